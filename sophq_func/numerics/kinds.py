"""What each run checks of the qparams that it is given: that they are those of the plan, and numbers that can be used.

A loop gives the same tensors again and again. A :class:`KindCheck` looks at tensors that it has not seen, and remembers
them by weak references, so that the check costs a comparison of identities.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from sophq_func.core.errors import StateError, explain, raise_all
from sophq_func.core.modes import is_compiling, is_mapped, is_plain
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.entries import FIELDS, FIX, check_entry, misnumbered, mistyped, unlike, unpaired
from sophq_func.numerics.layout import scale_axes
from sophq_func.numerics.scheme import QScheme, QuantizerConfig

AXES = {0: "shape ()", 1: "one axis"}
"""What a scale with few axes has, for errors."""

SIMILAR = 0.7
"""How alike two names are that are taken for one: a letter of four may differ, two may not."""

SETTINGS = ("enabled", "noise", "qmax", "qmin")
"""Extras that any quantizer may be given after ``init``; a quantizer without use for noise refuses it itself."""

GIVEN = ("hessian",)
"""Extras that some fake quantizers take without making or learning them."""


NO_EXTRAS: dict[str, weakref.ref[Tensor]] = {}
"""What is remembered of qparams without extras."""


class Kind(NamedTuple):
    """What the qparams of one quantizer are.

    Attributes:
      axes: how many axes its scale has; ``None``: any number, as where scales are computed from the tensor at hand.
      extras: names of the extras that it may have; those of a user's own fake quantizer may be others.
      is_read: its numbers must be usable: not where it only observes, or where it is optional and may have seen nothing.
      is_signed: its scale may be negative, as only the absolute value of a learned one counts.
      has_floor: its scale may be 0, which stands for the smallest scale there is.
    """

    axes: int | None
    extras: frozenset[str]
    is_read: bool
    is_signed: bool
    has_floor: bool = False


def kind_of(config: QuantizerConfig, scheme: QScheme, learnable: Collection[str]) -> Kind:
    """The kind of a quantizer's qparams, from its config, its scheme as it acts, and the fields that it may learn."""
    axes = None if scheme.dynamic else scale_axes(scheme.granularity)
    is_read = not (scheme.dynamic or config.observe_only or config.optional)
    return Kind(axes, frozenset((*SETTINGS, *GIVEN, *learnable)).difference(FIELDS), is_read, "scale" in learnable)


Seen: TypeAlias = tuple[weakref.ref[Tensor], weakref.ref[Tensor], dict[str, weakref.ref[Tensor]]]
"""Scale, zero point and extras of one quantizer that were found to fit. A tuple, as training makes many."""


class KindCheck:
    """The check of all qparams of a plan.

    Shapes, dtypes, devices and names of extras are compared. Sizes along an axis are compared where a tensor is quantized;
    inside a ``vmap`` a field has the shape of one member. Numbers are read once, of plain tensors that no derivative is
    asked for: a step of training gives new ones each time.

    Args:
      kinds: by quantizer; others are not looked at.
    """

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        self._kinds = kinds
        self._seen: dict[str, Seen] = {}

    def __reduce__(self) -> tuple[type[KindCheck], tuple[Mapping[str, Kind]]]:
        return KindCheck, (self._kinds,)  # what was seen in one process means nothing in another

    def __call__(self, qparams: Mapping[str, QParams]) -> None:
        """Raise a :class:`StateError` that names everything that does not fit."""
        if is_compiling() or is_mapped():  # a compiler knows no weak references, and wrappers of a transform do not last
            self._compare(qparams, self._kinds)
            return
        new = [name for name in self._kinds if not self._has_seen(name, qparams[name])]
        if not new:
            return
        self._compare(qparams, new)
        # what is learned in this step has no lasting numbers; ``_compare`` has seen that all fields are tensors
        is_graded = torch.is_grad_enabled()
        lasting = [name for name in new if not (is_graded and qparams[name].scale.requires_grad)]
        if lasting:
            self._look_closer({name: qparams[name] for name in lasting})
        for name in new:
            scale, zero_point, extras = qparams[name]
            refs = {field: weakref.ref(tensor) for field, tensor in extras.items()} if extras else NO_EXTRAS
            self._seen[name] = weakref.ref(scale), weakref.ref(zero_point), refs

    def _has_seen(self, name: str, qparams: QParams) -> bool:
        """Whether these tensors were found to fit, under the same names."""
        if name not in self._seen:
            return False
        scale, zero_point, extras = qparams
        seen_scale, seen_zero_point, seen_extras = self._seen[name]
        if scale is None or zero_point is None:  # as a reference that ended gives
            return False
        if seen_scale() is not scale or seen_zero_point() is not zero_point:
            return False
        if type(extras) is dict and not extras and not seen_extras:
            return True
        is_alike = isinstance(extras, dict) and seen_extras.keys() == extras.keys()
        return is_alike and all(t is not None and seen_extras[field]() is t for field, t in extras.items())

    def _compare(self, qparams: Mapping[str, QParams], names: Collection[str]) -> None:
        """Compare what takes no time."""
        problems: list[str] = []
        for name in names:
            entry, kind = qparams[name], self._kinds[name]
            if not _is_usual(entry, kind.axes):
                problems += [*_unfit(name, entry, kind)]  # a list, see ``check_entries``
        raise_all(problems, StateError)

    def _look_closer(self, qparams: Mapping[str, QParams]) -> None:
        """Compare layouts and devices, and look at numbers that lie in the CPU's memory."""
        for name, entry in qparams.items():
            if not _is_dense(entry):
                raise_all([*_unfit(name, entry, self._kinds[name])], StateError)
        read = {name: entry for name, entry in qparams.items() if self._kinds[name].is_read and _is_plain(entry)}
        if not read:
            return
        scales = [entry.scale.detach().reshape(-1) for entry in read.values()]
        widths = [_width(entry) for entry in read.values() if "qmin" in entry.extras]
        learned = [entry.zero_point.detach().reshape(-1) for entry in read.values() if entry.zero_point.is_floating_point()]
        are_positive = _are_all(scales, lambda numbers: (numbers > 0) & (numbers < torch.inf))
        if are_positive and _are_all(widths, lambda numbers: numbers >= 0) and _are_all(learned, torch.isfinite):
            return
        raise_all([line for name, entry in read.items() for line in unusable(name, entry, self._kinds[name])], StateError)


