"""Install a wheel in fresh environments, one for each Python, and use it there as a stranger would.

    python -m build
    python tools/wheel.py dist/*.whl --constraint constraints.txt       with all dependencies, torch included
    python tools/wheel.py dist/*.whl --no-deps --python python3.10 python3.13

With dependencies, a model is quantized, and the script ``sophq`` looks at its plan. Without them, every file is compiled,
and the files of the lowest room are imported that need nothing but Python. The exit code is 1 where something fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

USED = """
import torch
import sophq_func as sq

model, x = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)).eval(), torch.randn(5, 4)
q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
params = sq.params_of(model)
qparams = q.calibrate(params, [x])
error = (q.apply(params, qparams, x) - model(x)).abs().max()
assert 0 < error < 0.1, error
open("plan.json", "w").write(q.plan.to_json())
print("sophq_func", sq.__version__, "with torch", torch.__version__, "at", sq.__file__)
"""
"""A first program."""

ALONE = """
import compileall, importlib, importlib.util, pathlib, sys, types

root = pathlib.Path(importlib.util.find_spec("sophq_func").origin).parent
assert compileall.compile_dir(str(root), quiet=1, force=True), "a file cannot be compiled"

# empty packages in the place of those whose first lines import torch
for folder in (root, root / "core"):
    package = types.ModuleType("sophq_func" if folder == root else "sophq_func.core")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package

imported = []
for path in sorted((root / "core").glob("[a-z]*.py")):
    try:
        importlib.import_module(f"sophq_func.core.{path.stem}")
        imported.append(path.stem)
    except ModuleNotFoundError as error:
        assert error.name.partition(".")[0] in ("torch", "numpy", "optree", "safetensors"), error
assert "errors" in imported, imported
print("Python", sys.version.split()[0], "compiles all files, and imports of core:", *imported)
"""
"""What can be checked where no torch can be had."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check a wheel; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="the file, as python -m build writes it")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters; default: this one")
    parser.add_argument("--no-deps", action="store_true", help="install no dependencies, and check what needs none")
    parser.add_argument("--constraint", type=Path, help="versions of the dependencies, as pip takes them")
    options = parser.parse_args(argv)
    choice = ["--no-deps"] if options.no_deps else []
    if options.constraint:
        choice += ["--constraint", str(options.constraint.resolve(strict=True))]
    failed = 0
    for python in options.python:
        print(f"== {python}", flush=True)
        try:
            check(python, options.wheel.resolve(strict=True), choice)
        except subprocess.CalledProcessError as error:
            print(f"failed with exit code {error.returncode}: {Path(error.cmd[0]).name} {error.cmd[1]}")
            failed += 1
    return 1 if failed else 0


def check(python: str, wheel: Path, choice: Sequence[str]) -> None:
    """Install a wheel in a fresh environment, and use it from an empty folder.

    Args:
      python: the interpreter.
      wheel: an absolute path.
      choice: options of pip that say which dependencies are installed.

    Raises:
      subprocess.CalledProcessError: a step fails; it has said why.
    """
    with tempfile.TemporaryDirectory() as temporary:
        home, empty = Path(temporary) / "env", Path(temporary) / "empty"
        empty.mkdir()
        _run([python, "-m", "venv", home], empty)
        scripts = home / ("Scripts" if os.name == "nt" else "bin")
        install: list[str | Path] = [scripts / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([*install, *choice, wheel], empty)
        is_alone = "--no-deps" in choice
        # isolated: neither the current folder nor the user's own packages are on the path
        _run([scripts / "python", "-I", "-c", ALONE if is_alone else USED], empty)
        if not is_alone:
            _run([scripts / "sophq", "--version"], empty)
            _run([scripts / "sophq", "inspect", "plan.json", "--columns", "quantizer,grid"], empty)


def _run(command: Sequence[str | Path], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True)


if __name__ == "__main__":
    sys.exit(main())
