"""Integer grids with another rounding: learned for each element (AdaRound), dropped at random (QDrop)."""

from __future__ import annotations

import torch
from torch import Tensor

from sophq_func.core.errors import ConfigError, StateError, explain
from sophq_func.core.pytree import sorted_dict
from sophq_func.numerics.affine import decode, encode, fake_quantize, uncoded, working
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, Codes, FakeQuantize, QParams, kept
from sophq_func.numerics.layout import expand
from sophq_func.numerics.ranges import clamp, expanded_bounds, positive
from sophq_func.numerics.scheme import QScheme

GAMMA, ZETA = -0.1, 1.1
ROUNDINGS = ("soft", "hard")
QUANT_TYPES = (None, "param", "input", "tensor")


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """AdaRound's rounding of each element, ``clamp(1.2 sigmoid(alpha) - 0.1, 0, 1)``: 0 down, 1 up.

    Eq. (23) of arXiv:2004.10568. Its regularizer, eq. (24), is ``(1 - (2 h - 1).abs() ** beta).sum()``.

    Example:
      >>> rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0]))
      tensor([0.0000, 0.5000, 1.0000])
    """
    return (torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


@FAKE_QUANTIZERS.register("adaround", "AdaRoundFakeQuantize")
def adaround(rounding: str = "soft", quant_type: str | None = None) -> FakeQuantize:
    """Weights rounded up or down as is learned for each element (AdaRound, arXiv:2004.10568; semantics.md 4.8).

    ``y = (clamp(floor(x / s) + h + z, n, p) - z) s``. ``init`` is shown the weight and makes ``extras["alpha"]``, shaped
    like it, so that with ``h = rectified_sigmoid(alpha)`` the weight comes back as it is, inside the grid. ``"soft"``
    uses this ``h``, ``"hard"`` 1 where ``alpha >= 0`` and else 0. Without ``extras["alpha"]`` it is :func:`fixed`.

    Gradient: soft: to ``alpha`` by ordinary differentiation, 0 where ``h`` or the code is clamped; none to ``x`` and
    scale. Hard: none.

    Args:
      rounding: ``"soft"`` to learn, ``"hard"`` to use what was learned.
      quant_type: ``"param"`` or ``None``: a weight. ``"input"`` or ``"tensor"``, which a plan fills in for activations:
        there is nothing to learn for each element, ``init`` makes no ``alpha``.

    Differs from sophgo-mq: the scale has a floor; the second way of rounding is an option.

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
        raise ConfigError(
            explain("adaround", "this rounding is not possible", got=rounding, allowed=" or ".join(map(repr, ROUNDINGS)))
        )
    if quant_type not in QUANT_TYPES:
        raise ConfigError(
            explain(
                "adaround", "this quant_type is not possible", got=quant_type, allowed="'param', 'input', 'tensor' or None"
            )
        )

    def init(qparams: QParams, x: Tensor, scheme: QScheme) -> QParams:
        ratio = working(x).detach() / expand(positive(qparams.scale), x, scheme.granularity)
        rest = (ratio - ratio.floor()).float()
        alpha = -torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1)
        return qparams._replace(extras=sorted_dict({**qparams.extras, "alpha": alpha}))

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        if "alpha" not in qparams.extras:
            constant = QParams(qparams.scale.detach(), qparams.zero_point.detach(), qparams.extras)
            return fake_quantize(x, constant, scheme, "kernel")
        code, zero, scale = rounded(x, qparams, scheme)
        return ((code - zero) * scale).to(x.dtype)

    def rounded(x: Tensor, qparams: QParams, scheme: QScheme) -> tuple[Tensor, Tensor | int, Tensor]:
        """Code, zero point and scale of each element."""
        alpha = qparams.extras["alpha"]
        if alpha.shape != x.shape:
            allowed, fix = f"that of the weight, {tuple(x.shape)}", "qparams = fq.init(qparams, weight, scheme)"
            raise StateError(
                explain("adaround", "alpha of this shape is not possible", got=tuple(alpha.shape), allowed=allowed, fix=fix)
            )
        granularity = scheme.granularity
        low, high = expanded_bounds(qparams, scheme, x)
        scale = expand(positive(qparams.scale.detach()), x, granularity)
        zero = 0 if scheme.symmetric else expand(qparams.zero_point.detach().to(scale.dtype), x, granularity)
        up = rectified_sigmoid(alpha) if rounding == "soft" else (alpha.detach() >= 0).to(scale.dtype)
        level = (working(x).detach() / scale).floor() + up + zero
        inside = (level >= low) & (level <= high)
        return torch.where(inside, level, clamp(level.detach(), low, high)), zero, scale

    def own_encode(x: Tensor, qparams: QParams, scheme: QScheme) -> Codes:
        if "alpha" not in qparams.extras:
            return encode(x, qparams, scheme, "kernel")
        return Codes(rounded(x, qparams, scheme)[0].detach().to(torch.int32), {})

    def own_decode(codes: Codes, qparams: QParams, scheme: QScheme, dtype: torch.dtype = torch.float32) -> Tensor:
        if "alpha" not in qparams.extras:
            return decode(codes, qparams, scheme, dtype)
        return decode(codes, qparams._replace(scale=positive(qparams.scale)), scheme, dtype, whole=False)

    def own_uncoded(qparams: QParams, scheme: QScheme) -> str:
        if rounding == "soft" and weight and not _is_hard(qparams, scheme):
            return "its rounding is soft: between two codes, as long as it is learned"
        return uncoded(qparams, scheme, whole="alpha" not in qparams.extras)

    weight = quant_type in (None, "param")
    return FakeQuantize(
        init if weight else kept,
        apply,
        ("alpha",) if weight else (),
        resizable=not weight,
        encode=own_encode,
        decode=own_decode,
        uncoded=own_uncoded,
    )


def _is_hard(qparams: QParams, scheme: QScheme) -> bool:
    """Whether what was learned rounds each element all the way; without anything learned, it does."""
    if scheme.dynamic:  # alpha is made anew from each tensor, to give that tensor back
        return False
    if "alpha" not in qparams.extras:
        return True
    share = rectified_sigmoid(qparams.extras["alpha"])
    return bool(((share == 0) | (share == 1)).all())


@FAKE_QUANTIZERS.register("qdrop", "QDropFakeQuantize")
def qdrop(prob: float = 1.0) -> FakeQuantize:
    """Quantize each element with a probability, else let it pass (QDrop, arXiv:2203.05740; semantics.md 4.9).

    ``q = (clamp(round(x / s) + z, n, p) - z) s``; ``y = q`` where ``noise < prob``, else ``x``. Gradients as
    :func:`sophq_func.numerics.affine.fake_quantize` states where quantized, without LSQ's factor; 1 to ``x``
    where not. The zero point is a constant.

    Args:
      prob: probability to quantize; at 1 no noise is needed.

    Differs from sophgo-mq: the scale has a floor; works per channel; the random numbers are given.

    Example:
      >>> import sophq_func as sq
      >>> fq, scheme = sq.fake_quantizer("QDropFakeQuantize", prob=0.5), sq.QScheme(bits=4)
      >>> qp = sq.QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), {})
      >>> fq.apply(torch.tensor([1.2, 1.2]), qp, scheme, noise=torch.tensor([0.1, 0.9]))
      tensor([1.0000, 1.2000])
    """
    if isinstance(prob, bool) or not isinstance(prob, int | float) or not 0 <= prob <= 1:
        raise ConfigError(explain("qdrop", "prob is not possible", got=prob, allowed="a number from 0 to 1"))

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        found = qparams._replace(scale=positive(qparams.scale), zero_point=qparams.zero_point.detach())
        y = fake_quantize(x, found, scheme, "quotient")
        return y if prob == 1 else torch.where(uniform("qdrop", qparams, noise) < prob, y, x)

    def own_encode(x: Tensor, qparams: QParams, scheme: QScheme) -> Codes:
        return encode(x, qparams._replace(scale=positive(qparams.scale)), scheme, "quotient")

    def own_decode(codes: Codes, qparams: QParams, scheme: QScheme, dtype: torch.dtype = torch.float32) -> Tensor:
        return decode(codes, qparams._replace(scale=positive(qparams.scale)), scheme, dtype)

    def own_uncoded(qparams: QParams, scheme: QScheme) -> str:
        return "it rounds at random" if prob < 1 else uncoded(qparams, scheme)

    return FakeQuantize(kept, apply, ("scale",), noise=prob < 1, encode=own_encode, decode=own_decode, uncoded=own_uncoded)


def uniform(where: str, qparams: QParams, noise: Tensor | None) -> Tensor:
    """The noise that was given, as an argument or else in ``extras``; :class:`StateError` where there is none."""
    if noise is None and "noise" not in qparams.extras:
        fix = "qparams = q.with_noise(params, qparams, generator, *args), or apply(..., noise=torch.rand_like(x))"
        raise StateError(explain(where, "quantizing without noise is not possible", fix=fix))
    return qparams.extras["noise"] if noise is None else noise
