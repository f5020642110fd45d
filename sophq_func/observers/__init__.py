"""Observers: statistics of tensors that give scales. Each name returns a :class:`~sophq_func.core.registry.Spec`."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from sophq_func.core.public import public
from sophq_func.core.registry import Spec
from sophq_func.numerics.alone import observer_alone
from sophq_func.numerics.contracts import OBSERVERS, Observer
from sophq_func.observers._counts import CountsState, kld, percentile
from sophq_func.observers._floor import FloorState, VoteState, minmax_floor, pot_mode
from sophq_func.observers._histogram import HISTOGRAM_UNIT as HISTOGRAM_UNIT
from sophq_func.observers._histogram import HistogramState, histogram
from sophq_func.observers._minmax import EMAMinMaxState, MinMaxState, ema_minmax, minmax
from sophq_func.observers._moments import StepState, clip_std, lsq, lsq_plus
from sophq_func.observers._mse import ema_mse, mse
from sophq_func.observers._quantile import ema_quantile
from sophq_func.observers._range import RootState, absmax, fixed_range, rms

# The other names of the same functions: those of papers, and the classes of sophgo-mq.
ClipStdObserver = clip_std
EMAMSEObserver = ema_mse
EMAMinMaxObserver = ema_minmax
EMAQuantileObserver = ema_quantile
HistogramObserver = histogram
KLDObserver = histogram
LSQObserver = lsq
LSQPlusObserver = lsq_plus
MSEObserver = mse
MinMaxFloorObserver = minmax_floor
MinMaxObserver = minmax
PoTModeObserver = pot_mode

__all__ = [
    "ClipStdObserver",
    "EMAMSEObserver",
    "EMAMinMaxObserver",
    "EMAQuantileObserver",
    "HistogramObserver",
    "KLDObserver",
    "LSQObserver",
    "LSQPlusObserver",
    "MSEObserver",
    "MinMaxFloorObserver",
    "MinMaxObserver",
    "PoTModeObserver",
    "absmax",
    "clip_std",
    "ema_minmax",
    "ema_mse",
    "ema_quantile",
    "fixed_range",
    "histogram",
    "kld",
    "lsq",
    "lsq_plus",
    "minmax",
    "minmax_floor",
    "mse",
    "observer",
    "percentile",
    "pot_mode",
    "rms",
]

STATES = (CountsState, EMAMinMaxState, FloorState, HistogramState, MinMaxState, RootState, StepState, VoteState)
"""The classes of the states of all observers here."""


def __dir__() -> list[str]:
    return sorted({*__all__, *OBSERVERS.names()})


if not TYPE_CHECKING:  # type checkers see the functions above, and are to refuse other names

    def __getattr__(name: str) -> Callable[..., Spec]:
        """The function of a name that was registered elsewhere, or that is written in another case."""
        return OBSERVERS.function(name, __name__)


@public
def observer(name: str, **options: object) -> Observer:
    """An observer to use alone, by its short name or its name in sophgo-mq.

    Its functions raise a ``StateError`` for what is no tensor, and for states of other shapes; ``qparams`` for statistics
    that are not finite, where their numbers can be read: in eager mode, of plain tensors. Inside a transform of
    ``torch.func`` or a compiled function the scale is NaN instead.

    Args:
      name: ``"minmax"``, ``"EMAMinMaxObserver"``, ...
      **options: options of the observer, by their names here or in sophgo-mq.

    Raises:
      ConfigError: unknown name or option.

    Example:
      >>> observer("EMAMinMaxObserver", ema_ratio=0.9).update
      <function ema_minmax.<locals>.update at ...>
    """
    return observer_alone(name, OBSERVERS.build(OBSERVERS.spec(name, **options)))
