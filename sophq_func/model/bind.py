"""The quantizers of a plan, made ready: each site with its config and the functions that its specs describe."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sophq_func.capture.skeleton import Skeleton
from sophq_func.config.site import WeightSite
from sophq_func.core.errors import PlanError, near
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.model.weight_quantizer import Norm, WeightQuantizer
from sophq_func.numerics import pieces
from sophq_func.numerics.contracts import OBSERVERS
from sophq_func.numerics.scheme import QScheme
from sophq_func.planning.plan import Plan


def state_types(pieces: Mapping[str, WeightQuantizer | RunQuantizer]) -> dict[str, type]:
    """The class of each observer's state."""
    return {name: type(piece.observer.init(torch.zeros(1), QScheme())) for name, piece in pieces.items()}


def make_quantizers(skeleton: Skeleton, plan: Plan) -> tuple[tuple[WeightQuantizer, ...], dict[str, RunQuantizer]]:
    """Weight quantizers, and by name those that act while the model runs."""
    weights, running = [], {}
    for name, config in plan.items():
        site = plan.site(name)
        if not isinstance(site, WeightSite):
            running[name] = value_quantizer(plan, name)
            continue
        observer, fake = OBSERVERS.build(config.observer), pieces.build(config.fake_quantize)
        if site.parameter not in skeleton.all_names:
            hint = near(site.parameter, skeleton.all_names)
            raise PlanError(f"{name}: the model has no parameter {site.parameter!r}; {hint}. Fix: plan this model anew.")
        norm = _norm(skeleton, site.norm) if site.norm else None
        weights.append(WeightQuantizer(site, config, observer, fake, norm))
    return tuple(weights), running


def value_quantizer(plan: Plan, name: str) -> RunQuantizer:
    """A quantizer of a plan that acts while the model runs."""
    config = plan[name]
    return RunQuantizer(plan.site(name), config, OBSERVERS.build(config.observer), pieces.build(config.fake_quantize))


def _norm(skeleton: Skeleton, path: str) -> Norm:
    own = skeleton.tensors_of(path)
    if not {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"} <= own.keys():
        raise PlanError(f"{path}: the model has no BatchNorm there to be folded. Fix: plan this model anew.")
    module = skeleton.module.get_submodule(path)
    return Norm(
        own["weight"],
        own["bias"],
        own["running_mean"],
        own["running_var"],
        own["num_batches_tracked"],
        float(module.eps),  # type: ignore[arg-type]
        module.momentum,  # type: ignore[arg-type]
        module.training,
    )
