"""Qparams as flat dicts ``{"<quantizer>.<field>": Tensor}``, the form in which leaves are learned, compared and saved."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sophq_func.core.errors import StateError, explain
from sophq_func.core.pytree import sorted_dict
from sophq_func.numerics.contracts import QParams


def flat(qparams: Mapping[str, QParams]) -> dict[str, Tensor]:
    """All leaves by name, sorted; :func:`merge` with nothing else is the inverse."""
    fields = {name: {"scale": own.scale, "zero_point": own.zero_point, **own.extras} for name, own in qparams.items()}
    return sorted_dict({f"{name}.{field}": leaf for name, own in fields.items() for field, leaf in own.items()})


def merge(learnable: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> dict[str, QParams]:
    """Put together what :meth:`Quantized.split` took apart; names are split at the last dot.

    Raises:
      StateError: a name in both halves, or a quantizer without scale or zero point.

    Example:
      >>> import torch
      >>> merge({"a.scale": torch.tensor(1.0)}, {"a.zero_point": torch.tensor(0)})
      {'a': QParams(scale=tensor(1.), zero_point=tensor(0), extras={})}
    """
    for half in (learnable, rest):
        if not isinstance(half, Mapping) or not all(isinstance(value, Tensor) for value in half.values()):
            allowed = "two flat dicts {'<quantizer>.<field>': Tensor}"
            raise StateError(
                explain("merge", "this half is not possible", allowed=allowed, fix="sq.merge(*q.split(qparams))")
            )
    twice = sorted(learnable.keys() & rest.keys())
    if twice:
        raise StateError(explain("merge", "one name in both halves is not possible", got=twice))
    fields: dict[str, dict[str, Tensor]] = {}
    for key, value in {**learnable, **rest}.items():
        name, dot, field = key.rpartition(".")
        if not dot:
            raise StateError(explain("merge", f"the name {key!r} is not possible", allowed="'<quantizer>.<field>'"))
        fields.setdefault(name, {})[field] = value
    for name, own in fields.items():
        missing = [field for field in ("scale", "zero_point") if field not in own]
        if missing:
            fix = "pass both results of q.split(qparams)"
            raise StateError(f"merge: {name!r} has no {' and no '.join(missing)}. Fix: {fix}.")
    return sorted_dict({n: QParams(own.pop("scale"), own.pop("zero_point"), sorted_dict(own)) for n, own in fields.items()})
