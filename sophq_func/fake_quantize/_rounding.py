"""Integer grids with another rounding: learned for each element (AdaRound), dropped at random (QDrop)."""

from __future__ import annotations

import torch
from torch import Tensor

from sophq_func.core.errors import ConfigError, StateError, explain
from sophq_func.core.modes import as_constant
from sophq_func.core.pytree import sorted_dict
from sophq_func.fake_quantize._noise import uniform
from sophq_func.numerics import affine
from sophq_func.numerics.affine import fake_quantize, narrowed, working
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, Codes, FakeQuantize, QParams, kept
from sophq_func.numerics.layout import expand
from sophq_func.numerics.ranges import clamp, expanded_bounds, positive
from sophq_func.numerics.rectified import inverse_rectified_sigmoid, rectified_sigmoid
from sophq_func.numerics.scheme import QScheme

ROUNDINGS = ("soft", "hard")
QUANT_TYPES = (None, "param", "input", "tensor")
"""What a tensor is to its layer: a weight for the first two, an activation for the others."""


@FAKE_QUANTIZERS.register("adaround", "AdaRoundFakeQuantize")
def adaround(rounding: str = "soft", quant_type: str | None = None) -> FakeQuantize:
    """Weights rounded up or down, which is learned for each element (AdaRound, arXiv:2004.10568).

    ``y = (clamp(floor(x / s) + h + z, n, p) - z) s``. ``init`` takes the weight and adds ``extras["alpha"]``, shaped
    like it, such that ``h = rectified_sigmoid(alpha)`` reproduces the weight inside the grid. ``"soft"`` uses this ``h``,
    ``"hard"`` 1 where ``alpha >= 0`` and else 0. Without ``extras["alpha"]`` it is :func:`fixed`.

    Gradient: soft: to ``alpha`` by ordinary differentiation, 0 where ``h`` or the code is clamped; none to ``x`` and
    scale. Hard: none.

    Args:
      rounding: ``"soft"`` to learn, ``"hard"`` to use what was learned.
      quant_type: ``"param"`` or ``None``: a weight. ``"input"`` or ``"tensor"``, which a plan sets for activations:
        there is nothing to learn for each element, and ``init`` adds no ``alpha``.

    Differs from sophgo-mq: the scale has a floor; hard rounding is an option.

    Example:
      >>> import sophq_func as sq
      >>> scheme, x = sq.QScheme(bits=4), torch.tensor([1.2, -0.7])
      >>> qp = sq.QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), {})
      >>> for rounding in ("soft", "hard"):
      ...     fq = sq.fake_quantizer("AdaRoundFakeQuantize", rounding=rounding)
      ...     fq.apply(x, fq.init(qp, x, scheme), scheme)
      tensor([ 1.2000, -0.7000])
      tensor([ 1., -1.])
    """
    if rounding not in ROUNDINGS:
        allowed = " or ".join(map(repr, ROUNDINGS))
        raise ConfigError(explain("adaround", "this rounding is not known", got=rounding, allowed=allowed))
    if quant_type not in QUANT_TYPES:
        allowed = "'param', 'input', 'tensor' or None"
        raise ConfigError(explain("adaround", "this quant_type is not known", got=quant_type, allowed=allowed))
    is_weight = quant_type in (None, "param")

    def init(qparams: QParams, x: Tensor, scheme: QScheme) -> QParams:
        ratio = working(x).detach() / expand(positive(qparams.scale), x, scheme.granularity)
        fraction = (ratio - ratio.floor()).float()
        alpha = inverse_rectified_sigmoid(fraction)
        return qparams._replace(extras=sorted_dict({**qparams.extras, "alpha": alpha}))

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        if "alpha" not in qparams.extras:
            constant = QParams(as_constant(qparams.scale), as_constant(qparams.zero_point), qparams.extras)
            return fake_quantize(x, constant, scheme, "kernel")
        code, zero, scale = rounded(x, qparams, scheme)
        return narrowed((code - zero) * scale, x.dtype)

    def rounded(x: Tensor, qparams: QParams, scheme: QScheme) -> tuple[Tensor, Tensor | int, Tensor]:
        """Code, zero point and scale of each element."""
        alpha = qparams.extras["alpha"]
        if alpha.shape != x.shape:
            allowed, fix = f"that of the weight, {tuple(x.shape)}", "qparams = fq.init(qparams, weight, scheme)"
            raise StateError(
                explain("adaround", "alpha of this shape does not fit", got=tuple(alpha.shape), allowed=allowed, fix=fix)
            )
        granularity = scheme.granularity
        low, high = expanded_bounds(qparams, scheme, x)
        scale = expand(positive(qparams.scale.detach()), x, granularity)
        zero = 0 if scheme.symmetric else expand(qparams.zero_point.detach().to(scale.dtype), x, granularity)
        up = rectified_sigmoid(alpha) if rounding == "soft" else (alpha.detach() >= 0).to(scale.dtype)
        level = (working(x).detach() / scale).floor() + up + zero
        inside = (level >= low) & (level <= high)
        return torch.where(inside, level, clamp(level.detach(), low, high)), zero, scale

    def encode(x: Tensor, qparams: QParams, scheme: QScheme) -> Codes:
        if "alpha" not in qparams.extras:
            return affine.encode(x, qparams, scheme, "kernel")
        return Codes(rounded(x, qparams, scheme)[0].detach().to(torch.int32), {})

    def decode(codes: Codes, qparams: QParams, scheme: QScheme, dtype: torch.dtype = torch.float32) -> Tensor:
        if "alpha" not in qparams.extras:
            return affine.decode(codes, qparams, scheme, dtype)
        return affine.decode(codes, qparams._replace(scale=positive(qparams.scale)), scheme, dtype, whole=False)

    def uncoded(qparams: QParams, scheme: QScheme) -> str:
        if rounding == "soft" and is_weight and not _is_hard(qparams, scheme):
            return "its rounding is soft: while it is learned, values lie between two codes"
        return affine.uncoded(qparams, scheme, whole="alpha" not in qparams.extras)

    return FakeQuantize(
        init if is_weight else kept,
        apply,
        ("alpha",) if is_weight else (),
        resizable=not is_weight,  # alpha was made for the steps of one bit width
        encode=encode,
        decode=decode,
        uncoded=uncoded,
    )


