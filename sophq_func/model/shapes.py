"""Whether stored states fit a plan: class, shapes and dtypes of each quantizer's state, and scales that can be used.

A plan holds the shapes of activations. Of a weight it tells only how many axes the scales have, unless the shapes of the
weights are given, too: then sizes along these axes are compared, else only their number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from sophq_func.config.site import WeightSite
from sophq_func.core.errors import StateError, explain, raise_all
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.model.weight_quantizer import WeightQuantizer
from sophq_func.numerics import pieces
from sophq_func.numerics.contracts import OBSERVERS, QParams, State
from sophq_func.numerics.granularity import Granularity, PerBlock, PerChannel, PerGroup
from sophq_func.numerics.layout import scale_axes
from sophq_func.numerics.ranges import no_range
from sophq_func.numerics.scheme import QScheme, QuantizerConfig
from sophq_func.planning.plan import Plan

Shape: TypeAlias = tuple[int, ...]

FIELDS = ("scale", "zero_point")
"""What all qparams have; further fields are extras."""

AXES = {0: "shape ()", 1: "one axis"}
"""What a scale with few axes has, for errors."""

NO_ZERO_POINTS = (torch.bool, torch.complex32, torch.complex64, torch.complex128)
"""Dtypes that no zero point has."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes in which torch computes; those of eight bits are for storage alone."""

SIMILAR = 0.7
"""How alike two names are that are taken for one: a letter of four may differ, two may not."""

MOST_AXES = 64
"""Most axes of a shape that is made up: more than any weight has. A damaged plan may name axis 10 ** 9, and must not cost
memory."""

FIX = "calibrate with a model of this plan"
"""The fix in errors about states that belong to another plan."""

UNMAKEABLE = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
"""What making a quantizer may raise where a damaged plan names options or shapes that cannot be."""


class Leaf(NamedTuple):
    """What is expected of one tensor.

    Attributes:
      shape: its last axes, ``None`` for one of any size; ``None`` instead of a tuple: any shape.
      dtype: its dtype.
    """

    shape: tuple[int | None, ...] | None
    dtype: torch.dtype

    def axes_before(self, tensor: Tensor) -> Shape | None:
        """The axes of a tensor in front of those expected; ``None`` where the tensor does not have these."""
        expected = self.shape or ()
        front = tensor.ndim - len(expected)
        if front < 0:
            return None
        if any(size not in (None, actual) for size, actual in zip(expected, tensor.shape[front:], strict=True)):
            return None
        return tuple(tensor.shape[:front])

    def __str__(self) -> str:
        if self.shape is None:
            return str(self.dtype)
        sizes = tuple("any" if size is None else size for size in self.shape)
        return f"{self.dtype} {sizes}".replace("'", "")


class Expected(NamedTuple):
    """What one quantizer has.

    Attributes:
      cls: the class of its observer's state.
      state: fields of that state.
      qparams: fields of its qparams, extras too.
      learnable: names of the qparams that it may learn.
    """

    cls: type[State]
    state: dict[str, Leaf]
    qparams: dict[str, Leaf]
    learnable: tuple[str, ...]


def expected(plan: Plan, weights: Mapping[str, Tensor] | None = None) -> dict[str, Expected]:
    """What each quantizer of a plan has, by name. It takes no memory, whatever shapes the plan names.

    Args:
      plan: the plan.
      weights: tensors of the shapes of the model's parameters, by name.

    Raises:
      StateError: for every quantizer that cannot be made: a name that is not registered, impossible options or shapes.
    """
    expected, problems = {}, []
    for name in plan:
        try:
            expected[name] = _expected(plan, name, weights or {})
        except UNMAKEABLE as error:
            problems.append(f"{name}: no quantizer can be made of its config: {error}")
    raise_all(problems, StateError)
    return expected


