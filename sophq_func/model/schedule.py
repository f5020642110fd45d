"""At which calls of a run the quantizers of a plan act, and which calls a run may make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from typing import NamedTuple

from sophq_func.capture.decompose import DECOMPOSED
from sophq_func.capture.graph import REPARAMETRIZE, function_of, is_told_apart
from sophq_func.config.matching import matches_name
from sophq_func.config.names import value_quantizer
from sophq_func.config.site import EVERY_CALL, Site, ValueSite, WeightSite
from sophq_func.core.errors import StateError
from sophq_func.core.operations import CONTRACTIONS, LAYERS, hidden_from_compile, operations, without_names
from sophq_func.core.types import Output
from sophq_func.planning.plan import Plan
from sophq_func.planning.runs import UNKNOWN_WAY

Pair = tuple[str, str]
"""What calls are counted by: a module path, and the function called in that module, empty for the module's own call."""

OTHER_WAY = "plan with examples of both ways, sq.quantize(model, config, examples=[...])"
"""The fix in errors about runs that go another way than the examples."""

SHARE = "Rule(name=..., share=True) where a run may make any number of calls"
"""The fix in errors about loops of another length."""

OPTIONAL = "Rule(name=..., optional=True) where a run may leave the value out"
"""The fix in errors about runs that do not reach a quantizer."""


KNOWN = operations() - {"cond"} | {"", "get", REPARAMETRIZE}
"""Names of torch's own functions; a call of a module has none, and the getter of a tensor's attribute has ``"get"``.

Not ``torch.cond``, which a run sees only where hidden calls are reported.
"""


class Actions(NamedTuple):
    """The quantizers that act at one call.

    Attributes:
      operands: quantizer name by the operand's index among the tensors of the call's arguments.
      outputs: quantizer name by the index among the tensors of the call's result.
      inner: quantizer of a weight that is computed inside a leaf module; empty without.
    """

    operands: dict[int, str]
    outputs: dict[int, str]
    inner: str


class Known(NamedTuple):
    """The ways that the examples took.

    Attributes:
      pairs: what the examples call. Empty in plans of older versions, which do not say it.
      excluded: paths of modules, and functions, that a run may reach although no example does.
      told_apart: pairs whose calls are counted apart for each module that was called before.
      acting: those of ``told_apart`` at some calls of which quantizers act.
      after: by pair with several calls, for each of these, what may have been called before.
      items: names of the parameters of which examples take items by number.
      order: the pairs of the calls of the first example at which quantizers act, in its order.
      inputs: for each example, names of the values of the arguments that it gives.
    """

    pairs: frozenset[Pair]
    excluded: frozenset[str]
    told_apart: frozenset[Pair]
    acting: frozenset[Pair]
    after: Mapping[Pair, tuple[frozenset[str], ...]]
    items: frozenset[str]
    order: tuple[Pair, ...]
    inputs: tuple[frozenset[str], ...]


