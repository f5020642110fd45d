"""Integer grids whose surrogate gradient is that of tanh: before rounding (DoReFa), or in each cell of the grid (DSQ)."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from sophq_func.core.errors import ConfigError, explain
from sophq_func.fake_quantize._noise import drawing, with_rounding
from sophq_func.numerics import affine
from sophq_func.numerics.affine import constants, fake_quantize, narrowed, ste, working
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, Codes, FakeQuantize, QParams, kept
from sophq_func.numerics.formats import whole
from sophq_func.numerics.layout import expand
from sophq_func.numerics.ranges import EPS, Bound, bounds, clamp, expanded_bounds, min_max, positive, range_to_qparams
from sophq_func.numerics.scheme import QScheme

MAPPINGS = ("paper", "tanh")

LEAST_PEAK = EPS**2
"""The largest ``|tanh x|`` is at least 2 ** -46 where it divides, so that a tensor of zeros stays 0."""

TANH_MARGIN = 1e-5
"""With ``mapping="tanh"`` the divisor is larger than the largest ``|tanh x|`` by this, as in sophgo-mq."""


@FAKE_QUANTIZERS.register("dorefa", "DoReFaFakeQuantize")
def dorefa(mapping: str = "paper", *, rounding: str = "nearest") -> FakeQuantize:
    """Weights through tanh onto ``[-1, 1]``, then quantized (DoReFa, arXiv:1606.06160).

    ``t = tanh(x)``, ``m = max |t|`` over the whole tensor, NaN left out, at least 2 ** -46. ``"paper"``: ``y = 2 Q(t / (2
    m) + 1 / 2) - 1`` with ``Q(r) = round(r L) / L``, ``L = qmax - qmin`` steps, whatever the observer saw; 0 is on the grid
    only where ``L`` is even. ``"tanh"``: :func:`fixed` of ``t / (m + 1e-5)``, with the range of that quotient, or ``[-1,
    1]`` where it is 0 everywhere. For weights: ``init`` takes the weight. The mapping changes their magnitude, so
    calibrate the activations after them with ``observe_quantized``.

    Gradient: rounding straight through (in ``"tanh"`` 0 beyond the grid), tanh and ``m`` by ordinary differentiation; a
    maximum that several elements reach shares its gradient among them.

    Args:
      mapping: ``"paper"`` or, as sophgo-mq has it, ``"tanh"``.
      rounding: ``"nearest"``, or ``"stochastic"`` by uniform noise: what is unbiased is ``Q``, not the mapping before it.

    Differs from sophgo-mq: that has the second mapping only, and maps even where quantization is off.

    Example:
      >>> import sophq_func as sq
      >>> fq, scheme = sq.fake_quantizer("DoReFaFakeQuantize"), sq.QScheme(bits=2)
      >>> qp = sq.QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), {})
      >>> fq.apply(torch.tensor([-0.5, 0.1, 2.0]), qp, scheme)
      tensor([-0.3333,  0.3333,  1.0000])
    """
    draw = drawing("dorefa", rounding)
    if mapping not in MAPPINGS:
        allowed = " or ".join(map(repr, MAPPINGS))
        raise ConfigError(explain("dorefa", "this mapping is not known", got=mapping, allowed=allowed))

    def init(qparams: QParams, x: Tensor, scheme: QScheme) -> QParams:
        if mapping == "paper":
            scale = torch.full_like(qparams.scale, 2 / (scheme.qmax - scheme.qmin))
            initial = QParams(scale, torch.zeros_like(qparams.zero_point, dtype=torch.int32), {})
        else:
            lo, hi = min_max(_mapped(x), scheme.granularity)
            all_zero = (lo >= 0) & (hi <= 0)
            initial = range_to_qparams(torch.where(all_zero, -1, lo), torch.where(all_zero, 1, hi), scheme)
        # the grid does not depend on the observed scale, but one that is NaN must stay visible
        scale = torch.where(qparams.scale.isnan(), qparams.scale, initial.scale)
        return QParams(scale, initial.zero_point, qparams.extras)

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        if mapping == "tanh":
            constant = constants(qparams)
            return fake_quantize(_mapped(x), constant, scheme, "kernel", noise=draw(x, qparams, noise)).to(x.dtype)
        unit, steps = to_unit(x), grid_steps(x, qparams, scheme)
        level = whole((unit / 2 + 0.5) * steps, draw(x, qparams, noise))
        return ste(unit, (2 * level - steps) / steps).to(x.dtype)

    def to_unit(x: Tensor) -> Tensor:
        """``tanh(x)``, stretched to ``[-1, 1]``."""
        t = torch.tanh(working(x))
        return t / _peak(t).clamp(min=LEAST_PEAK)

    def grid_steps(x: Tensor, qparams: QParams, scheme: QScheme) -> Bound:
        """``L``, the number of steps of the grid."""
        low, high = expanded_bounds(qparams, scheme, x)
        return high - low

    def encode(x: Tensor, qparams: QParams, scheme: QScheme) -> Codes:
        if mapping == "tanh":
            return affine.encode(_mapped(x.detach()), qparams, scheme, "kernel")
        steps = grid_steps(x, qparams, scheme)
        # levels 0 .. L become codes -L / 2 .. L / 2, so that the code 0 means 0
        code = ((to_unit(x.detach()) / 2 + 0.5) * steps).round() - steps / 2
        return Codes(code.to(torch.int32), {})

    def decode(codes: Codes, qparams: QParams, scheme: QScheme, dtype: torch.dtype = torch.float32) -> Tensor:
        if mapping == "tanh":
            return affine.decode(codes, qparams, scheme, dtype)
        steps = grid_steps(codes.values, qparams, scheme)
        code = codes.values.to(torch.float64 if dtype == torch.float64 else torch.float32)
        return (2 * code / steps).to(dtype)

    def uncoded(qparams: QParams, scheme: QScheme) -> str:
        low, high = bounds(qparams, scheme)
        is_centered = bool((torch.as_tensor(low + high) == 0).all())
        if mapping == "paper" and not is_centered:
            return "0 lies between two of its codes"
        return affine.uncoded(qparams, scheme)

    fake = FakeQuantize(
        init,
        apply,
        integer=mapping == "tanh",
        encode=encode,
        decode=decode,
        uncoded=uncoded,
        local=False,
    )
    return with_rounding(fake, rounding)


def _peak(t: Tensor) -> Tensor:
    """The largest magnitude of a whole tensor, NaN left out; 0 of an empty one."""
    if t.numel() == 0:
        return t.new_zeros(())
    return torch.where(t.isnan(), 0, t).abs().amax()


def _mapped(x: Tensor) -> Tensor:
    """sophgo-mq's mapping of weights."""
    t = torch.tanh(working(x))
    return t / (_peak(t) + TANH_MARGIN)


