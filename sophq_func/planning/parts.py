"""The plan of a part of a model, and which parts there are.

A part is one call of one module. Its plan has the whole plan's decisions, quantizer names and parameter names; only the
calls at which quantizers act are counted from where the part starts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from sophq_func.config.site import OperandSite, Site, ValueSite, WeightSite
from sophq_func.core.errors import ConfigError, PlanError, explain, unknown
from sophq_func.planning.picture import Edge, Wiring
from sophq_func.planning.plan import Plan
from sophq_func.planning.runs import Pair, Run, Span


def part(plan: Plan, path: str, call: int, parameters: Collection[str]) -> Plan:
    """The plan of one call of a module.

    Args:
      plan: of the whole model.
      path: of the module.
      call: which of its calls, from 0.
      parameters: canonical names of the parameters that the module reads.

    Raises:
      PlanError: the examples do not reach that call, or come to it by different ways.
    """
    found = [(run, spans[call]) for run in plan.runs if len(spans := run.spans(path)) > call]
    if not found:
        raise PlanError(explain("part", f"call {call} of {path!r} is not possible", because=_why_not(plan, path)))
    before = [run.counts(0, span.start) for run, span in found]
    inside = [run.counts(span.start, span.stop) for run, span in found]
    sites: dict[str, Site] = {}
    for name in plan:
        site = plan.site(name)
        moved = [_moved(site, parameters, *counts) for counts in zip(before, inside, strict=True)]
        own = list(dict.fromkeys(one for one in moved if one is not None))
        if len(own) > 1:
            because = f"the examples make {name} at different calls of it"
            raise PlanError(
                explain("part", f"call {call} of {path!r} is not possible", because=because, fix="plan with one example")
            )
        if own:
            sites[name] = own[0]
    pairs = {place[:2] for site in sites.values() if not site.parameter for place in site.places()}
    names = {made.name for run, span in found for made in run.calls[span.start : span.stop]}
    return Plan(
        {name: plan[name] for name in sites},
        sites,
        tuple({pair: counts[pair] for pair in sorted(pairs)} for counts in inside),
        {name: plan.reasons(name) for name in sites},
        wiring=Wiring(
            tuple(one for one in plan.calls if one.name in names),
            tuple(edge for edge in plan.edges if edge.source in names and edge.target in names),
        ),
        runs=tuple(_cut(run, span) for run, span in found),
    )


def _why_not(plan: Plan, path: str) -> str:
    if not plan.runs:
        return "the plan was written by an older version, without the calls of its examples"
    called = max(len(run.spans(path)) for run in plan.runs)
    return f"the examples call it {called} times" if called else "no example calls it; inside a leaf nothing is seen"


def _moved(site: Site, parameters: Collection[str], before: Mapping[Pair, int], inside: Mapping[Pair, int]) -> Site | None:
    """A site whose calls are counted from the start of the part; ``None`` where it lies outside."""
    if site.argument:
        return None
    kept = []
    for path, function, call, operand in site.places():
        own = call - before[path, function]
        if 0 <= own < inside[path, function]:
            kept.append(OperandSite(path, function, own, operand))
    if isinstance(site, WeightSite) and site.parameter not in parameters:
        return None
    if not kept:
        return site if isinstance(site, WeightSite) else None
    first, *more = kept
    if isinstance(site, ValueSite):
        return replace(site, anchor=first.made, operand=first.operand, more=tuple(more))
    return replace(site, anchor=first.made)


def _cut(run: Run, span: Span) -> Run:
    """The run from where a span starts to where it ends."""
    scopes = (
        Span(scope.path, scope.start - span.start, scope.stop - span.start) for scope in run.scopes if span.holds(scope)
    )
    return Run(run.calls[span.start : span.stop], tuple(scopes))


def matching(plan: Plan, pattern: str) -> list[tuple[str, int]]:
    """Paths of the modules that a glob fits, none inside another, with the number of each call, in execution order.

    Raises:
      ConfigError: it fits no module that the example calls.
    """
    run = _longest(plan)
    called = {made.path for made in run.calls if made.path and not made.function} | {scope.path for scope in run.scopes}
    fits = {path for path in called if path and fnmatchcase(path, pattern)}
    if not fits:
        raise ConfigError(unknown("blocks", "pattern", pattern, sorted(called)))
    outermost = [path for path in fits if not any(_lies_in(path, other) for other in fits)]
    return _in_order(run, outermost)


def _lies_in(path: str, other: str) -> bool:
    return path.startswith(f"{other}.")


def blocks(plan: Plan, in_list: Callable[[str], bool]) -> list[tuple[str, int]]:
    """The blocks of a model: residual ones, and beside them those that stand in a list; as :func:`matching` has them.

    A block is residual if it adds two values that both come from one value made outside of it: ``x + f(x)``, or
    ``g(x) + f(x)`` with a shortcut. The smallest module of which that is true counts, and of those the outermost.

    Args:
      plan: of the model.
      in_list: whether the module at a path is an item of a ``ModuleList`` or ``Sequential``.
    """
    run = _longest(plan)
    residual = _outermost(_residual(run, plan.edges))
    listed = [scope for scope in run.scopes if in_list(scope.path)]
    apart = [scope for scope in listed if not any(scope.holds(own) or own.holds(scope) for own in residual)]
    return _in_order(run, [span.path for span in (*residual, *_outermost(apart))])


def _longest(plan: Plan) -> Run:
    if not plan.runs:
        raise PlanError(
            explain("blocks", "finding blocks is not possible", because=_why_not(plan, ""), fix="plan the model anew")
        )
    return max(plan.runs, key=lambda run: len(run.calls))


def _in_order(run: Run, paths: Collection[str]) -> list[tuple[str, int]]:
    """Each call of modules, first to last, with its number among those of its module."""
    found = [(span.start, path, number) for path in set(paths) for number, span in enumerate(run.spans(path))]
    return [(path, number) for _, path, number in sorted(found)]


def _outermost(spans: Iterable[Span]) -> list[Span]:
    """Those of some spans that lie in no other of them."""
    found: list[Span] = []
    for span in sorted(set(spans), key=lambda span: (span.start, -span.stop)):
        if not found or not found[-1].holds(span):
            found.append(span)
    return found


def _residual(run: Run, edges: Sequence[Edge]) -> Iterator[Span]:
    """For each addition of a value to what was made of it, the smallest call of a module around the two."""
    index = {made.name: i for i, made in enumerate(run.calls)}
    takes: dict[int, list[int]] = {}
    for edge in edges:
        if edge.source in index and edge.target in index:
            takes.setdefault(index[edge.target], []).append(index[edge.source])
    for i, made in enumerate(run.calls):
        terms = takes.get(i, [])
        if made.function == "add" and len(terms) == 2:
            around = (scope for scope in run.around(i) if scope.path)
            one, other = terms
            yield from [s for s in around if _origins(one, s, takes) & _origins(other, s, takes)][:1]


def _origins(value: int, span: Span, takes: Mapping[int, Sequence[int]]) -> set[int]:
    """The calls outside of a span from which a value comes."""
    found: set[int] = set()
    seen: set[int] = set()
    ahead = [value]
    while ahead:
        one = ahead.pop()
        if one in seen:
            continue
        seen.add(one)
        if span.start <= one < span.stop:
            ahead += takes.get(one, [])
        else:
            found.add(one)
    return found
