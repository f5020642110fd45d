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
from tests.docs import pages
from tests.docs.pages import PAGES, ROOT, Program, programs

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
    """The package of that name, or those that an extra of ours installs."""
    extra = re.fullmatch(r"sophq-func\[([\w-]+)\]", need)
    return set[str]().union(*(packages(each, known) for each in known[extra[1]])) if extra else {need}


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_every_block_runs_when_it_is_pasted(program: Program, fresh: Fresh, tmp_path: Path) -> None:
    known = extras()
    missing = {name for need in program.needs for name in packages(need, known)} - fresh.installed
    if missing:
        pytest.skip(f"needs {', '.join(sorted(missing))}")
    wrong = fresh.run(program, tmp_path)
    assert not wrong, wrong


PAGE = """# A page

Two words, once, with the extra `onnx` and the package `torch`:

```python
a = 1
```

Prints.

```python title="x.py"
print(a + 1)  # 2
```

* Indented, with the packages `b`, `c-d` and `e`. It needs more:

  ```python
  assert a == 1
  ```
"""


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page that one can write."""
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    return tmp_path / "page.md"


def test_a_block_follows_the_set_up_of_its_page_and_needs_what_the_sentences_say(page: Path) -> None:
    page.write_text(PAGE)
    setup, one, two = pages.blocks(page)
    assert [str(program) for program in programs(page)] == ["page.md:12", "page.md:18"]
    assert all(program.blocks[0] == setup and setup.once for program in programs(page))
    assert setup.needs == {"sophq-func[onnx]", "torch"} and one.needs == two.needs == set()
    assert two.code == "assert a == 1\n" and two.before == "It needs more:"
    assert {"onnx", "onnxruntime"} < packages("sophq-func[demo]", extras())

    page.write_text(PAGE.replace("once, ", "").replace(". It needs more", ""))
    assert [len(program.blocks) for program in programs(page)] == [1, 1, 1]
    assert programs(page)[2].needs == {"b", "c-d", "e"}

    page.write_text(PAGE.partition("Prints.")[0])
    assert [str(program) for program in programs(page)] == ["page.md:6"]  # a set-up alone runs, too


WRONG = {
    "NameError: name 'torch' is not defined": "torch.ones(1)",
    "NameError: name 'json' is not defined": "json",
    "says '3'": "print(1 + 1)  # 3",
    "says 'about 2.4 rows'": "print(2.2, 'rows')  # about 2.4 rows",
    "says 'about 2 columns'": "print(2, 'rows')  # about 2 columns",
    "says 'about 2 rows'": "print(2, 3, 'rows')  # about 2 rows",
    "UserWarning: seen": "import warnings\nwarnings.warn('seen')",
    "ModuleNotFoundError: No module named 'tests'": "import tests",
    "ModuleNotFoundError: No module named 'digits'": "import digits",
    "SystemExit": "exit(0)",
    "status 9": "import os\nos.kill(os.getpid(), 9)",
}


@pytest.mark.slow
@pytest.mark.parametrize("message", WRONG)
def test_what_goes_wrong_for_a_reader_goes_wrong_here(message: str, fresh: Fresh, page: Path, tmp_path: Path) -> None:
    page.write_text(f"```python\n{WRONG[message]}\n```\n")
    (program,) = programs(page)
    assert message in fresh.run(program, tmp_path)


RIGHT = """print(1 + 1)  # 2
print(2.2, "rows")  # about 2.1 rows
print("a", "table", sep="\\n")  # all that there is
for i in range(2):
    print(i)  # which is no result of one statement
from pathlib import Path
Path("file").write_text("here")
"""


@pytest.mark.slow
def test_a_block_runs_in_the_folder_and_leaves_nothing_to_the_next(fresh: Fresh, page: Path, tmp_path: Path) -> None:
    page.write_text(f"```python\n{RIGHT}```\n\n```python\nPath\n```\n")
    one, two = programs(page)
    assert fresh.run(one, tmp_path) == "" and (tmp_path / "file").read_text() == "here"
    assert "NameError: name 'Path' is not defined" in fresh.run(two, tmp_path)
