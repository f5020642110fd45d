"""The arithmetic of uniform grids: ``real = (code - zero_point) * scale``. Written once, here.

The code of ``x`` is computed in one of three orders, since sophgo-mq's fake quantizers differ in it. *Kernel order* is
``clamp(round(x * (1 / s)) + z)``, as in torch's fake-quantize kernels; *expression order* is ``clamp(round(x / s + z))``;
*quotient order* is ``clamp(round(x / s) + z)``. Rounding is half to even, so that expression order rounds exact ties to
the other side where ``z`` is odd; and ``x * (1 / s)`` may differ from ``x / s`` by one unit in the last place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sophq_func.core import modes
from sophq_func.core.pytree import tree_map
from sophq_func.numerics import eager, formats, ranges
from sophq_func.numerics.compiled import keeping_layout, materialized, recomputed
from sophq_func.numerics.contracts import Codes, QParams
from sophq_func.numerics.layout import expand
from sophq_func.numerics.ranges import Bound, bounds, clamp, expanded_bounds
from sophq_func.numerics.scheme import QScheme

Order = Literal["kernel", "expression", "quotient"]
"""In which order a code is computed; see the top of this file."""


def ste(x: Tensor, y: Tensor) -> Tensor:
    """The straight-through estimator: the value of ``y`` with the gradient of ``x`` (arXiv:1308.3432).

    No gradient flows where ``x`` is not finite.

    Example:
      >>> x = torch.tensor(0.7, requires_grad=True)
      >>> y = ste(x, x.round()); y.backward(); y.item(), x.grad.item()
      (1.0, 1.0)
    """
    # inf - inf would be NaN
    finite = torch.where(torch.isfinite(x), x, 0)
    return modes.beside(y.detach(), finite) + (finite - modes.beside(finite.detach(), finite))


def working(x: Tensor) -> Tensor:
    """``x`` in the dtype that codes are computed in: float32 for float16 and bfloat16, else its own."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


LARGEST_HALF = torch.finfo(torch.float16).max
"""Largest number of float16. The outermost values of a grid may lie beyond it, where half a step is added to a range."""


def narrowed(y: Tensor, dtype: torch.dtype) -> Tensor:
    """``y`` in a dtype; in float16 it saturates, so that no infinity is made of finite numbers.

    Example:
      >>> narrowed(torch.tensor([0.5, -65540.0]), torch.float16)
      tensor([ 5.0000e-01, -6.5504e+04], dtype=torch.float16)
    """
    if dtype == torch.float16 and y.dtype != dtype:
        y = y.clamp(-LARGEST_HALF, LARGEST_HALF)
    return y.to(dtype)


def round_to_grid(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: QScheme) -> Tensor:
    """Quantize and dequantize in kernel order; all three tensors broadcast. No gradient with respect to ``x``."""
    code = (torch.round(x * (1 / scale)) + zero_point).clamp(scheme.qmin, scheme.qmax)
    return (code - zero_point) * scale


def folded(quantize: Callable[[Tensor], Tensor], x: Tensor, factor: Tensor) -> Tensor:
    """``quantize(x * factor) / factor``, and ``x`` where the factor, which broadcasts against ``x``, is 0.

    Example:
      >>> folded(torch.round, torch.tensor([0.3, 0.3]), torch.tensor([10.0, 0.0]))
      tensor([0.3000, 0.3000])
    """
    dead, divisor = ranges.guarded(factor)
    return torch.where(dead, x, quantize(x * divisor) / divisor).to(x.dtype)


def constants(qparams: QParams) -> QParams:
    """The qparams without derivatives; themselves where none can be asked for, as for each token of a generated text."""
    return tree_map(modes.as_constant, qparams) if modes.may_differentiate() else qparams


