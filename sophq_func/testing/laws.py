"""What a law is, how it is held over many cases, and the report of those that break it."""

from __future__ import annotations

import itertools
import math
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sophq_func.core.errors import ConfigError, check_flags, explain, raise_all, unknown


class LawError(AssertionError):
    """A piece breaks laws that it must obey; the message names each, and a case that breaks it."""


class Law:
    """A law: a function of a piece, or its name, and a case, which raises where the case breaks it.

    Attributes:
      name: the function's name, by which a check can leave the law out.
      says: what the law demands: the first line of the function's docstring.
      tables: the cases are all combinations of one entry of each.
      only: whether it speaks of a piece, by name.
      slow: whether it compiles, or tries so many cases that it takes as long.
    """

    def __init__(
        self, check: Callable[..., None], tables: Sequence[Mapping[str, Any]], only: Callable[[Any], bool], slow: bool
    ) -> None:
        self.check = check
        self.name = check.__name__
        self.says = (check.__doc__ or "").partition("\n")[0]
        self.tables = tables
        self.only = only
        self.slow = slow
        self.__doc__ = check.__doc__

    def __call__(self, piece: Any, *case: Any) -> None:
        self.check(piece, *case)

    def __repr__(self) -> str:
        return f"Law {self.name}: {self.says}"

    def broken(self, piece: Any) -> list[str]:
        """The cases that break the law, each with its error."""
        return broken(lambda *case: self.check(piece, *case), *self.tables)


def of_all(piece: object) -> bool:
    """The default of ``only``: a law that speaks of every piece."""
    return True


def law(
    *tables: Mapping[str, Any], only: Callable[[Any], bool] = of_all, slow: bool = False
) -> Callable[[Callable[..., None]], Law]:
    """Decorator: a function of a piece, or its name, and one entry of each table is a :class:`Law`."""

    def decorate(check: Callable[..., None]) -> Law:
        return Law(check, tables, only, slow)

    return decorate


def broken(
    check: Callable[..., None],
    *tables: Mapping[str, Any],
    failures: tuple[type[BaseException], ...] = (Exception,),
) -> list[str]:
    """Each combination of one entry of each table that ``check`` raises for, by name, with the error."""
    found = []
    for chosen in itertools.product(*(table.items() for table in tables)):
        names, values = zip(*chosen, strict=True) if chosen else ((), ())
        try:
            check(*values)
        except failures as error:
            case = f"{', '.join(names)}: " if names else ""
            found.append(f"{case}{type(error).__name__}: {error if str(error) else _line(error)}")
    return found


def _line(error: BaseException) -> str:
    """The line of code that raised an error which says nothing: an assertion without words."""
    return traceback.extract_tb(error.__traceback__)[-1].line or ""


def hold(
    check: Callable[..., None],
    *tables: Mapping[str, Any],
    failures: tuple[type[BaseException], ...] = (Exception,),
) -> None:
    """Hold every combination of one entry of each table to a law; those that break it are reported together, by name."""
    found = broken(check, *tables, failures=failures)
    assert not found, "\n".join([f"{len(found)} of {math.prod(map(len, tables))} cases:", *found])


@contextmanager
def refused(error: type[Exception], *words: str) -> Iterator[None]:
    """The block raises an error whose message has these words."""
    try:
        yield
    except error as raised:
        lacking = [word for word in words if word not in str(raised)]
        assert not lacking, f"the message lacks {lacking}: {raised}"
    else:
        raise AssertionError(f"no {error.__name__} is raised")


def check_all(kind: str, piece: Any, laws: Collection[Law], without: Collection[str], slow: bool) -> None:
    """Hold a piece to laws.

    Args:
      kind: of the piece, for the report.
      piece: its name, or the piece itself where it has none.
      laws: all of them.
      without: names of laws that the piece does not claim to obey.
      slow: whether to try the laws that compile, too.

    Raises:
      ConfigError: ``without`` names no law.
      LawError: a law is broken; the report names each with its first case.
    """
    if not __debug__:
        raise ConfigError(explain("testing", "laws cannot be tried", because="python -O leaves out assertions"))
    check_flags(f"check of {kind}", {"slow": slow})
    names = [one.name for one in laws]
    raise_all([unknown(f"check of {kind} {piece}", "law", name, names) for name in without if name not in names])
    of_piece = [one for one in laws if one.name not in without and one.only(piece)]
    tried = [one for one in of_piece if slow or not one.slow]
    reports = []
    for one in tried:
        cases = one.broken(piece)
        if cases:
            count = math.prod(map(len, one.tables))
            reports.append(f"  {one.name}: {one.says}\n    {len(cases)} of {count} cases, the first: {_short(cases[0])}")
    if reports:
        raise LawError("\n".join([f"{kind} {_short(repr(piece))} breaks {len(reports)} of {len(tried)} laws:", *reports]))


LONGEST_CASE = 300
"""Characters of a case in a report; a comparison of tensors can be longer than a screen."""


def _short(case: str) -> str:
    text = " ".join(case.split())
    return text if len(text) <= LONGEST_CASE else text[:LONGEST_CASE] + " ..."
