"""Whether a plan fits a model: checked once, when it is built. A plan may come from a file, and from another model.

What fits here can still differ from later runs in what no plan says: how many tensors a call has, and their shapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from inspect import Parameter

from torch import Tensor

from sophq_func.capture.arguments import arguments
from sophq_func.capture.functions import signature
from sophq_func.capture.skeleton import Skeleton
from sophq_func.config.site import (
    EVERY_CALL,
    RULES_OF_LAYERS,
    RULES_OF_MULTIPLIERS,
    RULES_OF_TERMS,
    OperandSite,
    Requant,
    Site,
    ValueSite,
    WeightSite,
)
from sophq_func.core.errors import PlanError, StateError, explain, near, raise_all
from sophq_func.model.bind import NORM_TENSORS
from sophq_func.model.weight_quantizer import arranged, arranged_scheme, is_regrouped
from sophq_func.numerics.granularity import Axis
from sophq_func.numerics.layout import rows, scale_axes
from sophq_func.planning.checks import block_size, is_scaled_grid
from sophq_func.planning.plan import Plan
from sophq_func.planning.runs import Pair
from sophq_func.planning.unite import Counts

FIX = "plan this model anew"
"""What to do about a plan of another model."""

MOST = 20
"""Problems in one message: in a plan of another model, each quantizer has one."""

SHORT_BLOCK = 4096
"""Blocks of so many elements fit any tensor: filled up, an axis of one element does not take much."""

FILLED = 16
"""How many times as long as an axis a longer block may be."""

NO_CHANNELS = -1
"""How many output channels a weight has that has several axes of them."""

Problems = Iterator[tuple[str, str]]
"""The name of a quantizer, or of the plan as a whole; and what does not fit, as an error sentence."""


def check_fits(skeleton: Skeleton, plan: Plan) -> None:
    """Raise a :class:`PlanError` that says what in a plan does not fit a model.

    Args:
      skeleton: the whole model.
      plan: its plan, or another one.
    """
    sites = [plan.site(name) for name in plan]
    counts, known = plan.counts, frozenset(plan)
    problems = [
        *_of_blocks(plan, sites),
        *_of_counts(plan, counts, sites),
        *_of_places(sites),
        *_of_names(plan, sites),
        *_of_arguments(skeleton, plan, sites),
    ]
    modules, tensors = dict(skeleton.module.named_modules()), skeleton.registered()
    most = {pair: max(of_one[pair] for of_one in counts) for pair in counts[0]} if not problems else {}
    for site in sites:
        if isinstance(site, WeightSite):
            problems += ((site.quantizer, problem) for problem in _of_weight(skeleton, tensors, plan, known, site))
        else:
            problems += ((site.quantizer, problem) for problem in _of_value(modules, most, plan, known, site))
    found = [explain(name, problem, fix=FIX) for name, problem in problems]
    more = [f"plan: {len(found) - MOST} more."] if len(found) > MOST else []
    raise_all([*found[:MOST], *more], PlanError)


def _of_blocks(plan: Plan, sites: list[Site]) -> Problems:
    """Blocks are about as long as an axis at most: shorter axes are filled up with zeros, which take memory."""
    for site in sites:
        size = block_size(plan[site.quantizer])
        if size > max((SHORT_BLOCK, *(FILLED * length for length in site.shape))):
            yield site.quantizer, f"a tensor of shape {site.shape} has no blocks of {size} elements"


def _of_counts(plan: Plan, counts: tuple[Counts, ...], sites: list[Site]) -> Problems:
    """The calls that a plan counts are those at which its quantizers act, and those that its examples make."""
    acting = {place.pair for site in sites if _acts_at_calls(site) for place in site.places()}
    for pair in sorted(acting ^ counts[0].keys()):
        yield "plan", f"it counts {'no ' if pair in acting else ''}calls of {pair}"
    if plan.runs and len(plan.runs) != len(counts):  # older texts do not have the calls of the examples
        yield "plan", f"it counts the calls of {len(counts)} examples, and has {len(plan.runs)}"
        return
    for run, counted in zip(plan.runs, counts, strict=False):
        made = run.counts(0, len(run.calls))
        for pair, count in counted.items():
            if pair in acting and made.get(pair, 0) != count:
                yield "plan", f"it counts {count} calls of {pair}, and its example makes {made.get(pair, 0)}"


def _of_places(sites: list[Site]) -> Problems:
    """No two quantizers act on one tensor: one of them would be lost."""
    owners: dict[object, str] = {}
    shared = {place.pair: place.call == EVERY_CALL for site in sites if _acts_at_calls(site) for place in site.places()}
    for site in sites:
        for place in _places(site):
            other = owners.setdefault(place, site.quantizer)
            if other != site.quantizer:
                yield site.quantizer, f"{other} acts on the same tensor"
        for call in site.places() if _acts_at_calls(site) else ():
            if (call.call == EVERY_CALL) != shared[call.pair]:
                yield site.quantizer, f"it acts at call {call.call} of {call.pair}, and another one at every call"


def _acts_at_calls(site: Site) -> bool:
    return not site.argument and not isinstance(site, WeightSite)


def _places(site: Site) -> list[object]:
    """The tensors on which a quantizer acts, in a form that can be compared."""
    if isinstance(site, WeightSite):
        return [("parameter", site.parameter)]
    if site.argument:
        return [("argument", name) for name in (site.argument, *site.also)]
    return [(place, site.output) for place in site.places()]


def _of_arguments(skeleton: Skeleton, plan: Plan, sites: list[Site]) -> Problems:
    """The model has the arguments that a plan names."""
    parameters = signature(skeleton.entry).parameters
    takes_any = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())
    known = {*parameters, arguments(skeleton.entry).rest}
    named = [(site.quantizer, name) for site in sites if site.argument for name in (site.argument, *site.also)]
    for quantizer, name in (*named, *(("plan", name) for name in plan.written)):
        if not takes_any and name.partition(".")[0] not in known:  # ``x.0`` is a tensor in a list
            yield quantizer, f"the model has no argument {name!r}"


def _of_value(modules: Mapping[str, object], most: Counts, plan: Plan, known: Set[str], site: Site) -> Iterator[str]:
    """The calls at which a quantizer acts are there, and integers come to it from grids of the plan."""
    is_value = isinstance(site, ValueSite)
    if is_value and not site.argument and (site.output >= 0) == (site.operand >= 0):
        yield "it acts neither on one result nor on one operand"
    for place in site.places() if not site.argument else ():
        if place.path not in modules:
            yield f"the model has no module {place.path!r}"
        elif place.call >= most.get(place.pair, place.call + 1):
            yield f"the examples make {most[place.pair]} calls of {place.pair}, and it acts at call {place.call}"
        if place.operand < 0 <= site.operand:
            yield f"it acts on no operand of {place.pair}"
    if site.requant:
        yield from _of_multipliers(plan, known, site)


def _of_names(plan: Plan, sites: list[Site]) -> Problems:
    """The result on which a quantizer acts has its name: else two quantizers have changed places."""
    names: dict[OperandSite, set[str]] = {}
    for run in plan.runs:
        numbers: Counter[Pair] = Counter()
        for made in run.calls:
            if made.counted:
                names.setdefault(OperandSite(*made.pair, numbers[made.pair], -1), set()).add(made.name)
                numbers[made.pair] += 1
    for site in sites if plan.runs else ():
        if not isinstance(site, ValueSite) or site.argument or site.output < 0 or site.anchor.call == EVERY_CALL:
            continue
        value = site.members[-1] if site.members else site.value
        found = names.get(OperandSite(*site.anchor, -1), set())
        # of several results of one call, the later ones have a number behind its name
        if not any(value.startswith(name) for name in found):
            yield site.quantizer, f"the examples call {' or '.join(sorted(found)) or 'nothing'} where it acts on {value}"


def _of_multipliers(plan: Plan, known: Set[str], site: Site) -> Iterator[str]:
    """A chip's way from one grid to another has as many grids as its rule, with one step each."""
    first, *others = site.requant
    if any(requant._replace(source=first.source) != first for requant in others):
        yield "its multipliers belong to several rules"
    if first.rule not in RULES_OF_MULTIPLIERS:
        yield f"there is no rule {first.rule!r} of multipliers"
    if first.result and first.rule not in RULES_OF_TERMS:
        yield f"it is no term of {first.result}"
    sources = [requant.source for requant in site.requant]
    for name in dict.fromkeys((site.quantizer, *sources, *([first.result] if first.result else []))):
        if name not in known:
            yield f"the plan has no quantizer {name!r}, from whose grid integers come"
        elif not _has_steps(plan, name, first):
            yield f"integers cannot come from the grid of {name}"
    if first.rule in RULES_OF_LAYERS:
        layers = [plan.site(name) for name in sources if name in known]
        has_axis = len(sources) == 2 and -len(site.shape) <= first.axis < 0
        if not has_axis or not all(_has_channels(layer, site.shape[first.axis]) for layer in layers):
            yield f"it is no result of a layer with channels along axis {first.axis}"


