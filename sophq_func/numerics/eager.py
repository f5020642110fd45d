"""Fake quantization as one ``autograd.Function``, for large tensors in eager: few passes over memory, no saved mask.

It computes what the composition in :mod:`sophq_func.numerics.affine` computes: the value, in
:mod:`~sophq_func.numerics.eager_forward`, the gradient, in :mod:`~sophq_func.numerics.eager_gradients`, and all further
derivatives, here.

With a factor ``d`` folded in, the output is ``Q(x d) / d``, and ``x`` where ``d`` is 0. That is a grid of step
``r = s / d``, which takes the place of ``s`` in every derivative. Autograd differentiates ``r``; ``s`` and ``d``
themselves enter the function as constants.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from sophq_func.core.modes import (
    has_derivative,
    is_compiling,
    is_forward_mode,
    is_recorded_for_compiler,
    is_recording,
    is_wrapped,
    may_have_derivative,
)
from sophq_func.core.types import Args
from sophq_func.numerics.eager_forward import Point, Rounding, aligned, aligned_to, value
from sophq_func.numerics.eager_gradients import gradient, mask_and_slope, sum_like
from sophq_func.numerics.ranges import guarded

LARGE = 2**14
"""Smallest size for which the Function pays; below it, call overhead dominates."""

LARGE_IN_TRANSFORMS = 2**18
"""The same under a transform of ``torch.func``, where a Function costs as much as some twenty operations.

Of a member, where the transform is ``vmap``: with 2 ** 14, gradients of single examples took a third longer in a network of
small layers.
"""

LARGE_IN_FORWARD_MODE = 2**16
"""The same where tangents are computed: one pass of the Function's rule against some ten of the composition.

