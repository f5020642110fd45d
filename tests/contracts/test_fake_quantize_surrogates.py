"""Gradients against the surrogate that each fake quantizer states, first by finite differences, then to second order.

A surrogate is written down once more, in float64, with its constants frozen at one place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sophq_func as sq
from sophq_func.numerics.contracts import FAKE_QUANTIZERS
from sophq_func.numerics.layout import expand
from tests.contracts import SHAPE, over_static_schemes, sample
from tests.contracts.test_fake_quantize_laws import floating, made, put, ready

Leaves = dict[str, Tensor]
Surrogate = Callable[[Tensor, Leaves], Tensor]


class Place:
    """Where a surrogate is frozen: the tensor, the qparams, and the codes there."""

    def __init__(self, name: str, scheme: sq.QScheme, seed: int) -> None:
        self.scheme, (self.fq, found) = scheme, ready(name, scheme, seed, **self.options(name))
        self.x = sample(seed + 1, dtype=torch.float64)
        shift = 0.3 if name == "lsq_plus" else 0.0
        self.leaves = {k: v.double() + (shift if k == "zero_point" else 0) for k, v in floating(found).items()}
        self.qparams = put(found, self.leaves)
        self.y = self.fq.apply(self.x, self.qparams, scheme)

    @staticmethod
    def options(name: str) -> dict[str, Any]:
        return {"use_grad_scaling": False} if name in ("learnable", "lsq_plus") else {}

    def spread(self, value: Tensor) -> Tensor:
        return expand(value, self.x, self.scheme.granularity)

    @property
    def zero(self) -> Tensor | int:
        return 0 if self.scheme.symmetric else self.spread(self.qparams.zero_point.double())

    @property
    def inside(self) -> Tensor:
        """Whether the rounded code is on the grid; the value is that of a code that is strictly inside, or decides."""
        found = self.fq.grid(self.qparams, self.scheme)
        ratio = self.x / self.spread(found.scale)
        real = self.zero if isinstance(self.zero, int) else self.spread(found.zero_point.double())
        code = (ratio + real).round()
        return (code >= self.scheme.qmin) & (code <= self.scheme.qmax)

    def check(self, surrogate: Surrogate, flowing: tuple[str, ...]) -> None:
        """The value, every first derivative by central differences, every second one by differentiation."""
        torch.testing.assert_close(surrogate(self.x, self.leaves), self.y, rtol=1e-9, atol=1e-12)

        def f(x: Tensor, leaves: Leaves) -> Tensor:
            return self.fq.apply(x, put(self.qparams, leaves), self.scheme)

        actual = torch.func.jacrev(f, argnums=(0, 1))(self.x, self.leaves)
        expected = differences(lambda x: surrogate(x, self.leaves), self.x)
        torch.testing.assert_close(actual[0], expected, rtol=1e-6, atol=1e-7)
        for name, leaf in self.leaves.items():
            slope = differences(lambda v, n=name: surrogate(self.x, self.leaves | {n: v}), leaf)
            wanted = slope if name in flowing else torch.zeros_like(slope)
            torch.testing.assert_close(actual[1][name], wanted, rtol=1e-6, atol=1e-7)
        weights = torch.arange(1.0, self.x.numel() + 1, dtype=torch.float64).reshape(SHAPE)
        mine, stated = (self._second(g, weights, flowing) for g in (f, surrogate))
        torch.testing.assert_close(mine, stated, rtol=1e-8, atol=1e-8)

    def _second(self, g: Surrogate, weights: Tensor, flowing: tuple[str, ...]) -> Any:
        chosen = {name: leaf for name, leaf in self.leaves.items() if name in flowing}

        def loss(x: Tensor, leaves: Leaves) -> Tensor:
            return (weights * g(x, self.leaves | leaves).square()).sum()

        return torch.func.hessian(loss, argnums=(0, 1))(self.x, chosen)


def differences(f: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    """The Jacobian of ``f`` by central differences."""
    columns = []
    for i in range(at.numel()):
        move = torch.zeros(at.numel(), dtype=at.dtype)
        move[i] = step
        columns.append((f(at + move.reshape(at.shape)) - f(at - move.reshape(at.shape))) / (2 * step))
    return torch.stack(columns, -1).reshape(*SHAPE, *at.shape)


def uniform_grid(place: Place, scale: Callable[[Leaves], Tensor]) -> Surrogate:
    """``s where(inside, x / s + c, bound - z)``, ``c`` what makes it the value here."""
    inside = place.inside
    here = place.spread(scale(place.leaves))
    constant = place.y / here - place.x / here
    bound = torch.where(place.x / here + place.zero > place.scheme.qmax, place.scheme.qmax, place.scheme.qmin)

    def surrogate(x: Tensor, leaves: Leaves) -> Tensor:
        s = place.spread(scale(leaves))
        zero = place.spread(leaves["zero_point"]) if "zero_point" in leaves else place.zero
        return s * torch.where(inside, x / s + constant, bound - zero)

    return surrogate


@over_static_schemes
@pytest.mark.parametrize(("name", "flowing"), [("lsq_plus", ("scale", "zero_point")), ("qdrop", ("scale",)), ("dsq", ())])
def test_learned_steps(name: str, flowing: tuple[str, ...], scheme: sq.QScheme) -> None:
    for seed in range(3):
        place = Place(name, scheme, seed)
        if name == "dsq":
            place.check(cells(place), flowing)
        else:
            place.check(uniform_grid(place, lambda leaves: leaves["scale"]), flowing)


def cells(place: Place, alpha: float = 0.4) -> Surrogate:
    """DSQ's ``phi`` of the clamped quotient, plus what makes it the value here."""
    scale, zero = place.spread(place.leaves["scale"]), place.zero
    value = place.x / scale + zero
    inside, cell = (value >= place.scheme.qmin) & (value <= place.scheme.qmax), value.floor()

    def phi(x: Tensor) -> Tensor:
        steep = torch.tanh(math.log(2 / alpha - 1) * (x / scale + zero - cell - 0.5))
        return torch.where(inside, (cell + steep / (1 - alpha) / 2 + 0.5) * scale, 0)

    constant = place.y - phi(place.x)
    return lambda x, leaves: phi(x) + constant


