"""Makes the quantizers of a plan: each site with its config and the functions that its specs describe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch

from sophq_func.capture.skeleton import Skeleton
from sophq_func.config.site import Site, WeightSite
from sophq_func.core.errors import PlanError, near
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.model.weight_quantizer import Norm, WeightQuantizer, arranged_scheme, block_axis
from sophq_func.numerics import pieces
from sophq_func.numerics.contracts import OBSERVERS, FakeQuantize
from sophq_func.numerics.kernels import served
from sophq_func.numerics.library import Library
from sophq_func.numerics.scheme import QScheme, QuantizerConfig
from sophq_func.planning.plan import Plan

Quantizers: TypeAlias = Mapping[str, WeightQuantizer | RunQuantizer]
"""Quantizers by name."""

NORM_TENSORS = frozenset(("weight", "bias", "running_mean", "running_var", "num_batches_tracked"))
"""What a BatchNorm holds, where it is affine and tracks statistics; only such a one is folded."""


def make_quantizers(
    skeleton: Skeleton, plan: Plan, kernels: Library | None = None
) -> tuple[tuple[WeightQuantizer, ...], dict[str, RunQuantizer]]:
    """The weight quantizers of a plan; and, by name, the quantizers that act while the model runs.

    Args:
      skeleton, plan: the model, and the plan.
      kernels: what quantizers ask first, see :mod:`sophq_func.numerics.kernels`.

    Raises:
      PlanError: the model does not have a parameter, or a BatchNorm, that the plan names.
    """
    weights, running = [], {}
    for name in plan:
        site = plan.site(name)
        if isinstance(site, WeightSite):
            weights.append(weight_quantizer(skeleton, site, plan[name], kernels))
        else:
            running[name] = value_quantizer(plan, name, kernels)
    return tuple(weights), running


def weight_quantizer(
    skeleton: Skeleton, site: WeightSite, config: QuantizerConfig, kernels: Library | None = None
) -> WeightQuantizer:
    """The quantizer of a weight."""
    observer = OBSERVERS.build(config.observer)
    fake_quantize = _fake_quantize(site, config, arranged_scheme(config.scheme, site), kernels)
    if site.parameter not in skeleton.all_names:
        hint = near(site.parameter, skeleton.all_names)
        raise PlanError(
            f"{site.quantizer}: the model has no parameter {site.parameter!r}; {hint}. Fix: plan this model anew."
        )
    norm = _norm(skeleton, site.norm) if site.norm else None
    return WeightQuantizer(site, config, observer, fake_quantize, norm)


def value_quantizer(plan: Plan, name: str, kernels: Library | None = None) -> RunQuantizer:
    """A quantizer that acts while the model runs."""
    config = plan[name]
    site = plan.site(name)
    fake_quantize = _fake_quantize(site, config, config.scheme, kernels)
    return RunQuantizer(site, config, OBSERVERS.build(config.observer), fake_quantize)


def _fake_quantize(site: Site, config: QuantizerConfig, scheme: QScheme, kernels: Library | None) -> FakeQuantize:
    """The fake quantizer of a config, with blocks along the axis that the site's calls sum over.

    Args:
      site, config: where it sits, and what it does.
      scheme: that of the tensors that it will be given.
      kernels: what it asks first.
    """
    axis = block_axis(site, config.scheme.granularity, len(site.shape))
    serve = partial(served, config=replace(config, scheme=scheme), kernels=kernels)
    return pieces.along(pieces.build(config.fake_quantize, serve), axis)


def state_types(quantizers: Quantizers) -> dict[str, type]:
    """The class of each observer's state."""
    x, scheme = torch.zeros(1), QScheme()  # an observer has one class of states, whatever it observes
    return {name: type(quantizer.observer.init(x, scheme)) for name, quantizer in quantizers.items()}


def _norm(skeleton: Skeleton, path: str) -> Norm:
    """The BatchNorm at a path, which is folded into a weight."""
    names = skeleton.tensors_of(path)
    if not names.keys() >= NORM_TENSORS:
        raise PlanError(f"{path}: the model has no BatchNorm there to be folded. Fix: plan this model anew.")
    module = skeleton.module.get_submodule(path)
    return Norm(
        weight=names["weight"],
        bias=names["bias"],
        mean=names["running_mean"],
        var=names["running_var"],
        tracked=names["num_batches_tracked"],
        eps=float(module.eps),  # type: ignore[arg-type]
        momentum=module.momentum,  # type: ignore[arg-type]
        training=module.training,
    )
