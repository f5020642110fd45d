"""Observers and fake quantizers: NamedTuples of pure functions, the values they exchange, and their registries.

The docstring of each protocol is its contract; ``tests/contracts`` checks the contracts for everything registered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from sophq_func.core.brief import brief
from sophq_func.core.public import constructor
from sophq_func.numerics.formats import Format
from sophq_func.numerics.registries import FAKE_QUANTIZERS as FAKE_QUANTIZERS
from sophq_func.numerics.registries import OBSERVERS as OBSERVERS
from sophq_func.numerics.scheme import QScheme

State: TypeAlias = Any
"""An observer's state: a NamedTuple of tensors, each of a shape and dtype that no update changes.

Each observer has a NamedTuple of its own, which its functions alone read.
"""


class QParams(NamedTuple):
    """How one tensor is quantized: ``real = (code - zero_point) * scale``.

    Attributes:
      scale: float32 step; shape ``()`` per tensor, ``(C,)`` per channel, ``(C, groups)`` per group.
      zero_point: the code of 0.0, shaped like ``scale``; int32, or float32 when it is learned.
      extras: further tensors by sorted name: learned ones of a quantizer, ``"noise"``, or the bounds ``"qmin"`` and
        ``"qmax"`` where they are data instead of the scheme's.

    Example:
      >>> import torch
      >>> QParams(torch.linspace(0.1, 0.2, 64), torch.zeros(64, dtype=torch.int32), {})
      QParams(scale=(64,) float32 0.1..0.2, zero_point=(64,) int32 0, extras={})
    """

    scale: Tensor
    zero_point: Tensor
    extras: dict[str, Tensor]

    def __repr__(self) -> str:
        return f"QParams({', '.join(f'{field}={brief(value)}' for field, value in self._asdict().items())})"


class InitState(Protocol):
    """The state before any tensor: of the shapes that tensors like ``x`` need, whose values are not read."""

    def __call__(self, x: Tensor, scheme: QScheme) -> State: ...


class Update(Protocol):
    """The state after one more tensor; an empty tensor does not change it. No gradient flows into the state."""

    def __call__(self, state: State, x: Tensor, scheme: QScheme) -> State: ...


class Merge(Protocol):
    """The state that both data sets together would give: associative, and ``init`` is neutral.

    Raises a ``StateError`` where the statistic depends on the order of the data.
    """

    def __call__(self, a: State, b: State) -> State: ...


class Resolve(Protocol):
    """Scale and zero point from a state; the scale is NaN where a statistic is not finite."""

    def __call__(self, state: State, scheme: QScheme) -> QParams: ...


@constructor
class Observer(NamedTuple):
    """A statistic of tensors, and how to read scale and zero point from it.

    A state is a NamedTuple of tensors, shaped like the scales.

    Attributes:
      init: ``init(x, scheme)``, the state before any tensor: see :class:`InitState`.
      update: ``update(state, x, scheme)``, the state after one more tensor: see :class:`Update`.
      merge: ``merge(a, b)``, the state of both data sets together: see :class:`Merge`.
      qparams: ``qparams(state, scheme)``, the :class:`QParams` of a state: see :class:`Resolve`.
      sums: whether the statistic is a sum of floats, so that states merged in another order differ by rounding.
      clips: whether the range leaves out the extremes of ordinary data, by definition and not by an estimate.
    """

    init: InitState
    update: Update
    merge: Merge
    qparams: Resolve
    sums: bool = False
    clips: bool = False

    def __repr__(self) -> str:
        # the factory in which ``update`` is defined has the name of the observer
        defined: str = getattr(self.update, "__qualname__", type(self.update).__name__)
        return f"Observer({defined.partition('.')[0]})"


class InitQParams(Protocol):
    """The qparams of an observer, with what the fake quantizer adds to them (learned extras, for example).

    ``x`` is the weight, or, for an activation, a tensor of its shape and dtype.
    """

    def __call__(self, qparams: QParams, x: Tensor, scheme: QScheme) -> QParams: ...


class Apply(Protocol):
    """``x`` quantized and dequantized, in the dtype of ``x``; ``noise`` is uniform in [0, 1) and shaped like ``x``."""

    def __call__(self, x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor: ...


class Prepare(Protocol):
    """A thunk that returns ``apply(x * factor) / factor``, and ``x`` where the factor is 0.

    Work that does not touch ``x`` runs eagerly. The factor broadcasts against ``x``; ``None`` means 1.
    """

    def __call__(self, x: Tensor, factor: Tensor | None, qparams: QParams, scheme: QScheme) -> Callable[[], Tensor]: ...


class Many(Protocol):
    """For each of some tensors, a function that returns ``apply(x, qparams, scheme)`` of its own qparams.

    Work that does not touch the tensors is done once for all of them.

    Args:
      qparams: without extras; scale and zero point, of shape ``(N,)``, are those of N tensors that have one scale each.
        The zero point of a symmetric scheme is not read, and may have any shape.
      scheme: the same for all tensors.
    """

    def __call__(self, qparams: QParams, scheme: QScheme) -> list[Callable[[Tensor], Tensor]]: ...


class Uniform(NamedTuple):
    """How a fake quantizer on a uniform grid reads its qparams, for a kernel that computes all of it at once.

    Attributes:
      order: in which order a code is computed: ``"kernel"`` or ``"expression"``, see
        :mod:`~sophq_func.numerics.affine`.
      whole: the zero point is made a code; otherwise it is used as it is.
      learned: scale and floating zero point have gradients, and the scale that is applied is ``max(|s|, 2 ** -23)``;
        otherwise both are constants.
      grad_scaling: by what these gradients are multiplied. ``"none"``: 1; else ``g = 1 / sqrt(numel(x) / scales * qmax)``.
        With ``"parts"`` the value is computed as ``v g + (v - v g)``, which may round to a neighbour; with ``"term"`` it
        stays.
    """

    order: Literal["kernel", "expression"]
    whole: bool = True
    learned: bool = False
    grad_scaling: Literal["none", "term", "parts"] = "none"


class GridInForce(Protocol):
    """The qparams with the scale and zero point that ``apply`` rounds by, where learned extras determine these."""

    def __call__(self, qparams: QParams, scheme: QScheme) -> QParams: ...


class Codes(NamedTuple):
    """A tensor as codes, and the parts of its grid that were computed from the tensor itself.

    Attributes:
      values: shaped like the tensor: integers, or numbers of float8, float16 or bfloat16, which are their own codes.
      parts: by sorted name, what decoding needs beside the qparams: of each block ``"exponent"``, uint8, the biased power
        of two, or ``"block_scale"``, float8; with a dynamic scheme ``"scale"`` and ``"zero_point"``.
    """

    values: Tensor
    parts: dict[str, Tensor]


class Encode(Protocol):
    """The codes of ``apply(x)``; ``x`` must be finite. No gradient."""

    def __call__(self, x: Tensor, qparams: QParams, scheme: QScheme) -> Codes: ...


class Decode(Protocol):
    """The values of codes, in ``dtype``: ``decode(encode(x, ...), ..., x.dtype)`` equals ``apply(x, ...)``.

    -0.0 and 0.0, which are equal, may share a code.
    """

    def __call__(self, codes: Codes, qparams: QParams, scheme: QScheme, dtype: torch.dtype = torch.float32) -> Tensor: ...


class Uncoded(Protocol):
    """Why values have no codes with these qparams; empty where they have. Reads the numbers in the qparams."""

    def __call__(self, qparams: QParams, scheme: QScheme) -> str: ...


NO_CODES = "its values are not codes times a scale"
"""The reason of fake quantizers whose values lie on no grid, or on one that ``encode`` cannot find."""


def never_coded(qparams: QParams, scheme: QScheme) -> str:
    """The :class:`Uncoded` of a fake quantizer without ``encode``."""
    return NO_CODES


def always_coded(qparams: QParams, scheme: QScheme) -> str:
    """The :class:`Uncoded` of a fake quantizer whose every value is a code."""
    return ""


def as_stored(qparams: QParams, scheme: QScheme) -> QParams:
    """Scale and zero point unchanged: the :class:`GridInForce` of fake quantizers without such extras."""
    return qparams


def kept(qparams: QParams, x: Tensor, scheme: QScheme) -> QParams:
    """The qparams unchanged: the :class:`InitQParams` of a fake quantizer that adds nothing."""
    return qparams


@constructor
class FakeQuantize(NamedTuple):
    """Quantize and dequantize, with a surrogate gradient.

    Attributes:
      init: see :class:`InitQParams`.
      apply: see :class:`Apply`.
      learnable: fields of the qparams that may be learned: ``"scale"``, ``"zero_point"``, or names of extras.
      integer: values are integers times the scale of ``grid``, so that this scale can also round a bias.
      noise: ``apply`` needs uniform numbers in [0, 1) shaped like ``x``: its ``noise`` argument, or ``extras["noise"]``
        of the qparams. Where both are missing it raises a ``StateError``; ``q.with_noise`` provides them. Where this is
        ``False``, noise that is given is a ``StateError``, too: nothing would read it.
      grid: see :class:`GridInForce`.
      scales_bias: the scale of ``grid`` rounds a bias although the codes of values are not integers.
      prepare: see :class:`Prepare`; given where it takes fewer passes over ``x`` than ``apply(x * factor) / factor``.
      resizable: codes lie between bounds that ``extras["qmin"]`` and ``extras["qmax"]`` may move after ``init``, so that
        :func:`sophq_func.with_bits` can change the bit width.
      bits: size of a stored code, its share of the scales of a block included; ``None`` means the scheme's bits.
      scaled: the scale of the qparams must be stored with the codes.
      encode: see :class:`Encode`; ``None`` where values have no codes, or none that ``encode`` could find.
      decode: see :class:`Decode`; ``None`` exactly where ``encode`` is.
      uncoded: see :class:`Uncoded`; where it gives a reason, ``encode`` must not be called.
      element: how a code is read before scaling: as an index into the values of a format, as a number of a floating
        dtype, or, where this is ``None``, as an integer.
      block_size: how many elements along ``block_axis`` share one entry of ``Codes.parts``; 0 where none do.
      block_axis: the axis along which blocks lie, counted from the end.
      local: the result for an element depends on the elements of its scale or block alone.
      rowwise: weights of one scheme whose channels lie along the first axis, and have equally many elements, may be
        quantized as one: their channels as the rows of one matrix, with their qparams side by side. The zero point of a
        symmetric scheme is not read then, and may have any shape.
      many: see :class:`Many`; ``None`` where each tensor is prepared alone.
      uniform: of a scheme, how the qparams are read; ``None`` where only the functions themselves say it. Where it is given,
        ``apply`` and ``prepare`` must compute what it says.
      kernel: a compiled kernel is asked first, see :mod:`~sophq_func.numerics.kernels`; it gains nothing by ``many``.
      needs: names of extras that ``init`` does not make and a model must not do without: it raises a ``StateError`` where
        they are missing. Alone, ``apply`` says what it computes then.
    """

    init: InitQParams
    apply: Apply
    learnable: tuple[str, ...] = ()
    integer: bool = True
    noise: bool = False
    grid: GridInForce = as_stored
    scales_bias: bool = False
    prepare: Prepare | None = None
    resizable: bool = True
    bits: float | None = None
    scaled: bool = True
    encode: Encode | None = None
    decode: Decode | None = None
    uncoded: Uncoded = never_coded
    element: Format | torch.dtype | None = None
    block_size: int = 0
    block_axis: int = -1
    local: bool = True
    rowwise: bool = False
    many: Many | None = None
    uniform: Callable[[QScheme], Uniform] | None = None
    kernel: bool = False
    needs: tuple[str, ...] = ()

    def __repr__(self) -> str:
        grid = "integers" if self.integer else "no integers"
        learnable = f"learnable {', '.join(self.learnable)}" if self.learnable else "nothing learnable"
        return f"FakeQuantize({grid}, {learnable}{', needs noise' if self.noise else ''})"
