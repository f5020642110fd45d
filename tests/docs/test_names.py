"""The public names and the documentation speak of one another: neither has a name that the other lacks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

import sophq_func as sq
from sophq_func.config.chips import ChipName
from sophq_func.config.rules import QUANTMODES, QuantMode
from sophq_func.config.strategies import StrategyName
from sophq_func.numerics.granularity import SPELLINGS, GranularityName

ROOT = Path(__file__).parents[2]
TEXT = "\n".join(page.read_text() for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md")])
ROOMS = ("observers", "fake_quantize", "presets", "register", "testing", "export", "strategies", "formats")


def test_every_name_that_the_documentation_uses_is_public() -> None:
    assert set(re.findall(r"\bsq\.([A-Za-z]\w*)", TEXT)) <= set(sq.__all__)


RETURNED = frozenset("Coverage Fidelity HessianTrace Left Report ReportRow TopEigenvalue".split())
"""Classes that the page of a function describes by what is in them."""


@pytest.mark.parametrize("name", sorted(set(sq.__all__) - RETURNED))
def test_the_documentation_speaks_of_every_public_name(name: str) -> None:
    assert re.search(rf"\b{name}\b", TEXT)


@pytest.mark.parametrize("room", ROOMS)
def test_every_name_of_a_room_that_the_documentation_uses_is_there(room: str) -> None:
    for name in re.findall(rf"\bsq\.{room}\.([A-Za-z]\w*)", TEXT):
        assert hasattr(getattr(sq, room), name) or f'register.observer("{name}"' in TEXT, name


@pytest.mark.parametrize("room", ["presets", "register", "testing"])
def test_the_documentation_speaks_of_every_name_of_a_room(room: str) -> None:
    for name in getattr(sq, room).__all__:
        assert re.search(rf"\b{name}\b", TEXT), name


def test_type_checkers_know_the_names_of_the_library() -> None:
    assert set(get_args(ChipName)) == set(sq.CHIPS.spellings())
    assert set(get_args(StrategyName)) == set(sq.strategies.PLACEMENTS.spellings())
    assert get_args(QuantMode) == QUANTMODES
    assert get_args(GranularityName) == tuple(SPELLINGS)
