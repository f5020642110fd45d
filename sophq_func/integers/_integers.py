"""A chip in slow motion: run a model on the integers of an artifact, with int32 sums, from grid to grid.

A tensor that is known as integers, ``real = level * scale`` with the zero point taken off, runs through convolutions,
linear layers, matrix products and additions as these integers; what only moves data, and ReLU, moves them along. The next
quantizer brings their int32 sums onto its grid by a fixed-point multiplier (arXiv:1712.05877, section 2.2). All else sees
the real numbers and computes in float.

Products are summed in float64, which is exact for integers below 2 ** 53; each sum must fit int32.
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
from sophq_func.model.runner import Runner
from sophq_func.model.schedule import Schedule
from sophq_func.numerics.affine import working
from sophq_func.numerics.layout import expand
from sophq_func.numerics.ranges import min_max, range_to_qparams
from sophq_func.numerics.scheme import PerTensor, QScheme

INT32 = torch.iinfo(torch.int32)
SAME = frozenset(("clone", "contiguous", "detach", "float", "to", "type_as", *DROPOUTS))
"""What returns its first operand, number for number."""

LAYERS = frozenset(("linear", *(f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3))))
PRODUCTS = frozenset(("matmul", "mm", "bmm"))


class Whole(NamedTuple):
    """A tensor as integers.

    Attributes:
      level: int32; ``real = level * scale``.
      scale: float64; shape ``()``, or that of ``level``.
      origin: the quantizer on whose grid it is, or of a bias the one whose scale it was rounded to; empty for sums.
      largest: bound of ``|level|`` on a quantizer's grid; 0 elsewhere.
    """

    level: Tensor
    scale: Tensor
    origin: str = ""
    largest: int = 0

    def real(self, dtype: torch.dtype) -> Tensor:
        """The numbers that it stands for."""
        return (self.level * self.scale).to(dtype)


class Value(NamedTuple):
    """The grid of an activation; its scale and zero point are of no account where the scheme is dynamic."""

    scheme: QScheme
    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor


class Given(NamedTuple):
    """What an artifact gives the executor.

    Attributes:
      values: the integer grids of activations, by quantizer.
      other: what happens to a value that has none, told the quantizer and the tensor.
      wholes: parameters that are integers, by name.
      biases: of layers that a BatchNorm is folded into, by name of the weight: that of the bias, and the BatchNorm.
      extra: these biases, by name: integers, or real numbers.
      dropped: names of parameters that are folded away.
    """

    values: Mapping[str, Value]
    other: Callable[[str, Tensor], Tensor]
    wholes: Mapping[str, Whole]
    biases: Mapping[str, tuple[str, str]]
    extra: Mapping[str, Whole | Tensor]
    dropped: frozenset[str]


class Known(NamedTuple):
    """An entry of the executor's memory: a tensor, its version when it was noted, and what it is."""

    tensor: Tensor
    version: int
    whole: Whole


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
    shift = (31 - exponent).to(torch.int64)
    product = level.to(torch.int64) * multiplier
    least = shift.clamp(1, 62)
    down = product >> least
    rest, half = product - (down << least), torch.ones_like(least) << (least - 1)
    up = (rest > half) | ((rest == half) & (down % 2 == 1))
    return torch.where(shift > 62, 0, down + up.to(torch.int64))


def fitting(total: Tensor, where: str) -> Tensor:
    """Exact sums as int32."""
    total = total.double()
    if total.numel() and not bool((total == total.round()).all() & (total >= INT32.min).all() & (total <= INT32.max).all()):
        got = f"sums from {total.min():.0f} to {total.max():.0f}"
        because, fix = "a chip adds in 32 bits", "use fewer bits, or a layer with fewer inputs"
        raise StateError(explain(where, "the sums do not fit in int32", got=got, because=because, fix=fix))
    return total.to(torch.int32)


def constant_along(scale: Tensor, dims: tuple[int, ...]) -> Tensor | None:
    """The scale, once for all of ``dims``, which are kept; ``None`` where it varies there."""
    if scale.ndim == 0:
        return scale
    low, high = scale.amin(dims, keepdim=True), scale.amax(dims, keepdim=True)
    return low if torch.equal(low, high) else None


