"""Whether a value is QParams by which a tensor can be quantized, whatever the scheme: one check for all that take some."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from sophq_func.core.errors import StateError, explain, quoted, raise_all
from sophq_func.numerics.contracts import QParams

FIELDS = ("scale", "zero_point")
"""What all qparams have; further fields are extras."""

NO_ZERO_POINTS = (torch.bool, torch.complex32, torch.complex64, torch.complex128)
"""Dtypes that no zero point has."""

DICT_FIX = "q.calibrate(params, batches) returns one"
"""The fix in errors about what is no dict of qparams at all."""

FIX = "calibrate with a model of this plan"
"""The fix in errors about qparams that belong to another plan."""


def check_entries(
    where: str, qparams: Mapping[str, object], find: Callable[[str, object], Iterator[str]] | None = None
) -> None:
    """Raise a :class:`StateError` unless this is a dict of QParams; it names everything that is not sound.

    For what takes qparams without a plan, such as :func:`sophq_func.stack`: shapes are compared with each other only.

    Args:
      where: the function that the user called.
      qparams: should be a dict of QParams.
      find: what is looked for in each, by default :func:`flaws`.

    Example:
      >>> check_entries("stack", {"a": QParams(torch.tensor(1.0), torch.tensor(0), {})})
    """
    is_mapping = isinstance(qparams, Mapping)
    if not is_mapping or (qparams and not any(isinstance(entry, QParams) for entry in qparams.values())):
        got = f"a dict of {type(next(iter(qparams.values()))).__name__}" if is_mapping else type(qparams).__name__
        sentence, allowed = "these are no qparams", "a dict {quantizer: QParams}"
        raise StateError(explain(where, sentence, got=got, allowed=allowed, fix=DICT_FIX))
    problems: list[str] = []
    for name, entry in qparams.items():
        if not isinstance(name, str):
            sentence, allowed = "this names no quantizer", "a string"
            problems.append(explain(f"{where}: qparams", sentence, got=name, allowed=allowed, fix=DICT_FIX))
        # a list: Dynamo of torch 2.9 adds no generator to one
        problems += [*(find or flaws)(f"{where}: qparams of {name}", entry)]
    raise_all(problems, StateError)


def check_entry(where: str, entry: object) -> None:
    """:func:`check_entries` of the QParams of one quantizer."""
    raise_all([*flaws(where, entry)], StateError)


def flaws(where: str, entry: object) -> Iterator[str]:
    """What is wrong with an entry of qparams, in a line each.

    Args:
      where: how a line begins.
      entry: should be QParams.
    """
    wrong = [*mistyped(where, entry), *misnumbered(where, entry)]
    yield from wrong
    if isinstance(entry, QParams) and not wrong:
        yield from unlike(where, entry)
        yield from unpaired(where, entry)


def mistyped(where: str, entry: object) -> Iterator[str]:
    """A line for each field that holds no usable tensor, and for names of extras that can be written nowhere."""
    if not isinstance(entry, QParams):
        got, allowed = type(entry).__name__, "QParams(scale, zero_point, extras)"
        yield explain(where, "this value is not QParams", got=got, allowed=allowed, fix=DICT_FIX)
        return
    if not isinstance(entry.extras, Mapping):
        got, allowed = type(entry.extras).__name__, "a dict {name: Tensor}, which may be empty"
        yield explain(where, "extras are no dict", got=got, allowed=allowed, fix="extras={}")
        return
    for field in entry.extras:
        if not isinstance(field, str) or field in FIELDS or "." in field:
            sentence, allowed = f"extras cannot have the name {quoted(field)}", "a string without dots"
            because = "a leaf is named '<quantizer>.<field>'"
            yield explain(where, sentence, allowed=allowed, because=because, fix="rename it")
    for field, tensor in {"scale": entry.scale, "zero_point": entry.zero_point, **entry.extras}.items():
        if not isinstance(tensor, Tensor):
            got = quoted(tensor) if isinstance(tensor, str | int | float) else type(tensor).__name__
            yield explain(where, f"{field} of these QParams is no tensor", got=got, allowed="tensors", fix=FIX)
        elif tensor.layout != torch.strided:
            yield explain(where, f"{field} is sparse", got=tensor.layout, allowed="torch.strided", fix=f"{field}.to_dense()")


def misnumbered(where: str, entry: object) -> Iterator[str]:
    """A line for a scale or a zero point of a dtype that it cannot have."""
    if not isinstance(entry, QParams):
        return
    for field, tensor in (("scale", entry.scale), ("zero_point", entry.zero_point)):
        if isinstance(tensor, Tensor) and not is_number(field, tensor):
            allowed = "torch.float32" if field == "scale" else "torch.int32 or, where it is learned, torch.float32"
            yield explain(where, f"{field} has a dtype without use", got=tensor.dtype, allowed=allowed, fix=FIX)


def is_number(field: str, tensor: Tensor) -> bool:
    """Whether a scale or a zero point has a dtype that it may have."""
    return tensor.is_floating_point() if field == "scale" else tensor.dtype not in NO_ZERO_POINTS


def unlike(where: str, entry: QParams) -> Iterator[str]:
    """A line for each tensor that does not fit the scale."""
    scale, zero_point, _ = entry
    if zero_point.device != scale.device:
        allowed = f"{scale.device}, that of the scale"
        yield explain(where, "zero_point is on another device", got=zero_point.device, allowed=allowed, fix=FIX)
    if zero_point.shape != scale.shape:
        allowed = f"{tuple(scale.shape)}, that of the scale"
        yield explain(where, "zero_point has another shape", got=tuple(zero_point.shape), allowed=allowed, fix=FIX)


def unpaired(where: str, entry: QParams) -> Iterator[str]:
    """A line where one of the two bounds of codes is missing."""
    if ("qmin" in entry.extras) != ("qmax" in entry.extras):
        alone = "qmin" if "qmin" in entry.extras else "qmax"
        fix = "sq.with_bits(qparams, q.plan, bits)"
        yield explain(where, "bounds of codes come in pairs", got=f"only {alone}", allowed="qmin and qmax", fix=fix)
