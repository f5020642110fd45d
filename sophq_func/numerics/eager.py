"""Fake quantization as one ``autograd.Function``, for large tensors in eager: few passes over memory, no saved mask.

It computes what the composition in :mod:`sophq_func.numerics.affine` computes: the value and all derivatives. Let ``m`` be
the mask of codes inside ``[low, high]``, ``y`` the output and ``g`` its gradient. Then, with each sum over the elements
that share a scale::

    gx = m g
    gs = sum((y - m x) g) / s
    gz = -s sum((1 - m) g)

Mask and codes are recomputed in backward from the quotient ``v`` of ``x`` and the scale. A code is inside iff ``v`` lies
between ``low - 1/2`` and ``high + 1/2``; these bounds are ties, which round to even, so that a bound is inside iff its
integer is even.

With a factor ``d`` folded in, the output is ``Q(x d) / d``, and ``x`` where ``d`` is 0. That is a grid of step
``r = s / d``, which takes the place of ``s`` in every derivative. Autograd differentiates ``r``; ``s`` and ``d``
themselves enter the function as constants.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import repeat
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from sophq_func.core.modes import has_derivative, is_compiling, is_recording, is_wrapped
from sophq_func.core.types import Args
from sophq_func.numerics.ranges import guarded

LARGE = 2**14
"""Smallest size for which the Function pays; below it, call overhead dominates."""

BLOCK = 2**17
"""Elements that a CPU processes at once: 512 KiB of float32 stay in a second-level cache from one pass to the next."""

BACKWARD_BLOCK = 2**16
"""The same for the backward pass, which has five tensors in use at once: with 2 ** 17 it took a third longer."""

_Bound: TypeAlias = Any
"""A bound of the codes: an int or a tensor of shape ``()``. Both bounds are of one kind, as ``Tensor.clamp`` requires."""

F = TypeVar("F")


class Rounding(NamedTuple):
    """How a quotient becomes a code; nothing of it is differentiated.

    Attributes:
      low: the smallest code, an int or, where it is data, a tensor of shape ``()``.
      high: the largest code, of the same kind.
      reciprocal: the quotient is ``x * (1 / s)`` instead of ``x / s``.
      shifted: the zero point is added before rounding instead of after.
    """

    low: _Bound
    high: _Bound
    reciprocal: bool
    shifted: bool


class Point(NamedTuple):
    """Where the function and its derivatives are evaluated; all tensors broadcast against ``x``.

    Attributes:
      x: the tensor.
      step: the step ``r = s / d`` of the grid in ``x``: the scale, divided by the factor where there is one.
      zero: the zero point; ``None`` means 0.
      divisor: the scale ``s``, by which ``x`` is divided; with ``Rounding.reciprocal`` it is ``1 / s``, and ``x`` is
        multiplied with it. A constant.
      factor: the factor ``d``, with 1 where it is 0; a constant.
      dead: the mask where the factor is 0, and the output is ``x``; a constant.
    """

    x: Tensor
    step: Tensor
    zero: Tensor | None
    divisor: Tensor
    factor: Tensor | None = None
    dead: Tensor | None = None


class _Context(Protocol):
    """What the functions use of autograd's context, and the rounding that they keep there."""

    saved_tensors: tuple[Tensor, ...]
    rounding: Rounding

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def save_for_forward(self, *tensors: Tensor | None) -> None: ...


def fits(x: Tensor, scale: Tensor, low: Tensor | int, high: Tensor | int, factor: Tensor | None = None) -> bool:
    """Whether :func:`prepared` takes these tensors: eager, large, no subclasses, of one floating dtype."""
    floats = (x, scale) if factor is None else (x, scale, factor)
    return (
        not is_compiling()
        and x.numel() >= LARGE
        and all(t.dtype == x.dtype and type(t) in (Tensor, torch.nn.Parameter) for t in floats)
        and type(low) is type(high)
        and _is_constant(low)
        and _is_constant(high)
    )


def _is_constant(bound: Tensor | int) -> bool:
    """Whether a bound is the same for all elements, and neither differentiated nor mapped."""
    return isinstance(bound, int) or not (bound.ndim or bound.requires_grad or is_wrapped(bound))