def output_scale(name: str, scale: Tensor, groups: int) -> Tensor | None:
    """A weight's scale for each output channel, shape ``()`` or ``(out,)``; ``None`` where it varies inside one."""
    if scale.ndim == 0:
        return scale
    if name.startswith("conv_transpose"):
        scale = scale.reshape(groups, scale.shape[0] // groups, scale.shape[1], -1).transpose(1, 2).flatten(0, 1)
    found = constant_along(scale.flatten(1), (1,))
    return None if found is None else found.squeeze(1)


class Integers(Runner):
    """Runs a model on integers as far as they reach.

    Attributes:
      computed: names of the calls that were done in integers, with how often each was.
    """

    def __init__(self, schedule: Schedule, given: Given) -> None:
        super().__init__(schedule, self._quantized)
        self._given = given
        self._known: dict[int, Known] = {}
        self._folded: dict[int, Tensor] = {}
        self._folds: dict[int, tuple[str, str]] = {}
        self._dropped: set[int] = set()
        self.computed: dict[str, int] = {}

    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        for name, whole in self._given.wholes.items():
            self._note(tensors[name], whole)
        self._folds = {id(tensors[name]): fold for name, fold in self._given.biases.items()}
        self._dropped = {id(tensors[name]) for name in self._given.dropped}

    def looks_inside(self) -> bool:
        return True

    def compute(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        name = called(func)
        if name == "batch_norm":
            return self._normalized(func, args, kwargs)
        first = args[0] if args else kwargs.get("input")
        whole = self._lookup(first)
        if name in LAYERS:
            return self._layer(name, func, args, kwargs)
        if name in PRODUCTS and whole is not None:
            total = self._product(func, args, kwargs)
            if total is not None:
                return self._noted(total.real(first.dtype), total, name)
        total = self._sum(args, kwargs) if name == "add" else None
        output = func(*args, **kwargs)
        if total is not None and isinstance(output, Tensor):
            return self._noted(output.copy_(total.real(output.dtype)), total, name)
        if whole is not None and (name == "relu" or name in MOVES or name in SAME):
            self._move(name, func, whole, (first, args, kwargs), output)
        return output

    def _note(self, tensor: Tensor, whole: Whole) -> None:
        self._known[id(tensor)] = Known(tensor, writes_into(tensor), whole)

    def _noted(self, tensor: Tensor, whole: Whole, name: str) -> Tensor:
        self._count(name)
        self._note(tensor, whole)
        return tensor

    def _count(self, name: str) -> None:
        self.computed[name] = self.computed.get(name, 0) + 1

    def _lookup(self, tensor: Any) -> Whole | None:
        """What a tensor is known as, unless it, or a view of it, was written to since."""
        known = self._known.get(id(tensor))
        return known.whole if known is not None and known.version == writes_into(known.tensor) else None

    def _on_grid(self, tensor: Any) -> Whole | None:
        """The same, of a tensor on a quantizer's grid."""
        whole = self._lookup(tensor)
        return whole if whole is not None and whole.largest else None

    def _quantized(self, name: str, x: Tensor) -> Tensor:
        """The effect: onto the grid of a quantizer, from integers if it can be."""
        value = self._given.values.get(name)
        if value is None:
            return self._given.other(name, x)
        value = _at_hand(value, x)
        scale, zero, low, high = (
            expand(part.double(), x, value.scheme.granularity)
            for part in (value.scale, value.zero_point, value.low, value.high)
        )
        whole = self._lookup(x)
        if whole is not None and not value.scheme.dynamic:
            code = rescaled(whole.level, whole.scale / scale) + zero
        else:
            code = _rounded(working(x), scale.float(), zero.float(), value.scheme).double()
        if bool(code.isnan().any()):
            raise StateError(
                explain(
                    name,
                    "NaN has no code",
                    because="the grid is one of integers",
                    fix="look for the operation that makes NaN",
                )
            )
        level = fitting(torch.minimum(torch.maximum(code, low), high) - zero, name)
        bound = int(torch.maximum(value.high - value.zero_point, value.zero_point - value.low).max())
        found = Whole(level, scale.expand(x.shape) if scale.ndim else scale, name, bound)
        return self._noted(found.real(x.dtype), found, "quantize" if whole is None else "requantize")

    def _layer(self, name: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A convolution or linear layer; with the bias of the BatchNorm that is folded into its weight."""
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        x, weight, bias = given["input"], self._on_grid(given["weight"]), given.get("bias")
        rest = {key: value for key, value in kwargs.items() if key not in ("input", "weight", "bias")}
        key, norm = self._folds.get(id(given["weight"]), ("", ""))
        if norm:
            bias = self._given.extra[key]
        whole = self._on_grid(x)

        def run(data: Tensor, kernel: Tensor) -> Tensor:
            result: Tensor = func(data, kernel, None, *args[3:], **rest)
            return result

        output = None
        if whole is not None and weight is not None and given["weight"].ndim > 1:
            groups = args[6] if len(args) > 6 else rest.get("groups", 1)
            output = self._integer_layer(name, run, (whole, weight, groups), bias, x.dtype)
        if not norm:
            return func(*args, **kwargs) if output is None else output
        if output is None:
            output = run(x, given["weight"])
            output = output + _beside(bias.real(output.dtype) if isinstance(bias, Whole) else bias, output, name)
        self._folded[id(output)] = output
        return output

    def _integer_layer(
        self,
        name: str,
        run: Callable[[Tensor, Tensor], Tensor],
        operands: tuple[Whole, Whole, int],
        bias: Whole | Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor | None:
        x, weight, groups = operands
        every = tuple(range(x.scale.ndim)) if name != "linear" else (-1,)
        across, out = constant_along(x.scale, every), output_scale(name, weight.scale, groups)
        if across is None or out is None:
            return None
        total = run(x.level.double(), weight.level.double())
        scale = across.reshape(()) * _beside(out, total, name) if name != "linear" else across * out
        scale = scale.expand(total.shape) if scale.ndim else scale
        known = bias if isinstance(bias, Whole) else self._lookup(bias)
        if known is not None and known.origin == x.origin:
            total, bias = total + _beside(known.level, total, name), None
        whole = Whole(fitting(total, name), scale)
        if bias is None:
            return self._noted(whole.real(dtype), whole, name)
        real = known.real(torch.float64) if known is not None else torch.as_tensor(bias)
        self._count(name)
        return (whole.real(torch.float64) + _beside(real, total, name)).to(dtype)

    def _product(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Whole | None:
        """A matrix product of two tensors that are both on a grid, each with one scale along what is summed."""
        operands = [*args, *kwargs.values()]
        if len(operands) != 2 or any(operand.ndim < 2 for operand in operands):
            return None
        if getattr(func, "__name__", "") == "__rmatmul__":
            operands.reverse()
        a, b = map(self._on_grid, operands)
        if a is None or b is None:
            return None
        rows, columns = constant_along(a.scale, (-1,)), constant_along(b.scale, (-2,))
        if rows is None or columns is None:
            return None
        total = torch.matmul(a.level.double(), b.level.double())
        scale = rows * columns
        return Whole(fitting(total, "matmul"), scale.expand(total.shape) if scale.ndim else scale)

    def _sum(self, args: Any, kwargs: Any) -> Whole | None:
        """Two terms on grids of one scale each: both are brought to a common, finer step, and added in int32.

        With ``c = 2 max(s_a, s_b)`` and ``n`` bits of headroom, ``round(level * 2 ** n * s / c)`` of each.
        """
        operands = [*args, *kwargs.values()]
        if len(operands) != 2:
            return None
        a, b = map(self._on_grid, operands)
        if a is None or b is None or a.scale.ndim or b.scale.ndim:
            return None
        headroom = 30 - max(a.largest, b.largest).bit_length()
        common = 2 * torch.maximum(a.scale, b.scale)
        first, second = (rescaled(term.level << headroom, term.scale / common) for term in (a, b))
        return Whole(fitting(first + second, "add"), common / 2**headroom)

    def _move(self, name: str, func: Callable[..., Any], whole: Whole, call: tuple[Any, Any, Any], output: Any) -> None:
        """Note the results of what moves data, or of ReLU; what turns out to be other numbers is not noted."""
        first, args, kwargs = call

        def moved(data: Tensor) -> list[Tensor]:
            if name in SAME:
                return [data]
            if name == "relu":
                return [data.clamp(min=0)]
            return tensors(func(data, *args[1:], **kwargs) if args else func(**{**kwargs, "input": data}))

        results = [result for result in tensors(output) if result.is_floating_point()]
        levels = moved(whole.level.double())
        scales = moved(whole.scale) if whole.scale.ndim and name != "relu" else [whole.scale] * len(levels)
        for result, level, scale in zip(results, levels, scales, strict=False):
            found = whole._replace(level=level.to(torch.int32), scale=scale)
            same = (
                result.dtype == first.dtype and result.shape == level.shape and torch.equal(found.real(result.dtype), result)
            )
            if same and torch.equal(found.level.double(), level):
                self._note(result, found)

    def _normalized(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A BatchNorm: nothing is left to do behind the layer that it is folded into."""
        x = args[0] if args else kwargs["input"]
        if self._folded.pop(id(x), None) is not None:  # once: the next BatchNorm, if there is one, is another
            return x
        if any(id(tensor) in self._dropped for tensor in tensors((args, kwargs))):
            because, fix = "the artifact folds it into the layer before it", "plan with an example that shows this call"
            raise StateError(
                explain(
                    "artifact.run", "a folded BatchNorm cannot be computed behind another layer", because=because, fix=fix
                )
            )
        return func(*args, **kwargs)


def _at_hand(value: Value, x: Tensor) -> Value:
    """The grid itself, or with a dynamic scheme that of the range of ``x``."""
    if not value.scheme.dynamic:
        return value
    limits = int(value.low.min()), int(value.high.max())
    found = range_to_qparams(*min_max(x, value.scheme.granularity), value.scheme, limits=limits)
    return value._replace(scale=found.scale, zero_point=found.zero_point)


def _rounded(x: Tensor, scale: Tensor, zero: Tensor, scheme: QScheme) -> Tensor:
    """Codes, not clamped, in the rounding order of ``learnable``: kernel order per tensor, else expression order."""
    if isinstance(scheme.granularity, PerTensor):
        return torch.round(x * (1 / scale)) + zero
    return torch.round(x / scale + zero)


def _beside(channels: Tensor, like: Tensor, name: str) -> Tensor:
    """A number for each output channel, in a shape that broadcasts against a layer's result."""
    after = 0 if name == "linear" else int(name[-2])
    return channels if channels.ndim == 0 else channels.reshape(-1, *(1,) * after)
