"""Observers and fake quantizers used alone say what does not fit them; under transforms they are those of models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sophq_func as sq
from sophq_func.numerics.contracts import FAKE_QUANTIZERS

SCHEME, X = sq.QScheme(), torch.linspace(-1, 1, 12).reshape(3, 4)
OBSERVER, FIXED = sq.observer("minmax"), sq.fake_quantizer("fixed")
STATE = OBSERVER.update(OBSERVER.init(X, SCHEME), X, SCHEME)
QPARAMS = OBSERVER.qparams(STATE, SCHEME)
EMA = sq.observer("ema_minmax")
OF_ROWS = OBSERVER.init(X, sq.QScheme(granularity="per_channel"))

CALLS: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "a list": (OBSERVER.init, (X.tolist(), SCHEME), "'minmax'.init: x is no tensor"),
    "complex": (OBSERVER.update, (STATE, X.to(torch.complex64), SCHEME), "update: x is complex"),
    "sparse": (OBSERVER.update, (STATE, X.to_sparse(), SCHEME), "update: x is sparse"),
    "no scheme": (OBSERVER.init, (X, 8), "init: this is no scheme: got 8"),
    "no state": (OBSERVER.update, ((0, 1), X, SCHEME), "no state of it: got 'tuple', allowed MinMaxState"),
    "another state": (OBSERVER.merge, (STATE, EMA.init(X, SCHEME)), "no state of it: got 'EMAMinMaxState'"),
    "a number": (OBSERVER.update, (STATE._replace(lo=1.0), X, SCHEME), "lo is no tensor: got 1.0"),
    "another shape": (OBSERVER.update, (STATE._replace(hi=torch.ones(5)), X, SCHEME), r"hi does not fit: .*\(5,\)"),
    "another granularity": (OBSERVER.qparams, (OF_ROWS, SCHEME), "gives scales of another shape"),
    "an unknown keyword": (lambda *a: OBSERVER.init(*a, axis=1), (X, SCHEME), "keyword 'axis' is not known"),
    "qparams as a tuple": (FIXED.apply, (X, tuple(QPARAMS), SCHEME), "'fixed'.apply: qparams: this value is not QParams"),
    "a NaN scale": (FIXED.apply, (X, QPARAMS._replace(scale=torch.tensor(math.nan)), SCHEME), "the scale is not finite"),
    "an infinite scale": (FIXED.init, (QPARAMS._replace(scale=torch.tensor(math.inf)), X, SCHEME), "is not finite"),
    "a scale below zero": (FIXED.apply, (X, QPARAMS._replace(scale=-QPARAMS.scale), SCHEME), "a scale must be positive"),
    "noise as a text": (FIXED.apply, (X, QPARAMS, SCHEME, "x"), "no use for it"),
    "no tensor": (FIXED.apply, ("x", QPARAMS, SCHEME), "x is no tensor"),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_does_not_fit_is_named(name: str) -> None:
    function, args, said = CALLS[name]
    with pytest.raises((sq.StateError, sq.ConfigError), match=said):
        function(*args)


def test_under_transforms_the_functions_are_those_of_models() -> None:
    def quantized(x: Tensor, scale: Tensor) -> Tensor:
        return FIXED.apply(x, QPARAMS._replace(scale=scale), SCHEME)

    scales = torch.tensor([0.1, math.nan])
    mapped = torch.vmap(quantized, (None, 0))(X, scales)
    assert torch.equal(mapped[0], quantized(X, scales[0])) and bool(mapped[1].isnan().all())
    assert torch.func.grad(lambda x: quantized(x, scales[0]).sum())(X).isfinite().all()
    states = torch.vmap(lambda x: OBSERVER.update(OBSERVER.init(x, SCHEME), x, SCHEME))(X)
    assert states.lo.shape == (3,)


@pytest.mark.slow
def test_they_compile_into_one_graph() -> None:
    def run(x: Tensor) -> Tensor:
        state = OBSERVER.update(OBSERVER.init(x, SCHEME), x, SCHEME)
        return FIXED.apply(x, OBSERVER.qparams(state, SCHEME), SCHEME)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), run(X))


@pytest.mark.parametrize("size", [8, 20_000], ids=["composed", "at once"])
@pytest.mark.parametrize("name", FAKE_QUANTIZERS.names())
def test_float16_saturates_instead_of_becoming_infinite(name: str, size: int) -> None:
    """Half a step is added to the range: without a limit the largest codes lie beyond the largest float16."""
    largest = torch.finfo(torch.float16).max
    x = torch.linspace(-largest, largest, size).reshape(4, -1).half()
    fake = sq.fake_quantizer(name)
    for scheme in (sq.QScheme(bits=3), sq.QScheme(bits=4, symmetric=False, granularity="per_channel")):
        observed = OBSERVER.qparams(OBSERVER.update(OBSERVER.init(x, scheme), x, scheme), scheme)
        qparams = fake.init(observed, x, scheme)
        noise = torch.full(x.shape, 0.5) if fake.noise else None
        y = fake.apply(x, qparams, scheme, noise)
        assert y.dtype == x.dtype and bool(y.isfinite().all())
        if fake.encode is not None and fake.decode is not None and not fake.uncoded(qparams, scheme):
            assert bool(fake.decode(fake.encode(x, qparams, scheme), qparams, scheme, torch.float16).isfinite().all())