def prepared(
    x: Tensor, scale: Tensor, zero: Tensor | None, rounding: Rounding, factor: Tensor | None = None
) -> Callable[[], Tensor]:
    """A thunk that returns ``s (clamp(q, low, high) - z)``; scale, zero point and factor broadcast against ``x``."""
    fixed_scale = scale.detach()
    divisor = fixed_scale.reciprocal() if rounding.reciprocal else fixed_scale
    point = Point(x, scale, zero, divisor)
    if factor is not None:
        dead, safe = guarded(factor)
        point = Point(x, scale / safe, zero, divisor, safe.detach(), dead)
    # without derivatives, ``apply`` would only cost the time of its call
    function = _FakeQuantize.apply if has_derivative(*point) else _FakeQuantize.forward
    return partial(function, *point, rounding)


def _quotient(p: Point, rounding: Rounding, out: Tensor | None = None) -> Tensor:
    """The number ``v`` that is rounded, in a new tensor or in ``out``; it has the zero point in it where that is shifted."""
    x = p.x if p.factor is None else torch.mul(p.x, p.factor, out=out)
    v = torch.mul(x, p.divisor, out=out) if rounding.reciprocal else torch.div(x, p.divisor, out=out)
    return v if p.zero is None or not rounding.shifted else torch.add(v, p.zero, out=out)


def _is_inside(v: Tensor, p: Point, rounding: Rounding) -> Tensor:
    """The mask of quotients whose codes lie inside the bounds."""
    if p.zero is None or rounding.shifted:
        return (v >= _last_inside(rounding.low, -1, v.dtype)) & (v <= _last_inside(rounding.high, 1, v.dtype))
    # the code is round(v) + z, so that the bounds of round(v) are those of the code less z
    lowest, highest = _last_inside_of(rounding.low - p.zero, -1), _last_inside_of(rounding.high - p.zero, 1)
    return (v >= lowest) & (v <= highest)


def _last_inside(code: int | Tensor, side: int, dtype: torch.dtype) -> float | Tensor:
    """The outermost quotient that is rounded to an outermost code; ``side`` is 1 for the largest, -1 for the smallest.

    It is the tie beyond the code, or the number before that where the tie is rounded away from the code.
    """
    return _last_inside_of(code.to(dtype), side) if isinstance(code, Tensor) else _last_inside_int(code, side, dtype)


@cache
def _last_inside_int(code: int, side: int, dtype: torch.dtype) -> float:
    tie = torch.tensor(code + side / 2, dtype=dtype)
    if code % 2 == 0:
        return float(tie)
    inwards = torch.tensor(-side * math.inf, dtype=dtype)
    return float(torch.nextafter(tie, inwards))


def _last_inside_of(codes: Tensor, side: int) -> Tensor:
    """:func:`_last_inside` for codes in a tensor. Of one between two integers, the integer further inside counts."""
    whole = codes.floor() if side > 0 else codes.ceil()
    tie = whole + side / 2
    inwards = torch.full_like(tie, -side * math.inf)
    return torch.where(whole.remainder(2) == 0, tie, torch.nextafter(tie, inwards))


@cache
def _first_outside_int(code: int, side: int, dtype: torch.dtype) -> float:
    """The innermost quotient beyond the outermost code: the neighbour of :func:`_last_inside`."""
    inside = torch.tensor(_last_inside_int(code, side, dtype), dtype=dtype)
    outwards = torch.tensor(side * math.inf, dtype=dtype)
    return float(torch.nextafter(inside, outwards))


def _sum_like(value: Tensor, like: Tensor) -> Tensor:
    """The sum over all axes along which ``like`` is broadcast."""
    return value.sum_to_size(like.shape) if like.ndim else value.sum()


