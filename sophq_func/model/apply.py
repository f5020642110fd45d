"""Runs with fake quantization: for the output, for the buffers too, and for what each quantizer sees."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sophq_func.capture.calls import one_call
from sophq_func.capture.transforms import depth, is_inside, whole
from sophq_func.core.errors import StateError, explain
from sophq_func.core.modes import outside_inference, outside_of_transforms
from sophq_func.core.pytree import sorted_dict
from sophq_func.core.types import Args, Given, Kwargs, Output
from sophq_func.model.engine import Engine
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.kinds import check_alone


@one_call("quantized_apply")
def apply(engine: Engine, params: Given, qparams: Mapping[str, QParams], args: Args, kwargs: Kwargs) -> Output:
    """See :meth:`sophq_func.Quantized.apply`."""
    named = engine.check(params, qparams, "apply", "qparams")
    output, _ = engine.run_quantized(named, qparams, engine.quantizing(qparams), args, kwargs)
    return output


@one_call("quantized_apply_and_update")
def apply_and_update(
    engine: Engine, params: Given, qparams: Mapping[str, QParams], args: Args, kwargs: Kwargs
) -> tuple[Output, Given]:
    """See :meth:`sophq_func.Quantized.apply_and_update`."""
    named = engine.check(params, qparams, "apply_and_update", "qparams")
    output, buffers = engine.run_quantized(named, qparams, engine.quantizing(qparams), args, kwargs)
    # a quantized weight may be a buffer; what the run had in its place is the rounded one, which is not kept
    quantized = {weight.site.parameter for weight in engine.acting}
    after = dict(named)
    after.update({name: buffer for name, buffer in buffers.items() if name not in quantized})
    for weight in engine.acting:
        site = weight.site
        if site.source:
            after.update(weight.mean_shift(named, qparams[site.quantizer], qparams[site.source], after))
    return output, engine.like(params, after)


@one_call("freeze")
def freeze(engine: Engine, params: Given, qparams: Mapping[str, QParams]) -> Given:
    """The params of :meth:`sophq_func.Quantized.freeze`."""
    named = engine.check(params, qparams, "freeze", "qparams")
    if engine.skeleton.entry.training:
        fix = "q.eval().freeze(params, qparams)"
        raise StateError(explain("freeze", "a model in training mode cannot be frozen", fix=fix))
    quantized = engine.quantized_params(named, qparams)
    return engine.like(params, {name: outside_inference(tensor.detach()) for name, tensor in quantized.items()})


@one_call("quantized_capture")
def capture(
    engine: Engine, params: Given, qparams: Mapping[str, QParams], args: Args, kwargs: Kwargs
) -> dict[str, tuple[Tensor, Tensor]]:
    """See :meth:`sophq_func.Quantized.capture`."""
    named = engine.check(params, qparams, "capture", "qparams")
    captured = {}
    if not engine.frozen:
        for weight in engine.weights:
            name = weight.site.quantizer
            captured[name] = named[weight.site.parameter], weight.quantize(named, qparams[name])
    quantize = engine.quantizing(qparams)
    outer = depth()

    def before_and_after(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        # a copy, as the model may write into x later
        if name in engine.requantizers or name in engine.unsigned:
            return x.clone(), engine.quantized(name, x, qparams)
        return x.clone(), _quantized_alone(engine, name, x, qparams[name])

    def effect(name: str, x: Tensor) -> Tensor:
        if is_inside(x, outer):  # what is captured outlives the transform that wraps the value
            captured[name] = outside_of_transforms(lambda: before_and_after(name, whole(x, outer)), outer)
        else:
            captured[name] = before_and_after(name, x)
        return quantize(name, x)

    engine.run_quantized(named, qparams, effect, args, kwargs)
    return sorted_dict(captured)


@one_call("quantize_value")
def quantize_value(engine: Engine, name: str, x: Tensor, qparams: QParams) -> Tensor:
    """See :meth:`sophq_func.Quantized.quantize_value`."""
    name = engine.plan.find(name)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        sentence, fix = "only floating tensors are quantized", "q.quantize_value(name, x, qparams[name])"
        raise StateError(explain("quantize_value", sentence, got=got, allowed="a floating tensor", fix=fix))
    quantizer = engine.quantizers[name]
    check_alone("quantize_value: qparams", qparams, quantizer.scheme, "scale" in quantizer.fake_quantize.learnable)
    return _quantized_alone(engine, name, x, qparams)


def _quantized_alone(engine: Engine, name: str, x: Tensor, qparams: QParams) -> Tensor:
    quantizer = engine.quantizers[name]
    return quantizer.fake_quantize.apply(x, qparams, quantizer.scheme)
