"""The bit width of each quantizer under a budget, as an integer program; and the best that each budget can buy."""

from __future__ import annotations

import importlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import ModuleType
from typing import NamedTuple, TypeAlias

from sophq_func.algorithms.bits import BitSensitivity
from sophq_func.core.arguments import MOST_REPEATS, is_count
from sophq_func.core.errors import ConfigError, StateError, explain, raise_all, unknown
from sophq_func.core.public import public
from sophq_func.core.types import Given, Tree
from sophq_func.model.quantized import Quantized

Added: TypeAlias = Mapping[str, Mapping[int, float]]
"""By quantizer and width, what is added to the loss."""

Cost: TypeAlias = float | Mapping[int, float] | Mapping[tuple[int, int], float]
"""For each bit; or by width; of a pair, for each product of bits, or by the two widths."""

Costs: TypeAlias = Mapping[str | tuple[str, str], Cost]
"""Of quantizers, and of pairs of them."""

SLACK = 1e-9
"""Share of the budget by which sums of floats may exceed it."""


class Choice(NamedTuple):
    """One width for each quantizer.

    Attributes:
      bits: by quantizer, sorted.
      cost: of all.
      added: the sum of what they add to the loss.
    """

    bits: dict[str, int]
    cost: float
    added: float


@public
def choose_bits(
    sensitivity: BitSensitivity | Added,
    costs: Costs,
    budget: float,
    *,
    tie: Iterable[Collection[str]] = (),
) -> dict[str, int]:
    """The widths with the least sum of sensitivities whose costs stay within a budget.

    An integer program with one binary variable for each group and width, solved to optimality by ``scipy.optimize.milp``
    (HiGHS). Needs the package ``scipy``.

    Args:
      sensitivity: from :func:`sophq_func.algorithms.bit_sensitivity` or ``trace_sensitivity``; or ``{name: {bits: loss}}``.
      costs: of each quantizer for each bit, such as the size of ``sq.algorithms.sizes(q)``; or by width, ``{name:
        {bits: cost}}``; or of a pair, for each product of bits, such as ``sq.algorithms.bit_operations(...)``. What is not
        named costs nothing.
      budget: the largest sum of costs, in their unit.
      tie: groups of quantizers that must share a width.

    Returns:
      ``{name: bits}``, sorted; for ``q.plan.with_bits`` and ``sq.algorithms.at_widths``.

    Raises:
      ConfigError: unknown names; no ``scipy``; groups without a width in common.
      StateError: a sensitivity that is not finite; a budget that not even the cheapest widths keep.

    Differs from sophgo-mq: the answer is returned; any cost, ties, and quantizers of values.

    Example:
      >>> loss = {"a": {4: 0.5, 8: 0.1}, "b": {4: 0.3, 8: 0.2}}
      >>> choose_bits(loss, {"a": 10, "b": 10}, budget=120)
      {'a': 8, 'b': 4}
    """
    return Program.of(sensitivity, costs, tie).solve(budget).bits


@public
def pareto(
    sensitivity: BitSensitivity | Added,
    costs: Costs,
    budgets: int | Sequence[float] = 16,
    *,
    tie: Iterable[Collection[str]] = (),
) -> list[Choice]:
    """The best choice for each of some budgets, from the cheapest to the dearest; none that costs more and adds no less.

    Args:
      sensitivity, costs, tie: see :func:`choose_bits`.
      budgets: some; or how many, evenly between the costs of the smallest and of the largest widths.

    Example:
      >>> loss = {"a": {4: 0.5, 8: 0.1}, "b": {4: 0.3, 8: 0.2}}
      >>> [(choice.cost, round(choice.added, 1)) for choice in pareto(loss, {"a": 10, "b": 10}, budgets=3)]
      [(80.0, 0.8), (120.0, 0.4), (160.0, 0.3)]
    """
    program = Program.of(sensitivity, costs, tie)
    is_list = not isinstance(budgets, str) and isinstance(budgets, Iterable)
    if not is_list and not is_count(budgets):
        allowed = f"an int from 1 to {MOST_REPEATS}, or a list"
        raise ConfigError(explain("pareto", "there are no budgets", got=budgets, allowed=allowed))
    if isinstance(budgets, int):
        low, high = program.least_cost(), program.largest_cost()
        budgets = [low + (high - low) * i / max(1, budgets - 1) for i in range(budgets)]
    found: list[Choice] = []
    for budget in sorted(budgets):
        choice = program.solve(budget)
        if not found or choice.added < found[-1].added:
            found.append(choice)
    return found


