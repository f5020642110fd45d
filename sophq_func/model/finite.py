"""Statistics and scales must be numbers; where one is none, the error says which quantizer, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sophq_func.config.site import Site
from sophq_func.core.errors import StateError, explain, raise_all
from sophq_func.core.modes import is_plain
from sophq_func.core.pytree import leaves
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.model.weight_quantizer import WeightQuantizer
from sophq_func.numerics.contracts import QParams, State
from sophq_func.planning.plan import Plan

Pieces = Mapping[str, WeightQuantizer | RunQuantizer]


def check_finite(plan: Plan, pieces: Pieces, ostate: Mapping[str, State]) -> None:
    """Raise a :class:`StateError` for every observer with NaN or infinity; one reduction, where numbers can be read."""
    names = [name for name in ostate if not plan[name].scheme.dynamic]
    found = {name: [t for t in leaves(ostate[name]) if t.is_floating_point()] for name in names}
    if not names or not is_plain(t for values in found.values() for t in values):
        return
    if bool(torch.stack([t.isfinite().all() for values in found.values() for t in values]).all()):
        return
    bad = {name: values for name, values in found.items() if not all(bool(t.isfinite().all()) for t in values)}
    blank = {name for name in bad if plan[name].optional and _is_blank(pieces[name], ostate[name])}
    complaints = [_complaint(name, plan.site(name), bad[name]) for name in bad if name not in blank]
    raise_all(complaints, StateError)


def _is_blank(piece: WeightQuantizer | RunQuantizer, state: State) -> bool:
    """Whether an observer has seen nothing."""
    neutral = piece.observer.init(torch.zeros((), device=leaves(state)[0].device).expand(piece.site.shape), piece.scheme)
    return all(torch.equal(a, b) for a, b in zip(leaves(neutral), leaves(state), strict=True))


def check_reached(name: str, qparams: QParams) -> None:
    """A run that reaches an optional value needs what calibration may not have seen."""
    if is_plain([qparams.scale]) and bool(qparams.scale.isnan().any()):
        fix = "calibrate with a batch that reaches it"
        raise StateError(f"not calibrated: {name} is optional and has seen no data, but this run reaches it. Fix: {fix}.")


def _complaint(name: str, site: Site, values: Sequence[Tensor]) -> str:
    if any(bool(t.isnan().any()) for t in values):
        fix = f"look at {site.parameter or 'what reaches ' + (site.value or site.path)}"
        return explain(name, "a scale is not possible", got="NaN in the data", allowed="finite numbers", fix=fix)
    if site.parameter:
        fix = f"look at {site.parameter}"
        return explain(name, "a scale is not possible", got="infinity in the weight", allowed="finite numbers", fix=fix)
    fix = "q.calibrate(params, batches) with finite batches"
    return f"not calibrated: {name} has seen no data, or infinite data. Fix: {fix}."
