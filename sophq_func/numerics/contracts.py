"""The two kinds of pieces, as NamedTuples of pure functions, the state they share, and their registries.

The text of each protocol is the contract; ``tests/contracts`` holds its laws over everything registered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sophq_func.core.registry import Factories
from sophq_func.numerics.formats import Format
from sophq_func.numerics.scheme import QScheme

State = Any
"""An observer's state: a NamedTuple of tensors, each of a shape and dtype that no update changes."""


class QParams(NamedTuple):
    """How one tensor is quantized: ``real = (code - zero_point) * scale``.

    Attributes:
      scale: float32 step; shape ``()`` per tensor, ``(C,)`` per channel, ``(C, groups)`` per group.
      zero_point: the code of 0.0, shaped like ``scale``; int32, or float32 when it is learned.
      extras: further tensors by sorted name: learned ones of a quantizer, ``"noise"``, or the bounds ``"qmin"`` and
        ``"qmax"`` where they are data instead of the scheme's.
    """

    scale: Tensor
    zero_point: Tensor
    extras: dict[str, Tensor]


class InitState(Protocol):
    """A neutral state for tensors like ``x``, whose values are not looked at."""

    def __call__(self, x: Tensor, scheme: QScheme) -> State: ...


class Update(Protocol):
    """The state after one more tensor; an empty tensor leaves it as it is. No gradient flows into statistics."""

    def __call__(self, state: State, x: Tensor, scheme: QScheme) -> State: ...


class Merge(Protocol):
    """The state of two shards of data: associative, ``init`` neutral; ``StateError`` where there is no such law."""

    def __call__(self, a: State, b: State) -> State: ...


class Resolve(Protocol):
    """Scale and zero point from a state; NaN where a statistic is not finite."""

    def __call__(self, state: State, scheme: QScheme) -> QParams: ...


class Observer(NamedTuple):
    """A statistic of tensors: ``init``, ``update``, ``merge``, and ``qparams`` to read it."""

    init: InitState
    update: Update
    merge: Merge
    qparams: Resolve


class InitQParams(Protocol):
    """Add what a fake quantizer needs to the qparams of an observer; ``x`` is the weight, or gives shape and dtype."""

    def __call__(self, qparams: QParams, x: Tensor, scheme: QScheme) -> QParams: ...


class Apply(Protocol):
    """``x`` as the grid represents it, in the dtype of ``x``; ``noise`` holds uniform numbers shaped like ``x``."""

    def __call__(self, x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor: ...


class Prepare(Protocol):
    """``apply(x * factor) / factor``, and ``x`` where the factor is 0, when the result is called.

    What takes no pass over ``x`` is done before. The factor broadcasts against ``x``; ``None`` stands for 1.
    """

    def __call__(self, x: Tensor, factor: Tensor | None, qparams: QParams, scheme: QScheme) -> Callable[[], Tensor]: ...


class Grid(Protocol):
    """The qparams with the scale and zero point in force, where learned extras decide them."""

    def __call__(self, qparams: QParams, scheme: QScheme) -> QParams: ...


class Codes(NamedTuple):
    """A tensor as codes, and what was found in that tensor to read them by.

    Attributes:
      values: shaped like the tensor. Integers; or numbers of float8, float16 or bfloat16, which are their own codes.
      parts: by sorted name, what the qparams do not hold: ``"exponent"``, uint8, the biased power of two of each block, or
        ``"block_scale"``, float8; with a dynamic scheme ``"scale"`` and ``"zero_point"``.
    """

    values: Tensor
    parts: dict[str, Tensor]


class Encode(Protocol):
    """The codes of what ``apply`` makes of ``x``, which is finite. No gradient."""

    def __call__(self, x: Tensor, qparams: QParams, scheme: QScheme) -> Codes: ...


class Decode(Protocol):
    """What codes stand for, in ``dtype``: ``decode(encode(x, ...), ..., x.dtype)`` equals ``apply(x, ...)``.

    -0.0 and 0.0, which are equal, may have one code.
    """

    def __call__(self, codes: Codes, qparams: QParams, scheme: QScheme, dtype: torch.dtype = torch.float32) -> Tensor: ...


class Uncoded(Protocol):
    """Why values have no codes with these qparams, which are read; empty where they have some."""

    def __call__(self, qparams: QParams, scheme: QScheme) -> str: ...


NO_CODES = "its values are not codes times a scale"


def never_coded(qparams: QParams, scheme: QScheme) -> str:
    """The :class:`Uncoded` of a fake quantizer without ``encode``."""
    return NO_CODES


def always_coded(qparams: QParams, scheme: QScheme) -> str:
    """The :class:`Uncoded` of a fake quantizer whose every value is a code."""
    return ""


def stored(qparams: QParams, scheme: QScheme) -> QParams:
    """Scale and zero point as they are: the :class:`Grid` of most."""
    return qparams


def kept(qparams: QParams, x: Tensor, scheme: QScheme) -> QParams:
    """The qparams as they are: the :class:`InitQParams` of a fake quantizer that needs nothing more."""
    return qparams


class FakeQuantize(NamedTuple):
    """Quantize and dequantize, with a surrogate gradient.

    Attributes:
      init: see :class:`InitQParams`.
      apply: see :class:`Apply`.
      learnable: fields of the qparams that may be learned: ``"scale"``, ``"zero_point"``, or names of extras.
      integer: codes are integers times the scale of ``grid``, so that it can round a bias.
      noise: ``apply`` needs uniform numbers in [0, 1) shaped like ``x``: its ``noise`` argument, or ``extras["noise"]``
        of the qparams. Where both are missing it raises a ``StateError``; ``q.with_noise`` provides them.
      grid: see :class:`Grid`.
      scales_bias: that scale rounds a bias although codes are no integers.
      prepare: see :class:`Prepare`; given where it costs fewer passes over ``x`` than that sentence.
      resizable: codes lie between bounds that ``extras["qmin"]`` and ``extras["qmax"]`` may move after ``init``, so that
        :func:`sophq_func.with_bits` can give it another bit width.
      bits: what a stored code takes, its share of the scales of a block included; ``None``: the scheme's.
      scaled: the scale of the qparams must be stored with the codes.
      encode: see :class:`Encode`; ``None``: no values of it have codes, or none that it can name itself.
      decode: see :class:`Decode`; ``None``: as ``encode``.
      uncoded: see :class:`Uncoded`; where it gives a reason, ``encode`` must not be called.
      element: what a code stands for before scales: its index in the values of a format, a number of this floating type,
        or, where it is ``None``, an integer.
      block_size: so many elements along the last axis share a part of the codes; 0: no parts by blocks.
      local: what becomes of an element depends on elements that share its scale or its block, and on no others.
    """

    init: InitQParams
    apply: Apply
    learnable: tuple[str, ...] = ()
    integer: bool = True
    noise: bool = False
    grid: Grid = stored
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
    local: bool = True


OBSERVERS: Factories[Observer] = Factories("observer")
FAKE_QUANTIZERS: Factories[FakeQuantize] = Factories("fake quantizer")
