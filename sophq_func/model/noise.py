"""Uniform numbers for quantizers that round with noise, put into their qparams."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sophq_func.capture.calls import one_call
from sophq_func.capture.transforms import depth, is_inside, whole
from sophq_func.core.errors import StateError, explain
from sophq_func.core.modes import outside_inference
from sophq_func.core.pytree import sorted_dict
from sophq_func.core.randomness import kept_generators
from sophq_func.core.types import Args, Given, Kwargs
from sophq_func.model.engine import Engine, QParamsDict
from sophq_func.model.weight_quantizer import Params
from sophq_func.numerics.contracts import QParams


@one_call("with_noise")
def with_noise(
    engine: Engine,
    params: Given,
    qparams: Mapping[str, QParams],
    generator: torch.Generator,
    args: Args,
    kwargs: Kwargs,
) -> QParamsDict:
    """See :meth:`sophq_func.Quantized.with_noise`."""
    named = engine.skeleton.check(params, "with_noise")
    engine.check_state(qparams, "qparams")
    engine.check_kinds(qparams)
    _check_generator(generator)
    likes = _weights_with_noise(engine, named) | _values_with_noise(engine, named, args, kwargs)
    new = dict(qparams)
    for name in sorted(likes):  # a fixed order of draws, whatever the order of execution
        like = likes[name]
        noise = torch.rand(like.shape, generator=generator, device=generator.device).to(like.device)
        extras = sorted_dict({**new[name].extras, "noise": outside_inference(noise)})
        new[name] = new[name]._replace(extras=extras)
    return sorted_dict(new)


def _check_generator(generator: object) -> None:
    if not isinstance(generator, torch.Generator):
        sentence, got, fix = "noise needs a generator", type(generator).__name__, "torch.Generator().manual_seed(0)"
        raise StateError(explain("with_noise", sentence, got=got, allowed="a torch.Generator", fix=fix))


def _weights_with_noise(engine: Engine, params: Params) -> dict[str, Tensor]:
    """Each weight whose quantizer needs noise."""
    return {weight.site.quantizer: weight.seen(params) for weight in engine.acting if weight.fake_quantize.noise}


def _values_with_noise(engine: Engine, params: Params, args: Args, kwargs: Kwargs) -> dict[str, Tensor]:
    """Each value whose quantizer needs noise, from a run in float."""
    noisy = {
        name
        for name, quantizer in engine.running.items()
        if quantizer.fake_quantize.noise and not quantizer.config.observe_only
    }
    seen = {}
    outer = depth()

    def effect(name: str, x: Tensor) -> Tensor:
        if name in noisy:
            seen[name] = whole(x, outer) if is_inside(x, outer) else x
        return x

    # the run must not move the global generator: its dropout, say, is none of the caller's
    with kept_generators(params.values()), engine.constant():
        engine.run_float(params, effect, args, kwargs)
    return seen