def fake_quantize(
    x: Tensor,
    qparams: QParams,
    scheme: QScheme,
    order: Order,
    *,
    whole: bool = True,
    factor: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Quantize and dequantize with the straight-through surrogate of LSQ (arXiv:1902.08153).

    Forward ``y = s * (clamp(q, n, p) - z)``, where ``q`` is the code in the given order, not clamped yet, and ``n`` and
    ``p`` are the smallest and largest code. For gradients of any order the function is
    ``y = s * where(n <= q <= p, x / s + c, clamp(q) - z)`` with the constant ``c = q - z - x / s``, so inside
    ``dy/dx = 1``, ``dy/ds = q - z - x / s``, ``dy/dz = 0``; outside ``dy/dx = 0``, ``dy/ds`` is the bound less ``z`` and
    ``dy/dz = -s``.

    Args:
      x: any floating tensor.
      qparams: scale, zero point; ``extras["qmin"]`` and ``extras["qmax"]`` replace the scheme's bounds.
      scheme: the grid; a symmetric one ignores the zero point.
      order: ``"kernel"``, ``"expression"`` or ``"quotient"``, see the top of this file.
      whole: the zero point is made a code: clamped to the bounds and rounded, with a straight-through gradient; otherwise
        it is used as it is.
      factor: compute ``quantize(x * factor) / factor`` as :func:`folded` does; broadcasts against ``x``.
      noise: uniform in [0, 1) and shaped like ``x``: a code inside is rounded stochastically. What is inside, and so the
        mask of the gradient, is decided by rounding to the nearest.

    Returns:
      A tensor like ``x``.

    Example:
      >>> qp = QParams(torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), {})
      >>> fake_quantize(torch.tensor([0.26, -1.3]), qp, QScheme(bits=4), "kernel")
      tensor([ 0.3000, -0.8000])
    """
    return prepared(x, qparams, scheme, order, whole=whole, factor=factor, noise=noise)()


def prepared(
    x: Tensor,
    qparams: QParams,
    scheme: QScheme,
    order: Order,
    *,
    whole: bool = True,
    factor: Tensor | None = None,
    noise: Tensor | None = None,
) -> Callable[[], Tensor]:
    """A thunk that returns :func:`fake_quantize`.

    Scale, zero point and bounds are computed now; ``x`` is rounded when the thunk is called, so that a weight can be
    quantized as late as when its layer starts.
    """
    granularity = scheme.granularity
    work = working(x)
    low, high = expanded_bounds(qparams, scheme, x)
    scale = expand(materialized(qparams.scale), x, granularity)
    zero = None
    if not scheme.symmetric:
        zero = expand(materialized(_zero_point(qparams, scheme, whole)), x, granularity)
    if whole and noise is None and eager.fits(work, scale, low, high, factor):
        reciprocal, shifted = order == "kernel", order == "expression"
        y = eager.prepared(work, scale, zero, (low, high), factor, reciprocal=reciprocal, shifted=shifted)
        return y if work is x else lambda: narrowed(y(), x.dtype)
    if factor is None:  # then what is rounded is ``x`` itself, and the step is the scale
        y = partial(recomputed, _composed, work, work, scale, scale, zero, low, high, order, noise)
    else:
        y = partial(_composed_folded, work, factor, scale, zero, low, high, order, noise)
    return lambda: keeping_layout(narrowed(y(), x.dtype), granularity)


def many(
    qparams: QParams,
    scheme: QScheme,
    order: Order,
    *,
    whole: bool = True,
    share: Callable[[Tensor, QScheme], float] | None = None,
) -> list[Callable[[Tensor], Tensor]]:
    """For each of some tensors, a function that returns its :func:`fake_quantize`: see :class:`~..contracts.Many`.

    Args:
      qparams, scheme: see there.
      order, whole: as of :func:`fake_quantize`.
      share: of a tensor, by what the derivatives of its scale and zero point are multiplied; by default 1.
    """
    scale = qparams.scale
    zero = None if scheme.symmetric else _zero_point(qparams, scheme, whole)
    given = _constants_of(scale, scale, zero, order)
    parts = [[None] * len(scale) if field is None else field.unbind() for field in given]
    return [partial(_one_of_many, _Constants(*own), scheme, order, whole, share) for own in zip(*parts, strict=True)]


def _one_of_many(
    given: _Constants,
    scheme: QScheme,
    order: Order,
    whole: bool,
    share: Callable[[Tensor, QScheme], float] | None,
    x: Tensor,
) -> Tensor:
    """One function of :func:`many`."""
    work = working(x)
    low, high = scheme.qmin, scheme.qmax
    own = 1.0 if share is None or not modes.may_differentiate() else share(x, scheme)
    if whole and eager.fits(work, given.step, low, high):
        scale, zero = _with_derivative(given, own)
        reciprocal, shifted = order == "kernel", order == "expression"
        y = eager.prepared(work, scale, zero, (low, high), reciprocal=reciprocal, shifted=shifted)()
    else:
        y = _evaluated(work, work, given, low, high, order, None, own)
    return y if y.dtype == x.dtype else narrowed(y, x.dtype)


def _with_derivative(given: _Constants, share: float) -> tuple[Tensor, Tensor | None]:
    """Step and zero point, with a share of their derivatives."""
    step, zero = given.step, given.zero
    if given.moved_step is not None:
        step = torch.add(step, given.moved_step, alpha=share)
    if zero is not None and given.moved_zero is not None:
        zero = torch.add(zero, given.moved_zero, alpha=share)
    return step, zero


def encode(x: Tensor, qparams: QParams, scheme: QScheme, order: Order, *, whole: bool = True) -> Codes:
    """The codes, int32, of ``fake_quantize(x, ...)``; ``x`` must be finite. The inverse of :func:`decode`.

    Example:
      >>> qp = QParams(torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), {})
      >>> encode(torch.tensor([0.26, -1.3]), qp, QScheme(bits=4), "kernel").values
      tensor([ 3, -8], dtype=torch.int32)
    """
    work = working(x.detach())
    low, high = expanded_bounds(qparams, scheme, x)
    scale = expand(qparams.scale.detach(), x, scheme.granularity)
    zero = None
    if not scheme.symmetric:
        zero = expand(_zero_point(qparams, scheme, whole).detach(), x, scheme.granularity)
    ratio = _quotient(work, _divisor(scale, order), order)
    code = clamp(_rounded(ratio, zero, order), low, high)
    return Codes(code.to(torch.int32), {})


def decode(
    codes: Codes, qparams: QParams, scheme: QScheme, dtype: torch.dtype = torch.float32, *, whole: bool = True
) -> Tensor:
    """``(code - zero_point) * scale``, computed in float32, or in float64 for that ``dtype``.

    Example:
      >>> qp = QParams(torch.tensor(0.5), torch.tensor(3, dtype=torch.int32), {})
      >>> decode(Codes(torch.tensor([0, 4]), {}), qp, QScheme(bits=4, symmetric=False))
      tensor([-1.5000,  0.5000])
    """
    level = codes.values.to(torch.float64 if dtype == torch.float64 else torch.float32)
    scale = expand(qparams.scale.detach(), level, scheme.granularity)
    if not scheme.symmetric:
        level = level - expand(_zero_point(qparams, scheme, whole).detach(), level, scheme.granularity)
    return narrowed(level * scale, dtype)


def uncoded(qparams: QParams, scheme: QScheme, *, whole: bool = True) -> str:
    """Why values on an integer grid have no codes; empty where they have.

    While a bit width is learned, bounds may lie between two codes; a zero point that is not ``whole`` may be any number.
    """
    low, high = bounds(qparams, scheme)
    for bound in (low, high):
        if isinstance(bound, Tensor) and not bool((bound == bound.round()).all()):
            return "its outermost codes are not whole numbers"
    if isinstance(low, Tensor) and bool((low > high).any()):
        return "its smallest code lies above its largest"
    is_code_by_definition = whole or scheme.symmetric or scheme.dynamic
    if is_code_by_definition:
        return ""
    zero = qparams.zero_point
    is_code = (zero == zero.round()) & (zero >= low) & (zero <= high)
    if bool(is_code.all()):
        return ""
    return "its zero point is not a code: it lies between two, or beyond the outermost"


def nearest(y: Tensor, qparams: QParams, scheme: QScheme) -> Codes:
    """The codes of values ``y`` that lie on the grid already, up to the rounding of ``code * scale``.

    In float64, so that the quotient is nearer to its code than to a tie.
    """
    scale = expand(qparams.scale.detach(), y, scheme.granularity).double()
    level = (y.detach().double() / scale).round()  # the code without its zero point
    if not scheme.symmetric:
        level = level + expand(_zero_point(qparams, scheme, True).detach().double(), y, scheme.granularity)
    low, high = expanded_bounds(qparams, scheme, y)
    return Codes(clamp(level, low, high).to(torch.int32), {})


def _composed_folded(
    x: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    low: Bound,
    high: Bound,
    order: Order,
    noise: Tensor | None,
) -> Tensor:
    """:func:`_composed` with a factor folded in, and ``x`` where the factor is 0."""
    dead, safe = ranges.guarded(factor)
    safe = materialized(safe)
    y = recomputed(_composed, x, x * safe, scale, materialized(scale / safe), zero, low, high, order, noise)
    return torch.where(dead, x, y)


def _composed(
    x: Tensor,
    scaled: Tensor,
    scale: Tensor,
    step: Tensor,
    zero: Tensor | None,
    low: Bound,
    high: Bound,
    order: Order,
    noise: Tensor | None,
) -> Tensor:
    """:func:`fake_quantize` as a composition of torch functions: for small tensors, transforms and compilers.

    The value is ``step L`` with the constant level ``L = clamp(q) - z``. Terms that are 0 carry the derivatives, so that a
    compiler computes nothing for the value that only a derivative needs.

    Args:
      x: the tensor.
      scaled: what is divided by ``scale`` and rounded: ``x``, or ``x f`` with a factor ``f`` folded in.
      scale: the scale ``s``.
      step: distance of two neighbouring outputs: ``s``, or ``s / f``.
      zero: the zero point; ``None`` means 0.
      low, high: outermost codes.
      order: in which order the code is computed.
      noise: uniform numbers to round by; ``None``: to the nearest.
    """
    return _evaluated(x, scaled, _constants_of(scale, step, zero, order), low, high, order, noise)


class _Constants(NamedTuple):
    """What a composition reads beside the tensor itself; scale-shaped, so that it can be computed for many tensors at once.

    Attributes:
      divisor: the scale, or in kernel order its reciprocal.
      step, zero: distance of two neighbouring outputs, and zero point, ``None`` for 0; without derivatives.
      moved_step, moved_zero: 0, with the derivatives of these; ``None`` where they have none.
    """

    divisor: Tensor
    step: Tensor
    zero: Tensor | None
    moved_step: Tensor | None
    moved_zero: Tensor | None


def _constants_of(scale: Tensor, step: Tensor, zero: Tensor | None, order: Order) -> _Constants:
    """See :class:`_Constants`; arguments as of :func:`_composed`."""
    divisor = _divisor(modes.as_constant(scale), order)
    fixed_step, moved_step = _parted(step)
    fixed_zero, moved_zero = (None, None) if zero is None else _parted(zero)
    return _Constants(divisor, fixed_step, fixed_zero, moved_step, moved_zero)


def _parted(value: Tensor) -> tuple[Tensor, Tensor | None]:
    """A tensor without its derivative, and 0 with its derivative; ``None`` where it has none."""
    # a compiler sees no derivative that is none of its program's
    if not modes.may_differentiate() or not (modes.is_compiling() or modes.may_have_derivative(value)):
        return value, None
    fixed = modes.beside(modes.as_constant(value), value)
    return fixed, value - fixed


def _divisor(scale: Tensor, order: Order) -> Tensor:
    return scale.reciprocal() if order == "kernel" else scale


def _evaluated(
    x: Tensor,
    scaled: Tensor,
    given: _Constants,
    low: Bound,
    high: Bound,
    order: Order,
    noise: Tensor | None,
    share: float = 1.0,
) -> Tensor:
    """The rest of :func:`_composed`, with the derivatives of step and zero point multiplied by ``share``."""
    zero = given.zero
    if not modes.may_differentiate():
        clamped = _clamped(_quotient(scaled, given.divisor, order), zero, low, high, order, noise)
        return given.step * (clamped if zero is None else clamped - zero)
    ratio = _quotient(modes.as_constant(scaled), given.divisor, order)
    inside, clamped = _codes(ratio, zero, low, high, order, noise)
    level = clamped if zero is None else clamped - zero
    if given.moved_zero is not None:
        # dy/dz = -s outside: the zero point moves the outermost values; inside it cancels
        level = torch.sub(modes.beside(level, x), torch.where(inside, 0, given.moved_zero), alpha=share)
    # y = step L + (x - const(x)) + (step - const(step)) slope: the last two terms are 0, and give dy/dx = 1 inside and
    # dy/ds = slope, which is L - x / s inside and L outside. addcmul(a, b, c) is a + b c; the inner one is the first two
    within = torch.where(inside, x, 0)
    level = modes.beside(level, x)
    passed = within - modes.beside(within.detach(), within)
    y = torch.addcmul(passed, given.step, level)
    if given.moved_step is None:
        return y
    slope = level - modes.beside(torch.where(inside, ratio, 0), x)
    # in forward mode torch ends the process where addcmul with a factor meets an operand without a tangent under a mode
    y, slope = modes.beside(y, given.moved_step), modes.beside(slope, given.moved_step)
    return torch.addcmul(y, given.moved_step, slope, value=share)


def switched(x: Tensor, y: Tensor, qparams: QParams) -> Tensor:
    """``y``, the quantized ``x``, where ``extras["enabled"]`` of the qparams is on or missing, and ``x`` elsewhere.

    A floating mask ``m`` in [0, 1] mixes the two: ``x + m (y - x)``.
    """
    mask = qparams.extras.get("enabled")
    if mask is None:
        return y
    return torch.where(mask, y, x) if mask.dtype == torch.bool else torch.lerp(x, y, mask.to(x.dtype))


def _quotient(x: Tensor, divisor: Tensor, order: Order) -> Tensor:
    """The quotient that is rounded, without a zero point."""
    return x * divisor if order == "kernel" else x / divisor


def _codes(
    ratio: Tensor, zero: Tensor | None, low: Bound, high: Bound, order: Order, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The mask of codes inside the bounds, and all codes, clamped.

    With noise, what is inside is drawn; where the nearest code lies outside, the bound stays, whatever the noise says.
    """
    code = _rounded(ratio, zero, order)
    clamped = clamp(code, low, high)
    inside = clamped == code
    if noise is None:
        return inside, clamped
    drawn = clamp(_rounded(ratio, zero, order, noise), low, high)
    return inside, torch.where(inside, drawn.detach(), clamped)


def _clamped(ratio: Tensor, zero: Tensor | None, low: Bound, high: Bound, order: Order, noise: Tensor | None) -> Tensor:
    """The second of :func:`_codes`; without noise nothing needs to know what is inside."""
    if noise is None:
        return clamp(_rounded(ratio, zero, order), low, high)
    return _codes(ratio, zero, low, high, order, noise)[1]


def _rounded(ratio: Tensor, zero: Tensor | None, order: Order, noise: Tensor | None = None) -> Tensor:
    """The code of a quotient, before clamping."""
    if zero is None:
        return formats.whole(ratio, noise)
    return formats.whole(ratio + zero, noise) if order == "expression" else formats.whole(ratio, noise) + zero


def _zero_point(qparams: QParams, scheme: QScheme, whole: bool) -> Tensor:
    """The zero point in the dtype of the scale; a whole one clamped and rounded with a straight-through gradient."""
    zero = qparams.zero_point.to(qparams.scale.dtype)
    if not whole:
        return zero
    low, high = bounds(qparams, scheme)
    nearest = clamp(zero, low, high).round()
    # 0 is added there, too, so that no zero point is -0.0: then 0.0 would be quantized to another zero
    return ste(zero, nearest) if modes.may_differentiate() else nearest + 0