def _has_channels(source: Site, count: int) -> bool:
    """Whether a weight has as many output channels as the result of its layer; yes for values, which have none."""
    return source.role != "weight" or not source.shape or _channels(source.shape, source.axis) in (count, NO_CHANNELS)


def _has_steps(plan: Plan, name: str, requant: Requant) -> bool:
    """Whether the integers of a grid can be told: it has one step, or the grid of a layer's weight one for each channel."""
    axes = scale_axes(plan[name].scheme.granularity)
    return axes == 0 or (axes == 1 and requant.rule in RULES_OF_LAYERS and plan.site(name).role == "weight")


def _of_weight(
    skeleton: Skeleton, tensors: Mapping[str, Tensor], plan: Plan, known: Set[str], site: WeightSite
) -> Iterator[str]:
    """A weight has the axes, channels and groups of its site; its BatchNorm and its bias have as many channels."""
    if site.parameter not in tensors:
        yield f"the model has no parameter {site.parameter!r}; {near(site.parameter, tensors)}".removesuffix("; ")
        return
    weight = tensors[site.parameter]
    if site.shape and len(site.shape) != weight.ndim:
        yield f"its weight has {weight.ndim} axes, and that of the plan {len(site.shape)}"
        return
    kept = site.axis if isinstance(site.axis, tuple) else (site.axis,)
    if any(not -weight.ndim <= axis < weight.ndim for axis in kept) or len(set(kept)) < len(kept):
        yield f"a weight of {weight.ndim} axes has no output axis {site.axis!r}"
        return
    if is_regrouped(site) and weight.shape[0] % site.groups:
        yield f"its weight cannot be cut into {site.groups} groups"
        return
    seen = arranged(weight, site)
    try:
        *steps, _ = rows(seen, arranged_scheme(plan[site.quantizer].scheme, site).granularity).shape
    except StateError as error:
        yield str(error)
        return
    channels = _channels(seen.shape, 0 if is_regrouped(site) else site.axis)
    if site.norm:
        owned = skeleton.tensors_of(site.norm)
        if not owned.keys() >= NORM_TENSORS or not hasattr(skeleton.module.get_submodule(site.norm), "momentum"):
            yield f"the model has no BatchNorm {site.norm!r} to be folded"
        elif any(tensors[owned[name]].numel() != channels for name in NORM_TENSORS - {"num_batches_tracked"}):
            yield f"{site.norm} has other channels than the weight"
    if site.bias and site.bias not in tensors:
        yield f"the model has no bias {site.bias!r}"
    elif site.bias and (site.source or site.norm) and tuple(tensors[site.bias].shape) != (channels,):
        yield f"{site.bias} has {tuple(tensors[site.bias].shape)} elements, and the weight {channels} channels"
    if site.source:
        yield from _of_rounded_bias(plan, known, site, steps in ([], [channels]))
    lacking = {read.quantizer for read in site.inputs if read.quantizer} - known
    yield from (f"the plan has no quantizer {name!r}, which its layer reads" for name in sorted(lacking))


def _channels(shape: Sequence[int], axis: Axis) -> int:
    """How many output channels a weight has that has one axis of them."""
    return shape[axis] if isinstance(axis, int) and -len(shape) <= axis < len(shape) else NO_CHANNELS


def _of_rounded_bias(plan: Plan, known: Set[str], site: WeightSite, has_channels: bool) -> Iterator[str]:
    """A bias is rounded with one scale of the input, and one of each channel of the weight (``has_channels``)."""
    if site.source not in known:
        yield f"the plan has no quantizer {site.source!r}, whose scale rounds the bias"
        return
    source, own = plan[site.source], plan[site.quantizer]
    is_value = plan.site(site.source).role == "activation"
    has_one_scale = scale_axes(source.scheme.granularity) == 0 and is_scaled_grid(source) and is_scaled_grid(own)
    if not (is_value and has_one_scale and has_channels):
        yield f"the scale of {site.source} cannot round the bias"
