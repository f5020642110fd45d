"""What the site is made from: its reference has every public name, its links lead somewhere, its navigation every page."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

import sophq_func as sq

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools" / "pages"
NAVIGATION = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
REPOSITORY = "https://github.com/owner/name"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tools that need nothing but Python, as modules of one namespace."""
    monkeypatch.syspath_prepend(TOOLS)
    found = ModuleType("tool")
    for name in ("links", "llms", "reference", "tutorials"):
        vars(found)[name] = importlib.import_module(name)
        monkeypatch.delitem(sys.modules, name)
    return found


def test_every_public_name_has_one_entry_in_the_reference(tool: ModuleType) -> None:
    pages = tool.reference.pages(sq)
    shown = Counter(re.findall(r"^::: sophq_func\.(\S+)$", "\n".join(pages.values()), flags=re.MULTILINE))
    also = Counter(
        re.findall(r"`sq\.([\w.]+)`", " ".join(re.findall(r"^Also .*$", "\n".join(pages.values()), flags=re.MULTILINE)))
    )
    public = [name for name in tool.reference.names(sq) if not isinstance(getattr(sq, name), ModuleType)]
    modules = {name: getattr(sq, name) for name in tool.reference.names(sq) if name not in public}
    assert {"observers", "fake_quantize", "export", "patterns", "rules"} <= set(modules)
    public += [f"{name}.{inner}" for name, module in modules.items() for inner in tool.reference.names(module)]
    assert len(public) > 100
    assert {name: shown[name] + also[name] for name in public} == dict.fromkeys(public, 1)
    assert set(shown.values()) == {1}


def test_the_index_of_the_reference_links_to_every_entry(tool: ModuleType) -> None:
    pages = tool.reference.pages(sq)
    links = set(re.findall(r"\]\((\w+\.md)#sophq_func\.([\w.]+)\)", pages["index.md"]))
    entries = {
        (page, name)
        for page, text in pages.items()
        for name in re.findall(r"^::: sophq_func\.(\S+)$", text, flags=re.MULTILINE)
    }
    assert links == entries


def test_the_reference_follows_what_is_public(tool: ModuleType) -> None:
    package, module = ModuleType("package"), ModuleType("package.room")

    def f() -> None:
        """Do it."""

    f.__module__ = "package.room"
    vars(package).update(f=f, again=f, room=module, hidden=f, one=1, __all__=["again", "f", "one", "room"])
    vars(module).update(f=f, g=str, also=1, __all__=["f", "g", "also"])
    found = {entry.name: entry for entry in tool.reference.entries(package)}
    assert set(found) == {"f", "one", "room.g", "room.also"}
    assert found["f"].aliases == ("again", "room.f")
    assert found["f"].room == found["room.g"].room == "room"
    assert found["f"].summary == "Do it."


@pytest.mark.parametrize("name", ["links", "llms", "reference", "tutorials"])
def test_the_examples_of_the_tools_are_true(tool: ModuleType, name: str) -> None:
    assert doctest.testmod(vars(tool)[name]).failed == 0


@pytest.mark.parametrize(
    ("written_at", "shown_at", "link", "expected"),
    [
        ("README.md", "index.md", "docs/rules.md#where", "rules.md#where"),
        ("README.md", "index.md", "examples/demo.py", f"{REPOSITORY}/blob/main/examples/demo.py"),
        ("README.md", "index.md", "https://arxiv.org/abs/1902.08153", "https://arxiv.org/abs/1902.08153"),
        ("docs/rules.md", "rules.md", "../README.md", "index.md"),
        ("docs/rules.md", "rules.md", "plan.png", "plan.png"),
        ("docs/how-to/which.md", "how-to/which.md", "../numerics.md#minmax-observer", "../numerics.md#minmax-observer"),
        ("docs/how-to/index.md", "how-to/index.md", "../tutorials/training.py", "../tutorials/training.md"),
        ("docs/tutorials/training.md", "tutorials/training.md", "research.py", "research.md"),
        ("docs/rules.md", "rules.md", "../nowhere.py", "../nowhere.py"),
        ("docs/rules.md", "rules.md", f"{REPOSITORY}/blob/main/docs/errors.md", "errors.md"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(
    tool: ModuleType, written_at: str, shown_at: str, link: str, expected: str
) -> None:
    text = f"see [this]({link}), and not `[this]({link})`\n```\n[this]({link})\n```\n"
    resolved = tool.links.resolved(text, written_at, shown_at, ROOT, REPOSITORY)
    assert resolved == text.replace(f"see [this]({link})", f"see [this]({expected})")


def test_the_navigation_names_pages_that_there_are_and_wildcards_for_the_others(tool: ModuleType) -> None:
    named = re.findall(r"(\S+\.md)", NAVIGATION)
    made = {*tool.links.PAGES.values(), *(f"reference/{name}" for name in tool.reference.pages(sq))}
    made |= {f"tutorials/{path.stem}.md" for path in (ROOT / "docs" / "tutorials").glob("*.py")}
    written = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    for page in named:
        assert "*" in page or page in made | written, page
    folders = {str(Path(page.strip('"')).parent) for page in named if "*" in page}
    for page in made | written:
        assert page in named or str(Path(page).parent) in folders, page


def test_cells_are_read_run_and_shown(tool: ModuleType) -> None:
    cells = tool.tutorials.read("# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nx = 1\nprint(x)\nx + 1\n\n# %%\nx = 3\n")
    results = list(tool.tutorials.run(cells, names := {}))
    assert names["x"] == 3
    assert [tuple(result) for result in results] == [("", "", ()), ("1", "2", ()), ("", "", ())]
    text, pictures = tool.tutorials.page("name", cells, results)
    assert text.startswith("# Title\n\nText.\n\n```python\nx = 1\nprint(x)\nx + 1\n```\n\n```{ .text .output }\n1\n2\n```\n")
    assert pictures == {}
    notebook = json.loads(tool.tutorials.notebook(cells, results))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert [cell["cell_type"] for cell in notebook["cells"]] == ["markdown", "code", "code"]
    assert [output["output_type"] for output in notebook["cells"][1]["outputs"]] == ["stream", "execute_result"]
    assert len({cell["id"] for cell in notebook["cells"]}) == 3


def test_the_figure_of_a_cell_is_its_picture(tool: ModuleType) -> None:
    pytest.importorskip("matplotlib").use("agg")
    cells = tool.tutorials.read("# %%\nimport matplotlib.pyplot as plt\n_ = plt.plot([1, 2])\n")
    results = list(tool.tutorials.run(cells, {}))
    text, pictures = tool.tutorials.page("name", cells, results)
    assert pictures["name-1.png"].startswith(b"\x89PNG")
    assert "![What the cell above draws](name-1.png)" in text


def test_llms_txt_lists_each_page_in_its_section(tool: ModuleType) -> None:
    entry = tool.llms.Entry
    pages = [entry("A", "One", "one.html", "# One\n\nFirst. Second."), entry("B", "Two", "b/two.html", "# Two\n")]
    text = tool.llms.text("name", "What it is.", pages)
    assert text == "# name\n\n> What it is.\n\n## A\n\n* [One](one.html): First.\n\n## B\n\n* [Two](b/two.html)\n"
