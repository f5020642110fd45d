"""Compare the parts of a checkpoint with a quantized model: one line for each difference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import zip_longest

from torch import Tensor

from sophq_func.config.site import Site
from sophq_func.core.errors import other_prefix
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
    """All differences, each as a line that names the quantizer or parameter; empty if the parts fit ``q``.

    Args:
      q: the quantized model or the plan to use the parts with.
      plan, qparams, ostate, params: the parts; ``None`` for those that the checkpoint does not have.
    """
    here = q.plan if isinstance(q, Quantized) else q
    lines: list[str] = []
    if plan is not None:
        lines += _of_plans(plan, here)
    elif qparams is not None:
        lines += _of_names(qparams, here)
    weights = q.engine.empty_params() if isinstance(q, Quantized) else {}
    wanted = {} if qparams is None and ostate is None else expected(here, weights)
    lines += qparams_misfits(qparams or {}, wanted) + state_misfits(ostate or {}, wanted)
    if params is not None and isinstance(q, Quantized):
        lines += _of_params(params, weights)
    return lines


def _of_names(names: Mapping[str, object], here: Plan) -> Iterator[str]:
    """Quantizers that only the file or only the plan has; one line where only a step of their paths differs."""
    renamed = other_prefix(names, here, here)
    if renamed and names.keys() != here.keys():
        yield f"the quantizers in the file {renamed}"
        return
    yield from (f"missing in the file: {name}" for name in here if name not in names)
    yield from (f"unknown to the plan: {name}" for name in names if name not in here)


def _of_plans(stored: Plan, here: Plan) -> Iterator[str]:
    """Differences of quantizers; and of the calls between them, if the quantizers are the same."""
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
    """Differences in how often modules and functions are called, and in what the plan leaves alone."""
    counts: Iterator[tuple[Counts, Counts]] = zip_longest(stored.counts, here.counts, fillvalue={})
    for number, (before, after) in enumerate(counts):
        for path, function in sorted(before.keys() | after.keys()):
            there, now = before.get((path, function), 0), after.get((path, function), 0)
            if there != now:
                yield f"calls of {function or 'the module'} in {path!r}, example {number}: {there} in the file, {now} here"
    if stored.opaque != here.opaque:
        yield f"modules whose inside is not traced: {stored.opaque!r} in the file, {here.opaque!r} here"
    if stored.written != here.written:
        yield f"inputs that the model writes into: {stored.written!r} in the file, {here.written!r} here"


def _of_sites(name: str, before: Site, after: Site) -> Iterator[str]:
    """Differences of a quantizer's site, except for the shape of an activation, which depends on the example's batch."""
    if before.kind != after.kind:
        yield f"{name}: its site is that of a {before.kind} in the file, of a {after.kind} here"
        return
    are_activations = before.role == after.role == "activation"
    for field in (f.name for f in fields(before) if f.compare):
        there, here = getattr(before, field), getattr(after, field)
        depends_on_batch = field == "shape" and are_activations
        if there != here and not depends_on_batch:
            yield f"{name}: {field} of its site is {there!r} in the file, {here!r} here"


def _of_params(params: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> Iterator[str]:
    """Parameters that only the file or only the model has, and those of another dtype or shape."""
    renamed = other_prefix(params, here, here)
    if renamed and params.keys() != here.keys():
        yield f"the parameters in the file {renamed}"
        return
    yield from (f"missing in the file: parameter {name}" for name in here if name not in params)
    yield from (f"unknown to the model: parameter {name}" for name in sorted(params) if name not in here)
    in_both = [name for name in here if name in params]
    pairs = {name: (params[name], Leaf(tuple(here[name].shape), here[name].dtype)) for name in in_both}
    front = front_axes(pairs.values())  # the extra leading axes of a stack of several params
    for name, (stored, expected_leaf) in pairs.items():
        if stored.dtype != expected_leaf.dtype or not is_shaped(stored, expected_leaf, front):
            yield f"parameter {name}: {stored.dtype} {tuple(stored.shape)} in the file, {expected_leaf} here"