def _is_usual(entry: QParams, axes: int | None) -> bool:
    """Whether an entry has nothing that a closer look could find fault with."""
    scale, zero_point, extras = entry
    if extras or not isinstance(scale, Tensor) or not isinstance(zero_point, Tensor) or not isinstance(extras, dict):
        return False
    # a zero point is int32, floating where it is learned; the others are seen to one by one
    is_number = scale.is_floating_point() and (zero_point.dtype == torch.int32 or zero_point.is_floating_point())
    if not is_number or zero_point.ndim != scale.ndim:
        return False
    return axes is None or (scale.ndim == axes and (axes == 0 or zero_point.shape == scale.shape))


def _is_plain(entry: QParams) -> bool:
    """Whether numbers can be read, and without waiting for an accelerator: a run never does."""
    return entry.scale.is_cpu and is_plain((entry.scale, entry.zero_point, *entry.extras.values()))


def _is_dense(entry: QParams) -> bool:
    """Whether scale and zero point are dense, and on one device."""
    scale, zero_point, _ = entry
    is_dense = scale.layout is torch.strided and zero_point.layout is torch.strided
    return is_dense and zero_point.device == scale.device


def _unfit(name: str, qparams: QParams, kind: Kind) -> Iterator[str]:
    """Why qparams of one quantizer do not fit it, in a line each."""
    where = f"qparams of {name}"
    found = [*mistyped(where, qparams), *misnumbered(where, qparams)]
    if found:
        yield from found
        return
    scale, _, extras = qparams
    if kind.axes is not None and scale.ndim != kind.axes:
        allowed = f"{AXES.get(kind.axes, f'{kind.axes} axes')}, as planned"
        fix = f"{FIX}; a batch of settings goes through torch.vmap(q.apply, (None, 0, None))(params, settings, x)"
        yield explain(where, "scale has another number of axes", got=tuple(scale.shape), allowed=allowed, fix=fix)
    elif kind.axes is not None:
        yield from unlike(where, qparams)
    yield from _misnamed(where, extras, kind.extras)
    yield from unpaired(where, qparams)
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


def _width(entry: QParams) -> Tensor:
    return (entry.extras["qmax"].detach() - entry.extras["qmin"].detach()).reshape(-1)


def _are_all(tensors: list[Tensor], is_right: Callable[[Tensor], Tensor]) -> bool:
    """Whether all numbers are right."""
    return not tensors or bool(is_right(torch.cat(tensors)).all())


def unusable(name: str, qparams: QParams, kind: Kind) -> Iterator[str]:
    """Why the numbers of one quantizer's qparams cannot be used, in a line each; nothing of one that is switched off."""
    mask = qparams.extras.get("enabled")
    if mask is not None and not bool((mask != 0).any()):
        return
    where, anew = f"qparams of {name}", "qparams = q.calibrate(params, batches)"
    for field in FIELDS:
        tensor: Tensor = getattr(qparams, field)
        if not bool(tensor.detach().isfinite().all()):
            got, allowed = "NaN or infinity", "finite numbers"
            yield explain(where, f"the {field} is not finite", got=got, allowed=allowed, fix=anew)
    scale = qparams.scale.detach()
    if not kind.is_signed and bool(((scale < 0) if kind.has_floor else (scale <= 0)).any()):
        yield explain(where, "a scale must be positive", got="0 or less", allowed="numbers > 0", fix=anew)
    if "qmin" in qparams.extras and not bool((_width(qparams) >= 0).all()):
        allowed, fix = "qmin <= qmax", "sq.with_bits(qparams, q.plan, bits)"
        yield explain(where, "these bounds hold no code", allowed=allowed, fix=fix)


ALONE = Kind(axes=None, extras=frozenset(), is_read=True, is_signed=False)
"""What is asked of qparams that no plan knows: a scheme says how many axes they have when they are used."""


def check_alone(where: str, qparams: object, scheme: QScheme, is_signed: bool = False) -> None:
    """Raise a :class:`StateError` unless these are QParams, with numbers that can be used.

    Args:
      where: how a message begins.
      qparams: should be QParams.
      scheme: a dynamic one reads no numbers.
      is_signed: the scale may be negative, see :class:`Kind`.

    Example:
      >>> check_alone("clip_solve", QParams(torch.tensor(1.0), torch.tensor(0), {}), QScheme())
    """
    check_entry(where, qparams)
    if not scheme.dynamic:
        KindCheck({where: ALONE._replace(is_signed=is_signed)})({where: qparams})  # type: ignore[dict-item]
