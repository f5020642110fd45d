"""Checks of the options of observers, and the sentence of those that cannot be merged."""

from __future__ import annotations

from typing import Any

from sophq_func.core.errors import ConfigError, StateError, explain
from sophq_func.numerics.contracts import Merge, State


def check(where: str, what: str, got: Any, allowed: str, *, ok: bool) -> None:
    """Raise a :class:`ConfigError` for an option out of its bounds."""
    if not ok:
        raise ConfigError(explain(where, f"this {what} is not possible", got=got, allowed=allowed))


def is_number(value: Any) -> bool:
    """Whether ``value`` is an int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_decay(where: str, decay: Any) -> None:
    """A share of the past lies in [0, 1)."""
    check(where, "decay", decay, "a number in [0, 1)", ok=is_number(decay) and 0 <= decay < 1)


def check_positive(where: str, what: str, value: Any) -> None:
    """A factor, a width or an exponent is a finite number above 0."""
    check(where, what, value, "a number > 0", ok=is_number(value) and 0 < value < float("inf"))


def unmergeable(where: str, because: str) -> Merge:
    """A ``merge`` that refuses."""

    def merge(a: State, b: State) -> State:
        raise StateError(explain(where, "merge is not possible", because=because, fix='observer("minmax")'))

    return merge