@public
def bit_operations(
    q: Quantized, params: Given, batch: Tree, names: Collection[str] = ()
) -> dict[str | tuple[str, str], float]:
    """Multiplications of each layer times the bits of its operands, as costs for :func:`choose_bits`.

    ``multiplications * bits of the weight * bits of the value`` (BOPs, Baskin et al., arXiv:1804.10969, without additions).

    Args:
      q: a quantized model.
      params: see :meth:`Quantized.apply`.
      batch: one call of the model, whose multiplications are counted.
      names: quantizers of values whose widths are chosen, too. Others count as wide as they are planned; what is not
        quantized has 32 bits.

    Returns:
      Costs for each bit, of weights; for each product of bits, of pairs ``(weight, value)`` with a value of ``names``.

    Example:
      >>> import torch, sophq_func as sq
      >>> _ = torch.manual_seed(0)
      >>> model, x = torch.nn.Linear(4, 3), torch.randn(1, 4)
      >>> q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
      >>> bit_operations(q, sq.params_of(model), x)
      {'weight_fake_quant': 96.0}
    """
    args, kwargs = q.engine.call(batch, "bit_operations")
    graph = q.engine.retrace(q.engine.skeleton.check(params, "bit_operations"), args, kwargs)
    weights = {weight.site.parameter: weight.site for weight in q.engine.acting}
    costs: dict[str | tuple[str, str], float] = {}
    for node in graph:
        read = {*node.parameters.values(), *(operand.parameter for operand in node.operands)}
        for parameter in sorted(read & weights.keys()):
            site = weights[parameter]
            value = site.input.quantizer
            if value in names:
                key: str | tuple[str, str] = (site.quantizer, value)
                each = float(node.multiplications)
            else:
                key = site.quantizer
                each = float(node.multiplications) * (q.plan[value].scheme.bits if value else 32)
            costs[key] = costs.get(key, 0.0) + each
    return costs


class Program:
    """An integer program: one width for each group of quantizers.

    Args:
      groups: of quantizers that share a width.
      added: for each group, by width, what it adds to the loss.
      own: for each group, by width, its cost.
      joint: for each pair of groups, by both widths, their cost.
    """

    def __init__(
        self,
        groups: Sequence[tuple[str, ...]],
        added: Sequence[Mapping[int, float]],
        own: Sequence[Mapping[int, float]],
        joint: Mapping[tuple[int, int], Mapping[tuple[int, int], float]],
    ) -> None:
        self._groups, self._added, self._own, self._joint = groups, added, own, joint
        self._choices = [(group, bits) for group in range(len(groups)) for bits in added[group]]

    @staticmethod
    def of(sensitivity: BitSensitivity | Added, costs: Costs, tie: Iterable[Collection[str]]) -> Program:
        """The program of what a user gives, after a check of it."""
        added = sensitivity.added if isinstance(sensitivity, BitSensitivity) else sensitivity
        groups = _groups(list(added), [tuple(names) for names in tie])
        _check(added, costs)
        place = {name: group for group, names in enumerate(groups) for name in names}
        widths = [_common(names, added) for names in groups]
        sums = [
            {bits: sum(float(added[name][bits]) for name in names) for bits in widths[g]} for g, names in enumerate(groups)
        ]
        own = [dict.fromkeys(each, 0.0) for each in widths]
        joint: dict[tuple[int, int], dict[tuple[int, int], float]] = {}
        for key, cost in costs.items():
            if isinstance(key, str):
                for bits in widths[place[key]]:
                    own[place[key]][bits] += _of(cost, bits, bits)
                continue
            one, other = place[key[0]], place[key[1]]
            for a in widths[one]:
                for b in widths[other]:
                    if one == other and a == b:
                        own[one][a] += _of(cost, (a, a), a * a)
                    elif one != other:
                        pair = joint.setdefault((one, other), {})
                        pair[a, b] = pair.get((a, b), 0.0) + _of(cost, (a, b), a * b)
        return Program(groups, sums, own, joint)

    def solve(self, budget: float) -> Choice:
        """The best choice under a budget.

        Raises:
          ConfigError: no ``scipy``.
          StateError: no choice keeps the budget.
        """
        optimize, numpy = _package("scipy.optimize"), _package("numpy")
        products = [(pair, widths) for pair, by_widths in self._joint.items() for widths in by_widths]
        count = len(self._choices) + len(products)
        index = {choice: place for place, choice in enumerate(self._choices)}
        objective = numpy.zeros(count)
        for choice, place in index.items():
            objective[place] = self._added[choice[0]][choice[1]]
        one_width = numpy.zeros((len(self._groups), count))
        spent = numpy.zeros((1, count))
        for (group, bits), place in index.items():
            one_width[group, place] = 1
            spent[0, place] = self._own[group][bits]
        # the variable of a pair is at least 1 where both widths are chosen; its cost keeps it from being larger
        both = numpy.zeros((len(products), count))
        for row, ((one, other), (a, b)) in enumerate(products):
            both[row, index[one, a]] = both[row, index[other, b]] = 1
            both[row, len(index) + row] = -1
            spent[0, len(index) + row] = self._joint[one, other][a, b]
        limits = [
            optimize.LinearConstraint(one_width, 1, 1),
            optimize.LinearConstraint(spent, -numpy.inf, budget * (1 + SLACK)),
        ]
        if products:
            limits.append(optimize.LinearConstraint(both, -numpy.inf, 1))
        is_whole = numpy.array([1] * len(index) + [0] * len(products))
        found = optimize.milp(objective, constraints=limits, integrality=is_whole, bounds=optimize.Bounds(0, 1))
        if found.x is None:
            allowed = f"at least {self.least_cost():.6g}"
            raise StateError(explain("choose_bits", "no widths keep this budget", got=budget, allowed=allowed))
        return self._choice({group: bits for (group, bits), place in index.items() if found.x[place] > 0.5})

    def least_cost(self) -> float:
        """Of the smallest widths."""
        return self._choice({group: min(by_bits) for group, by_bits in enumerate(self._added)}).cost

    def largest_cost(self) -> float:
        """Of the largest widths."""
        return self._choice({group: max(by_bits) for group, by_bits in enumerate(self._added)}).cost

    def _choice(self, bits: Mapping[int, int]) -> Choice:
        cost = sum(self._own[group][width] for group, width in bits.items())
        cost += sum(by_widths[bits[one], bits[other]] for (one, other), by_widths in self._joint.items())
        added = sum(self._added[group][width] for group, width in bits.items())
        named = {name: bits[group] for group, names in enumerate(self._groups) for name in names}
        return Choice(dict(sorted(named.items())), cost, added)


