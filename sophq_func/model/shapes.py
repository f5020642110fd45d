"""Whether stored states fit a plan: class, shapes and dtypes of each quantizer's state, and scales that can be used.

A plan holds the shapes of activations. Of a weight it tells only how many axes the scales have, unless the shapes of the
weights are given, too: then sizes along these axes are compared, else only their number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from sophq_func.config.site import WeightSite
from sophq_func.core.errors import StateError, explain, raise_all
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.model.weight_quantizer import WeightQuantizer
from sophq_func.numerics import pieces
from sophq_func.numerics.contracts import OBSERVERS, QParams, State
from sophq_func.numerics.entries import FIELDS, FIX, check_entries, mistyped
from sophq_func.numerics.granularity import Granularity, PerBlock, PerChannel, PerGroup
from sophq_func.numerics.ranges import no_range
from sophq_func.numerics.scheme import QuantizerConfig
from sophq_func.planning.plan import Plan

Shape: TypeAlias = tuple[int, ...]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes in which torch computes; those of eight bits are for storage alone."""

MOST_AXES = 64
"""Most axes of a shape that is made up: more than any weight has. A damaged plan may name axis 10 ** 9, and must not cost
memory."""

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
    check_entries("qparams", qparams, mistyped)
    empty = [name for name, entry in qparams.items() if any(leaf.is_meta for leaf in _fields(entry).values())]
    sentence, fix = "these are on the meta device, and have no numbers", "qparams = q.calibrate(params, batches)"
    problems = [explain(f"qparams of {name}", sentence, fix=fix) for name in empty]
    raise_all(problems, StateError)
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
