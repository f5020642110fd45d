"""``pytest --quick``: what a developer runs after each change.

Tests marked ``slow`` are left out, and of a test with many cases as few are kept as hold every value of each of its
parameters once: every granularity and every observer, not each with each. What is left out counts as deselected.
A test that loops over its cases itself asks for :func:`few` of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

import pytest

T = TypeVar("T")

MOST = 4
"""Cases of one test. Of more, some are passed over, evenly: with 4 a run takes 50 s on two cores, with 32 four minutes."""


def chosen(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """What a quick run keeps of all tests, the same in every process."""
    groups: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("slow") is None:
            groups[item.nodeid.partition("[")[0]].append(item)
    return {group[i] for group in groups.values() for i in some([values_of(item) for item in group])}


def values_of(item: pytest.Item) -> Mapping[str, Hashable]:
    """The place of each parameter's value among the values of that parameter."""
    call = getattr(item, "callspec", None)
    return {} if call is None else call.indices


def few(cases: Mapping[str, T]) -> dict[str, T]:
    """Which of the cases inside one test to keep.

    Example:
      >>> few({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5})
      {'a': 1, 'c': 3, 'e': 5}
    """
    names = list(cases)
    return {names[i]: cases[names[i]] for i in some([{"case": name} for name in names])}


def some(cases: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """Which of the cases to keep: every value once, ``MOST`` cases at most.

    Example:
      >>> some([{"a": i, "b": j} for i in range(2) for j in range(3)])
      [0, 4, 2]
    """
    kept = list(cover(cases))
    step = max(1, -(-len(kept) // MOST))
    return kept[::step]


def cover(cases: Sequence[Mapping[str, Hashable]]) -> Iterator[int]:
    """Cases that hold every value: first those in which all values are new, then those in which fewer are."""
    seen: set[tuple[str, Hashable]] = set()
    width = max(map(len, cases))
    if not width:
        yield from range(len(cases))
    for wanted in range(width, 0, -1):
        for i, case in enumerate(cases):
            if len(case.items() - seen) >= wanted:
                seen |= case.items()
                yield i
