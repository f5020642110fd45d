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
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from sophq_func.core.modes import has_derivative, is_compiling, is_recording, is_wrapped
from sophq_func.core.types import Args
from sophq_func.numerics.eager_forward import Point, Rounding, value
from sophq_func.numerics.eager_gradients import gradient, mask_and_slope, sum_like
from sophq_func.numerics.ranges import guarded

LARGE = 2**14
"""Smallest size for which the Function pays; below it, call overhead dominates."""

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


def _positional(forward: F) -> F:
    """Give a ``forward`` that is always called with all arguments, in order, a signature of ``*args``.

    At each call ``Function.apply`` reads the signature of ``forward`` and binds the arguments to it, to fill in defaults:
    a third of the time of a forward on a small tensor. To ``*args`` nothing has to be bound.
    """
    signature = inspect.Signature([inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


class _FakeQuantize(torch.autograd.Function):
    """The fake-quantized tensor; its gradient is that of ``eager_gradients``. Arguments: a :class:`Point`, a rounding."""

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
        return value(Point(x, step, zero, divisor, factor, dead), rounding)

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
        inside, slope = mask_and_slope(p, ctx.rounding)
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
        return gradient(g, Point(x, step, zero, divisor, factor, dead), rounding)

    @staticmethod
    def setup_context(ctx: _Context, inputs: Args, output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs)

    @staticmethod
    def backward(ctx: _Context, ggx: Tensor, ggr: Tensor, ggz: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        g, *point = ctx.saved_tensors
        p = Point(*point)
        inside, slope = mask_and_slope(p, ctx.rounding)
        to_g = torch.where(inside, ggx, 0) + slope * ggr
        # x has no second derivative, nor have the four constants at the end; without a zero point the step has none either
        if p.zero is None:
            return to_g, *(None,) * 7
        g_outside = torch.where(inside, 0, g)
        to_g = to_g - torch.where(inside, 0, p.step * ggz)
        to_step, to_zero = -sum_like(g_outside * ggz, p.step), -sum_like(g_outside * ggr, p.zero)
        return to_g, None, to_step, to_zero, *(None,) * 4

    @staticmethod
    def jvp(  # type: ignore[override]
        ctx: _Context, tg: Tensor | None, tx: Tensor | None, tr: Tensor | None, tz: Tensor | None, *_: None
    ) -> tuple[Tensor, ...]:
        g, *point = ctx.saved_tensors
        p = Point(*point)
        tg = torch.zeros_like(g) if tg is None else tg
        inside, slope = mask_and_slope(p, ctx.rounding)
        to_step = sum_like(slope * tg, p.step)
        if p.zero is None:
            return torch.where(inside, tg, 0), to_step, torch.zeros_like(p.step)
        tr = torch.zeros_like(p.step) if tr is None else tr
        tz = torch.zeros_like(p.zero) if tz is None else tz
        g_outside, tg_outside = torch.where(inside, 0, g), torch.where(inside, 0, tg)
        to_zero = -sum_like(g_outside * tr + tg_outside * p.step, p.zero)
        return torch.where(inside, tg, 0), to_step - sum_like(g_outside * tz, p.step), to_zero


def _save(ctx: _Context, inputs: Args) -> None:
    """Keep what a derivative needs. Not the output: a model may write into it, which would spoil a saved tensor."""
    *tensors, ctx.rounding = inputs
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
