"""The comparison at the end of an algorithm: what it decides, and how many runs that takes."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.algorithms._error import no_worse
from sophq_func.algorithms.contract import Start, begin
from tests.helpers import same


class Case(NamedTuple):
    """A layer that counts its runs in ``runs``; its output is off by 1 at the start, in four batches."""

    runs: list[int]
    start: Start
    batches: list[Tensor]
    targets: list[Tensor]

    def off(self, by: float) -> dict[str, Tensor]:
        """Params with which the output is off by ``by``."""
        return {**self.start.params, "bias": self.start.params["bias"] - 1 + by}

    def decides(self, by: float, made: dict[int, Tensor] | None = None) -> tuple[bool, int]:
        """Whether params that are off are taken, and in how many runs that is decided."""
        self.runs.clear()
        params, qparams = no_worse("test", self.start, self.off(by), {}, self.batches, self.targets, made)
        assert not qparams and isinstance(params, dict)
        taken = torch.equal(params["bias"], self.off(by)["bias"])
        same(params, self.off(by) if taken else self.start.params)
        return taken, len(self.runs)


@pytest.fixture
def case() -> Case:
    torch.manual_seed(0)
    runs: list[int] = []

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            runs.append(1)
            return super().forward(x)

    model, batches = Counted(4, 2).eval(), list(torch.randn(12, 4).split(3))
    q = sq.quantize(model, sq.QuantConfig(weight=None, activation=None), example_args=(batches[0],))
    params = sq.params_of(model)
    with torch.no_grad():
        targets = [model(x) - 1 for x in batches]
    return Case(runs, begin("test", q, params, {}), batches, targets)


@pytest.mark.parametrize(("by", "taken"), [(0.5, True), (0.99, True), (1.01, False), (2.0, False), (float("nan"), False)])
def test_what_is_worse_is_not_taken(case: Case, by: float, taken: bool) -> None:
    assert case.decides(by)[0] is taken


def test_the_start_is_run_no_longer_than_it_takes_to_be_worse(case: Case) -> None:
    assert case.decides(0.1) == (True, 4 + 1)
    assert case.decides(0.6) == (True, 4 + 2)
    assert case.decides(0.99) == (True, 4 + 4)


def test_an_output_that_is_known_spares_a_run_unless_the_two_are_close(case: Case) -> None:
    assert case.decides(0.1, {3: case.targets[3] + 0.1}) == (True, 3 + 1)
    # what is known says better by a little, and all runs say worse
    assert case.decides(1.01, {3: case.targets[3] + 0.8}) == (False, 3 + 4 + 4)
