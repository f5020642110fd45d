"""Integer grids with a surrogate that is not a straight line: tanh before rounding (DoReFa), tanh in each cell (DSQ)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sophq_func.core.errors import ConfigError, explain
from sophq_func.core.pytree import tree_map
from sophq_func.numerics.affine import fake_quantize, ste, working
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, FakeQuantize, QParams, kept
from sophq_func.numerics.layout import expand
from sophq_func.numerics.ranges import EPS, clamp, expanded_bounds, min_max, positive, range_to_qparams
from sophq_func.numerics.scheme import QScheme

MAPPINGS = ("paper", "tanh")


@FAKE_QUANTIZERS.register("dorefa", "DoReFaFakeQuantize")
def dorefa(mapping: str = "paper") -> FakeQuantize:
    """Weights through tanh onto ``[-1, 1]``, then quantized (DoReFa, arXiv:1606.06160; semantics.md 4.7).

    ``t = tanh(x)``, ``m = max |t|`` over the whole tensor, NaN left out, at least 2 ** -46. ``"paper"``: ``y = 2 Q(t / (2
    m) + 1 / 2) - 1`` with ``Q(r) = round(r L) / L``, ``L = qmax - qmin`` steps, whatever the observer saw; 0 is on the grid
    only where ``L`` is even. ``"tanh"``: :func:`fixed` of ``t / (m + 1e-5)``, with the range of what comes out, or ``[-1,
    1]`` where that is nothing but 0. For weights: ``init`` is shown the weight. They change their size, so calibrate
    activations behind them with ``observe_quantized``.

    Gradient: rounding straight through (in ``"tanh"`` 0 beyond the grid), tanh and ``m`` by ordinary differentiation; a
    maximum that several elements reach shares its gradient among them.

    Args:
      mapping: ``"paper"`` or, as sophgo-mq has it, ``"tanh"``.

    Differs from sophgo-mq: that has the second mapping only, and maps even where quantization is off.

    Example:
      >>> import sophq_func as sq
      >>> fq, scheme = sq.fake_quantizer("DoReFaFakeQuantize"), sq.QScheme(bits=2)
      >>> qp = sq.QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), {})
      >>> fq.apply(torch.tensor([-0.5, 0.1, 2.0]), qp, scheme)
      tensor([-0.3333,  0.3333,  1.0000])
    """
    if mapping not in MAPPINGS:
        raise ConfigError(explain("dorefa", "this mapping", got=mapping, allowed=" or ".join(map(repr, MAPPINGS))))

    def init(qparams: QParams, x: Tensor, scheme: QScheme) -> QParams:
        if mapping == "paper":
            step = torch.full_like(qparams.scale, 2 / (scheme.qmax - scheme.qmin))
            found = QParams(step, torch.zeros_like(qparams.zero_point, dtype=torch.int32), {})
        else:
            lo, hi = min_max(_mapped(x), scheme.granularity)
            nothing = (lo >= 0) & (hi <= 0)
            found = range_to_qparams(torch.where(nothing, -1, lo), torch.where(nothing, 1, hi), scheme)
        scale = torch.where(qparams.scale.isnan(), qparams.scale, found.scale)
        return QParams(scale, found.zero_point, qparams.extras)

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        if mapping == "tanh":
            constant = tree_map(torch.Tensor.detach, qparams)
            return fake_quantize(_mapped(x), constant, scheme, "kernel").to(x.dtype)
        low, high = expanded_bounds(qparams, scheme, x)
        t = torch.tanh(working(x))
        share, steps = t / _peak(t).clamp(min=EPS**2), high - low
        return ste(share, (2 * ((share / 2 + 0.5) * steps).round() - steps) / steps).to(x.dtype)

    return FakeQuantize(init, apply, integer=mapping == "tanh")


def _peak(t: Tensor) -> Tensor:
    return torch.where(t.isnan(), 0, t).abs().amax() if t.numel() else t.new_zeros(())


def _mapped(x: Tensor) -> Tensor:
    t = torch.tanh(working(x))
    return t / (_peak(t) + 1e-5)


@FAKE_QUANTIZERS.register("dsq", "DSQFakeQuantize")
def dsq(alpha: float = 0.4) -> FakeQuantize:
    """Ordinary rounding, whose surrogate is a tanh in each cell of the grid (DSQ, arXiv:1908.05033; semantics.md 4.5).

    ``v = clamp(x / s + z, n, p)``, ``y = (round(phi(v)) - z) s`` with ``phi(v) = floor(v) + S tanh(k (v - floor(v) - 1/2))
    / 2 + 1/2``, ``S = 1 / (1 - alpha)``, ``k = ln(2 / alpha - 1)``: ``phi`` is ``v`` at codes and half-way between them.

    Gradient: that of ``phi``, straight through the rounding: ``S k / (2 cosh(k (v - floor(v) - 1/2)) ** 2)`` to ``x``
    where ``n <= x / s + z <= p``, else 0; none to scale and zero point.

    Args:
      alpha: between 0, a staircase, and 1, a straight line.

    Differs from sophgo-mq: calibrated like all others, not in training mode only.

    Example:
      >>> import sophq_func as sq
      >>> fq, scheme = sq.fake_quantizer("DSQFakeQuantize"), sq.QScheme(bits=4)
      >>> qp = sq.QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), {})
      >>> torch.func.grad(lambda x: fq.apply(x, qp, scheme))(torch.tensor(2.6))
      tensor(1.1333)
    """
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1:
        raise ConfigError(explain("dsq", "alpha", got=alpha, allowed="a number between 0 and 1"))
    stretch, steepness = 1 / (1 - alpha), math.log(2 / alpha - 1)

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        granularity = scheme.granularity
        low, high = expanded_bounds(qparams, scheme, x)
        scale = expand(positive(qparams.scale.detach()), x, granularity)
        zero = 0 if scheme.symmetric else expand(qparams.zero_point.detach().to(scale.dtype), x, granularity)
        value = working(x) / scale + zero
        inside = (value >= low) & (value <= high)
        value = torch.where(inside, value, clamp(value.detach(), low, high))
        cell = value.detach().floor()
        phi = cell + 0.5 * stretch * torch.tanh(steepness * (value - cell - 0.5)) + 0.5
        return ((ste(phi, phi.round()) - zero) * scale).to(x.dtype)

    return FakeQuantize(kept, apply)