def _expected(plan: Plan, name: str, weights: Mapping[str, Tensor]) -> Expected:
    """What one quantizer has: read off a state and qparams that it makes of an empty tensor."""
    site, config = plan.site(name), plan[name]
    observer, fake_quantize = OBSERVERS.build(config.observer), pieces.build(config.fake_quantize)
    empty = torch.empty((), device="meta")
    sized = True
    if not isinstance(site, WeightSite):
        scheme = config.scheme
        params = {"": empty}  # of which a value's quantizer reads the device
        x = RunQuantizer(site, config, observer, fake_quantize).seen(params)
    else:
        weight = WeightQuantizer(site, config, observer, fake_quantize)
        scheme = weight.scheme
        sized = site.parameter in weights
        if sized:
            x = weight.seen({site.parameter: empty.expand(weights[site.parameter].shape)})
        else:
            x = empty.expand(_some_shape(scheme.granularity))
    state = observer.init(x, scheme)
    scale, _ = no_range(x, scheme.granularity)
    qparams = QParams(scale, torch.zeros_like(scale, dtype=torch.int32), {})
    fields = _fields(fake_quantize.init(qparams, x, scheme))
    return Expected(
        type(state),
        {field: _leaf(tensor, sized, ranked=True) for field, tensor in state._asdict().items()},
        {field: _leaf(tensor, sized, ranked=field in FIELDS) for field, tensor in fields.items()},
        fake_quantize.learnable,
    )


def _some_shape(granularity: Granularity) -> Shape:
    """A shape that a weight with this granularity may have."""
    if isinstance(granularity, PerBlock):
        return granularity.rows, granularity.columns
    size = granularity.size if isinstance(granularity, PerGroup) else 1
    axis = granularity.axis if isinstance(granularity, PerChannel | PerGroup) else 0
    last = max(axis, default=0) if isinstance(axis, tuple) else abs(axis or 0)
    ndim = last + 4  # enough for the axis to exist, in a weight of a 2-d convolution or larger
    return (size,) * min(ndim, MOST_AXES)


def _leaf(tensor: Tensor, sized: bool, ranked: bool) -> Leaf:
    """What is expected of a tensor like this one.

    Args:
      tensor: of the same dtype and number of axes.
      sized: its sizes are those that are expected.
      ranked: if not, its number of axes is.
    """
    if sized:
        return Leaf(tuple(tensor.shape), tensor.dtype)
    return Leaf((None,) * tensor.ndim if ranked else None, tensor.dtype)


def _fields(qparams: QParams) -> dict[str, Tensor]:
    return {"scale": qparams.scale, "zero_point": qparams.zero_point, **qparams.extras}


def check_ostate(plan: Plan, ostate: Mapping[str, State]) -> None:
    """Raise a :class:`StateError` unless these are the plan's states, of its shapes and dtypes."""
    expected_of = expected(plan)
    plan.check(ostate, "ostate", {name: entry.cls for name, entry in expected_of.items()})
    raise_all([f"{misfit} Fix: {FIX}." for misfit in state_misfits(ostate, expected_of)], StateError)


def check_qparams(plan: Plan | None, qparams: Mapping[str, QParams]) -> None:
    """Raise a :class:`StateError` unless these are qparams, and those of the plan, with scales that can be used."""
    _check_types(qparams)
    problems: list[str] = []
    if plan is None:
        for name, entry in qparams.items():
            problems += _not_finite(name, entry, FIELDS)
    else:
        expected_of = expected(plan)
        plan.check(qparams, "qparams", dict.fromkeys(plan, QParams))
        # before any number is read: torch does not compare those of some dtypes
        raise_all([f"{misfit} Fix: {FIX}." for misfit in qparams_misfits(qparams, expected_of)], StateError)
        for name in plan:
            problems += _unusable(name, qparams[name], plan[name], expected_of[name].learnable)
    raise_all(problems, StateError)


SETTINGS = ("enabled", "noise", "qmax", "qmin")
"""Extras that any quantizer may be given after ``init``; a quantizer without use for noise refuses it itself."""

GIVEN = ("hessian",)
"""Extras that some fake quantizers take without making or learning them."""


class Kind(NamedTuple):
    """What is checked of the qparams of one quantizer at each run, as it takes no look at numbers.

    Attributes:
      axes: how many axes its scale has; ``None``: any number, as where scales are computed from the tensor at hand.
      extras: names of the extras that it may have; those of a user's own fake quantizer may be others.
    """

    axes: int | None
    extras: frozenset[str]


def kind_of(scheme: QScheme, learnable: Collection[str]) -> Kind:
    """The kind of a quantizer's qparams, from its scheme and the fields that it may learn."""
    axes = None if scheme.dynamic else scale_axes(scheme.granularity)
    return Kind(axes, frozenset((*SETTINGS, *GIVEN, *learnable)).difference(FIELDS))


