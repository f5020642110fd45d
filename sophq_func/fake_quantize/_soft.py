"""Integer grids with a surrogate that is not a straight line: tanh before rounding (DoReFa), tanh in each cell (DSQ)."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from sophq_func.core.errors import ConfigError, explain
from sophq_func.core.pytree import tree_map
from sophq_func.numerics.affine import decode, encode, fake_quantize, ste, uncoded, working
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, Codes, FakeQuantize, QParams, kept
from sophq_func.numerics.layout import expand
from sophq_func.numerics.ranges import EPS, Bound, bounds, clamp, expanded_bounds, min_max, positive, range_to_qparams
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
        raise ConfigError(
            explain("dorefa", "this mapping is not possible", got=mapping, allowed=" or ".join(map(repr, MAPPINGS)))
        )

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
        share, steps = shared(x), steps_of(x, qparams, scheme)
        return ste(share, (2 * ((share / 2 + 0.5) * steps).round() - steps) / steps).to(x.dtype)

    def shared(x: Tensor) -> Tensor:
        t = torch.tanh(working(x))
        return t / _peak(t).clamp(min=EPS**2)

    def steps_of(x: Tensor, qparams: QParams, scheme: QScheme) -> Bound:
        low, high = expanded_bounds(qparams, scheme, x)
        return high - low

    def own_encode(x: Tensor, qparams: QParams, scheme: QScheme) -> Codes:
        if mapping == "tanh":
            return encode(_mapped(x.detach()), qparams, scheme, "kernel")
        steps = steps_of(x, qparams, scheme)
        level = ((shared(x.detach()) / 2 + 0.5) * steps).round() - steps / 2  # 0 stands in the middle of the codes
        return Codes(level.to(torch.int32), {})

    def own_decode(codes: Codes, qparams: QParams, scheme: QScheme, dtype: torch.dtype = torch.float32) -> Tensor:
        if mapping == "tanh":
            return decode(codes, qparams, scheme, dtype)
        steps = steps_of(codes.values, qparams, scheme)
        level = codes.values.to(torch.float64 if dtype == torch.float64 else torch.float32)
        return (2 * level / steps).to(dtype)

    def own_uncoded(qparams: QParams, scheme: QScheme) -> str:
        low, high = bounds(qparams, scheme)
        if mapping == "paper" and not bool((torch.as_tensor(low + high) == 0).all()):
            return "0 lies between two of its codes"
        return uncoded(qparams, scheme)

    return FakeQuantize(
        init,
        apply,
        integer=mapping == "tanh",
        encode=own_encode,
        decode=own_decode,
        uncoded=own_uncoded,
        local=False,
    )


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
        raise ConfigError(explain("dsq", "alpha is not possible", got=alpha, allowed="a number between 0 and 1"))
    stretch, steepness = 1 / (1 - alpha), math.log(2 / alpha - 1)

    def rounded(x: Tensor, qparams: QParams, scheme: QScheme) -> tuple[Tensor, Tensor | int, Tensor]:
        """Code, zero point and scale of each element."""
        granularity = scheme.granularity
        low, high = expanded_bounds(qparams, scheme, x)
        scale = expand(positive(qparams.scale.detach()), x, granularity)
        zero = 0 if scheme.symmetric else expand(qparams.zero_point.detach().to(scale.dtype), x, granularity)
        value = working(x) / scale + zero
        inside = (value >= low) & (value <= high)
        value = torch.where(inside, value, clamp(value.detach(), low, high))
        cell = value.detach().floor()
        phi = cell + 0.5 * stretch * torch.tanh(steepness * (value - cell - 0.5)) + 0.5
        return ste(phi, phi.round()), zero, scale

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        code, zero, scale = rounded(x, qparams, scheme)
        return ((code - zero) * scale).to(x.dtype)

    def own_encode(x: Tensor, qparams: QParams, scheme: QScheme) -> Codes:
        return Codes(rounded(x.detach(), qparams, scheme)[0].to(torch.int32), {})

    def own_decode(codes: Codes, qparams: QParams, scheme: QScheme, dtype: torch.dtype = torch.float32) -> Tensor:
        return decode(codes, qparams._replace(scale=positive(qparams.scale)), scheme, dtype, whole=False)

    return FakeQuantize(kept, apply, encode=own_encode, decode=own_decode, uncoded=partial(uncoded, whole=False))
