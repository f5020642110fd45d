"""A compiled function may leave out what it would ask of quantized models, and computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.model.guards import Guard
from tests.helpers import RELEASE, ready

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def network(bits: int) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    return ready(model, x, config=sq.QuantConfig(weight=sq.override(bits=bits))), x


def compiled(f: Callable[..., Any], kept: list[int] | None = None) -> Callable[..., Any]:
    def guards(entries: list[Guard]) -> list[bool]:
        chosen = sq.skip_guards_on_quantized(entries)
        if kept is not None:
            kept.append(sum(chosen))
        return chosen

    return torch.compile(f, fullgraph=True, backend="eager", options={"guard_filter_fn": guards})


@pytest.mark.skipif(RELEASE < (2, 13), reason="Dynamo makes a variable of bits that differ from one model to the next")
def test_a_program_of_one_model_never_serves_another() -> None:
    ((one, params, qparams), x), ((other, _, _), _) = network(8), network(2)
    assert not torch.equal(one.apply(params, qparams, x), other.apply(params, qparams, x))
    for q in (one, other, one):
        assert torch.equal(compiled(q.apply)(params, qparams, x), q.apply(params, qparams, x))


def test_what_the_user_changes_is_still_asked_for() -> None:
    (q, params, qparams), x = network(8)
    kept: list[int] = []
    scale = [1.0]
    f = compiled(lambda params, x: scale[0] * q.apply(params, qparams, x), kept)
    assert torch.equal(f(params, x), q.apply(params, qparams, x))
    scale[0] = 2.0
    assert torch.equal(f(params, x), 2.0 * q.apply(params, qparams, x))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in params.items()}
    assert f(leaves, x).requires_grad
    with torch.no_grad():
        assert not f(leaves, x).requires_grad
    assert len(kept) == 4
    assert f(params, x.double().float()).dtype == torch.float32
    assert len(kept) == 4


def test_most_guards_are_left_out() -> None:
    (q, params, qparams), x = network(8)
    kept: list[int] = []
    compiled(q.apply, kept)(params, qparams, x)
    every: list[int] = []
    torch._dynamo.reset()

    def count(entries: list[Guard]) -> list[bool]:
        every.append(len(entries))
        return [True] * len(entries)

    torch.compile(q.apply, fullgraph=True, backend="eager", options={"guard_filter_fn": count})(params, qparams, x)
    assert kept[0] < every[0] / 2


def test_an_engine_that_was_not_told_apart_keeps_its_guards() -> None:
    class Entry:
        def __init__(self, name: str, value: object = None) -> None:
            self.name, self.value = name, value

    (q, _, _), _ = network(8)
    names = ("self", "self.engine.plan", "self.engine.skeleton.module", "x.engine.plan")
    guards = [Entry("self.engine", q.engine), *map(Entry, names)]
    assert sq.skip_guards_on_quantized(guards) == [True] * 5
    known = [*guards, Entry("self.engine.identity")]
    assert sq.skip_guards_on_quantized(known) == [True, True, False, False, True, True]


def test_the_example_of_the_docstring_compiles() -> None:
    (q, params, qparams), x = network(8)
    fast = torch.compile(q.apply, options={"guard_filter_fn": sq.skip_guards_on_quantized})
    torch.testing.assert_close(fast(params, qparams, x), q.apply(params, qparams, x))
