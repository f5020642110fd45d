"""Whole models through every transform, cell by cell of ``docs/composition.md``; and that page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.composition import ROWS, SUBJECTS, Row, Subject, compilers
from tests.composition.page import made

OTHER_ORDERS = {("functionalize", "convnet"), ("make_fx", "convnet")}
"""Cells that may take sums in another order than eager does; those that compile, or trace more, take too long."""

CELLS = [(row, name) for row in ROWS.values() for name in SUBJECTS]


def cell(row: Row, name: str, *way: str) -> Any:
    """A case; slow where it compiles, or where the model is a whole ResNet or BERT."""
    marks = [pytest.mark.slow] if row.check.__module__ == compilers.__name__ or name != "convnet" else []
    marks += [pytest.mark.isa] if (row.name, name) in OTHER_ORDERS and name not in row.limits else []
    return pytest.param(row, name, *way, id="-".join((row.name, name, *way)), marks=marks)


PLAIN = [cell(row, name) for row, name in CELLS if name not in row.limits]
LIMITED = [cell(row, name) for row, name in CELLS if name in row.limits]
AROUND = [cell(row, name, way) for row, name in CELLS if name in row.limits for way in row.limits[name].ways]
pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),  # linearize, of any function
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),  # fused attention under vmap
]


@pytest.fixture(scope="module")
def subjects() -> Iterator[dict[str, Subject]]:
    yield {name: make() for name, make in SUBJECTS.items()}


@pytest.mark.parametrize(("row", "name"), PLAIN)
def test_a_cell_agrees(row: Row, name: str, subjects: dict[str, Subject]) -> None:
    if row.needs_cuda and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    row.check(subjects[name])


@pytest.mark.parametrize(("row", "name"), LIMITED)
def test_a_limit_is_this_error(row: Row, name: str, subjects: dict[str, Subject]) -> None:
    limit = row.limits[name]
    with pytest.raises(limit.error, match=re.escape(limit.message)) as caught:
        row.check(subjects[name])
    assert type(caught.value) is limit.error


@pytest.mark.parametrize(("row", "name", "way"), AROUND)
def test_a_way_around_a_limit_agrees(row: Row, name: str, way: str, subjects: dict[str, Subject]) -> None:
    row.limits[name].ways[way](row.check, subjects[name])


def test_linearize_of_torch_adds_up_what_is_written_in_place() -> None:
    """The limit of ``linearize`` is not one of quantized models."""

    def f(x: Tensor) -> Tensor:
        y = torch.zeros(2).clone()
        y += x.sin()
        return y.square().sum()

    x = torch.ones(2)
    _, push = torch.func.linearize(f, x)
    _, functional = torch.func.linearize(torch.func.functionalize(f), x)
    first, second = push(x), push(x)
    torch.testing.assert_close(first, (2 * x.sin() * x.cos()).sum())
    torch.testing.assert_close(second, 2 * first)
    torch.testing.assert_close((functional(x), functional(x)), (first, first))


def test_the_page_has_the_rows_of_the_registry() -> None:
    text = (Path(__file__).parents[2] / "docs" / "composition.md").read_text()
    assert made() in text, "run: python benchmarks/composition_page.py"
    assert len(re.findall(r"^\| .* \|$", made(), flags=re.MULTILINE)) == len(ROWS) + 1
    assert set(re.findall(r"^\[\^([\w-]+)\]: ", made(), flags=re.MULTILINE)) == set(re.findall(r" \[\^([\w-]+)\] ", made()))
