"""Run a model on the integers of an artifact, as a chip does: products and sums in int32 between two grids.

A tensor is noted as integers when it equals ``level * scale``, where ``level = code - zero_point``. Convolutions, linear
layers, matrix products and additions compute with the levels of noted tensors; operations that only move data, and ReLU,
pass them on. The next quantizer brings int32 sums onto its grid with a fixed-point multiplier (arXiv:1712.05877, section
2.2). Every other operation computes in floating point, with the real numbers.

Products are summed in float64, which is exact for integers below 2 ** 53; each sum must fit in int32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sophq_func.core.errors import StateError, explain
from sophq_func.core.modes import writes_into
from sophq_func.core.operations import DROPOUTS, MOVES, called
from sophq_func.core.pytree import tensors
from sophq_func.core.types import Args, Kwargs, Output
from sophq_func.model.runner import Runner
from sophq_func.model.schedule import Schedule
from sophq_func.numerics.affine import working
from sophq_func.numerics.granularity import PerTensor
from sophq_func.numerics.layout import expand
from sophq_func.numerics.ranges import min_max, range_to_qparams
from sophq_func.numerics.scheme import QScheme

INT32 = torch.iinfo(torch.int32)
SAME = frozenset(("clone", "contiguous", "detach", "float", "to", "type_as", *DROPOUTS))
"""Operations that return their first operand with the same numbers; dropout is one of them in eval mode."""

LAYERS = frozenset(("linear", *(f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3))))
"""Operations with a weight and a bias, by canonical name."""

PRODUCTS = frozenset(("matmul", "mm", "bmm"))
"""Products of two activations, by canonical name."""

TERM_BITS = 30
"""Bits that the terms of an addition may use: the sum of two numbers below 2 ** 30 fits in int32."""


class IntegerTensor(NamedTuple):
    """A tensor as integers times a scale.

    Attributes:
      level: int32; ``real = level * scale``.
      scale: float64; shape ``()``, or that of ``level``.
      origin: the quantizer on whose grid the tensor is; of a bias, the quantizer of the layer's input, whose scale is part
        of the bias's step; empty for sums.
      largest: bound of ``|level|`` on a quantizer's grid; 0 for sums and biases.
    """

    level: Tensor
    scale: Tensor
    origin: str = ""
    largest: int = 0

    def real(self, dtype: torch.dtype) -> Tensor:
        """``level * scale`` in this dtype."""
        return (self.level * self.scale).to(dtype)


class ValueGrid(NamedTuple):
    """The integer grid of an activation.

    Attributes:
      scheme: which elements share a scale; whether the grid is dynamic.
      scale, zero_point: in ``real = (code - zero_point) * scale``; not used where the scheme is dynamic.
      low, high: the smallest and largest code.
    """

    scheme: QScheme
    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor


class IntegerModel(NamedTuple):
    """An artifact in the form in which :class:`Integers` computes with it.

    Attributes:
      values: the integer grids of activations, by quantizer.
      other: quantizes an activation without an integer grid; takes the name of the quantizer and the tensor.
      wholes: parameters that are stored as integers (whole numbers), by name.
      biases: of each weight with a BatchNorm folded in, by the weight's name: the names of the bias that folding makes,
        and of the BatchNorm.
      extra: the values of these biases, by name: integers, or real numbers. :class:`Integers` adds them itself,
        behind a layer that runs without a bias.
      dropped: names of the parameters of BatchNorms that are folded into weights.
      derived: weights that the model computes from parameters alone, by quantizer: integers, or real numbers.
    """

    values: Mapping[str, ValueGrid]
    other: Callable[[str, Tensor], Tensor]
    wholes: Mapping[str, IntegerTensor]
    biases: Mapping[str, tuple[str, str]]
    extra: Mapping[str, IntegerTensor | Tensor]
    dropped: frozenset[str]
    derived: Mapping[str, IntegerTensor | Tensor]


class Noted(NamedTuple):
    """A tensor that was noted as integers, with its version at that time: a later version holds other numbers."""

    tensor: Tensor
    version: int
    integers: IntegerTensor


def rescaled(level: Tensor, ratio: Tensor) -> Tensor:
    """``round(level * ratio)``, half to even, in integers: a 31-bit multiplier, an int64 product, a shift.

    With ``ratio = m 2 ** e``, ``1/2 <= m < 1``, it is ``(level * round(m 2 ** 31)) / 2 ** (31 - e)``, rounded once.

    Args:
      level: int32.
      ratio: float64, positive, below 2 ** 30; broadcasts against ``level``.

    Returns:
      int64.

    Example:
      >>> rescaled(torch.tensor([5, 7, -7], dtype=torch.int32), torch.tensor(0.5, dtype=torch.float64))
      tensor([ 2,  4, -4])
    """
    mantissa, exponent = torch.frexp(ratio)
    multiplier = (mantissa * 2**31).round().to(torch.int64)
    product = level.to(torch.int64) * multiplier
    shift = (31 - exponent).to(torch.int64)
    # int64 cannot be shifted by more than 63 bits; |product| <= 2 ** 62, so that a shift by more than 62 rounds to 0. As
    # the ratio is below 2 ** 30, no shift is below 1.
    possible = shift.clamp(1, 62)
    floor = product >> possible
    remainder = product - (floor << possible)
    half = torch.ones_like(possible) << (possible - 1)
    is_odd = floor % 2 == 1
    rounds_up = (remainder > half) | ((remainder == half) & is_odd)
    return torch.where(shift > 62, 0, floor + rounds_up.to(torch.int64))


def fitting(total: Tensor, where: str) -> Tensor:
    """Exact sums, in any dtype, as int32.

    Raises:
      StateError: a sum is outside int32.
    """
    total = total.double()
    is_integer = (total == total.round()).all()
    is_inside = (total >= INT32.min).all() & (total <= INT32.max).all()
    if total.numel() and not bool(is_integer & is_inside):
        got = f"sums from {total.min():.0f} to {total.max():.0f}"
        because, fix = "a chip adds in 32 bits", "use fewer bits, or a layer with fewer inputs"
        raise StateError(explain(where, "the sums do not fit in int32", got=got, because=because, fix=fix))
    return total.to(torch.int32)


def constant_along(scale: Tensor, dims: tuple[int, ...]) -> Tensor | None:
    """The scale with ``dims`` reduced to size 1; ``None`` where it varies along them."""
    if scale.ndim == 0:
        return scale
    low, high = scale.amin(dims, keepdim=True), scale.amax(dims, keepdim=True)
    return low if torch.equal(low, high) else None


def output_scale(name: str, scale: Tensor, groups: int) -> Tensor | None:
    """A weight's scale for each output channel, shape ``()`` or ``(out,)``; ``None`` where it varies inside one.

    Args:
      name: the operation, one of ``LAYERS``.
      scale: shape ``()``, or that of the weight.
      groups: of the convolution.
    """
    if scale.ndim == 0:
        return scale
    # A deconvolution's weight is (in, out / groups, ...): its output channels lie along two axes.
    if name.startswith("conv_transpose"):
        scale = scale.reshape(groups, scale.shape[0] // groups, scale.shape[1], -1).transpose(1, 2).flatten(0, 1)
    per_channel = constant_along(scale.flatten(1), (1,))
    return None if per_channel is None else per_channel.squeeze(1)


class Integers(Runner):
    """Runs a model in integers wherever the operands of a call are noted as integers, else in floating point.

    Tensors are found again by their ``id``. An entry holds its tensor, so that no other one gets that id.

    Attributes:
      computed: how often each operation was computed in integers, by name.
    """

    def __init__(self, schedule: Schedule, model: IntegerModel) -> None:
        super().__init__(schedule, self._quantized)
        self._model = model
        # All four by the ``id`` of a tensor: what is noted of it; results of layers that a BatchNorm is folded into, until
        # the BatchNorm's call has come; of weights, the names in ``model.biases``; parameters of folded BatchNorms.
        self._entries: dict[int, Noted] = {}
        self._folded: dict[int, Tensor] = {}
        self._folds: dict[int, tuple[str, str]] = {}
        self._dropped: set[int] = set()
        self.computed: dict[str, int] = {}

    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        super().begin(tensors)
        for name, integers in self._model.wholes.items():
            self._note(tensors[name], integers)
        self._folds = {id(tensors[name]): fold for name, fold in self._model.biases.items()}
        self._dropped = {id(tensors[name]) for name in self._model.dropped}

    def looks_inside(self) -> bool:
        return True  # what a leaf module calls is computed in integers, too

    def compute(self, func: Callable[..., Output], args: Args, kwargs: Kwargs) -> Output:
        name = called(func)
        if name == "batch_norm":
            return self._normalized(func, args, kwargs)
        if name in LAYERS:
            return self._layer(name, func, args, kwargs)
        first: Any = args[0] if args else kwargs.get("input")
        integers = self._lookup(first)
        if name in PRODUCTS and integers is not None:
            product = self._product(func, args, kwargs)
            if product is not None:
                return self._noted(product.real(first.dtype), product, name)
        # The sum is made before the call: an addition in place changes its first operand.
        total = self._sum(args, kwargs) if name == "add" else None
        output = func(*args, **kwargs)
        if total is not None and isinstance(output, Tensor):
            return self._noted(output.copy_(total.real(output.dtype)), total, name)
        if integers is not None and (name == "relu" or name in MOVES or name in SAME):
            self._move(name, func, integers, (first, args, kwargs), output)
        return output

    def _note(self, tensor: Tensor, integers: IntegerTensor) -> None:
        """Remember that a tensor equals these integers times their scale."""
        self._entries[id(tensor)] = Noted(tensor, writes_into(tensor), integers)

    def _noted(self, tensor: Tensor, integers: IntegerTensor, name: str) -> Tensor:
        """The tensor, noted as these integers and counted as a result of this operation."""
        self._count(name)
        self._note(tensor, integers)
        return tensor

    def _count(self, name: str) -> None:
        self.computed[name] = self.computed.get(name, 0) + 1

    def _lookup(self, tensor: object) -> IntegerTensor | None:
        """The integers of a tensor, unless it, or a view of it, was written to since they were noted."""
        noted = self._entries.get(id(tensor))
        if noted is None or noted.version != writes_into(noted.tensor):
            return None
        return noted.integers

    def _on_grid(self, tensor: object) -> IntegerTensor | None:
        """The integers of a tensor on a quantizer's grid: small enough to be multiplied, as sums are not."""
        integers = self._lookup(tensor)
        return integers if integers is not None and integers.largest else None

    def _quantized(self, name: str, x: Tensor) -> Tensor:
        """The effect of a run: ``x`` on the grid of a quantizer, from its integers where it has them."""
        if name in self._model.derived:
            return self._stored(name, x)
        value = self._model.values.get(name)
        if value is None:
            return self._model.other(name, x)
        value = _grid_for(value, x)
        integers = self._lookup(x)
        granularity = value.scheme.granularity
        scale, zero, low, high = (
            expand(part.double(), x, granularity) for part in (value.scale, value.zero_point, value.low, value.high)
        )
        if integers is not None and not value.scheme.dynamic:
            code = rescaled(integers.level, integers.scale / scale) + zero
        else:
            code = _rounded(working(x), scale.float(), zero.float(), value.scheme).double()
        if bool(code.isnan().any()):
            because, fix = "the grid is one of integers", "look for the operation that makes NaN"
            raise StateError(explain(name, "NaN has no code", because=because, fix=fix))
        level = fitting(torch.minimum(torch.maximum(code, low), high) - zero, name)
        largest = int(torch.maximum(value.high - value.zero_point, value.zero_point - value.low).max())
        quantized = IntegerTensor(level, _for_each(scale, x), name, largest)
        return self._noted(quantized.real(x.dtype), quantized, "quantize" if integers is None else "requantize")

    def _stored(self, name: str, x: Tensor) -> Tensor:
        """The stored weight in the place of ``x``, which is computed from parameters that an artifact need not hold."""
        weight = self._model.derived[name]
        if isinstance(weight, Tensor):
            return weight.to(x.dtype)
        real = weight.real(x.dtype)
        self._note(real, weight)
        return real

    def _layer(self, name: str, func: Callable[..., Output], args: Args, kwargs: Kwargs) -> Output:
        """The result of a convolution or linear layer, with the bias of a BatchNorm that is folded into its weight."""
        # The first three arguments of all these functions; what stands behind them, and other keywords, is passed on.
        operands = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
        x, weight, bias = operands["input"], operands["weight"], operands.get("bias")
        options = {key: value for key, value in kwargs.items() if key not in ("input", "weight", "bias")}
        bias_name, norm = self._folds.get(id(weight), ("", ""))
        if norm:
            bias = self._model.extra[bias_name]

        def run(data: Tensor, kernel: Tensor) -> Tensor:
            result: Tensor = func(data, kernel, None, *args[3:], **options)
            return result

        output = None
        integers, weight_integers = self._on_grid(x), self._on_grid(weight)
        # A linear layer may have a weight of one axis, which is no axis of output channels.
        if integers is not None and weight_integers is not None and weight.ndim > 1:
            groups = args[6] if len(args) > 6 else options.get("groups", 1)  # the seventh argument of all convolutions
            output = self._integer_layer(name, run, (integers, weight_integers, groups), bias, x.dtype)
        if not norm:
            return func(*args, **kwargs) if output is None else output
        if output is None:
            output = run(x, weight)
            folded_bias = self._model.extra[bias_name]
            real = folded_bias.real(output.dtype) if isinstance(folded_bias, IntegerTensor) else folded_bias
            output = output + _beside(real, output, name)
        self._folded[id(output)] = output
        return output

    def _integer_layer(
        self,
        name: str,
        run: Callable[[Tensor, Tensor], Tensor],
        operands: tuple[IntegerTensor, IntegerTensor, int],
        bias: IntegerTensor | Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """The layer in integers, a bias on the grid of the sums included; ``None`` where the scales vary inside a sum.

        Args:
          name: the operation.
          run: the layer without its bias, of an input and a weight.
          operands: the input, the weight, and the groups of a convolution.
          bias: integers, or real numbers, which are added in float64.
          dtype: of the result.
        """
        x, weight, groups = operands
        # A linear layer sums along the last axis alone, so that each row may have its own scale.
        summed = (-1,) if name == "linear" else tuple(range(x.scale.ndim))
        input_scale, weight_scale = constant_along(x.scale, summed), output_scale(name, weight.scale, groups)
        if input_scale is None or weight_scale is None:
            return None
        total = run(x.level.double(), weight.level.double())
        if name == "linear":
            scale = input_scale * weight_scale
        else:
            scale = input_scale.reshape(()) * _beside(weight_scale, total, name)
        integer_bias = bias if isinstance(bias, IntegerTensor) else self._lookup(bias)
        # Its step is then that of the sums, so that it is added in integers; any other bias is added as real numbers.
        is_on_grid = integer_bias is not None and integer_bias.origin == x.origin
        if integer_bias is not None and is_on_grid:
            total = total + _beside(integer_bias.level, total, name)
        sums = IntegerTensor(fitting(total, name), _for_each(scale, total))
        if bias is None or is_on_grid:
            return self._noted(sums.real(dtype), sums, name)
        real = torch.as_tensor(bias) if integer_bias is None else integer_bias.real(torch.float64)
        self._count(name)
        return (sums.real(torch.float64) + _beside(real, total, name)).to(dtype)

    def _product(self, func: Callable[..., Output], args: Args, kwargs: Kwargs) -> IntegerTensor | None:
        """The product of two matrices on grids, each with one scale along the summed axis; else ``None``."""
        operands = [*args, *kwargs.values()]
        if len(operands) != 2 or any(operand.ndim < 2 for operand in operands):
            return None
        if getattr(func, "__name__", "") == "__rmatmul__":
            operands.reverse()  # a.__rmatmul__(b) is b @ a
        a, b = map(self._on_grid, operands)
        if a is None or b is None:
            return None
        rows, columns = constant_along(a.scale, (-1,)), constant_along(b.scale, (-2,))
        if rows is None or columns is None:
            return None
        total = torch.matmul(a.level.double(), b.level.double())
        return IntegerTensor(fitting(total, "matmul"), _for_each(rows * columns, total))

    def _sum(self, args: Args, kwargs: Kwargs) -> IntegerTensor | None:
        """The sum of two tensors on grids of one scale each, added in int32 on a common, finer grid; else ``None``.

        The levels of both use at most ``TERM_BITS - n`` bits, so that ``n`` are free. With ``c = 2 max(s_a, s_b)`` each
        term is ``round(level * 2 ** n * s / c)``, at most half of ``level * 2 ** n``. The sum has the step ``c / 2 ** n``.
        """
        operands = [*args, *kwargs.values()]
        if len(operands) != 2:
            return None
        a, b = map(self._on_grid, operands)
        if a is None or b is None or a.scale.ndim or b.scale.ndim:
            return None
        free_bits = TERM_BITS - max(a.largest, b.largest).bit_length()
        common = 2 * torch.maximum(a.scale, b.scale)
        first, second = (rescaled(term.level << free_bits, term.scale / common) for term in (a, b))
        return IntegerTensor(fitting(first + second, "add"), common / 2**free_bits)

    def _move(
        self,
        name: str,
        func: Callable[..., Output],
        integers: IntegerTensor,
        call: tuple[Tensor, Args, Kwargs],
        output: Output,
    ) -> None:
        """Note the results of a call that moves data, or of ReLU: the same call moves level and scale.

        A result is noted only where it equals its integers, because a call may do more than its name says (``pad`` with
        another number than 0, ``to`` another dtype).

        Args:
          name: the operation.
          func: the function.
          integers: those of the first operand.
          call: the first operand, all arguments and keywords.
          output: what the call returned.
        """
        first, args, kwargs = call

        def moved(data: Tensor) -> list[Tensor]:
            if name in SAME:
                return [data]
            if name == "relu":
                return [data.clamp(min=0)]
            return tensors(func(data, *args[1:], **kwargs) if args else func(**{**kwargs, "input": data}))

        results = [result for result in tensors(output) if result.is_floating_point()]
        levels = moved(integers.level.double())
        # ReLU clamps levels, and leaves each at its place.
        keeps_scale = integers.scale.ndim == 0 or name == "relu"
        scales = [integers.scale] * len(levels) if keeps_scale else moved(integers.scale)
        for result, level, scale in zip(results, levels, scales, strict=False):
            if result.dtype != first.dtype or result.shape != level.shape:
                continue
            candidate = integers._replace(level=level.to(torch.int32), scale=scale)
            is_equal = torch.equal(candidate.real(result.dtype), result)
            if is_equal and torch.equal(candidate.level.double(), level):
                self._note(result, candidate)

    def _normalized(self, func: Callable[..., Output], args: Args, kwargs: Kwargs) -> Output:
        """The result of a BatchNorm: its input, where it is folded into the layer that made that."""
        x = args[0] if args else kwargs["input"]
        if self._folded.pop(id(x), None) is not None:  # popped: a second BatchNorm behind the layer is computed
            return x
        if any(id(tensor) in self._dropped for tensor in tensors((args, kwargs))):
            because, fix = "the artifact folds it into the layer before it", "plan with an example that shows this call"
            raise StateError(
                explain(
                    "artifact.run", "a folded BatchNorm cannot be computed behind another layer", because=because, fix=fix
                )
            )
        return func(*args, **kwargs)


def _grid_for(value: ValueGrid, x: Tensor) -> ValueGrid:
    """The grid; with a dynamic scheme, the one that covers the range of ``x``."""
    if not value.scheme.dynamic:
        return value
    limits = int(value.low.min()), int(value.high.max())
    qparams = range_to_qparams(*min_max(x, value.scheme.granularity), value.scheme, limits=limits)
    return value._replace(scale=qparams.scale, zero_point=qparams.zero_point)


def _rounded(x: Tensor, scale: Tensor, zero: Tensor, scheme: QScheme) -> Tensor:
    """Codes, not clamped, in the rounding order of the fake quantizer ``learnable``, so that both give the same codes."""
    if isinstance(scheme.granularity, PerTensor):  # as torch's kernel for one scale
        return torch.round(x * (1 / scale)) + zero
    return torch.round(x / scale + zero)


def _for_each(scale: Tensor, like: Tensor) -> Tensor:
    """A scale for each element of ``like``; one scale for all elements keeps its shape ``()``."""
    return scale.expand(like.shape) if scale.ndim else scale


def _beside(channels: Tensor, like: Tensor, name: str) -> Tensor:
    """A number for each output channel, in a shape that broadcasts against a layer's result."""
    after = 0 if name == "linear" else int(name[-2])  # "conv2d": two axes behind the channels
    return channels if channels.ndim == 0 else channels.reshape(-1, *(1,) * after)
