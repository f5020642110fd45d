"""The two kinds of pieces, as NamedTuples of pure functions, the state they share, and their registries.

The text of each protocol is the contract; ``tests/contracts`` holds its laws over everything registered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from sophq_func.core.registry import Factories
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


OBSERVERS: Factories[Observer] = Factories("observer")
FAKE_QUANTIZERS: Factories[FakeQuantize] = Factories("fake quantizer")
