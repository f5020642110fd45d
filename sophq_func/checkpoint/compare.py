"""What differs between stored parts and the quantized model that they are to be used with, in a line each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import zip_longest

from torch import Tensor

from sophq_func.capture.skeleton import params_of
from sophq_func.config.site import Site
from sophq_func.model.quantized import Quantized
from sophq_func.model.shapes import Leaf, expected, front_axes, is_shaped, qparams_misfits, state_misfits
from sophq_func.numerics.contracts import QParams, State
from sophq_func.planning.plan import Counts, Plan


def differences(
    q: Quantized | Plan,
    plan: Plan | None,
    qparams: Mapping[str, QParams] | None,
    ostate: Mapping[str, State] | None,
    params: Mapping[str, Tensor] | None,
) -> list[str]:
    """Every difference as a line that names the quantizer or parameter; none where the parts can be used with ``q``."""
    here = q.plan if isinstance(q, Quantized) else q
    found = [] if plan is None else list(_of_plans(plan, here))
    if plan is None and qparams is not None:
        found += _of_names(qparams, here)
    weights = params_of(q.engine.skeleton.module) if isinstance(q, Quantized) else {}
    wanted = {} if qparams is None and ostate is None else expected(here, weights)
    found += qparams_misfits(qparams or {}, wanted) + state_misfits(ostate or {}, wanted)
    if params is not None and isinstance(q, Quantized):
        found += _of_params(params, weights)
    return found


def _of_names(names: Mapping[str, object], here: Plan) -> Iterator[str]:
    yield from (f"missing in the file: {name}" for name in here if name not in names)
    yield from (f"unknown to the plan: {name}" for name in names if name not in here)


def _of_plans(stored: Plan, here: Plan) -> Iterator[str]:
    yield from _of_names(stored, here)
    for name, changed in stored.diff(here).changed.items():
        for field, (before, after) in changed.items():
            if field == "site":
                yield from _of_sites(name, before, after)
            else:
                yield f"{name}: {field} is {before!r} in the file, {after!r} here"
    if stored.keys() == here.keys():
        yield from _of_calls(stored, here)


def _of_calls(stored: Plan, here: Plan) -> Iterator[str]:
    """What the model does otherwise between the quantizers, where these are the same."""
    counts: Iterator[tuple[Counts, Counts]] = zip_longest(stored.counts, here.counts, fillvalue={})
    for number, (before, after) in enumerate(counts):
        for path, function in sorted(before.keys() | after.keys()):
            there, now = before.get((path, function), 0), after.get((path, function), 0)
            if there != now:
                yield f"calls of {function or 'the module'} in {path!r}, example {number}: {there} in the file, {now} here"
    for what, own, other in (
        ("modules whose inside is not looked at", stored.opaque, here.opaque),
        ("inputs that the model writes into", stored.written, here.written),
    ):
        if own != other:
            yield f"{what}: {own!r} in the file, {other!r} here"


def _of_sites(name: str, before: Site, after: Site) -> Iterator[str]:
    """Where a quantizer sits otherwise; the shape of an activation comes with the example's batch."""
    if before.kind != after.kind:
        yield f"{name}: its place is that of a {before.kind} in the file, of a {after.kind} here"
        return
    for field in (f.name for f in fields(before) if f.compare):
        there, here = getattr(before, field), getattr(after, field)
        if there != here and not (field == "shape" and before.role == after.role == "activation"):
            yield f"{name}: {field} of its place is {there!r} in the file, {here!r} here"


def _of_params(params: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> Iterator[str]:
    yield from (f"missing in the file: parameter {name}" for name in here if name not in params)
    yield from (f"unknown to the model: parameter {name}" for name in sorted(params) if name not in here)
    both = {name: (params[name], Leaf(tuple(other.shape), other.dtype)) for name, other in here.items() if name in params}
    front = front_axes(both.values())
    for name, (own, leaf) in both.items():
        if own.dtype != leaf.dtype or not is_shaped(own, leaf, front):
            yield f"parameter {name}: {own.dtype} {tuple(own.shape)} in the file, {leaf} here"
