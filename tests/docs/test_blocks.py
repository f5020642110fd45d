"""Every block of Python in the README and the documentation runs as a reader pastes it: see :mod:`tests.docs.pages`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sophq_func as sq
from tests.docs.pages import PAGES, ROOT, Block, Program, blocks, programs

SERVER = (Path(__file__).parent / "interpreter.py").read_text()
PROGRAMS = [program for page in PAGES for program in programs(page)]


class Fresh:
    """Interpreters that know nothing of this one: one new process for each program.

    ``PAGES_PYTHON`` names another interpreter, such as that of an environment into which a wheel was installed. Without it
    this one is taken, and finds the package that the tests import, alone, in a folder on its path.
    """

    def __init__(self, folder: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        python = environment.get("PAGES_PYTHON")
        if not python:
            (folder / "sophq_func").symlink_to(Path(sq.__file__).parent)
            environment["PYTHONPATH"] = str(folder)
        self.process = subprocess.Popen(
            [python or sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.installed = frozenset(self.answer())

    def answer(self) -> list[str] | str:
        """The next line of the server."""
        assert self.process.stdout
        answer: list[str] | str = json.loads(self.process.stdout.readline())
        return answer

    def run(self, program: Program, folder: Path) -> list[str] | str:
        """What goes wrong with a program in a folder; "" if nothing does."""
        parts = [(str(block.page), block.line, block.code) for block in program.blocks]
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"folder": str(folder), "blocks": parts}) + "\n")
        self.process.stdin.flush()
        return self.answer()


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fresh]:
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    server = Fresh(tmp_path_factory.mktemp("installed"))
    yield server
    with server.process:
        assert server.process.stdin
        server.process.stdin.close()


def extras() -> dict[str, set[str]]:
    """What each extra installs."""
    text = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    lists = dict(re.findall(r"^([\w-]+) = (\[.*?\])$", text, flags=re.MULTILINE | re.DOTALL))
    return {name: set(re.findall(r'"([\w-]+(?:\[\w+\])?)', listed)) for name, listed in lists.items()}


def packages(need: str, known: dict[str, set[str]]) -> set[str]:
    """The packages that an extra means, or the one of that name."""
    own = re.fullmatch(r"sophq-func\[(\w+)\]", need)
    name = own[1] if own else need
    return set[str]().union(*(packages(each, known) for each in known[name])) if name in known else {name}


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_every_block_runs_when_it_is_pasted(program: Program, fresh: Fresh, tmp_path: Path) -> None:
    known = extras()
    missing = {name for need in program.needs for name in packages(need, known)} - fresh.installed
    if missing:
        pytest.skip(f"needs {', '.join(sorted(missing))}")
    wrong = fresh.run(program, tmp_path)
    assert not wrong, wrong