@FAKE_QUANTIZERS.register("dsq", "DSQFakeQuantize")
def dsq(alpha: float = 0.4) -> FakeQuantize:
    """Ordinary rounding with the gradient of a tanh in each cell of the grid (DSQ, arXiv:1908.05033).

    ``v = clamp(x / s + z, n, p)``, ``y = (round(phi(v)) - z) s`` with ``phi(v) = floor(v) + S tanh(k (v - floor(v) - 1/2))
    / 2 + 1/2``, ``S = 1 / (1 - alpha)``, ``k = ln(2 / alpha - 1)``: ``phi`` is ``v`` at codes and half-way between them.

    Gradient: that of ``phi``, straight through the rounding: ``S k / (2 cosh(k (v - floor(v) - 1/2)) ** 2)`` to ``x``
    where ``n <= x / s + z <= p``, else 0; none to scale and zero point.

    Args:
      alpha: in (0, 1). Near 0 ``phi`` is a staircase, near 1 a straight line.

    Differs from sophgo-mq: calibrated like all others, not in training mode only.

    Example:
      >>> import sophq_func as sq
      >>> fq, scheme = sq.fake_quantizer("DSQFakeQuantize"), sq.QScheme(bits=4)
      >>> qp = sq.QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), {})
      >>> torch.func.grad(lambda x: fq.apply(x, qp, scheme))(torch.tensor(2.6))
      tensor(1.1333)
    """
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1:
        raise ConfigError(explain("dsq", "alpha must lie between 0 and 1", got=alpha, allowed="a number between 0 and 1"))
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
        return narrowed((code - zero) * scale, x.dtype)

    def encode(x: Tensor, qparams: QParams, scheme: QScheme) -> Codes:
        return Codes(rounded(x.detach(), qparams, scheme)[0].to(torch.int32), {})

    def decode(codes: Codes, qparams: QParams, scheme: QScheme, dtype: torch.dtype = torch.float32) -> Tensor:
        return affine.decode(codes, qparams._replace(scale=positive(qparams.scale)), scheme, dtype, whole=False)

    return FakeQuantize(kept, apply, encode=encode, decode=decode, uncoded=partial(affine.uncoded, whole=False))