With 2 ** 18, ``jvp`` took a fifth longer in a network of three linear layers, and Hessian-vector products a quarter.
"""

DIFFERENTIATED = (1, 2, 3)
"""Where ``x``, step and zero point lie among the arguments of the backward pass."""

CONSTANTS = len(Point._fields) - len(DIFFERENTIATED) + 1
"""How many arguments behind them have no derivative: the rest of a :class:`Point`, and a rounding."""

F = TypeVar("F")


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
        and x.numel() >= _least_size(x, scale)
        and not is_recorded_for_compiler()
        and all(t.dtype == x.dtype and type(t) in (Tensor, torch.nn.Parameter) for t in floats)
        and type(low) is type(high)
        and _is_constant(low)
        and _is_constant(high)
    )


def _least_size(x: Tensor, scale: Tensor) -> int:
    """From which size on the Function pays, where these tensors are computed with now."""
    if not is_wrapped(x, scale):
        return LARGE
    return LARGE_IN_FORWARD_MODE if is_forward_mode() else LARGE_IN_TRANSFORMS


def _is_constant(bound: Tensor | int) -> bool:
    """Whether a bound is the same for all elements, and not differentiated; it may be mapped."""
    return isinstance(bound, int) or not (bound.ndim or may_have_derivative(bound))


def prepared(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bounds: tuple[Tensor | int, Tensor | int],
    factor: Tensor | None = None,
    *,
    reciprocal: bool,
    shifted: bool,
) -> Callable[[], Tensor]:
    """A thunk that returns ``s (clamp(q, low, high) - z)``.

    Args:
      x: the tensor; scale, zero point and factor broadcast against it.
      scale, zero, factor: see :class:`Point`.
      bounds: the smallest and the largest code, as :func:`fits` allows them.
      reciprocal, shifted: see :class:`Rounding`.
    """
    low, high = bounds
    fixed_scale = scale.detach()
    divisor = fixed_scale.reciprocal() if reciprocal else fixed_scale
    point = Point(x, scale, zero, divisor)
    if factor is not None:
        dead, safe = guarded(factor)
        point = Point(x, scale / safe, zero, divisor, safe.detach(), dead)
    rounding = Rounding(None, None, reciprocal, shifted)
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        # one dtype, so that bounds with axes of members in front do not widen the codes
        point = point._replace(low=low.detach().to(x.dtype), high=high.detach().to(x.dtype))
    elif isinstance(low, int) and isinstance(high, int):
        rounding = rounding._replace(low=low, high=high)
    return partial(_without_need, _FakeQuantize, point, rounding)


def _without_need(function: type[torch.autograd.Function], tensors: Sequence[Tensor | None], rounding: Rounding) -> Any:
    """The result of a function, applied only where a derivative may be asked for: else that only costs time."""
    evaluate: Callable[..., Any] = function.apply if has_derivative(*tensors) else function.forward
    return evaluate(*tensors, rounding)


def _with_members(tensor: Tensor | None, axis: int | None) -> Tensor | None:
    """A tensor with the axis of a ``vmap`` in front; one of length 1 where the tensor is not mapped."""
    if tensor is None:
        return None
    return tensor.unsqueeze(0) if axis is None else tensor.movedim(axis, 0)


def _positional(forward: F) -> F:
    """Give a ``forward`` that is always called with all arguments, in order, a signature of ``*args``.

    At each call ``Function.apply`` reads the signature of ``forward`` and binds the arguments to it, to fill in defaults:
    a third of the time of a forward on a small tensor. To ``*args`` nothing has to be bound.
    """
    signature = inspect.Signature([inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


class _MapInfo(Protocol):
    """What a rule for ``vmap`` is told."""

    batch_size: int


class _FakeQuantize(torch.autograd.Function):
    """The fake-quantized tensor; its gradient is that of ``eager_gradients``. Arguments: a :class:`Point`, a rounding."""

    @staticmethod
    @_positional
    def forward(*args: Any) -> Tensor:
        *point, rounding = args
        return value(Point(*point), rounding)

    @staticmethod
    def setup_context(ctx: _Context, inputs: Args, output: Tensor) -> None:
        _save(ctx, inputs)

    @staticmethod
    def vmap(info: _MapInfo, in_dims: Args, *args: Any) -> tuple[Tensor, int]:
        """Fold the mapped axis in: the members of a batch are computed one after the other, in the cache.

        The rule that torch can generate would run :func:`whole_value` on all of them: several times as long, with several
        temporary tensors of the size of the result.
        """
        *point, rounding = args
        folded = [_with_members(t, axis) for t, axis in zip(point, in_dims[:-1], strict=True)]
        return _without_need(_FakeQuantize, folded, rounding._replace(axes=rounding.axes + 1)), 0

    @staticmethod
    def backward(ctx: _Context, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        p = Point(*ctx.saved_tensors)
        function = _Backward.apply if is_recording(g, *p) else _Backward.forward
        gx, gr, gz = function(g, *p, ctx.rounding)  # type: ignore[no-untyped-call]
        return gx, gr, None if p.zero is None else gz, *(None,) * CONSTANTS

    @staticmethod
    def jvp(ctx: _Context, tx: Tensor | None, tr: Tensor | None, tz: Tensor | None, *_: None) -> Tensor:  # type: ignore[override]
        axes = ctx.rounding.axes
        p = aligned(Point(*ctx.saved_tensors), axes)
        inside, slope = mask_and_slope(p, ctx.rounding)
        tangent = torch.zeros_like(slope) if tx is None else torch.where(inside, tx, 0)
        if tr is not None:
            tangent = tangent + slope * aligned_to(p.x, tr, axes)
        if tz is not None:
            tangent = tangent - torch.where(inside, 0, p.step * aligned_to(p.x, tz, axes))
        return tangent


class _Backward(torch.autograd.Function):
    """The gradient ``(gx, gr, gz)``, and its own derivatives.

    A function of its own, so that the gradient stays fast where torch records it for the next derivative. Arguments: ``g``,
    a :class:`Point`, a rounding. Without a zero point ``gz`` is zeros, since a function must return tensors.
    """

    @staticmethod
    @_positional
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        g, *point, rounding = args
        return gradient(g, Point(*point), rounding)

    @staticmethod
    def setup_context(ctx: _Context, inputs: Args, output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs)

    @staticmethod
    def vmap(info: _MapInfo, in_dims: Args, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Fold the mapped axis in, see the rule of the function."""
        g, *point, rounding = args
        folded = [_with_members(t, axis) for t, axis in zip((g, *point), in_dims[:-1], strict=True)]
        # each member gets a gradient of its own, also to what is not mapped
        for i in DIFFERENTIATED:
            t = folded[i]
            folded[i] = None if t is None else t.expand(info.batch_size, *t.shape[1:])
        return _without_need(_Backward, folded, rounding._replace(axes=rounding.axes + 1)), (0, 0, 0)

    @staticmethod
    def backward(ctx: _Context, ggx: Tensor, ggr: Tensor, ggz: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        g, *point = ctx.saved_tensors
        axes, given = ctx.rounding.axes, Point(*point)
        p = aligned(given, axes)
        inside, slope = mask_and_slope(p, ctx.rounding)
        to_g = torch.where(inside, ggx, 0) + slope * aligned_to(p.x, ggr, axes)
        # x has no second derivative, nor have the constants at the end; without a zero point the step has none either
        if p.zero is None or given.zero is None:
            return sum_like(to_g, g), *(None,) * (3 + CONSTANTS)
        ggz = aligned_to(p.x, ggz, axes)
        g_outside = torch.where(inside, 0, g)
        to_g = to_g - torch.where(inside, 0, p.step * ggz)
        to_step = -sum_like(g_outside * ggz, p.step).reshape(given.step.shape)
        to_zero = -sum_like(g_outside * aligned_to(p.x, ggr, axes), p.zero).reshape(given.zero.shape)
        return sum_like(to_g, g), None, to_step, to_zero, *(None,) * CONSTANTS

    @staticmethod
    def jvp(  # type: ignore[override]
        ctx: _Context, tg: Tensor | None, tx: Tensor | None, tr: Tensor | None, tz: Tensor | None, *_: None
    ) -> tuple[Tensor, ...]:
        g, *point = ctx.saved_tensors
        axes, given = ctx.rounding.axes, Point(*point)
        p = aligned(given, axes)
        tg = torch.zeros_like(g) if tg is None else tg
        inside, slope = mask_and_slope(p, ctx.rounding)
        to_x = sum_like(torch.where(inside, tg, 0), p.x)
        to_step = sum_like(slope * tg, p.step)
        if p.zero is None or given.zero is None:
            return to_x, to_step.reshape(given.step.shape), torch.zeros_like(given.step)
        tr = torch.zeros_like(p.step) if tr is None else aligned_to(p.x, tr, axes)
        tz = torch.zeros_like(p.zero) if tz is None else aligned_to(p.x, tz, axes)
        g_outside, tg_outside = torch.where(inside, 0, g), torch.where(inside, 0, tg)
        to_step = to_step - sum_like(g_outside * tz, p.step)
        to_zero = -sum_like(g_outside * tr + tg_outside * p.step, p.zero)
        return to_x, to_step.reshape(given.step.shape), to_zero.reshape(given.zero.shape)


def _save(ctx: _Context, inputs: Args) -> None:
    """Keep what a derivative needs. Not the output: a model may write into it, which would spoil a saved tensor."""
    *tensors, ctx.rounding = inputs
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
