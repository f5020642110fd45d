"""Bit widths and switches as leaves of qparams, so that they can be mapped over, learned, stacked and compared.

A setting is a dict of qparams for the same ``Quantized``: nothing is planned or built anew, and a compiled function takes
another setting without being compiled again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import Tensor

from sophq_func.core.constants import number
from sophq_func.core.errors import ConfigError, StateError, explain, near, quoted, raise_all
from sophq_func.core.modes import is_plain, outside_inference
from sophq_func.core.public import public
from sophq_func.core.pytree import flatten, sorted_dict, tree_map
from sophq_func.model.flat import flat
from sophq_func.numerics import pieces
from sophq_func.numerics.contracts import FakeQuantize, QParams
from sophq_func.numerics.entries import check_entries
from sophq_func.numerics.ranges import clamp, qparams_to_range, range_to_qparams
from sophq_func.numerics.scheme import QScheme, QuantizerConfig
from sophq_func.planning.plan import Plan

NARROWEST, WIDEST = 1, 16
"""Bit widths that a setting may have: from two codes to the widest of :class:`QScheme`."""

Width: TypeAlias = float | Tensor
"""A bit width: shape ``()``, or that of the scale."""

Mask: TypeAlias = float | Tensor
"""A switch: a boolean (which is a number, too), or a number to mix by."""


@public
def with_bits(qparams: Mapping[str, QParams], plan: Plan, bits: Width | Mapping[str, Width]) -> dict[str, QParams]:
    """The qparams with other bit widths, as data: the same ranges on grids of ``2 ** bits`` codes.

    The bounds of the codes become ``extras["qmin"]`` and ``extras["qmax"]``; scale and zero point cover, with these
    bounds, the range that they covered before, as if it had been observed at that width (up to the last bit). A learned
    scale is moved, too; a learned threshold stays.

    ``bits`` may be mapped over and has a gradient, through the scale and through the bounds that clip (Uhlich et al.,
    arXiv:1905.11452, with the range held). A width that is no whole number is a relaxed one, whose outermost codes are
    not whole either: ``-2 ** (bits - 1)`` and ``2 ** (bits - 1) - 1``; to learn whole ones, round straight through,
    ``bits + (bits.round() - bits).detach()``.

    Args:
      qparams: from ``q.qparams`` or ``q.calibrate``.
      plan: ``q.plan``.
      bits: from 1 to 16; a tensor has shape ``()`` or that of the scale. A dict gives widths by quantizer name, dotted,
        underscored or a glob, later entries over earlier; quantizers that it does not name stay as they are.

    Raises:
      ConfigError: a name that fits nothing, a width out of bounds, a quantizer whose codes have no width to change.

    Example:
      >>> import sophq_func as sq
      >>> model, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
      >>> q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
      >>> qparams = q.calibrate(sq.params_of(model), [x], progress=False)
      >>> low = sq.with_bits(qparams, q.plan, {"*weight_fake_quant": 3})
      >>> low["weight_fake_quant"].extras
      {'qmax': tensor(3.), 'qmin': tensor(-4.)}
    """
    check_entries("with_bits", qparams)
    if not isinstance(plan, Plan):
        sentence, got = "widths are those of a plan's quantizers", type(plan).__name__
        raise ConfigError(explain("with_bits", sentence, got=got, allowed="q.plan", fix="sq.with_bits(qparams, q.plan, 4)"))
    _check_named_alike(qparams, plan)
    widths: dict[str, Width] = {}
    by_pattern = bits if isinstance(bits, Mapping) else {"*": bits}
    for pattern, width in by_pattern.items():
        if not _is_width(width):
            sentence, allowed = f"{pattern!r} cannot have this width", f"numbers from {NARROWEST} to {WIDEST}"
            several = "sq.stack([sq.with_bits(qparams, plan, bits) for bits in (2, 4, 8)])"
            fix = several if isinstance(width, list | tuple) else "bits=4"
            raise ConfigError(explain("with_bits", sentence, got=width, allowed=allowed, fix=fix))
        widths.update(dict.fromkeys(_fitting("with_bits", pattern, plan), width))
    fake_quantizers = {name: pieces.build(plan[name].fake_quantize) for name in widths}
    raise_all([no_width("with_bits", name, plan[name]) for name in widths if not fake_quantizers[name].resizable])
    new = dict(qparams)
    for name, width in widths.items():
        if name in qparams:
            resized = _resized(qparams[name], plan[name].scheme, fake_quantizers[name], width)
            new[name] = tree_map(outside_inference, resized)
    return sorted_dict(new)


def _check_named_alike(qparams: Mapping[str, QParams], plan: Plan) -> None:
    """Raise a :class:`ConfigError` for qparams of which a plan knows none: nothing would change.

    Some that it does not know are right: a part of a model has the plan of the part, and may have the qparams of the whole.
    """
    if qparams and not any(name in plan for name in qparams):
        first = next(iter(qparams))
        hint = near(str(first), plan) or "with_bits(q.calibrate(params, batches), q.plan, bits)"
        sentence = "the plan has none of these quantizers"
        raise ConfigError(explain("with_bits", sentence, got=list(qparams)[:3], fix=hint))


def _is_width(width: object) -> bool:
    """Whether a bit width lies within bounds; the numbers of a tensor inside a transform cannot be read and pass."""
    if isinstance(width, Tensor):
        if width.is_complex():
            return False
        return not is_plain([width]) or bool(((width >= NARROWEST) & (width <= WIDEST)).all())
    if not isinstance(width, int | float) or isinstance(width, bool):
        return False
    return NARROWEST <= width <= WIDEST


def no_width(where: str, name: str, config: QuantizerConfig) -> str:
    """The message that a quantizer cannot change its bit width."""
    return explain(
        f"{where}: {name}",
        f"{config.fake_quantize} cannot change its bit width",
        because="its codes, or what it has learned, belong to one width",
        fix="name only integer grids, or plan with another fake quantizer",
    )


def _resized(qparams: QParams, scheme: QScheme, fake_quantize: FakeQuantize, bits: Width) -> QParams:
    """One quantizer at another width."""
    width = number(bits, qparams.scale.device, qparams.scale.dtype)
    low, high = _bounds(width, scheme)
    lower, upper = qparams_to_range(qparams, scheme)
    extras = sorted_dict({**qparams.extras, "qmin": low, "qmax": high})
    resized = range_to_qparams(lower, upper, scheme, limits=(low, high))._replace(extras=extras)
    resized = fake_quantize.grid(resized, scheme)  # a learned threshold decides the scale at this width, too
    if scheme.symmetric:
        return resized._replace(zero_point=qparams.zero_point)
    zero = low - lower / resized.scale
    if not qparams.zero_point.is_floating_point():  # a learned one may lie between two codes, any other may not
        code = clamp(zero.detach().round(), low.detach(), high.detach())
        zero = torch.where(zero.isnan(), 0, code)  # NaN has no integer; the scale is NaN and says it already
    return resized._replace(zero_point=zero.to(qparams.zero_point.dtype))


def _bounds(width: Tensor, scheme: QScheme) -> tuple[Tensor, Tensor]:
    """Smallest and largest code of a width."""
    half = torch.exp2(width - 1)
    if scheme.symmetric:
        return int(scheme.symmetric_range) - half, half - 1
    return torch.zeros_like(half), 2 * half - 1


@public
def enabled(qparams: Mapping[str, QParams], mask: Mask | Mapping[str, Mask]) -> dict[str, QParams]:
    """The qparams with quantizers switched on or off, as data.

    Each quantizer gets ``extras["enabled"]``: where it is ``False`` or 0, values pass unchanged, and no bias is rounded
    to its step. A floating mask mixes, ``x + mask (Q(x) - x)``, exact at 0 and 1, with a gradient: how the loss changes as
    a quantizer is faded in. May be mapped over: ``torch.vmap`` of one-hot rows shows each quantizer alone.

    Args:
      qparams: from ``q.qparams`` or ``q.calibrate``.
      mask: one for all; or a tensor of shape ``(len(qparams),)``, in the sorted order of the names; or by name or glob,
        later entries over earlier, the others staying as they are.

    Raises:
      ConfigError: a name that fits nothing, a mask of another shape or kind.

    Example:
      >>> qp = {"a": QParams(torch.tensor(1.0), torch.tensor(0), {})}
      >>> enabled(qp, {"*": False})["a"].extras
      {'enabled': tensor(False)}
    """
    check_entries("enabled", qparams)
    new = dict(qparams)
    for name, value in _masks(qparams, mask):
        if not _is_mask(value):
            sentence, allowed = f"{name!r} cannot have this mask", "True, False, or a boolean or floating scalar"
            fix = "sq.enabled(qparams, False)"
            raise ConfigError(explain("enabled", sentence, got=value, allowed=allowed, fix=fix))
        switch = outside_inference(number(value, qparams[name].scale.device))
        extras = sorted_dict({**new[name].extras, "enabled": switch})
        new[name] = new[name]._replace(extras=extras)
    return sorted_dict(new)


def _is_mask(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and (value.dtype == torch.bool or value.is_floating_point())
    return isinstance(value, bool) or (isinstance(value, float) and math.isfinite(value))


def _masks(qparams: Mapping[str, QParams], mask: Mask | Mapping[str, Mask]) -> Iterator[tuple[str, Mask]]:
    """Each name with its mask."""
    if isinstance(mask, Mapping):
        for pattern, value in mask.items():
            for name in _fitting("enabled", pattern, qparams):
                yield name, value
    elif isinstance(mask, Tensor) and mask.ndim:
        if mask.shape != (len(qparams),):
            sentence, allowed = "a mask has one entry for each quantizer, in sorted order", f"the shape {(len(qparams),)}"
            fix = "sq.enabled(qparams, torch.ones(len(qparams)))"
            raise ConfigError(explain("enabled", sentence, got=tuple(mask.shape), allowed=allowed, fix=fix))
        yield from zip(sorted(qparams), mask.unbind(), strict=True)
    else:
        for name in sorted(qparams):
            yield name, mask


def _fitting(where: str, pattern: object, names: Plan | Mapping[str, QParams]) -> list[str]:
    """The quantizers that a name or glob fits; a plan reads underscored names, too."""
    if not isinstance(pattern, str):
        sentence, allowed = "this names no quantizer", "a quantizer's name or a glob"
        raise ConfigError(explain(where, sentence, got=pattern, allowed=allowed, fix="'*weight_fake_quant'"))
    if any(sign in pattern for sign in "*?["):
        fitting = [name for name in names if fnmatchcase(name, pattern)]
    elif pattern in names:
        fitting = [pattern]
    elif isinstance(names, Plan):
        fitting = _underscored(names, pattern)
    else:
        fitting = []
    if not fitting:
        source = "plan" if isinstance(names, Plan) else "qparams"
        inside = [name for name in names if name.startswith(f"{pattern}.")]  # a rule would take the path of a module
        hint = near(pattern, names) or f"list({source}) has the names"
        hint = f"'{pattern}.*', which fits {', '.join(inside[:3])}" if inside else hint
        raise ConfigError(f"{where}: {quoted(pattern)} fits no quantizer. Fix: {hint}")
    return fitting


def _underscored(plan: Plan, spelling: str) -> list[str]:
    """The quantizer of an underscored name; none where there is no such name."""
    try:
        return [plan.find(spelling)]
    except KeyError:
        return []


@public
def stack(settings: Sequence[Mapping[str, QParams]]) -> dict[str, QParams]:
    """Settings as one batch of qparams, along a new first axis of every leaf, for ``torch.vmap``.

    Raises:
      StateError: no settings, or settings with other quantizers, extras, shapes or dtypes than the first.

    Example:
      >>> one, two = ({"a": QParams(torch.tensor(s), torch.tensor(0), {})} for s in (1.0, 2.0))
      >>> stack([one, two])["a"].scale
      tensor([1., 2.])
    """
    settings = list(settings)
    if not settings:
        fix = "sq.stack([qparams])"
        raise StateError(explain("stack", "nothing cannot be stacked", allowed="at least one dict of qparams", fix=fix))
    first = _described(settings[0])
    for index, setting in enumerate(settings):
        _check_alike(first, _described(setting), index)
    stacked: dict[str, QParams] = tree_map(_stacked, *map(sorted_dict, settings))
    return stacked


def _described(setting: Mapping[str, QParams]) -> dict[str, str]:
    """Dtype and shape of each leaf, by its name in ``q.split``."""
    check_entries("stack", setting)
    return {name: f"{leaf.dtype} {tuple(leaf.shape)}" for name, leaf in flat(setting).items()}


def _check_alike(first: Mapping[str, str], other: Mapping[str, str], index: int) -> None:
    """Raise a :class:`StateError` that names the first leaf in which a setting differs from the first one."""
    for leaf in sorted(other.keys() | first.keys()):
        if other.get(leaf) != first.get(leaf):
            got = f"{other.get(leaf, 'no such leaf')} in setting {index}"
            allowed = f"{first.get(leaf, 'no such leaf')}, as in setting 0"
            fix = "give each setting the same calls of with_bits, enabled and with_noise"
            raise StateError(explain("stack", f"settings differ in {leaf}", got=got, allowed=allowed, fix=fix))


def _stacked(*leaves: Tensor) -> Tensor:
    return torch.stack(leaves)


@public
def unstack(settings: Mapping[str, QParams]) -> list[dict[str, QParams]]:
    """The settings of a batch, one by one; the inverse of :func:`stack`.

    Raises:
      StateError: no qparams, or leaves without a first axis of one size.

    Example:
      >>> batch = {"a": QParams(torch.tensor([1.0, 2.0]), torch.tensor([0, 0]), {})}
      >>> unstack(batch)[1]["a"].scale
      tensor(2.)
    """
    check_entries("unstack", settings)
    sizes = {name: tuple(leaf.shape[:1]) for name, leaf in flat(settings).items()}
    if len({*sizes.values()}) > 1 or () in sizes.values():
        name, other = next(iter(sizes)), next((n for n in sizes if sizes[n] != next(iter(sizes.values()))), "")
        got = f"{sizes[name]} of {name}" + (f", {sizes[other]} of {other}" if other else "")
        sentence, allowed = "these are no settings along a first axis", "one size of it for all leaves"
        raise StateError(explain("unstack", sentence, got=got, allowed=allowed, fix="sq.unstack(sq.stack([qparams]))"))
    batches, rebuild = flatten(settings)
    if not batches:
        return []
    count = len(batches[0])
    return [rebuild([batch[i] for batch in batches]) for i in range(count)]
