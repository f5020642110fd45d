"""Whether stored states fit a plan: the class, shapes and dtypes that each quantizer has, and scales that can be.

A plan knows the shapes of activations, and of a weight only how many axes its scales have. So sizes along the axes of a
weight's scales are compared where the shapes of the weights are given, else their number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sophq_func.core.errors import StateError, explain, raise_all
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.model.weight_quantizer import WeightQuantizer
from sophq_func.numerics import pieces
from sophq_func.numerics.contracts import OBSERVERS, QParams, State
from sophq_func.numerics.ranges import no_range
from sophq_func.numerics.scheme import Granularity, PerBlock, PerChannel, PerGroup, QuantizerConfig
from sophq_func.planning.plan import Plan

Shape = tuple[int, ...]
FIELDS = ("scale", "zero_point")
MOST_AXES = 64
FIX = "calibrate with a model of this plan"


class Leaf(NamedTuple):
    """What is expected of one tensor: a size of ``None`` is any, a shape of ``None`` too."""

    shape: tuple[int | None, ...] | None
    dtype: torch.dtype

    def axes_before(self, tensor: Tensor) -> Shape | None:
        """The axes in front of those expected; ``None`` where they are not there."""
        wanted = self.shape or ()
        cut = tensor.ndim - len(wanted)
        agree = cut >= 0 and all(n in (None, m) for n, m in zip(wanted, tensor.shape[cut:], strict=True))
        return tuple(tensor.shape[:cut]) if agree else None

    def __str__(self) -> str:
        sizes = "" if self.shape is None else f" {tuple('any' if n is None else n for n in self.shape)}".replace("'", "")
        return f"{self.dtype}{sizes}"


class Expected(NamedTuple):
    """What one quantizer has: the class and the fields of its observer's state, its qparams, and what it may learn."""

    cls: type[Any]
    state: dict[str, Leaf]
    qparams: dict[str, Leaf]
    learnable: tuple[str, ...]


def expected(plan: Plan, weights: Mapping[str, Tensor] | None = None) -> dict[str, Expected]:
    """What each quantizer of a plan has; no memory is taken for it, whatever the plan asks for.

    Args:
      plan: the plan.
      weights: tensors of the shapes of the model's parameters, by name.

    Raises:
      StateError: for every quantizer whose config or place makes no quantizer: a name that is not registered, options or
        shapes that cannot be.
    """
    found, problems = {}, []
    for name in plan:
        try:
            found[name] = _expected(plan, name, weights or {})
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            problems.append(f"{name}: no quantizer can be made of its config: {error}")
    raise_all(problems, StateError)
    return found


def _expected(plan: Plan, name: str, weights: Mapping[str, Tensor]) -> Expected:
    site, config = plan.site(name), plan[name]
    observer, fake = OBSERVERS.build(config.observer), pieces.build(config.fake_quantize)
    piece: WeightQuantizer | RunQuantizer = RunQuantizer(site, config, observer, fake)
    if site.parameter:
        piece = WeightQuantizer(site, config, observer, fake)
    known = not site.parameter or site.parameter in weights
    empty = torch.empty((), device="meta")
    if known:
        x = piece.seen({site.parameter: empty.expand(weights[site.parameter].shape)} if site.parameter else {"": empty})
    else:
        x = empty.expand(_some_shape(piece.scheme.granularity))
    lo, _ = no_range(x, piece.scheme.granularity)
    state, qparams = observer.init(x, piece.scheme), QParams(lo, torch.zeros_like(lo, dtype=torch.int32), {})
    fields = _fields(fake.init(qparams, x, piece.scheme))
    return Expected(
        type(state),
        {field: _leaf(t, known, ranked=True) for field, t in state._asdict().items()},
        {field: _leaf(t, known, ranked=field in FIELDS) for field, t in fields.items()},
        fake.learnable,
    )


def _some_shape(granularity: Granularity) -> Shape:
    """A shape that a weight with this granularity may have."""
    if isinstance(granularity, PerBlock):
        return granularity.rows, granularity.columns
    size = granularity.size if isinstance(granularity, PerGroup) else 1
    axis = granularity.axis if isinstance(granularity, PerChannel | PerGroup) else None
    return (size,) * min(abs(axis or 0) + 4, MOST_AXES)


def _leaf(tensor: Tensor, known: bool, ranked: bool) -> Leaf:
    shape: tuple[int | None, ...] = tuple(tensor.shape) if known else (None,) * tensor.ndim
    return Leaf(shape if known or ranked else None, tensor.dtype)


def _fields(qparams: QParams) -> dict[str, Tensor]:
    return {"scale": qparams.scale, "zero_point": qparams.zero_point, **qparams.extras}


def check_ostate(plan: Plan, ostate: Mapping[str, State]) -> None:
    """Raise a :class:`StateError` unless these are the plan's states, of its shapes and dtypes."""
    found = expected(plan)
    plan.check(ostate, "ostate", {name: own.cls for name, own in found.items()})
    raise_all([f"{misfit} Fix: {FIX}." for misfit in state_misfits(ostate, found)], StateError)