def check_kinds(qparams: Mapping[str, QParams], kinds: Mapping[str, Kind]) -> None:
    """Raise a :class:`StateError` for qparams whose fields would broadcast to something else, or that nobody reads.

    Sizes along an axis are compared where a tensor is quantized. Inside a ``vmap`` a field has the shape of one member.
    """
    problems: list[str] = []
    for name, (axes, known) in kinds.items():
        scale, zero_point, extras = qparams[name]
        is_fitting = axes is None or (scale.ndim == axes and (axes == 0 or zero_point.shape == scale.shape))
        # a zero point is int32, floating where it is learned; the others are seen to one by one
        is_usual = zero_point.dtype == torch.int32 or zero_point.is_floating_point()
        if extras or not is_fitting or zero_point.ndim != scale.ndim or not is_usual or not scale.is_floating_point():
            problems += _unfit(name, qparams[name], axes, known)
    raise_all(problems, StateError)


def _unfit(name: str, qparams: QParams, axes: int | None, known: Collection[str]) -> Iterator[str]:
    """Why qparams of one quantizer do not fit it, in a line each."""
    where = f"qparams of {name}"
    scale, zero_point, extras = qparams
    if axes is not None and scale.ndim != axes:
        allowed = f"{AXES.get(axes, f'{axes} axes')}, as planned"
        fix = f"{FIX}; a batch of settings goes through torch.vmap(q.apply, (None, 0, None))(params, settings, x)"
        yield explain(where, "scale has another number of axes", got=tuple(scale.shape), allowed=allowed, fix=fix)
    elif zero_point.shape != scale.shape and axes is not None:
        allowed = f"{tuple(scale.shape)}, that of the scale"
        yield explain(where, "zero_point has another shape", got=tuple(zero_point.shape), allowed=allowed, fix=FIX)
    for field, tensor in (("scale", scale), ("zero_point", zero_point)):
        is_number = tensor.is_floating_point() if field == "scale" else tensor.dtype not in NO_ZERO_POINTS
        if not is_number:
            allowed = "torch.float32" if field == "scale" else "torch.int32 or, where it is learned, torch.float32"
            yield explain(where, f"{field} has a dtype without use", got=tensor.dtype, allowed=allowed, fix=FIX)
    yield from _misnamed(where, extras, known)
    if ("qmin" in extras) != ("qmax" in extras):
        alone = "qmin" if "qmin" in extras else "qmax"
        fix = "sq.with_bits(qparams, q.plan, bits)"
        yield explain(where, "bounds of codes come in pairs", got=f"only {alone}", allowed="qmin and qmax", fix=fix)
    for field in ("qmin", "qmax", "enabled"):
        bound = extras.get(field)
        if bound is not None and bound.ndim and (field == "enabled" or bound.shape != scale.shape):
            allowed = "()" if field == "enabled" else f"() or {tuple(scale.shape)}, that of the scale"
            yield explain(where, f"{field} has another shape", got=tuple(bound.shape), allowed=allowed, fix=FIX)


def _misnamed(where: str, extras: Collection[str], known: Collection[str]) -> Iterator[str]:
    """A line for each extra whose name is nearly that of one which is missing: nobody would read it."""
    for field in sorted(set(extras) - set(known)):
        meant = get_close_matches(field, sorted(set(known) - set(extras)), n=1, cutoff=SIMILAR)
        if meant:
            allowed = ", ".join(sorted(known))
            yield explain(where, "extras has a name that nobody reads", got=field, allowed=allowed, fix=f"{meant[0]!r}")


def _check_types(qparams: Mapping[str, QParams]) -> None:
    """Raise unless every value is QParams of tensors whose names can be written as ``<quantizer>.<field>``."""
    allowed, fix = "a dict {quantizer: QParams} of tensors", "q.calibrate(params, batches) returns one"
    if not isinstance(qparams, Mapping):
        sentence, got = "this is not a dict of qparams", type(qparams).__name__
        raise StateError(explain("qparams", sentence, got=got, allowed=allowed, fix=fix))
    for name, entry in qparams.items():
        where = f"qparams[{name!r}]"
        if not isinstance(entry, QParams) or not all(isinstance(leaf, Tensor) for leaf in _fields(entry).values()):
            sentence, got = "this value is not QParams", type(entry).__name__
            raise StateError(explain(where, sentence, got=got, allowed=allowed, fix=fix))
        bad = [field for field in entry.extras if field in FIELDS or "." in field]
        if bad:
            sentence, because = "extras cannot have these names", "a leaf is named '<quantizer>.<field>'"
            raise StateError(explain(where, sentence, got=bad, because=because, fix="rename them"))


