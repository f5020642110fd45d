"""If a statistic, a scale or a weight is NaN or infinite, the error names the quantizer and the cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sophq_func.config.site import Site, WeightSite
from sophq_func.core.errors import StateError, explain, raise_all
from sophq_func.core.modes import is_plain
from sophq_func.core.pytree import leaves
from sophq_func.model.bind import Quantizers
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.model.weight_quantizer import WeightQuantizer
from sophq_func.numerics.contracts import QParams, State
from sophq_func.planning.plan import Plan


def check_finite(plan: Plan, quantizers: Quantizers, ostate: Mapping[str, State]) -> None:
    """Raise a :class:`StateError` that names every observer with NaN or infinity in its state.

    Nothing is checked inside a transform or a compiler, where numbers cannot be read. The state of an optional quantizer
    that has seen no data may stay, see :func:`check_reached`.
    """
    observed = [name for name in ostate if not plan[name].scheme.dynamic]  # a dynamic scheme takes no range from its state
    statistics = {name: _floating(ostate[name]) for name in observed}
    every = [tensor for tensors in statistics.values() for tensor in tensors]
    if not observed or not is_plain(every):
        return
    # one reduction and one read for all: reading a number waits for an accelerator
    if bool(torch.stack([tensor.isfinite().all() for tensor in every]).all()):
        return
    complaints = []
    for name, tensors in statistics.items():
        if all(bool(tensor.isfinite().all()) for tensor in tensors):
            continue
        if plan[name].optional and _is_blank(quantizers[name], ostate[name]):
            continue
        complaints.append(_complaint(name, plan.site(name), tensors))
    raise_all(complaints, StateError)


def check_reached(name: str, qparams: QParams) -> None:
    """Raise a :class:`StateError` if a run reaches an optional value that no batch of the calibration reached.

    On an accelerator nothing is checked, since to read a number stops the host in each run: the value becomes NaN there.
    """
    if qparams.scale.is_cpu and is_plain([qparams.scale]) and bool(qparams.scale.isnan().any()):
        fix = "calibrate with a batch that reaches it"
        raise StateError(f"not calibrated: {name} is optional and has seen no data, but this run reaches it. Fix: {fix}.")


def check_numbers(
    where: str, plan: Plan, quantizers: Quantizers, params: Mapping[str, Tensor], qparams: Mapping[str, QParams]
) -> None:
    """Raise a :class:`StateError` that names every weight, folded bias and scale in which NaN would reach a grid.

    For what stores or reports numbers: a run may go on with NaN, a file of integers cannot. Quantizers that only observe or
    are switched off are passed over, and optional ones that no batch reached.

    Args:
      where: the function that the user called.
      plan, quantizers: of the engine.
      params: of the model; plain tensors.
      qparams: of every quantizer.
    """
    problems = []
    for name, quantizer in quantizers.items():
        entry = qparams[name]
        mask = entry.extras.get("enabled")
        is_off = mask is not None and not bool((mask != 0).any())
        if plan[name].observe_only or is_off:
            continue
        is_unreached = plan[name].optional and bool(entry.scale.isnan().any())
        scales = entry.scale, quantizer.fake_quantize.grid(entry, quantizer.scheme).scale
        is_finite = all(bool(scale.isfinite().all()) for scale in scales)
        if not (plan[name].scheme.dynamic or is_unreached or is_finite):
            fix = "qparams = q.calibrate(params, batches)"
            problems.append(explain(f"{where}: {name}", "the scale is not finite", allowed="finite numbers", fix=fix))
        if not (plan[name].scheme.dynamic or is_unreached or bool(entry.zero_point.isfinite().all())):
            fix = "qparams = q.calibrate(params, batches)"
            problems.append(explain(f"{where}: {name}", "the zero_point is not finite", allowed="finite numbers", fix=fix))
        if isinstance(quantizer, WeightQuantizer):
            problems += _numbers_of_layer(where, quantizer, params)
    raise_all(list(dict.fromkeys(problems)), StateError)


def _numbers_of_layer(where: str, weight: WeightQuantizer, params: Mapping[str, Tensor]) -> list[str]:
    """A sentence for each tensor of a layer in which NaN or infinity would become a code."""
    site, norm, problems = weight.site, weight.norm, []
    folded = [] if norm is None else [norm.weight, norm.bias, norm.mean, norm.var]
    for name in filter(None, [site.parameter, site.bias, *folded]):
        if not bool(params[name].isfinite().all()):
            problems.append(_not_a_number(where, name, "NaN or infinity"))
    if norm is not None and bool((params[norm.var] < 0).any()):
        because, fix = "no number is its root", f"look at {norm.var}"
        problems.append(explain(f"{where}: {norm.var}", "a variance is negative", because=because, fix=fix))
    return problems


def _not_a_number(where: str, parameter: str, got: str) -> str:
    because, fix = "no code stands for it", f"look at {parameter}"
    return explain(f"{where}: {parameter}", f"the numbers hold {got}", because=because, fix=fix)


def _floating(state: State) -> list[Tensor]:
    return [tensor for tensor in leaves(state) if tensor.is_floating_point()]


def _is_blank(quantizer: WeightQuantizer | RunQuantizer, state: State) -> bool:
    """Whether an observer has seen nothing."""
    device = leaves(state)[0].device
    example = torch.zeros((), device=device).expand(quantizer.site.shape)
    neutral = quantizer.observer.init(example, quantizer.scheme)
    return all(torch.equal(a, b) for a, b in zip(leaves(neutral), leaves(state), strict=True))


def _complaint(name: str, site: Site, statistics: Sequence[Tensor]) -> str:
    """Why the statistics of one observer are not finite."""
    sentence, allowed = "no scale can be computed", "finite numbers"
    if any(bool(tensor.isnan().any()) for tensor in statistics):
        source = site.parameter if isinstance(site, WeightSite) else f"what reaches {site.value or site.path}"
        return explain(name, sentence, got="NaN in the data", allowed=allowed, fix=f"look at {source}")
    if isinstance(site, WeightSite):
        fix = f"look at {site.parameter}"
        return explain(name, sentence, got="infinity in the weight", allowed=allowed, fix=fix)
    fix = "q.calibrate(params, batches) with finite batches"
    return f"not calibrated: {name} has seen no data, or infinite data. Fix: {fix}."