def check_qparams(plan: Plan | None, qparams: Mapping[str, QParams]) -> None:
    """Raise a :class:`StateError` unless these are qparams, and those of the plan, with scales that can be."""
    _check_types(qparams)
    problems = []
    if plan is None:
        problems = [problem for name, own in qparams.items() for problem in _not_finite(name, own, FIELDS)]
    else:
        found = expected(plan)
        plan.check(qparams, "qparams", dict.fromkeys(plan, QParams))
        problems = [f"{misfit} Fix: {FIX}." for misfit in qparams_misfits(qparams, found)]
        for name in plan:
            problems += _impossible(name, qparams[name], plan[name], found[name].learnable)
    raise_all(problems, StateError)


def _check_types(qparams: Mapping[str, QParams]) -> None:
    """Raise unless every value is QParams of tensors whose names can be written as ``<quantizer>.<field>``."""
    allowed = "a dict {quantizer: QParams} of tensors"
    if not isinstance(qparams, Mapping):
        raise StateError(explain("qparams", "this type is not possible", got=type(qparams).__name__, allowed=allowed))
    for name, own in qparams.items():
        if not isinstance(own, QParams) or not all(isinstance(t, Tensor) for t in _fields(own).values()):
            raise StateError(
                explain(f"qparams[{name!r}]", "this value is not possible", got=type(own).__name__, allowed=allowed)
            )
        bad = [field for field in own.extras if field in FIELDS or "." in field]
        if bad:
            because = "a leaf is named '<quantizer>.<field>'"
            raise StateError(
                explain(f"qparams[{name!r}]", "these extras is not possible", got=bad, because=because, fix="rename them")
            )


def state_misfits(ostate: Mapping[str, State], found: Mapping[str, Expected]) -> list[str]:
    """What does not fit in observer states of the expected classes, in a line each; others are passed over."""
    own = {name: state._asdict() for name, state in ostate.items() if name in found and type(state) is found[name].cls}
    return list(misfits("ostate", own, {name: found[name].state for name in own}))


def qparams_misfits(qparams: Mapping[str, QParams], found: Mapping[str, Expected]) -> list[str]:
    """What does not fit in qparams, in a line each; names that are not expected are passed over."""
    own = {name: _fields(value) for name, value in qparams.items() if name in found}
    return list(misfits("qparams", own, {name: found[name].qparams for name in own}))


def misfits(
    what: str, leaves: Mapping[str, Mapping[str, Tensor]], wanted: Mapping[str, Mapping[str, Leaf]]
) -> Iterator[str]:
    """What does not fit, in a line each. All may have further axes in front, the same ones, as ``vmap`` makes them."""
    front = front_axes((leaves[name][f], leaf) for name in wanted for f, leaf in wanted[name].items() if f in leaves[name])
    for name, fields in wanted.items():
        own = leaves[name]
        for field, leaf in fields.items():
            tensor = own.get(field)
            if tensor is None or not _is_kind(what, field, tensor, leaf) or not is_shaped(tensor, leaf, front):
                yield f"{what} of {name}: {field} is {_described(tensor)}, expected {_behind(front, leaf)}."
        if what == "qparams" and own["zero_point"].shape != own["scale"].shape:
            scale, zero = tuple(own["scale"].shape), tuple(own["zero_point"].shape)
            yield f"qparams of {name}: zero_point has the shape {zero}, scale {scale}, expected the same."


def _is_kind(what: str, field: str, tensor: Tensor, leaf: Leaf) -> bool:
    """Whether a dtype is the expected one; of qparams floating ones count as one, and zero points may be learned."""
    floating = what == "qparams" and tensor.is_floating_point()
    return tensor.dtype == leaf.dtype or (floating and (leaf.dtype.is_floating_point or field == "zero_point"))


def is_shaped(tensor: Tensor, leaf: Leaf, front: Shape) -> bool:
    """Whether a tensor has the expected shape behind the axes of ``front``."""
    return leaf.shape is None or leaf.axes_before(tensor) == front


def front_axes(pairs: Iterable[tuple[Tensor, Leaf]]) -> Shape:
    """The axes that most tensors have in front of those that are expected."""
    found = Counter(leaf.axes_before(tensor) for tensor, leaf in pairs if leaf.shape is not None)
    found.pop(None, None)
    return (found.most_common(1)[0][0] or ()) if found else ()


def _described(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"


def _behind(front: Shape, leaf: Leaf) -> Leaf:
    return leaf if leaf.shape is None else leaf._replace(shape=(*front, *leaf.shape))


def _impossible(name: str, own: QParams, config: QuantizerConfig, learnable: Collection[str]) -> Iterator[str]:
    """Scales that are no numbers, where no run can have skipped the value; and negative ones, where they are not learned."""
    if not config.optional:
        yield from _not_finite(name, own, {*FIELDS, *learnable})
    if "scale" not in learnable and bool((own.scale.detach() <= 0).any()):
        yield explain(
            f"qparams of {name}", "this scale is not possible", got="0 or less", allowed="numbers > 0", fix="calibrate anew"
        )


def _not_finite(name: str, own: QParams, fields: Collection[str]) -> Iterator[str]:
    leaves: dict[str, Any] = _fields(own)
    for field in sorted(leaves.keys() & set(fields)):
        if not bool(leaves[field].detach().isfinite().all()):
            fix = "calibrate anew, or save it with the plan that says optional=True"
            yield explain(
                f"qparams of {name}",
                f"this {field} is not possible",
                got="NaN or infinity",
                allowed="finite numbers",
                fix=fix,
            )