@over_static_schemes
def test_a_learned_threshold(scheme: sq.QScheme) -> None:
    bits = scheme.bits - int(scheme.symmetric)
    for seed in range(3):
        place = Place("tqt", scheme, seed)
        up = place.leaves["log2_t"].ceil() - place.leaves["log2_t"]
        place.check(uniform_grid(place, lambda leaves, up=up: torch.exp2(leaves["log2_t"] + up - bits)), ("log2_t",))


@over_static_schemes
def test_learned_bounds(scheme: sq.QScheme) -> None:
    for seed in range(3):
        fq = sq.fake_quantizer("pact", alpha=0.9)
        place = Place("pact", scheme, seed)
        place.fq, place.leaves = fq, {k: v * 0.15 for k, v in place.leaves.items() if k != "scale"}
        place.qparams = put(place.qparams, place.leaves)
        place.y = fq.apply(place.x, place.qparams, scheme)

        def clipped(x: Tensor, leaves: Leaves, place: Place = place) -> Tensor:
            hi = place.spread(leaves["alpha"])
            lo = -hi if scheme.symmetric else place.spread(leaves["n_alpha"])
            return torch.where(place.x >= hi, hi, torch.where(place.x < lo, lo, x))

        constant = place.y - clipped(place.x, place.leaves)
        assert (constant - constant.mean()).any()
        place.check(lambda x, leaves, c=constant, f=clipped: f(x, leaves) + c, ("alpha", "n_alpha"))


@over_static_schemes
@pytest.mark.parametrize("name", ["dorefa", "dorefa_tanh"])
def test_weights_through_tanh(name: str, scheme: sq.QScheme) -> None:
    for seed in range(3):
        place = Place(name, scheme, seed)
        extra = 1e-5 if name == "dorefa_tanh" else 0.0

        def mapped(x: Tensor, extra: float = extra) -> Tensor:
            t = torch.tanh(x)
            return t / (t.abs().amax() + extra)

        inside = torch.ones(SHAPE, dtype=torch.bool)
        if name == "dorefa_tanh":
            code = mapped(place.x) / place.spread(place.qparams.scale)
            code = code.round() + (0 if scheme.symmetric else place.spread(place.qparams.zero_point))
            inside = (code >= scheme.qmin) & (code <= scheme.qmax)
        constant = place.y - torch.where(inside, mapped(place.x), 0)
        place.check(lambda x, leaves, i=inside, c=constant, f=mapped: torch.where(i, f(x), 0) + c, ())


@over_static_schemes
def test_learned_rounding(scheme: sq.QScheme) -> None:
    for seed in range(3):
        place = Place("adaround", scheme, seed)
        scale, zero = place.spread(place.leaves["scale"]), place.zero

        def level(leaves: Leaves, place: Place = place, scale: Tensor = scale, zero: Any = zero) -> Tensor:
            h = (1.2 / (1 + torch.exp(-leaves["alpha"])) - 0.1).clamp(0, 1)
            return (place.x / scale).floor() + h + zero

        def surrogate(x: Tensor, leaves: Leaves, f: Any = level, scale: Tensor = scale, zero: Any = zero) -> Tensor:
            return (f(leaves).clamp(scheme.qmin, scheme.qmax) - zero) * scale

        constant = dict(place.leaves)
        place.leaves = {"alpha": constant["alpha"] + sample(seed + 5, dtype=torch.float64) * 0.3}
        place.qparams = put(place.qparams, place.leaves)
        place.y = place.fq.apply(place.x, place.qparams, scheme)
        place.check(surrogate, ("alpha",))


IDENTITY = [
    "e4m3",
    "e5m2",
    "fp4",
    "fp4_nf4",
    "fpxgroup",
    "fpxgroup_double",
    "mxfp4",
    "mxfp6",
    "mxfp8",
    "mxint8",
    "nnie",
    "nvfp4",
]


@over_static_schemes
@pytest.mark.parametrize("name", IDENTITY)
def test_formats_pass_the_gradient_of_every_element_and_of_nothing_else(name: str, scheme: sq.QScheme) -> None:
    place = Place(name, scheme, 0)
    constant = place.y - place.x
    place.check(lambda x, leaves: x + constant, ())


def test_every_quantizer_has_its_surrogate_tested() -> None:
    here = {"lsq_plus", "qdrop", "dsq", "tqt", "pact", "dorefa", "adaround", *IDENTITY}
    elsewhere = {"fixed", "learnable", "fp16", "bf16"}  # the laws
    integer_without_hessian = {"gptq", "gptqfp4"}  # fixed; with one: test_gptq
    assert set(FAKE_QUANTIZERS.names()) <= here | elsewhere | integer_without_hessian
    assert all(made(name) for name in here)
