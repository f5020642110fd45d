"""The calls of an example's run, in order. A plan keeps them, so that the plan of a part of the model can be cut out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sophq_func.capture.graph import Graph

Pair = tuple[str, str]
"""Module path and function; the function is empty for the call of the module itself."""


UNKNOWN_WAY = "?"
"""What was called before, in plans of versions that do not say it."""


class Made(NamedTuple):
    """One call of a run, or one input of the model.

    Attributes:
      name: of the call.
      path: of the module that is called, or in which a function is called; empty for an input.
      function: canonical name; empty for modules and inputs. Calls that are told apart have their step here, see
        :class:`sophq_func.capture.graph.Node`.
      counted: whether it counts, see there.
      after: what was called before, see there.
    """

    name: str
    path: str
    function: str
    counted: bool
    after: str = UNKNOWN_WAY

    @property
    def is_input(self) -> bool:
        """Whether it is an input of the model."""
        return not self.path and not self.function and not self.counted

    @property
    def pair(self) -> Pair:
        """Path and function: calls that have both in common are counted together."""
        return self.path, self.function


class Span(NamedTuple):
    """One call of a module, by the calls made in it: those from ``start`` up to ``stop``; of a leaf module, itself."""

    path: str
    start: int
    stop: int

    def holds(self, other: Span) -> bool:
        """Whether another span lies in this one."""
        return self.start <= other.start and other.stop <= self.stop


class Run(NamedTuple):
    """The calls of one example, and the calls of modules around them.

    Attributes:
      calls: in the order of execution, inputs first.
      scopes: calls of modules that are no leaves, in the order in which they end.
    """

    calls: tuple[Made, ...]
    scopes: tuple[Span, ...]

    @staticmethod
    def of(graph: Graph) -> Run:
        """The run that a graph records."""
        calls = (Made(node.name, node.path, node.step, node.kind != "input" and node.counted, node.after) for node in graph)
        return Run(tuple(calls), tuple(Span(scope.path, scope.start, scope.stop) for scope in graph.scopes))

    @staticmethod
    def from_data(data: Any) -> Run:
        """A run from JSON data, in which it is nested lists.

        Raises:
          TypeError, ValueError: the data is not that of a run.
        """
        calls, scopes = data
        made = tuple(
            Made(_text(name), _text(path), _text(function), _flag(on), _text(after))
            for name, path, function, on, after in calls
        )
        spans = tuple(Span(_text(path), start, stop) for path, start, stop in scopes)
        for span in spans:
            if not type(span.start) is type(span.stop) is int or not 0 <= span.start <= span.stop <= len(made):
                raise ValueError(f"{span!r} is no part of a run of {len(made)} calls")
        return Run(made, spans)

    def spans(self, path: str) -> list[Span]:
        """Each call of the module at a path, first to last."""
        leaves = [Span(path, i, i + 1) for i, made in enumerate(self.calls) if made.counted and made.pair == (path, "")]
        scopes = [scope for scope in self.scopes if scope.path == path]
        return sorted(leaves + scopes, key=lambda span: span.start)

    def around(self, index: int) -> Iterator[Span]:
        """The calls of modules around a call, innermost first."""
        return (scope for scope in self.scopes if scope.start <= index < scope.stop)

    def counts(self, start: int, stop: int) -> Mapping[Pair, int]:
        """For each path and function, the number of counted calls from ``start`` up to ``stop``."""
        return Counter(made.pair for made in self.calls[start:stop] if made.counted)


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
