"""Observer states that are not those of the plan are named, whatever takes them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.core.pytree import tree_map

WEIGHT, INPUT = "weight_fake_quant", "input.post_act_fake_quantizer"


@functools.cache
def ready() -> tuple[sq.Quantized, dict[str, Tensor], dict[str, Any], Tensor]:
    model, x = nn.Linear(4, 3).eval(), torch.linspace(-1, 1, 8).reshape(2, 4)
    q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
    params = sq.params_of(model)
    _, ostate = q.observe(params, q.init(params), x)
    return q, params, ostate, x


BAD: dict[str, tuple[str, Any, str]] = {
    "a number": (INPUT, 1.0, "lo is no tensor: got 1.0"),
    "a text": (WEIGHT, "x", "lo is no tensor: got 'x'"),
    "another shape": (
        INPUT,
        torch.zeros(5),
        r"lo has another shape or dtype: got 'torch.float32 \(5,\)', allowed floating \(\)",
    ),
    "a scalar for channels": (WEIGHT, torch.zeros(()), r"allowed floating \(3,\)"),
    "integers": (INPUT, torch.zeros((), dtype=torch.int32), "got 'torch.int32"),
    "complex": (INPUT, torch.zeros((), dtype=torch.complex64), "lo is complex"),
    "sparse": (WEIGHT, torch.zeros(3).to_sparse(), "lo is sparse"),
    "meta": (INPUT, torch.zeros((), device="meta"), "on another device"),
}

TAKES: dict[str, Callable[[sq.Quantized, dict[str, Tensor], dict[str, Any], Tensor], Any]] = {
    "init": lambda q, p, o, x: q.init(p, o),
    "observe": lambda q, p, o, x: q.observe(p, o, x),
    "observe_quantized": lambda q, p, o, x: q.observe_quantized(p, o, q.calibrate(p, [x], progress=False), x),
    "qparams": lambda q, p, o, x: q.qparams(p, o),
}


@pytest.mark.parametrize("take", TAKES.values(), ids=TAKES)
@pytest.mark.parametrize("name", BAD)
def test_a_field_that_does_not_fit_is_named(name: str, take: Callable[..., Any]) -> None:
    quantizer, value, said = BAD[name]
    q, params, ostate, x = ready()
    first, *rest = ostate[quantizer]._fields
    fields = {first: value} if name != "meta" else {rest[0]: value}
    said = said if name != "meta" else said.replace("lo", rest[0])
    with pytest.raises(sq.StateError, match=rf"(?s)ostate of {quantizer}.*{said}"):
        take(q, params, {**ostate, quantizer: ostate[quantizer]._replace(**fields)}, x)


def test_wide_states_and_members_of_a_batch_are_right() -> None:
    q, params, ostate, x = ready()
    wide = tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, ostate)
    assert q.qparams(params, wide).keys() == q.qparams(params, ostate).keys()
    mapped = torch.vmap(lambda x: q.observe(params, ostate, x[None])[1])(x)
    assert all(tensor.shape[0] == 2 for state in mapped.values() for tensor in state)
