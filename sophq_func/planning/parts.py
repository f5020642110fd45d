"""The plan of a part of a model, and the parts that a model has.

A part is one call of one module. Its plan has the decisions, quantizer names and parameter names of the whole plan; only the
calls at which quantizers act are counted from the start of the part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from sophq_func.config.site import EVERY_CALL, ComputedSite, OperandSite, Site, ValueSite, WeightSite
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
    sentence = f"call {call} of {path!r} cannot be cut out"
    spans = [(run, run.spans(path)[call]) for run in plan.runs if len(run.spans(path)) > call]
    if not spans:
        raise PlanError(explain("part", sentence, because=_why_not(plan, path), fix="plan with an example that makes it"))
    before = [run.counts(0, span.start) for run, span in spans]
    inside = [run.counts(span.start, span.stop) for run, span in spans]
    sites: dict[str, Site] = {}
    for name in plan:
        site = plan.site(name)
        moved = [_moved(site, parameters, *counts) for counts in zip(before, inside, strict=True)]
        inner = list(dict.fromkeys(one for one in moved if one is not None))
        if len(inner) > 1:
            because = f"the examples make {name} at different calls of it"
            raise PlanError(explain("part", sentence, because=because, fix="plan with one example"))
        if inner:
            sites[name] = inner[0]
    pairs = {place.pair for site in sites.values() if not isinstance(site, WeightSite) for place in site.places()}
    names = {made.name for run, span in spans for made in run.calls[span.start : span.stop]}
    calls = tuple(one for one in plan.calls if one.name in names)
    edges = tuple(edge for edge in plan.edges if edge.source in names and edge.target in names)
    return Plan(
        {name: plan[name] for name in sites},
        sites,
        tuple({pair: counts[pair] for pair in sorted(pairs)} for counts in inside),
        {name: plan.reasons(name) for name in sites},
        wiring=Wiring(calls, edges),
        runs=tuple(_cut(run, span) for run, span in spans),
        excluded=plan.excluded,
    )


def _why_not(plan: Plan, path: str) -> str:
    """Why a call of a module is not in a plan, in words."""
    if not plan.runs:
        return "the plan was written by an older version, without the calls of its examples"
    called = max(len(run.spans(path)) for run in plan.runs)
    if called:
        return f"the examples call it {called} times"
    return "no example calls it; calls inside of leaf modules are not recorded"


def _moved(site: Site, parameters: Collection[str], before: Mapping[Pair, int], inside: Mapping[Pair, int]) -> Site | None:
    """A site with its calls counted from the start of a part; ``None`` for one outside of it.

    Args:
      site: in the whole model.
      parameters: canonical names of the parameters that the part reads.
      before: number of calls before the part.
      inside: number of calls in the part.
    """
    if site.argument:
        return None
    kept = []
    for path, function, call, operand in site.places():
        if call == EVERY_CALL and inside[path, function]:
            kept.append(OperandSite(path, function, call, operand))
            continue
        call_in_part = call - before[path, function]
        if 0 <= call_in_part < inside[path, function]:
            kept.append(OperandSite(path, function, call_in_part, operand))
    if isinstance(site, WeightSite) and site.parameter not in parameters:
        return None
    if not kept:
        return site if isinstance(site, WeightSite) else None
    first, *more = kept
    if isinstance(site, ValueSite | ComputedSite):
        return replace(site, anchor=first.made, operand=first.operand, more=tuple(more))
    return replace(site, anchor=first.made)


def _cut(run: Run, span: Span) -> Run:
    """The part of a run in a span, counted from its start."""
    inner = [scope for scope in run.scopes if span.holds(scope)]
    scopes = tuple(Span(scope.path, scope.start - span.start, scope.stop - span.start) for scope in inner)
    return Run(run.calls[span.start : span.stop], scopes)


def matching(plan: Plan, pattern: str) -> list[tuple[str, int]]:
    """The calls of the modules that a glob fits and that lie in no other such module, in execution order.

    Args:
      plan: of the model.
      pattern: the glob; ``*`` also matches dots.

    Returns:
      For each call the module's path, and the call's number among those of the module.

    Raises:
      ConfigError: it fits no module that the example calls.
    """
    run = _longest(plan)
    leaves = {made.path for made in run.calls if made.path and not made.function}
    called = leaves | {scope.path for scope in run.scopes}
    fits = {path for path in called if path and fnmatchcase(path, pattern)}
    if not fits:
        raise ConfigError(unknown("blocks", "pattern", pattern, sorted(called)))
    outermost = [path for path in fits if not any(_lies_in(path, other) for other in fits)]
    return _in_order(run, outermost)


def _lies_in(path: str, other: str) -> bool:
    return path.startswith(f"{other}.")


def blocks(plan: Plan, in_list: Callable[[str], bool]) -> list[tuple[str, int]]:
    """The calls of a model's blocks, in execution order: residual blocks, and items of module lists apart from these.

    A block is residual if it adds two values that both come from one value made outside of it: ``x + f(x)``, or
    ``g(x) + f(x)`` with a shortcut. For each addition the smallest such module counts. Of blocks inside one another the
    outermost counts.

    Args:
      plan: of the model.
      in_list: whether the module at a path is an item of a ``ModuleList`` or ``Sequential``.

    Returns:
      As :func:`matching`.
    """
    run = _longest(plan)
    residual = _outermost(_residual(run, plan.edges))
    listed = [scope for scope in run.scopes if in_list(scope.path)]
    apart = [scope for scope in listed if not any(scope.holds(block) or block.holds(scope) for block in residual)]
    return _in_order(run, [span.path for span in (*residual, *_outermost(apart))])


def _longest(plan: Plan) -> Run:
    """The run of the example that calls most; the blocks are those that it calls."""
    if not plan.runs:
        fix = "sq.plan(sq.trace(model, args), config)"
        raise PlanError(explain("blocks", "blocks cannot be found", because=_why_not(plan, ""), fix=fix))
    return max(plan.runs, key=lambda run: len(run.calls))


def _in_order(run: Run, paths: Collection[str]) -> list[tuple[str, int]]:
    """The calls of the modules at some paths, first to last, each with its number among those of its module."""
    calls = [(span.start, path, number) for path in set(paths) for number, span in enumerate(run.spans(path))]
    return [(path, number) for _, path, number in sorted(calls)]


def _outermost(spans: Iterable[Span]) -> list[Span]:
    """The spans that lie in no other one."""
    outermost: list[Span] = []
    # Spans lie in one another or apart, so a span lies in another one exactly if it lies in the last outermost one.
    for span in sorted(set(spans), key=lambda span: (span.start, -span.stop)):
        if not outermost or not outermost[-1].holds(span):
            outermost.append(span)
    return outermost


def _residual(run: Run, edges: Sequence[Edge]) -> Iterator[Span]:
    """For each addition of two values, the smallest call of a module outside of which both have an origin in common."""
    index = {made.name: i for i, made in enumerate(run.calls)}
    takes: dict[int, list[int]] = {}
    for edge in edges:
        if edge.source in index and edge.target in index:
            takes.setdefault(index[edge.target], []).append(index[edge.source])
    for i, made in enumerate(run.calls):
        terms = takes.get(i, [])
        if made.function != "add" or len(terms) != 2:
            continue
        one, other = terms
        for scope in run.around(i):
            if scope.path and _origins(one, scope, takes) & _origins(other, scope, takes):
                yield scope
                break


def _origins(call: int, span: Span, takes: Mapping[int, Sequence[int]]) -> set[int]:
    """The calls outside of a span from which the result of a call comes."""
    origins: set[int] = set()
    seen: set[int] = set()
    pending = [call]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if span.start <= current < span.stop:
            pending += takes.get(current, [])
        else:
            origins.add(current)
    return origins