class Schedule:
    """All actions of a plan, by call, and the calls that a run must make.

    Attributes:
      inputs: quantizer name, by the model's argument on which it acts.
      arguments: names of the model's arguments that hold a tensor on which a quantizer acts.
      same: for each argument that must be the same tensor as another argument, that other one.
      actions: by pair, then by the number of the call among those of its pair.
      every: pairs at each call of which the same quantizers act, however many there are.
      shared: quantizers that act before several calls, which may read the same tensor.
      counts: for each example, how many calls each pair makes; of ``every``, one or none.
      optional: pairs, and arguments, that a run may leave out.
      functions: whether an example calls a function that is none of torch's, such as an ``autograd.Function``.
      hidden: pairs of ``actions`` whose function has a spelling that ``torch.compile`` hides from a frame.
      known: the ways that the examples took.
      unreached: paths of modules with parameters that no example calls, and that no rule leaves float.
      groups: pairs whose counts belong together, with the counts that they have in the examples. Those do that an example
        calls more often than another, and the functions of one scope, since their numbers depend on one another. Modules,
        and calls that are told apart, that a run reaches or not do not: any set of experts may run of which each has run in
        an example.

    Args:
      plan: of the model.
      owners: paths of modules that have parameters themselves, with the names of these.
    """

    def __init__(self, plan: Plan, owners: Mapping[str, Collection[str]]) -> None:
        sites = [site for site in map(plan.site, plan) if not isinstance(site, WeightSite)]
        self.inputs = {site.argument: site.quantizer for site in sites if site.argument}
        self._values = {site.argument: site.value for site in sites if site.argument}
        self.same = {repeated: site.argument for site in sites for repeated in site.also}
        self.arguments = {name.partition(".")[0] for name in (*self.inputs, *self.same)}
        self.shared = {site.quantizer for site in sites if site.more}
        self.actions: dict[Pair, dict[int, Actions]] = {}
        for site in sites:
            if not site.argument:
                self._add(site)
        self.every = {pair for pair, calls in self.actions.items() if EVERY_CALL in calls}
        for pair in self.every:
            calls = self.actions[pair]
            calls.update(dict.fromkeys((0, 1), calls.pop(EVERY_CALL)))
        self.counts = [
            {pair: min(count, 1) if pair in self.every else count for pair, count in counts.items()}
            for counts in plan.counts
        ]
        # a place is optional only if every quantizer there is
        required = {place for site in sites if not plan[site.quantizer].optional for place in places(site)}
        self.optional = {place for site in sites for place in places(site)} - required
        # a plan of an older version does not know
        called = {function_of(made.function) for run in plan.runs for made in run.calls}
        self.functions = not plan.runs or not called <= KNOWN
        hidden = hidden_from_compile()
        self.hidden = {pair for pair in self.actions if function_of(pair[1]) in hidden}
        self.known = _known(plan, self.actions.keys() - self.every, bool(self.optional))
        self.groups = _groups(self.counts)
        self.unreached = frozenset(path for path in _unreached(plan, owners) if not self.excludes(path, ""))

    def _add(self, site: Site) -> None:
        """Add a site to the actions of each call at which it acts."""
        for path, function, call, operand in site.places():
            calls = self.actions.setdefault((path, function), {})
            actions = calls.setdefault(call, Actions({}, {}, ""))
            if site.output >= 0:
                actions.outputs[site.output] = site.quantizer
            elif operand >= 0:
                actions.operands[operand] = site.quantizer
            else:
                calls[call] = actions._replace(inner=site.quantizer)

    def __bool__(self) -> bool:
        return bool(self.inputs or self.actions or self.unreached)

    @cached_property
    def idle(self) -> frozenset[Callable[..., Output]]:
        """Builtin functions at whose calls no quantizer acts, and of which no run makes a call that no example may make."""
        acting = {function_of(step) for _, step in (*self.actions, *self.known.acting, *self.known.told_apart)}
        # an item of a parameter has the parameter's name from then on
        items = {"getitem"} if self.known.items else set()
        return without_names(acting | items | CONTRACTIONS.keys() | LAYERS.keys() | DECOMPOSED.keys())

    @cached_property
    def acting_leaves(self) -> frozenset[str]:
        """Paths of the leaves at whose calls quantizers act, or that are counted, or that no run may reach."""
        return self.unreached | {path for path, step in (*self.actions, *self.known.told_apart) if not step}

    @cached_property
    def looks_inside(self) -> bool:
        """Whether a quantizer acts on a weight that is computed inside a leaf."""
        return any(actions.inner for calls in self.actions.values() for actions in calls.values())

    @cached_property
    def tells_apart(self) -> bool:
        """Whether it matters to a call which module was called before it."""
        return bool(self.known.told_apart or self.known.after)

    def may_lack(self, argument: str) -> bool:
        """Whether an example runs without an argument."""
        return any(self._values[argument] not in given for given in self.known.inputs)

    def excludes(self, path: str, step: str) -> bool:
        """Whether rules leave a call float that no example makes: a module's, or a function's in a module."""
        function = function_of(step)
        if function in self.known.excluded:
            return True
        value = place_name(path, function)
        site = ValueSite(quantizer=value_quantizer(value), value=value, paths=(path,))
        return any(matches_name(name, site) for name in self.known.excluded)

    def unknown(self, path: str, step: str, counts: Mapping[Pair, int]) -> StateError:
        """The error for a call that no example makes.

        Args:
          path, step: of the call.
          counts: how many calls of each pair the run has made.
        """
        place = place_name(path, step)
        text = f"{place}: this run calls it and no example does, so it would run in float"
        left = Counter(counts)
        for pair in self.known.order:
            left[pair] -= 1
            if left[pair] < 0:
                text += f" (the first example calls {place_name(*pair)} next)"
                break
        fix = f'{OTHER_WAY}, or sq.Rule(name="{path or function_of(step)}", weight=None, activation=None) to leave it float'
        return StateError(f"{text}. Fix: {fix}.")


