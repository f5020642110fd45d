"""Qparams as flat dicts ``{"<quantizer>.<field>": Tensor}``, the form in which leaves are learned, compared and saved."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sophq_func.core.errors import StateError, explain
from sophq_func.core.public import public
from sophq_func.core.pytree import sorted_dict
from sophq_func.model.engine import Engine
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.entries import check_entries

Leaves = dict[str, Tensor]
"""Tensors by ``"<quantizer>.<field>"``."""


def flat(qparams: Mapping[str, QParams]) -> Leaves:
    """All leaves by name, sorted. :func:`merge` of them and an empty dict is the inverse."""
    leaves = {}
    for name, entry in qparams.items():
        fields = {"scale": entry.scale, "zero_point": entry.zero_point, **entry.extras}
        leaves.update({f"{name}.{field}": leaf for field, leaf in fields.items()})
    return sorted_dict(leaves)


def split(engine: Engine, qparams: Mapping[str, QParams]) -> tuple[Leaves, Leaves]:
    """See :meth:`sophq_func.Quantized.split`."""
    engine.check_state(qparams, "qparams")
    check_entries("split", qparams)
    leaves = flat(qparams)
    learned = {name: leaf for name, leaf in leaves.items() if leaf.is_floating_point() and _is_learned(engine, name)}
    rest = {name: leaf for name, leaf in leaves.items() if name not in learned}
    return learned, rest


@public
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
                explain("merge", "these halves cannot be merged", allowed=allowed, fix="sq.merge(*q.split(qparams))")
            )
    nameless = [key for key in (*learnable, *rest) if not isinstance(key, str)]
    if nameless:
        allowed, fix = "'<quantizer>.<field>'", "sq.merge(*q.split(qparams))"
        raise StateError(explain("merge", "this is no name", got=nameless[0], allowed=allowed, fix=fix))
    twice = sorted(learnable.keys() & rest.keys())
    if twice:
        fix = "sq.merge(*q.split(qparams))"
        raise StateError(explain("merge", "a name may be in one half only", got=twice, fix=fix))
    fields_of: dict[str, Leaves] = {}
    for key, leaf in {**learnable, **rest}.items():
        name, dot, field = key.rpartition(".")
        if not dot:
            fix = "sq.merge(*q.split(qparams))"
            raise StateError(explain("merge", "this name has no field", got=key, allowed="'<quantizer>.<field>'", fix=fix))
        fields_of.setdefault(name, {})[field] = leaf
    return sorted_dict({name: _from_fields(name, fields) for name, fields in fields_of.items()})


def _from_fields(name: str, fields: Leaves) -> QParams:
    """The qparams of one quantizer."""
    missing = [field for field in ("scale", "zero_point") if field not in fields]
    if missing:
        fix = "pass both results of q.split(qparams)"
        raise StateError(f"merge: {name!r} has no {' and no '.join(missing)}. Fix: {fix}.")
    extras = {field: leaf for field, leaf in fields.items() if field not in ("scale", "zero_point")}
    return QParams(fields["scale"], fields["zero_point"], sorted_dict(extras))


def _is_learned(engine: Engine, name: str) -> bool:
    """Whether the leaf of this name may be learned."""
    quantizer, _, field = name.rpartition(".")
    if quantizer not in engine.quantizers:
        return False
    config = engine.plan[quantizer]
    if config.observe_only or config.scheme.dynamic:
        return False
    if config.scheme.symmetric and field == "zero_point":
        return False
    if engine.frozen and quantizer not in engine.running:
        return False
    return field in engine.quantizers[quantizer].fake_quantize.learnable