def _of(cost: Cost, key: object, factor: int) -> float:
    """The cost at some widths."""
    return _as_float(cost[key]) if isinstance(cost, Mapping) else _as_float(cost) * factor  # type: ignore[index]


def _as_float(number: float) -> float:
    """A number as a float; an int that none can hold is infinite."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _groups(names: Sequence[str], tie: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Quantizers that share a width, directly or through others."""
    raise_all([unknown("choose_bits", "quantizer", name, names) for group in tie for name in group if name not in names])
    label = {name: name for name in names}
    for group in tie:
        joined = {label[name] for name in group}
        label = {name: group[0] if own in joined else own for name, own in label.items()}
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(label[name], []).append(name)
    return [tuple(group) for group in found.values()]


def _common(names: Sequence[str], added: Added) -> list[int]:
    """The widths that all quantizers of a group were measured at."""
    common = set(added[names[0]]).intersection(*(added[name] for name in names))
    if not common:
        allowed = {name: sorted(added[name]) for name in names}
        raise ConfigError(explain("choose_bits", "a group has no width in common", got=list(names), allowed=allowed))
    return sorted(common)


def _check(added: Added, costs: Costs) -> None:
    """Raise for costs of names that there are not, and for sensitivities that are no numbers."""
    names = [name for key in costs for name in ((key,) if isinstance(key, str) else key)]
    raise_all([unknown("choose_bits", "quantizer", name, list(added)) for name in dict.fromkeys(names) if name not in added])
    for name, by_bits in added.items():
        for bits, loss in by_bits.items():
            if not float("-inf") < _as_float(loss) < float("inf"):
                where, fix = f"choose_bits: {name}", "leave the width out, or measure it with other batches"
                sentence = f"at {bits} bits it has no finite loss"
                raise StateError(explain(where, sentence, got=_as_float(loss), allowed="a finite number", fix=fix))


def _package(name: str) -> ModuleType:
    """A module of a package that is no dependency."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        sentence, fix = f"the package {package} is missing", "pip install sophq-func[search]"
        raise ConfigError(explain("choose_bits", sentence, fix=fix)) from error