def places(site: Site) -> list[Pair | str]:
    """The argument on which a site acts, or the pair of each call at which it acts."""
    if site.argument:
        return [site.argument]
    return [(place.path, place.function) for place in site.places()]


def place_name(path: str, step: str) -> str:
    """A call's place in words.

    Example:
      >>> place_name("layer1", "add"), place_name("moe", "mul@moe.experts.2")
      ('layer1.add', 'moe.mul after moe.experts.2')
    """
    function, _, after = step.partition("@")
    place = f"{path}.{function}".strip(".")
    return f"{place} after {after}" if after else place


def _known(plan: Plan, pairs: Iterable[Pair], may_skip: bool) -> Known:
    """The ways that the examples of a plan took.

    Args:
      plan: of the model.
      pairs: those at whose calls quantizers act.
      may_skip: whether a run may leave some out; then it says nothing what comes before the others.
    """
    pairs = set(pairs)
    made = [one for run in plan.runs for one in run.calls]
    steps = {one.pair for one in made}
    after: dict[Pair, list[set[str]]] = {}
    for run in () if may_skip else plan.runs:
        numbers: dict[Pair, int] = {}
        for one in run.calls:
            if one.counted and one.pair in pairs and not is_told_apart(one.function):
                number = numbers[one.pair] = numbers.get(one.pair, -1) + 1
                ways = after.setdefault(one.pair, [])
                ways += [set() for _ in range(number + 1 - len(ways))]
                ways[number].add(one.after)
    return Known(
        pairs=frozenset(steps | {(path, function_of(step)) for path, step in steps}),
        excluded=frozenset(plan.excluded),
        told_apart=frozenset((path, function_of(step)) for path, step in steps if is_told_apart(step)),
        acting=frozenset((path, function_of(step)) for path, step in pairs if is_told_apart(step)),
        after={pair: tuple(map(frozenset, ways)) for pair, ways in after.items() if _is_ambiguous(ways)},
        items=frozenset(one.after.rpartition("[")[0] for one in made if one.after.endswith("]")),
        order=tuple(one.pair for run in plan.runs[:1] for one in run.calls if one.counted and one.pair in pairs),
        inputs=tuple(frozenset(one.name for one in run.calls if one.is_input) for run in plan.runs),
    )


def _is_ambiguous(ways: Sequence[Set[str]]) -> bool:
    """Whether the numbers of calls could be mixed up: there are several, which come after different modules."""
    found = set().union(*ways)
    return len(ways) > 1 and len(found) > 1 and UNKNOWN_WAY not in found


def _groups(examples: Sequence[Mapping[Pair, int]]) -> list[tuple[tuple[Pair, ...], list[tuple[int, ...]]]]:
    """See :class:`Schedule`.

    Args:
      examples: the counts of each.
    """
    members: dict[Pair, list[Pair]] = {}
    for pair in examples[0]:
        path, step = pair
        is_reached_or_not = len({counts[pair] for counts in examples} - {0}) <= 1
        if not is_reached_or_not:
            group = ("*", "*")
        elif step and not is_told_apart(step):
            group = (path, "*")
        else:
            group = pair
        members.setdefault(group, []).append(pair)
    return [
        (tuple(pairs), list(dict.fromkeys(tuple(counts[pair] for pair in pairs) for counts in examples)))
        for pairs in members.values()
    ]


def _unreached(plan: Plan, owners: Mapping[str, Collection[str]]) -> Iterator[str]:
    """Paths of modules with parameters of their own that no example calls, and whose parameters have no quantizers.

    A function may read the parameters of a module that is never called, as that of ``nn.MultiheadAttention`` does.
    """
    # a plan of an older version does not say what was called
    if not plan or not plan.runs:
        return
    made = [one for run in plan.runs for one in run.calls]
    leaves = {one.path for one in made if not one.function}
    called = {one.path for one in made} | {scope.path for run in plan.runs for scope in run.scopes}
    quantized = {site.parameter for site in map(plan.site, plan)}
    for path, parameters in owners.items():
        parts = path.split(".")
        is_inside = any(".".join(parts[:length]) in leaves for length in range(1, len(parts)))
        if path and path not in called and not is_inside and quantized.isdisjoint(parameters):
            yield path
