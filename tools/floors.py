"""Run the tests with the oldest versions of what the library needs, or with the newest.

    python tools/floors.py oldest --python python3.10       those that pyproject.toml names
    python tools/floors.py newest --python python3.13       those that pip finds
    python tools/floors.py oldest --environment FOLDER      in an environment that is there already, as it is

One case of each test runs, nothing slow; then what compiles, since that depends most on the version of torch. The exit code
is 1 where a test fails, or where an environment has other versions than those asked for.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]

RUNS = (
    ("--quick", "tests"),
    ("-m", "slow", "-k", "compil", "tests/contracts", "tests/capture", "tests/model"),
)
"""Arguments of pytest: two runs, since the first leaves out what is slow."""

# Dynamo of newer torch says so of early releases of Python 3.13, and the tests take a warning for an error.
QUIET = ("-W", "ignore:Guards may run slower on Python:RuntimeWarning")

VERSIONS = """
import importlib.metadata, sys
for name in sys.argv[1:]:
    print(f"{name}={importlib.metadata.version(name)}")
"""
"""A program that prints the installed version of each package that it is given."""


def floors(project: str) -> dict[str, str]:
    """The oldest version of each dependency, from the text of ``pyproject.toml``.

    Example:
      >>> floors('dependencies = ["torch>=2.9", "numpy>=1.26"]')
      {'torch': '2.9', 'numpy': '1.26'}
    """
    # Python 3.10, which shall run this, has no reader of TOML
    (listed,) = re.findall(r"^dependencies = (\[.*?\])$", project, flags=re.MULTILINE | re.DOTALL)
    pairs = (requirement.split(">=") for requirement in ast.literal_eval(listed))
    return dict(pairs)


def is_release(version: str, wanted: str) -> bool:
    """Whether an installed version is the wanted one, whatever it was built for.

    Example:
      >>> is_release("2.9.0+cu128", "2.9"), is_release("2.9.1", "2.9")
      (True, False)
    """
    numbers = version.partition("+")[0].split(".")
    expected = wanted.split(".")
    return numbers == expected + ["0"] * (len(numbers) - len(expected))


def install(python: str, environment: Path, pins: Sequence[str]) -> None:
    """Make an environment of an interpreter, with the library and all that its tests need, at the versions pinned."""
    subprocess.run([python, "-m", "venv", str(environment)], check=True)
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *pins, "--editable", f"{ROOT}[test,demo]"], check=True)


def installed(environment: Path, names: Sequence[str]) -> dict[str, str]:
    """The versions of packages in an environment."""
    command = [str(environment / "bin" / "python"), "-c", VERSIONS, *names]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(line.split("=") for line in printed.split())


def wrong(found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """What an environment has instead of the wanted versions, a line for each.

    Example:
      >>> wrong({"torch": "2.13.0", "numpy": "1.26.0"}, {"torch": "2.9", "numpy": "1.26"})
      ['torch is 2.13.0, not 2.9']
    """
    return [f"{name} is {found[name]}, not {floor}" for name, floor in wanted.items() if not is_release(found[name], floor)]


def passes(environment: Path, arguments: Sequence[str]) -> bool:
    """Run tests in an environment, with the library of this folder."""
    command = [str(environment / "bin" / "python"), "-m", "pytest", "-q", "-p", "no:cacheprovider", *QUIET, *arguments]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=one_thread, check=False).returncode == 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tests; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("oldest", "newest"), help="versions of torch, numpy, optree and safetensors")
    parser.add_argument("--python", default=sys.executable, help="the interpreter; default: this one")
    parser.add_argument("--environment", type=Path, help="a virtual environment to use; default: a new one")
    options, arguments = parser.parse_known_args(argv)
    lowest = floors((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = lowest if options.which == "oldest" else {}
    with tempfile.TemporaryDirectory() as folder:
        environment = options.environment or Path(folder)
        if options.environment is None:
            install(options.python, environment, [f"{name}=={version}" for name, version in wanted.items()])
        found = installed(environment, list(lowest))
        print(*(f"{name} {version}" for name, version in found.items()), sep=", ", flush=True)
        problems = wrong(found, wanted)
        print(*problems, sep="\n", end="\n" * bool(problems))
        # both run, whatever becomes of the first
        outcomes = [] if problems else [passes(environment, [*run, *arguments]) for run in RUNS]
    return 0 if outcomes and all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