def _blocks(size: int, like: Tensor, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Corresponding views, of about ``size`` elements, of ``like`` and of tensors that broadcast against it.

    They are cut along the first axis; tensors of shape ``()`` or of length 1 along it are passed whole to each block.
    """
    count = round(like.numel() / size)
    whole: list[Any] = [like, *tensors]
    # a GPU has no use for blocks: each would be a kernel of its own
    if count <= 1 or not like.is_cpu:
        return iter((tuple(whole),))
    with_axes = [i for i, t in enumerate(whole) if t is not None and t.ndim]
    # where all are contiguous and alike, the first axis, which may be short, need not be the one to cut
    if all(whole[i].shape == like.shape and whole[i].is_contiguous() for i in with_axes):
        for i in with_axes:
            whole[i] = whole[i].view(-1)
    length = len(whole[0])
    cut = [i for i in with_axes if len(whole[i]) != 1 or length == 1]
    parts = [t.chunk(count) if i in cut else repeat(t) for i, t in enumerate(whole)]
    return zip(*parts, strict=False)  # not strict, since a repeated tensor has no end; ``like`` is cut and has one


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    """The sums of all blocks as the sum that ``like`` has: side by side where ``like`` was cut, too, else added up."""
    if len(parts) == 1:
        return parts[0].reshape(like.shape)
    was_cut = sum(part.numel() for part in parts) == like.numel()
    joined = torch.cat(parts) if was_cut else torch.stack(parts).sum(0)
    return joined.reshape(like.shape)


def _gradient_parts(g: Tensor, p: Point, rounding: Rounding, out: Tensor, scratch: Sequence[Tensor]) -> Tensor:
    """Write ``m g`` to ``out``, and return ``g dy/dr`` in the second of two ``scratch`` tensors."""
    v, code = scratch
    _quotient(p, rounding, out=v)
    torch.round(v, out=code)
    if p.zero is not None and not rounding.shifted:
        code.add_(p.zero)
    code.clamp_(rounding.low, rounding.high)
    if p.zero is None and isinstance(rounding.low, int) and isinstance(rounding.high, int):
        # one pass instead of the four of two comparisons, their conjunction and a selection: this kernel returns its first
        # argument where the second lies strictly between the limits, and 0 elsewhere
        limits = _first_outside_int(rounding.low, -1, v.dtype), _first_outside_int(rounding.high, 1, v.dtype)
        masked = torch.ops.aten.hardtanh_backward.grad_input
        masked(g, v, *limits, grad_input=out)
        slope = code.sub_(masked(v, v, *limits, grad_input=v))  # less v inside, less 0 outside
    else:
        inside = _is_inside(v, p, rounding)
        torch.where(inside, g, g.new_zeros(()), out=out)
        slope = code.sub_(_subtrahend(v, inside, p, rounding))
    return slope.mul_(g)


def _subtrahend(v: Tensor, inside: Tensor, p: Point, rounding: Rounding) -> Tensor:
    """The number to subtract from the code for ``dy/dr``: ``x / r + z`` inside the bounds, and ``z`` outside."""
    if p.zero is None or rounding.shifted:  # here ``v`` is ``x / r + z``
        return torch.where(inside, v, 0 if p.zero is None else p.zero)
    return torch.where(inside, v, 0) + p.zero


def _mask_and_slope(p: Point, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """The mask ``dy/dx``, and the slope ``dy/dr``.

    They are constants, but for the slope of codes outside, which has a derivative with respect to the zero point.
    """
    fixed = Point._make(None if t is None else t.detach() for t in p)
    v = _quotient(fixed, rounding)
    inside = _is_inside(v, fixed, rounding)
    code = v.round() if rounding.shifted or fixed.zero is None else v.round() + fixed.zero
    slope = code.clamp(rounding.low, rounding.high) - _subtrahend(v, inside, fixed, rounding)
    if p.dead is not None:  # there y = x
        inside, slope = inside | p.dead, torch.where(p.dead, 0, slope)
    if p.zero is not None and fixed.zero is not None:
        # a term that is 0: for second derivatives, the slope outside is the bound less the zero point
        slope = slope - torch.where(inside, 0, p.zero - fixed.zero)
    return inside, slope


def _output(v: Tensor, p: Point, rounding: Rounding) -> Tensor:
    """The output from the quotient ``v``, in new tensors, as transforms need it."""
    code = v.round() if rounding.shifted or p.zero is None else v.round() + p.zero
    code = code.clamp(rounding.low, rounding.high)
    return (code if p.zero is None else code - p.zero) * p.step


def _write_output(v: Tensor, p: Point, rounding: Rounding) -> None:
    """:func:`_output`, written over the quotient."""
    v.round_()
    if p.zero is None:
        v.clamp_(rounding.low, rounding.high)
    elif rounding.shifted:
        v.clamp_(rounding.low, rounding.high).sub_(p.zero)
    else:
        v.add_(p.zero).clamp_(rounding.low, rounding.high).sub_(p.zero)
    v.mul_(p.step)


def _with_dead(x: Tensor, y: Tensor, dead: Tensor | None) -> Tensor:
    """``y``, with the elements of ``x`` where the factor is 0; may write into ``y``.

    Mostly the factor is that of a BatchNorm, one a channel, and few or none are 0: only these channels are copied, where
    ``torch.where`` would read and write the whole tensor.
    """
    if dead is None:
        return y
    axes = [axis for axis, size in enumerate(dead.shape) if size > 1]
    if len(axes) != 1 or not x.is_cpu or is_wrapped(x, y, dead):
        return torch.where(dead, x, y)
    channels = dead.reshape(-1).nonzero().reshape(-1)
    if len(channels) == 0:
        return y
    return y.index_copy_(axes[0], channels, x.index_select(axes[0], channels))


def _positional(forward: F) -> F:
    """Give a ``forward`` that is always called with all arguments, in order, a signature of ``*args``.

    At each call ``Function.apply`` reads the signature of ``forward`` and binds the arguments to it, to fill in defaults:
    a third of the time of a forward on a small tensor. To ``*args`` nothing has to be bound.
    """
    signature = inspect.Signature([inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


class _FakeQuantize(torch.autograd.Function):
    """The fake-quantized tensor; see the top of this file for its gradient. Arguments: a :class:`Point`, a rounding."""

    generate_vmap_rule = True

    @staticmethod
    @_positional
    def forward(
        x: Tensor,
        step: Tensor,
        zero: Tensor | None,
        divisor: Tensor,
        factor: Tensor | None,
        dead: Tensor | None,
        rounding: Rounding,
    ) -> Tensor:
        p = Point(x, step, zero, divisor, factor, dead)
        if is_wrapped(*p):
            return _with_dead(x, _output(_quotient(p, rounding), p, rounding), dead)
        y = torch.empty_like(x)
        for y_block, *point in _blocks(BLOCK, y, *p):
            block = Point(*point)
            _write_output(_quotient(block, rounding, out=y_block), block, rounding)
        return _with_dead(x, y, dead)

    @staticmethod
    def setup_context(ctx: _Context, inputs: Args, output: Tensor) -> None:
        _save(ctx, inputs)

    @staticmethod
    def backward(ctx: _Context, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        p = Point(*ctx.saved_tensors)
        function = _Backward.apply if is_recording(g, *p) else _Backward.forward
        gx, gr, gz = function(g, *p, ctx.rounding)  # type: ignore[no-untyped-call]
        # none for divisor, factor, dead and rounding, which are constants
        return gx, gr, None if p.zero is None else gz, *(None,) * 4

    @staticmethod
    def jvp(ctx: _Context, tx: Tensor | None, tr: Tensor | None, tz: Tensor | None, *_: None) -> Tensor:  # type: ignore[override]
        p = Point(*ctx.saved_tensors)
        inside, slope = _mask_and_slope(p, ctx.rounding)
        tangent = torch.zeros_like(p.x) if tx is None else torch.where(inside, tx, 0)
        if tr is not None:
            tangent = tangent + slope * tr
        if tz is not None:
            tangent = tangent - torch.where(inside, 0, p.step * tz)
        return tangent


class _Backward(torch.autograd.Function):
    """The gradient ``(gx, gr, gz)``, and its own derivatives.

    A function of its own, so that the gradient stays fast where torch records it for the next derivative. Arguments: ``g``,
    a :class:`Point`, a rounding. Without a zero point ``gz`` is zeros, since a function must return tensors.
    """

    generate_vmap_rule = True

    @staticmethod
    @_positional
    def forward(
        g: Tensor,
        x: Tensor,
        step: Tensor,
        zero: Tensor | None,
        divisor: Tensor,
        factor: Tensor | None,
        dead: Tensor | None,
        rounding: Rounding,
    ) -> tuple[Tensor, Tensor, Tensor]:
        p = Point(x, step, zero, divisor, factor, dead)
        if is_wrapped(g, *p):
            inside, slope = _mask_and_slope(p, rounding)
            gx = torch.where(inside, g, 0)
            gz = torch.zeros_like(step) if zero is None else _sum_like((gx - g) * step, zero)
            return gx, _sum_like(slope * g, step), gz
        gx = torch.empty_like(x)
        step_sums: list[Tensor] = []
        zero_sums: list[Tensor] = []
        scratch: list[Tensor] = []
        for g_block, gx_block, *point in _blocks(BACKWARD_BLOCK, g, gx, *p):
            block = Point(*point)
            if not scratch or scratch[0].shape != gx_block.shape:  # for the first block, and again for a shorter last one
                scratch = [torch.empty_like(gx_block), torch.empty_like(gx_block)]
            terms = _gradient_parts(g_block, block, rounding, gx_block, scratch)
            # cloned where there is nothing to add up: the next block overwrites the scratch tensors
            step_sums.append(terms.clone() if terms.shape == block.step.shape else _sum_like(terms, block.step))
            if block.zero is not None:
                minus_outside = gx_block - g_block  # -(1 - m) g
                if block.dead is not None:
                    minus_outside.masked_fill_(block.dead, 0)
                zero_sums.append(_sum_like(minus_outside * block.step, block.zero))
        gr = _joined(step_sums, step)
        gz = torch.zeros_like(step) if zero is None else _joined(zero_sums, zero)
        if dead is not None:
            gr = gr.masked_fill(dead, 0)
        return _with_dead(g, gx, dead), gr, gz

    @staticmethod
    def setup_context(ctx: _Context, inputs: Args, output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs)

    @staticmethod
    def backward(ctx: _Context, ggx: Tensor, ggr: Tensor, ggz: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        g, *point = ctx.saved_tensors
        p = Point(*point)
        inside, slope = _mask_and_slope(p, ctx.rounding)
        to_g = torch.where(inside, ggx, 0) + slope * ggr
        # x has no second derivative, nor have the four constants at the end; without a zero point the step has none either
        if p.zero is None:
            return to_g, *(None,) * 7
        g_outside = torch.where(inside, 0, g)
        to_g = to_g - torch.where(inside, 0, p.step * ggz)
        to_step, to_zero = -_sum_like(g_outside * ggz, p.step), -_sum_like(g_outside * ggr, p.zero)
        return to_g, None, to_step, to_zero, *(None,) * 4

    @staticmethod
    def jvp(  # type: ignore[override]
        ctx: _Context, tg: Tensor | None, tx: Tensor | None, tr: Tensor | None, tz: Tensor | None, *_: None
    ) -> tuple[Tensor, ...]:
        g, *point = ctx.saved_tensors
        p = Point(*point)
        tg = torch.zeros_like(g) if tg is None else tg
        inside, slope = _mask_and_slope(p, ctx.rounding)
        to_step = _sum_like(slope * tg, p.step)
        if p.zero is None:
            return torch.where(inside, tg, 0), to_step, torch.zeros_like(p.step)
        tr = torch.zeros_like(p.step) if tr is None else tr
        tz = torch.zeros_like(p.zero) if tz is None else tz
        g_outside, tg_outside = torch.where(inside, 0, g), torch.where(inside, 0, tg)
        to_zero = -_sum_like(g_outside * tr + tg_outside * p.step, p.zero)
        return torch.where(inside, tg, 0), to_step - _sum_like(g_outside * tz, p.step), to_zero


def _save(ctx: _Context, inputs: Args) -> None:
    """Keep what a derivative needs. Not the output: a model may write into it, which would spoil a saved tensor."""
    *tensors, ctx.rounding = inputs
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
