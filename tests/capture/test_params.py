"""Params that do not fit the model are named at each door; the same tensors are looked at once."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.capture.params import check_of

Params = dict[str, Any]


class Net(nn.Module):
    """Layers with a norm between them, and a buffer of the model's own, which grows."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, x.detach().mean().reshape(1)])
        return self.second(self.norm(self.first(x)).relu())  # type: ignore[no-any-return]


@functools.cache
def ready() -> tuple[sq.Quantized, Params, dict[str, sq.QParams], Tensor]:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(3, 4)
    q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
    params = sq.params_of(model)
    return q, params, q.calibrate(params, [x], progress=False), x


BAD: dict[str, tuple[str, Any, str]] = {
    "a list": ("first.weight", [[1.0]], "params.'first.weight'. must be a tensor: got 'list'"),
    "a bias for all": ("first.bias", torch.zeros(1), r"it has another shape: got \(1,\), allowed \(8,\), as in the model"),
    "a scalar": ("second.bias", torch.zeros(()), r"got \(\), allowed \(2,\)"),
    "a batch": ("first.weight", torch.zeros(5, 8, 4), r"got \(5, 8, 4\).*torch.vmap"),
    "integers": ("first.weight", torch.zeros(8, 4, dtype=torch.int64), "no floating numbers: got torch.int64"),
    "complex": ("first.bias", torch.zeros(8, dtype=torch.complex64), "no floating numbers"),
    "a complex count": ("norm.num_batches_tracked", torch.tensor(1j), "it is complex"),
    "sparse": ("first.weight", torch.zeros(8, 4).to_sparse(), "it is sparse"),
    "meta": ("second.bias", torch.zeros(2, device="meta"), "where there are no numbers"),
    "a statistic": ("norm.running_mean", torch.zeros(4), r"got \(4,\), allowed \(8,\)"),
}

RUNS: dict[str, Callable[[sq.Quantized, Params, dict[str, sq.QParams], Tensor], Any]] = {
    "apply": lambda q, p, qp, x: q.apply(p, qp, x),
    "init": lambda q, p, qp, x: q.init(p),
    "calibrate": lambda q, p, qp, x: q.calibrate(p, [x], progress=False),
    "convert": lambda q, p, qp, x: sq.convert(q, p, qp),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("name", BAD)
def test_a_tensor_that_does_not_fit_is_named(name: str, run: Callable[..., Any]) -> None:
    parameter, value, said = BAD[name]
    q, params, qparams, x = ready()
    with pytest.raises(sq.StateError, match=said):
        run(q, {**params, parameter: value}, qparams, x)


def test_other_dtypes_devices_and_grown_buffers_are_right() -> None:
    q, params, qparams, x = ready()
    expected = q.apply(params, qparams, x)
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in params.items()}
    torch.testing.assert_close(q.apply(wide, qparams, x.double()), expected.double(), rtol=1e-2, atol=1e-2)
    empty = {name: tensor.to("meta") for name, tensor in params.items()}
    on_meta = {name: sq.QParams(own.scale.to("meta"), own.zero_point.to("meta"), {}) for name, own in qparams.items()}
    assert q.apply(empty, on_meta, x.to("meta")).is_meta
    _, after = q.apply_and_update(params, qparams, x)
    assert after["seen"].shape == (1,)
    assert torch.equal(q.apply(after, qparams, x), expected)


def test_functions_take_params_of_any_shape() -> None:
    params = {"w": torch.randn(3, 4)}
    q = sq.quantize(lambda p, x: x @ p["w"], sq.QuantConfig(weight=None), params=params, example_args=(torch.randn(2, 3),))
    qparams = q.calibrate(params, [torch.randn(2, 3)], progress=False)
    assert q.apply({"w": torch.randn(3, 7)}, qparams, torch.randn(2, 3)).shape == (2, 7)


def test_members_of_a_batch_are_right() -> None:
    q, params, qparams, x = ready()
    stacked = {name: torch.stack([tensor, tensor]) for name, tensor in params.items()}
    expected = q.apply(params, qparams, x)
    torch.testing.assert_close(torch.vmap(q.apply, (0, None, None))(stacked, qparams, x)[1], expected)


def test_tensors_are_looked_at_once_and_not_kept_alive() -> None:
    model = nn.Linear(2, 3)
    check = check_of(model, dict(model.named_parameters()), is_function=False)
    params = {name: torch.zeros_like(tensor) for name, tensor in model.named_parameters()}
    assert check.problems(params, "apply", "fix") == []
    params["bias"].resize_(1)  # what was seen is not looked at again
    assert check.problems(params, "apply", "fix") == []
    assert len(check.problems({**params, "bias": torch.zeros(1)}, "apply", "fix")) == 1
    alive = weakref.ref(params["weight"])
    del params
    gc.collect()
    assert alive() is None


def test_a_tensor_that_is_gone_is_not_taken_for_none() -> None:
    model = nn.Linear(2, 3, bias=False)
    check = check_of(model, dict(model.named_parameters()), is_function=False)
    assert check.problems({"weight": torch.zeros(3, 2)}, "apply", "fix") == []
    gc.collect()
    assert len(check.problems({"weight": None}, "apply", "fix")) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["copy", "pickle"])
def test_copies_look_anew(copied: Callable[[sq.Quantized], sq.Quantized]) -> None:
    q, params, qparams, x = ready()
    again = copied(q)
    assert torch.equal(again.apply(params, qparams, x), q.apply(params, qparams, x))
    with pytest.raises(sq.StateError, match="another shape"):
        again.apply({**params, "first.bias": torch.zeros(1)}, qparams, x)
