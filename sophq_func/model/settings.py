"""Settings as data: bit widths and switches as leaves of qparams, to be mapped over, learned, stacked and compared.

Nothing here plans or builds anything: a setting is one more dict of qparams for the same ``Quantized``, and a compiled
function takes it without being compiled again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from sophq_func.core.errors import ConfigError, StateError, explain, near, raise_all
from sophq_func.core.modes import is_plain
from sophq_func.core.pytree import flatten, sorted_dict, tree_map
from sophq_func.model.flat import flat
from sophq_func.numerics import pieces
from sophq_func.numerics.contracts import FakeQuantize, QParams
from sophq_func.numerics.ranges import clamp, qparams_to_range, range_to_qparams
from sophq_func.numerics.scheme import QScheme, QuantizerConfig
from sophq_func.planning.plan import Plan

NARROWEST, WIDEST = 1, 16


def with_bits(
    qparams: Mapping[str, QParams], plan: Plan, bits: float | Tensor | Mapping[str, float | Tensor]
) -> dict[str, QParams]:
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
    chosen: dict[str, float | Tensor] = {}
    for pattern, width in (bits if isinstance(bits, Mapping) else {"*": bits}).items():
        problem = _width_problem(width)
        if problem:
            raise ConfigError(
                explain("with_bits", f"the width of {pattern!r} is not possible", got=width, allowed=problem, fix="bits=4")
            )
        chosen.update(dict.fromkeys(_fitting("with_bits", pattern, plan), width))
    made = {name: pieces.build(plan[name].fake_quantize) for name in chosen}
    raise_all([_no_width(name, plan[name]) for name in chosen if not made[name].resizable])
    new = dict(qparams)
    for name, width in chosen.items():
        if name in qparams:
            new[name] = _resized(qparams[name], plan[name].scheme, made[name], width)
    return sorted_dict(new)


def _width_problem(width: float | Tensor) -> str:
    """What is allowed instead of a width; nothing where it may stay."""
    if isinstance(width, Tensor):
        if not is_plain([width]):
            return ""
        fits = bool(((width >= NARROWEST) & (width <= WIDEST)).all())
    else:
        fits = isinstance(width, int | float) and not isinstance(width, bool) and NARROWEST <= width <= WIDEST
    return "" if fits else f"numbers from {NARROWEST} to {WIDEST}"


def _no_width(name: str, config: QuantizerConfig) -> str:
    what, fix = (
        f"another bit width of {config.fake_quantize}",
        "name only integer grids, or plan with another fake quantizer",
    )
    return explain(
        f"with_bits: {name}",
        f"{what} is not possible",
        because="its codes, or what it has learned, belong to one width",
        fix=fix,
    )


def _resized(qparams: QParams, scheme: QScheme, made: FakeQuantize, bits: float | Tensor) -> QParams:
    """One quantizer at another width."""
    width = torch.as_tensor(bits, dtype=qparams.scale.dtype, device=qparams.scale.device)
    half = torch.exp2(width - 1)
    low, high = (int(scheme.symmetric_range) - half, half - 1) if scheme.symmetric else (0 * half, 2 * half - 1)
    if not scheme.symmetric:  # the zero point is a code, 0.0 is on the grid
        low = low.detach()
    lower, upper = qparams_to_range(qparams, scheme)
    found = range_to_qparams(lower, upper, scheme, limits=(low, high))
    extras = sorted_dict({**qparams.extras, "qmin": low, "qmax": high})
    found = made.grid(found._replace(extras=extras), scheme)
    if scheme.symmetric:
        return found._replace(zero_point=qparams.zero_point)
    zero = low - lower / found.scale
    if not qparams.zero_point.is_floating_point():
        zero = torch.where(zero.isnan(), 0, clamp(zero.detach().round(), low.detach(), high.detach()))
    return found._replace(zero_point=zero.to(qparams.zero_point.dtype))


def enabled(qparams: Mapping[str, QParams], mask: Tensor | float | Mapping[str, Tensor | float]) -> dict[str, QParams]:
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
    new = dict(qparams)
    for name, value in _masks(qparams, mask):
        if not isinstance(value, bool | float | Tensor) or (isinstance(value, Tensor) and not _is_mask(value)):
            allowed = "True, False, or a boolean or floating scalar"
            raise ConfigError(explain("enabled", f"the mask of {name!r} is not possible", got=value, allowed=allowed))
        switch = torch.as_tensor(value, device=qparams[name].scale.device)
        new[name] = new[name]._replace(extras=sorted_dict({**new[name].extras, "enabled": switch}))
    return sorted_dict(new)


def _is_mask(value: Tensor) -> bool:
    return value.ndim == 0 and (value.dtype == torch.bool or value.is_floating_point())


def _masks(qparams: Mapping[str, QParams], mask: Any) -> Iterator[tuple[str, Any]]:
    """Each name with its mask."""
    if isinstance(mask, Mapping):
        for pattern, value in mask.items():
            yield from ((name, value) for name in _fitting("enabled", pattern, qparams))
    elif isinstance(mask, Tensor) and mask.ndim:
        if mask.shape != (len(qparams),):
            allowed = f"{(len(qparams),)}, one for each quantizer in sorted order"
            raise ConfigError(
                explain("enabled", "a mask of this shape is not possible", got=tuple(mask.shape), allowed=allowed)
            )
        yield from zip(sorted(qparams), mask.unbind(), strict=True)
    else:
        yield from ((name, mask) for name in sorted(qparams))


def _fitting(where: str, pattern: object, names: Mapping[str, Any]) -> list[str]:
    """The quantizers that a name or glob fits."""
    if not isinstance(pattern, str):
        raise ConfigError(explain(where, "this name is not possible", got=pattern, allowed="a quantizer's name or a glob"))
    if any(c in pattern for c in "*?["):
        found = [name for name in names if fnmatchcase(name, pattern)]
    elif isinstance(names, Plan) and pattern not in names:
        found = _found(names, pattern)
    else:
        found = [pattern] if pattern in names else []
    if not found:
        hint = near(pattern, names) or f"list({'plan' if isinstance(names, Plan) else 'qparams'}) has the names"
        raise ConfigError(f"{where}: {pattern!r} fits no quantizer. Fix: {hint}")
    return found


def _found(plan: Plan, spelling: str) -> list[str]:
    """The quantizer of an underscored name."""
    try:
        return [plan.find(spelling)]
    except KeyError:
        return []


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
        raise StateError(explain("stack", "stacking nothing is not possible", allowed="at least one dict of qparams"))
    first = _described(settings[0])
    for index, setting in enumerate(settings):
        own = _described(setting)
        if own != first:
            leaf = next(name for name in sorted(own.keys() | first.keys()) if own.get(name) != first.get(name))
            got, allowed = (
                f"{own.get(leaf, 'no such leaf')} in setting {index}",
                f"{first.get(leaf, 'no such leaf')}, as in setting 0",
            )
            fix = "give each setting the same calls of with_bits, enabled and with_noise"
            raise StateError(explain("stack", f"another {leaf} is not possible", got=got, allowed=allowed, fix=fix))
    stacked: dict[str, QParams] = tree_map(lambda *leaves: torch.stack(leaves), *map(sorted_dict, settings))
    return stacked


def _described(setting: Mapping[str, QParams]) -> dict[str, str]:
    """Dtype and shape of each leaf, by its name in ``q.split``."""
    if not isinstance(setting, Mapping) or not all(isinstance(own, QParams) for own in setting.values()):
        raise StateError(
            explain("stack", "this setting is not possible", got=type(setting).__name__, allowed="a dict of QParams")
        )
    return {name: f"{leaf.dtype} {tuple(leaf.shape)}" for name, leaf in flat(setting).items()}


def unstack(settings: Mapping[str, QParams]) -> list[dict[str, QParams]]:
    """The settings of a batch, one by one; the inverse of :func:`stack`.

    Example:
      >>> batch = {"a": QParams(torch.tensor([1.0, 2.0]), torch.tensor([0, 0]), {})}
      >>> unstack(batch)[1]["a"].scale
      tensor(2.)
    """
    found, rebuild = flatten(settings)
    return [rebuild([leaf[i] for leaf in found]) for i in range(len(found[0]))] if found else []
