"""The quantizers of a plan, made ready: each site with its config and the functions that its specs describe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sophq_func import fake_quantize as fake_quantizers
from sophq_func.affine import switched
from sophq_func.base import OBSERVERS, FakeQuantize, Observer, QParams
from sophq_func.errors import PlanError, near
from sophq_func.intercept import Skeleton
from sophq_func.plan import Plan
from sophq_func.scheme import QScheme, QuantizerConfig
from sophq_func.site import Site
from sophq_func.weights import Norm, Params, WeightQuantizer


@dataclass(frozen=True)
class RunQuantizer:
    """One quantizer that acts while the model runs: on an activation, or on a weight computed in the forward."""

    site: Site
    config: QuantizerConfig
    observer: Observer
    fake_quantize: FakeQuantize

    @property
    def scheme(self) -> QScheme:
        """The scheme."""
        return self.config.scheme

    def quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """``x`` on its grid, where the quantizer is enabled."""
        return switched(x, self.fake_quantize.apply(x, qparams, self.scheme), qparams)

    def seen(self, params: Params) -> Tensor:
        """A tensor of the example's shape, on the device of the params; it takes no memory."""
        device = next((p.device for p in params.values()), torch.device("cpu"))
        return torch.zeros((), device=device).expand(self.site.shape)


def state_types(pieces: Mapping[str, WeightQuantizer | RunQuantizer]) -> dict[str, type]:
    """The class of each observer's state."""
    return {name: type(piece.observer.init(torch.zeros(1), QScheme())) for name, piece in pieces.items()}


def make_quantizers(skeleton: Skeleton, plan: Plan) -> tuple[tuple[WeightQuantizer, ...], dict[str, RunQuantizer]]:
    """Weight quantizers, and by name those that act while the model runs."""
    weights, running = [], {}
    for name, config in plan.items():
        site = plan.site(name)
        observer, fake = OBSERVERS.build(config.observer), fake_quantizers.build(config.fake_quantize)
        if site.parameter:
            if site.parameter not in skeleton.names:
                hint = near(site.parameter, skeleton.names)
                raise PlanError(f"{name}: the model has no parameter {site.parameter!r}; {hint}. Fix: plan this model anew.")
            norm = _norm(skeleton, site.norm) if site.norm else None
            weights.append(WeightQuantizer(site, config, observer, fake, norm))
        else:
            running[name] = RunQuantizer(site, config, observer, fake)
    return tuple(weights), running


def _norm(skeleton: Skeleton, path: str) -> Norm:
    own = skeleton.owned.get(path, {})
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
