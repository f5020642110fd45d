"""The page of observers, fake quantizers and number formats lists all of them, as the code has them."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import sophq_func as sq
from sophq_func.numerics import formats
from sophq_func.numerics.codebooks import CODEBOOKS
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, OBSERVERS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "numerics.md").read_text()
FIX = "run: python benchmarks/numerics_page.py (--keep-costs leaves the measured figures as they are)"
REGISTRIES = {"observer": OBSERVERS, "fake quantizer": FAKE_QUANTIZERS}
PIECES = [(kind, name) for kind, registry in REGISTRIES.items() for name in registry]
CONSTANTS = [name for name, value in vars(formats).items() if isinstance(value, formats.Integer | formats.Float)]
MAKERS = (formats.int_, formats.float_, formats.codebook)
over_pieces = pytest.mark.parametrize(("kind", "name"), PIECES)


def section(heading: str) -> str:
    """What stands under a heading, up to the next one."""
    found = re.search(rf"^### {re.escape(heading)}\n(.*?)(?=^##|\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert found, f"docs/numerics.md has no section {heading}; {FIX}"
    return found[1]


def rendered() -> ModuleType:
    """The script that renders docstrings; it stands outside of all packages."""
    path = ROOT / "benchmarks" / "numerics_text.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@over_pieces
def test_every_piece_is_on_the_page_with_all_its_names_and_options(kind: str, name: str) -> None:
    registry, text = REGISTRIES[kind], section(f"`{name}` {kind}")
    for alias in set(registry.aliases(name)) - {name}:
        assert f"`{alias}`" in text, f"{alias}; {FIX}"
    for option, value in registry.spec(name).options:
        assert f"`{option}={value!r}`" in text, f"{option}; {FIX}"
    for option in registry.options(name):
        assert f"`{option}" in text, f"{option}; {FIX}"


@over_pieces
def test_the_page_says_what_the_docstring_says(kind: str, name: str) -> None:
    assert rendered().body(name, kind) in PAGE, f"the text on {name} is not that of its docstring; {FIX}"


@over_pieces
def test_the_table_of_choices_leads_to_every_piece(kind: str, name: str) -> None:
    anchor = f"{name}-{kind}".replace(" ", "-")
    assert re.search(rf"^\| \[`{name}`\]\(#{anchor}\) \| \S", PAGE, flags=re.MULTILINE), f"{name}; {FIX}"


@pytest.mark.parametrize("name", [*CONSTANTS, *CODEBOOKS])
def test_every_format_is_on_the_page(name: str) -> None:
    value = CODEBOOKS[name] if name in CODEBOOKS else getattr(formats, name)
    assert re.search(rf"^\| `{name}` \| {len(value.values())} \|", PAGE, flags=re.MULTILINE), f"{name}; {FIX}"


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_every_maker_of_formats_is_on_the_page_with_all_its_options(maker: object) -> None:
    text = section(f"`{maker.__name__}` format")  # type: ignore[attr-defined]
    for option in inspect.signature(maker).parameters:  # type: ignore[arg-type]
        assert f"* `{option}" in text, f"{option}; {FIX}"


def test_pictures_are_those_that_the_pages_show() -> None:
    pages = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    shown = {picture for page in pages for picture in re.findall(r"!\[[^\]]+\]\((pictures/[^)]+)\)", page)}
    there = {f"pictures/{path.name}" for path in (ROOT / "docs" / "pictures").iterdir()}
    assert shown == there, f"{shown ^ there}; {FIX}"
    assert {f"pictures/{name}-quantizer.png" for name in FAKE_QUANTIZERS} <= shown, FIX


def test_every_link_inside_the_page_leads_to_a_heading() -> None:
    headings = re.findall(r"^#+ (.*)$", PAGE, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert len(anchors) == len(headings)
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= anchors


def test_states_and_options_are_read_off_what_is_registered() -> None:
    page = rendered()
    assert page.merges("minmax") and not page.merges("ema_minmax")
    assert page.parse(sq.observers.mse.__doc__).options == {"p": "exponent of the error, > 0."}
    assert "`hessian`, which you give" in page.body("gptq", "fake quantizer")


def test_the_page_of_speed_shows_the_figures_that_were_measured() -> None:
    data = json.loads((ROOT / "benchmarks" / "speed.json").read_text())
    text = (ROOT / "docs" / "speed.md").read_text()
    for label, row in data["rows"].items():
        for figures in row.get("ratios", {}).values():
            assert f"\n## {label}\n" in text
            assert [name for name, ratio in figures.items() if f"{ratio:.2f}" not in text] == []