def _is_hard(qparams: QParams, scheme: QScheme) -> bool:
    """Whether the learned rounding of each element is exactly 0 or 1; also where there is no ``alpha``."""
    if scheme.dynamic:  # alpha is made anew from each tensor, such that it reproduces the tensor
        return False
    if "alpha" not in qparams.extras:
        return True
    share = rectified_sigmoid(qparams.extras["alpha"])
    return bool(((share == 0) | (share == 1)).all())


@FAKE_QUANTIZERS.register("qdrop", "QDropFakeQuantize")
def qdrop(prob: float = 1.0) -> FakeQuantize:
    """Quantize each element with a probability, else leave it as it is (QDrop, arXiv:2203.05740).

    ``q = (clamp(round(x / s) + z, n, p) - z) s``; ``y = q`` where ``noise < prob``, else ``x``. Gradients as
    :func:`sophq_func.numerics.affine.fake_quantize` states where quantized, without LSQ's factor; 1 to ``x``
    where not. The zero point is a constant.

    Args:
      prob: probability to quantize, in [0, 1]; at 1 no noise is needed.

    Differs from sophgo-mq: the scale has a floor; works per channel; the random numbers are an argument.

    Example:
      >>> import sophq_func as sq
      >>> fq, scheme = sq.fake_quantizer("QDropFakeQuantize", prob=0.5), sq.QScheme(bits=4)
      >>> qp = sq.QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), {})
      >>> fq.apply(torch.tensor([1.2, 1.2]), qp, scheme, noise=torch.tensor([0.1, 0.9]))
      tensor([1.0000, 1.2000])
    """
    if isinstance(prob, bool) or not isinstance(prob, int | float) or not 0 <= prob <= 1:
        raise ConfigError(explain("qdrop", "prob must lie in [0, 1]", got=prob, allowed="a number from 0 to 1"))

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        applied = qparams._replace(scale=positive(qparams.scale), zero_point=as_constant(qparams.zero_point))
        quantized = fake_quantize(x, applied, scheme, "quotient")
        if prob == 1:
            return quantized
        return torch.where(uniform("qdrop", x, qparams, noise) < prob, quantized, x)

    def encode(x: Tensor, qparams: QParams, scheme: QScheme) -> Codes:
        return affine.encode(x, qparams._replace(scale=positive(qparams.scale)), scheme, "quotient")

    def decode(codes: Codes, qparams: QParams, scheme: QScheme, dtype: torch.dtype = torch.float32) -> Tensor:
        return affine.decode(codes, qparams._replace(scale=positive(qparams.scale)), scheme, dtype)

    def uncoded(qparams: QParams, scheme: QScheme) -> str:
        return "it rounds at random" if prob < 1 else affine.uncoded(qparams, scheme)

    return FakeQuantize(kept, apply, ("scale",), noise=prob < 1, encode=encode, decode=decode, uncoded=uncoded)
