"""Stochastic rounding, an option of many fake quantizers, and the uniform numbers that it takes.

A number between two values of a grid is rounded up with the probability ``p`` that is its distance to the lower one, as a
share of their distance (arXiv:1502.02551): up where ``noise < p``. Its expectation is the number itself, as long as it lies
within the grid. Gradients are those of rounding to the nearest, which also decides what lies beyond the grid.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sophq_func.core.errors import ConfigError, StateError, explain
from sophq_func.numerics.contracts import FakeQuantize, QParams
from sophq_func.numerics.scheme import QScheme

ROUNDINGS = ("nearest", "stochastic")


class Draw(Protocol):
    """The noise that a tensor is rounded with; ``None``: it is rounded to the nearest value."""

    def __call__(self, x: Tensor, qparams: QParams, noise: Tensor | None = None) -> Tensor | None: ...


def drawing(where: str, rounding: str) -> Draw:
    """How a fake quantizer gets its noise; a :class:`ConfigError` where its option ``rounding`` is not known."""
    if rounding not in ROUNDINGS:
        allowed = " or ".join(map(repr, ROUNDINGS))
        raise ConfigError(explain(where, "this rounding is not known", got=rounding, allowed=allowed))

    def draw(x: Tensor, qparams: QParams, noise: Tensor | None = None) -> Tensor | None:
        return None if rounding == "nearest" else uniform(where, x, qparams, noise)

    return draw


def with_rounding(fake: FakeQuantize, rounding: str) -> FakeQuantize:
    """A fake quantizer whose ``apply`` draws, with what follows from that: it needs noise, and its values have no codes."""
    if rounding == "nearest":
        return fake
    return fake._replace(noise=True, uncoded=_at_random, rowwise=False, many=None, uniform=None)


def _at_random(qparams: QParams, scheme: QScheme) -> str:
    return "it rounds at random; plan with rounding='nearest', whose qparams are the same"


def uniform(where: str, x: Tensor, qparams: QParams, noise: Tensor | None) -> Tensor:
    """The argument ``noise``, or else that of ``extras``.

    Raises:
      StateError: there is neither, or it is not shaped like ``x``.
    """
    if noise is None:
        noise = qparams.extras.get("noise")
    fix = "qparams = q.with_noise(params, qparams, generator, *args), or apply(..., noise=torch.rand_like(x))"
    if noise is None:
        raise StateError(explain(where, "quantizing at random needs noise", fix=fix))
    if noise.shape != x.shape or not noise.is_floating_point():
        got, allowed = (
            f"{noise.dtype} {tuple(noise.shape)}",
            f"floating numbers of shape {tuple(x.shape)}, that of the tensor",
        )
        raise StateError(explain(where, "noise of this kind does not fit", got=got, allowed=allowed, fix=fix))
    return noise
