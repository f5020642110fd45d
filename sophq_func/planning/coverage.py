"""What a plan leaves float: the share of parameters and multiplications that are quantized, and a line for each rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sophq_func.config.rules import QuantConfig
from sophq_func.config.site import Data
from sophq_func.core.errors import PlanError, explain
from sophq_func.core.tables import wrapped
from sophq_func.core.texts import printable
from sophq_func.planning.work import Work

SHOWN = 20
"""Lines in a text; a plan of a large model has thousands."""

NAMED = 3
"""Layers that a warning names."""


class Left(NamedTuple):
    """A layer or contraction that stays float, or whose operands are not all quantized.

    Attributes:
      name: of the call; of a layer that no example calls, its path.
      kind: class of the layer, or the function that is called.
      share: of the multiplications of all examples, from 0 to 1; 0 for embeddings and for layers that are not called.
      reason: why.
    """

    name: str
    kind: str
    share: float
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.name} ({self.kind}, {percent(self.share)}): {self.reason}")


@dataclass(frozen=True)
class Coverage:
    """How much of a model a plan quantizes, and what it leaves float.

    Multiplications are those of the examples: of convolutions, linear and recurrent layers, matrix products and all other
    calls that multiply and sum, counted from the shapes of their tensors.

    Attributes:
      shares: of parameters, and of multiplications; ``None`` where they are not known.
      left: what is not quantized, the largest share first.
      unknown: why they are not known; empty where they are.

    Example:
      >>> import torch, sophq_func as sq
      >>> from torch import nn
      >>> model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
      >>> config = sq.QuantConfig(rules=(sq.Rule(name="1", weight=None, activation=None),))
      >>> print(sq.plan(sq.trace(model, (torch.ones(1, 4),)), config).coverage)
      coverage: 50.0 % of parameters and 50.0 % of multiplications are quantized
      float: 1 (Linear, 50.0 %): its weight: Rule(name='1', weight=None, activation=None)
    """

    shares: tuple[float, float] | None
    left: tuple[Left, ...] = ()
    unknown: str = ""

    @property
    def parameters(self) -> float:
        """Share of the elements of parameters that have a quantizer, from 0 to 1.

        Raises:
          PlanError: it is not known.
        """
        return self._known()[0]

    @property
    def multiplications(self) -> float:
        """Share of multiplications whose factors are quantized, from 0 to 1; 1 for a model without any.

        Raises:
          PlanError: it is not known.
        """
        return self._known()[1]

    def _known(self) -> tuple[float, float]:
        if self.shares is None:
            sentence, fix = "the coverage of this plan is unknown", "sq.plan(sq.trace(model, args), config)"
            raise PlanError(explain("plan.coverage", sentence, because=self.unknown, fix=fix))
        return self.shares

    def __repr__(self) -> str:
        if self.shares is None:
            return f"Coverage(unknown, because {self.unknown})"
        parameters, multiplications = map(percent, self.shares)
        what = f"{parameters} of parameters and {multiplications} of multiplications are quantized"
        return f"Coverage({what}, {len(self.left)} calls or weights are float)"

    def __str__(self) -> str:
        return "\n".join(line for text in self.lines() for line in wrapped(text))

    def lines(self) -> list[str]:
        """The shares, and what is left, each as a line of any length; of many the first."""
        if self.shares is None:
            return [f"coverage: unknown, because {self.unknown}"]
        parameters, multiplications = map(percent, self.shares)
        head = f"coverage: {parameters} of parameters and {multiplications} of multiplications are quantized"
        lines = [head, *(f"float: {left}" for left in self.left[:SHOWN])]
        hidden = self.left[SHOWN:]
        if hidden:
            share = percent(sum(left.share for left in hidden))
            lines.append(f"float: {len(hidden)} more, {share} of multiplications, see plan.coverage.left")
        return lines

    def to_data(self) -> Data | None:
        """As data that JSON can hold; ``None`` for one that is not known."""
        return None if self.shares is None else {"shares": list(self.shares), "left": [list(left) for left in self.left]}

    @staticmethod
    def from_data(data: Any) -> Coverage:
        """The inverse of :meth:`to_data`.

        Raises:
          TypeError, ValueError: the data is not that of a coverage.
        """
        if data is None:
            return Coverage(None, unknown=OF_OLD_TEXT)
        parameters, multiplications = map(_stored_share, data["shares"])
        return Coverage((parameters, multiplications), tuple(_left(*line) for line in data["left"]))


OF_OLD_TEXT = "the plan was written by an older version, which did not store it"
"""Why the coverage of a plan that was read from a text is not known."""

NOT_MEASURED = Coverage(None, unknown="the plan is that of a part, or was made by hand")
"""The coverage of a plan that was not made from graphs."""


def _left(name: str, kind: str, share: float, reason: str) -> Left:
    if not all(isinstance(text, str) for text in (name, kind, reason)):
        raise TypeError(f"{(name, kind, reason)!r} are no texts")
    return Left(name, kind, _stored_share(share), reason)


def _stored_share(number: object) -> float:
    if not isinstance(number, int | float) or isinstance(number, bool) or not 0 <= number <= 1:
        raise TypeError(f"{number!r} is no share")
    return float(number)


def percent(share: float) -> str:
    """A share in percent, rounded down, so that only what is whole is 100.

    Example:
      >>> percent(0.99999), percent(1.0)
      ('99.9 %', '100.0 %')
    """
    # 0.29 * 1000 is 289.99...: shares are sums of floats, so that 12 digits are enough
    return f"{math.floor(round(share * 1000, 9)) / 10:.1f} %"


def coverage(works: Sequence[Work]) -> Coverage:
    """The coverage of a plan, over all of its examples together."""
    calls = [contraction for work in works for contraction in work.contractions]
    total = sum(call.multiplications for call in calls)
    left: dict[tuple[str, str, str], int] = {}
    for call in calls:
        if call.reason is not None:
            key = call.name, call.kind, call.reason.text
            left[key] = left.get(key, 0) + call.multiplications
    lines = [Left(name, kind, n / max(1, total), reason) for (name, kind, reason), n in left.items()]
    lines.sort(key=lambda line: -line.share)  # stable: equal shares in execution order
    sizes = {name: size for work in works for name, size in work.sizes.items()}
    quantized = frozenset().union(*(work.quantized for work in works))
    of_parameters = _share(sum(size for name, size in sizes.items() if name in quantized), sum(sizes.values()))
    of_multiplications = _share(total - sum(left.values()), total)
    return Coverage((of_parameters, of_multiplications), (*lines, *_never_called(works)))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _never_called(works: Sequence[Work]) -> list[Left]:
    """The layers with a weight that no example reads."""
    used = frozenset().union(*(work.used for work in works))
    layers = {path: kind for work in works for path, kind in work.layers.items()}
    unread = {name for work in works for name in work.sizes} - used
    return [Left(path, kind, 0.0, "no example calls it") for path, kind in layers.items() if f"{path}.weight" in unread]


def complaints(works: Iterable[Work], config: QuantConfig) -> list[str]:
    """What a user should be warned of: that much is left float that nobody excluded."""
    calls = [contraction for work in works for contraction in work.contractions]
    asked = [call for call in calls if call.reason is None or not call.reason.excluded]
    total = sum(call.multiplications for call in asked)
    done = sum(call.multiplications for call in asked if call.reason is None)
    missed = dict.fromkeys(f"{call.name} ({call.kind})" for call in asked if call.missed)
    where = f"chip {config.chip}, strategy {config.placement}" if config.chip else f"strategy {config.placement}"
    texts = []
    if 2 * done < total:
        texts.append(f"only {percent(done / total)} of the multiplications are quantized")
    if missed:
        names = [*missed][:NAMED]
        more = f" and {len(missed) - NAMED} more" if len(missed) > NAMED else ""
        texts.append(f"weights of {len(missed)} convolutions or linear layers stay float: {', '.join(names)}{more}")
    if not texts:
        return []
    fix = "print(plan.coverage) has the reasons; sq.Rule(name=..., weight=None, requests=False) where that is meant"
    return [f"plan: with {where} {', and '.join(texts)}. Fix: {fix}."]
