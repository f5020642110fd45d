"""What each unit reads and makes: the same whether its calls are handed on or the model is run up to it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.algorithms.contract import Start, begin
from sophq_func.algorithms.units import Sample, Stream, units_of
from tests.helpers import Block, Inplace, same


class Twice(nn.Module):
    """A block that is called twice before another one reads what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(self.one(x)))


def started(model: nn.Module) -> tuple[Start, list[Tensor]]:
    """What an algorithm starts from, and batches."""
    torch.manual_seed(0)
    model, batches = model.eval(), list(torch.randn(12, 4).split(6))
    config = sq.QuantConfig(strategy="Layers", weight=sq.override(bits=3, fake_quantize="fixed"))
    q = sq.quantize(model, config, example_args=(batches[0],))
    params = sq.params_of(model)
    return begin("test", q, params, q.calibrate(params, batches, progress=False)), batches


def each(start: Start, batches: list[Tensor], paths: str | Sequence[str], goes_on: bool) -> tuple[list[list[Sample]], int]:
    """The samples of all units, whose weights are doubled as soon as they are done; how many units are handed on."""
    units = units_of("test", start, paths, start.weights)
    stream, params = Stream(start, start.params, batches, units), dict(start.params)
    found = []
    for unit in units:
        found.append(stream.samples(unit, params, start.qparams))
        for weight in unit.weights.values():
            params[weight.site.parameter] = 2 * params[weight.site.parameter]
        if goes_on:
            stream.leave(unit, params, start.qparams)
    return found, len(stream._wires)


@pytest.mark.parametrize("kind", ["block", "layer"])
@pytest.mark.parametrize(
    ("model", "handed_on"),
    [(nn.Sequential(Block(), Block(), Block()), 2), (Inplace(), 0), (Twice(), 0)],
    ids=["chain", "inplace", "twice"],
)
def test_what_is_handed_on_is_what_a_run_of_the_model_shows(kind: str, model: nn.Module, handed_on: int) -> None:
    start, batches = started(model)
    found, wires = each(start, batches, kind, goes_on=True)
    expected, _ = each(start, batches, kind, goes_on=False)
    same(found, expected)
    if kind == "block":
        assert wires == handed_on
