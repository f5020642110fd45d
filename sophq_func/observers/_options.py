"""Checks of the options of observers, and the error of observers that cannot be merged."""

from __future__ import annotations

import math
from typing import NoReturn, TypeGuard

from sophq_func.core.errors import ConfigError, StateError, explain
from sophq_func.numerics.contracts import Merge, State


def check(where: str, what: str, got: object, allowed: str, *, ok: bool) -> None:
    """Raise a :class:`ConfigError` about an option unless it is ``ok``.

    Args:
      where: the observer.
      what: the option, as a noun for the sentence.
      got: its value.
      allowed: the values that it may have, in words.
      ok: whether ``got`` is one of them.
    """
    if not ok:
        raise ConfigError(explain(where, f"this {what} is not possible", got=got, allowed=allowed))


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether ``value`` is an int or a float, and no bool, which Python counts among the ints."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_decay(where: str, decay: object) -> None:
    """Raise a :class:`ConfigError` unless ``decay``, the weight of the past, is a number in [0, 1)."""
    check(where, "decay", decay, "a number in [0, 1)", ok=is_number(decay) and 0 <= decay < 1)


def check_positive(where: str, what: str, value: object) -> None:
    """Raise a :class:`ConfigError` unless a factor, a width or an exponent is a finite number above 0."""
    check(where, what, value, "a number > 0", ok=is_number(value) and 0 < value < math.inf)


def unmergeable(where: str, because: str) -> Merge:
    """The ``merge`` of an observer whose states cannot be merged: it raises a :class:`StateError`.

    Args:
      where: the observer.
      because: why not.
    """

    def merge(a: State, b: State) -> NoReturn:
        raise StateError(
            explain(where, "states of this observer cannot be merged", because=because, fix='observer("minmax")')
        )

    return merge