def state_misfits(ostate: Mapping[str, State], expected: Mapping[str, Expected]) -> list[str]:
    """What does not fit in observer states, in a line each; those of other names or classes are passed over."""
    fields = {}
    for name, state in ostate.items():
        if name in expected and type(state) is expected[name].cls:
            fields[name] = state._asdict()
    return list(misfits("ostate", fields, {name: expected[name].state for name in fields}))


def qparams_misfits(qparams: Mapping[str, QParams], expected: Mapping[str, Expected]) -> list[str]:
    """What does not fit in qparams, in a line each; names that are not expected are passed over."""
    fields = {name: _fields(entry) for name, entry in qparams.items() if name in expected}
    return list(misfits("qparams", fields, {name: expected[name].qparams for name in fields}))


def misfits(
    what: str, leaves: Mapping[str, Mapping[str, Tensor]], expected: Mapping[str, Mapping[str, Leaf]]
) -> Iterator[str]:
    """What does not fit, in a line each. All may have further axes in front, the same ones, as ``vmap`` makes them.

    Args:
      what: ``"ostate"`` or ``"qparams"``.
      leaves: tensors by quantizer and field.
      expected: what they should be, by the same; of fewer quantizers, maybe.
    """
    pairs = [
        (leaves[name][field], leaf)
        for name, fields in expected.items()
        for field, leaf in fields.items()
        if field in leaves[name]
    ]
    front = front_axes(pairs)
    for name, fields in expected.items():
        found = leaves[name]
        for field, leaf in fields.items():
            tensor = found.get(field)
            if tensor is None or not _is_kind(what, field, tensor, leaf) or not is_shaped(tensor, leaf, front):
                yield f"{what} of {name}: {field} is {_described(tensor)}, expected {_behind(front, leaf)}."
        if what == "qparams" and found["zero_point"].shape != found["scale"].shape:
            scale, zero = tuple(found["scale"].shape), tuple(found["zero_point"].shape)
            yield f"qparams of {name}: zero_point has the shape {zero}, scale {scale}, expected the same."


def _is_kind(what: str, field: str, tensor: Tensor, leaf: Leaf) -> bool:
    """Whether a dtype is the expected one.

    Of qparams, any of :data:`FLOATS` counts as the expected one, and a zero point may be floating, as it is when learned.
    """
    if tensor.dtype == leaf.dtype:
        return True
    if what != "qparams" or tensor.dtype not in FLOATS:
        return False
    return leaf.dtype.is_floating_point or field == "zero_point"


def is_shaped(tensor: Tensor, leaf: Leaf, front: Shape) -> bool:
    """Whether a tensor has the expected shape behind the axes of ``front``."""
    return leaf.shape is None or leaf.axes_before(tensor) == front


def front_axes(pairs: Iterable[tuple[Tensor, Leaf]]) -> Shape:
    """The axes that most tensors have in front of those that are expected."""
    fronts = [leaf.axes_before(tensor) for tensor, leaf in pairs if leaf.shape is not None]
    counts = Counter(front for front in fronts if front is not None)
    if not counts:
        return ()
    ((front, _),) = counts.most_common(1)
    return front


def _described(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"


def _behind(front: Shape, leaf: Leaf) -> Leaf:
    return leaf if leaf.shape is None else leaf._replace(shape=(*front, *leaf.shape))


def _unusable(name: str, qparams: QParams, config: QuantizerConfig, learnable: Collection[str]) -> Iterator[str]:
    """Why qparams of one quantizer cannot be used, in a line each.

    What is NaN is allowed where a quantizer is optional: no batch may have reached it. A learned scale may be negative, as
    only its absolute value counts.
    """
    if not config.optional:
        yield from _not_finite(name, qparams, {*FIELDS, *learnable})
    if "scale" not in learnable and bool((qparams.scale.detach() <= 0).any()):
        sentence = "a scale must be positive"
        yield explain(f"qparams of {name}", sentence, got="0 or less", allowed="numbers > 0", fix="calibrate anew")


def _not_finite(name: str, qparams: QParams, fields: Collection[str]) -> Iterator[str]:
    """A line for each of some fields with NaN or infinity."""
    leaves = _fields(qparams)
    for field in sorted(leaves.keys() & set(fields)):
        numbers = leaves[field].detach()
        if numbers.itemsize == 1:  # float8 has no isfinite of its own
            numbers = numbers.to(torch.float32)
        if not bool(numbers.isfinite().all()):
            got, allowed = "NaN or infinity", "finite numbers"
            fix = "calibrate anew, or save it with the plan that says optional=True"
            yield explain(f"qparams of {name}", f"{field} must be finite", got=got, allowed=allowed, fix=fix)
