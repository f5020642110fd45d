"""Calibration: observer states, what runs add to them, and the qparams that they give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sophq_func.capture.calls import one_call
from sophq_func.core.errors import ConfigError, StateError, explain, raise_all
from sophq_func.core.modes import is_distributed, outside_inference
from sophq_func.core.progress import shown
from sophq_func.core.public import is_absent
from sophq_func.core.pytree import sorted_dict, tree_map
from sophq_func.core.types import Args, Given, Kwargs, Output, Tree
from sophq_func.model.engine import Engine, OState, QParamsDict
from sophq_func.model.finite import check_finite
from sophq_func.model.settings import no_width
from sophq_func.model.usage import refuse_absent
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.model.weight_quantizer import Params, WeightQuantizer
from sophq_func.numerics.contracts import QParams, State
from sophq_func.numerics.scheme import QScheme
from sophq_func.planning.widths import Widths, widths_of

Quantizer = WeightQuantizer | RunQuantizer
"""The quantizer of a weight, or of a value."""


@one_call("calibrate")
def calibrate(
    engine: Engine, params: Given, batches: Iterable[Tree], inputs: Callable[[Tree], Tree] | None, progress: bool
) -> QParamsDict:
    """See :meth:`sophq_func.Quantized.calibrate`."""
    named = engine.skeleton.check(params, "calibrate")
    if inputs is not None and not callable(inputs):
        sentence, fix = "inputs cannot be called", "inputs=lambda batch: batch[0]"
        allowed = "a function from a batch to the model's arguments"
        raise ConfigError(explain("calibrate", sentence, got=inputs, allowed=allowed, fix=fix))
    constants = {name: tensor.detach() for name, tensor in named.items()}
    ostate = init(engine, constants, None)
    count = 0
    with engine.constant():
        for batch in shown(_checked(batches), "calibrate", progress):
            args, kwargs = engine.call(batch if inputs is None else inputs(batch), "calibrate")
            _, ostate = observe(engine, constants, ostate, args, kwargs)
            if engine.differentiates:  # a batch that requires grad would stay alive as long as the states
                ostate = tree_map(Tensor.detach, ostate)
            count += 1
    if not count:
        fix = "pass a list of tensors, tuples or dicts"
        raise StateError(explain("calibrate", "there are no batches to observe", fix=fix))
    with torch.no_grad():
        return resolve(engine, constants, ostate)


@one_call("quantized_init")
def init(engine: Engine, params: Given, ostate: Mapping[str, State] | None) -> OState:
    """See :meth:`sophq_func.Quantized.init`."""
    named = engine.skeleton.check(params, "init")
    _check_whole(engine, named, "init")
    if ostate is not None:
        engine.check_state(ostate, "ostate")
    states = {weight.site.quantizer: weight.observe(named) for weight in engine.weights}
    for name, quantizer in engine.running.items():
        if ostate is None:
            states[name] = quantizer.observer.init(quantizer.seen(named), quantizer.scheme)
        else:
            states[name] = ostate[name]
    return sorted_dict(states)


@one_call("quantized_observe")
def observe(engine: Engine, params: Given, ostate: Mapping[str, State], args: Args, kwargs: Kwargs) -> tuple[Output, OState]:
    """See :meth:`sophq_func.Quantized.observe`."""
    named = engine.check(params, ostate, "observe", "ostate")
    _check_whole(engine, named, "observe")
    states = dict(ostate)
    output = engine.run_float(named, engine.observing(states), args, kwargs)
    return output, sorted_dict(states)


@one_call("observe_quantized")
def observe_quantized(
    engine: Engine,
    params: Given,
    ostate: Mapping[str, State],
    qparams: Mapping[str, QParams],
    args: Args,
    kwargs: Kwargs,
) -> tuple[Output, OState]:
    """See :meth:`sophq_func.Quantized.observe_quantized`."""
    if is_absent(qparams):
        refuse_absent("observe_quantized", params=params, ostate=ostate, qparams=qparams)
    named = engine.check(params, ostate, "observe_quantized", "ostate")
    engine.check_state(qparams, "qparams")
    engine.check_kinds(qparams)
    states = dict(ostate)
    observing, quantizing = engine.observing(states), engine.quantizing(qparams)

    def effect(name: str, x: Tensor) -> Tensor:
        return quantizing(name, observing(name, x))

    output, _ = engine.run_quantized(named, qparams, effect, args, kwargs)
    return output, sorted_dict(states)


@one_call("quantized_qparams")
def resolve(engine: Engine, params: Given, ostate: Mapping[str, State], bits: int | Widths | None = None) -> QParamsDict:
    """See :meth:`sophq_func.Quantized.qparams`."""
    named = engine.check(params, ostate, "qparams", "ostate")
    check_finite(engine.plan, engine.quantizers, ostate)
    widths = {} if bits is None else _widths(engine, bits)
    resolved = {}
    for name, quantizer in engine.quantizers.items():
        if name in widths:
            resolved[name] = at_width(quantizer, named, ostate[name], widths[name])
        else:
            resolved[name] = _resolved(quantizer, named, ostate[name], quantizer.scheme)
    resolved = {name: engine.in_force(name, resolved) for name in resolved}
    # a calibration in torch.inference_mode gives scales that can still be learned
    learnable: QParamsDict = tree_map(outside_inference, sorted_dict(resolved))
    return learnable


def _resolved(quantizer: Quantizer, params: Params, state: State, scheme: QScheme) -> QParams:
    """The qparams of one quantizer from its state, for a scheme."""
    entry = quantizer.observer.qparams(state, scheme)
    if scheme.dynamic:  # each tensor gives its own; NaN of an observer without data must not stay
        entry = entry._replace(scale=torch.ones_like(entry.scale))
    return quantizer.fake_quantize.init(entry, quantizer.seen(params), scheme)


def at_width(quantizer: Quantizer, params: Params, state: State, bits: int) -> QParams:
    """The qparams of one quantizer at another width than that of its config, with the bounds of its codes as data."""
    scheme = replace(quantizer.scheme, bits=bits)
    if isinstance(quantizer, WeightQuantizer):
        # its observer may have searched a range for the width of the plan
        weight = quantizer.seen(params)
        state = quantizer.observer.update(quantizer.observer.init(weight, scheme), weight, scheme)
    resolved = _resolved(quantizer, params, state, scheme)
    low, high = (resolved.scale.new_tensor(bound, dtype=torch.float32) for bound in (scheme.qmin, scheme.qmax))
    return resolved._replace(extras=sorted_dict({**resolved.extras, "qmin": low, "qmax": high}))


def weight_qparams(quantizer: WeightQuantizer, params: Params, bits: int | None = None) -> QParams:
    """The qparams of a weight as its observer finds them now, at the width of its config or at another one."""
    if bits is not None:
        return at_width(quantizer, params, quantizer.observe(params), bits)
    return _resolved(quantizer, params, quantizer.observe(params), quantizer.scheme)


def _widths(engine: Engine, bits: int | Widths) -> dict[str, int]:
    """The widths of the quantizers that are named, after a check that each can have another one."""
    widths = widths_of("qparams", bits, {name: engine.plan.site(name) for name in engine.plan})
    fixed = [name for name in widths if not engine.quantizers[name].fake_quantize.resizable]
    raise_all([no_width("qparams", name, engine.plan[name]) for name in fixed])
    return widths


def _check_whole(engine: Engine, params: Params, where: str) -> None:
    """Raise a :class:`StateError` for DTensors, which torch cannot mix with the plain tensors of observer states."""
    if engine.quantizers and is_distributed(params.values()):
        sentence, fix = "DTensors cannot be observed", "calibrate before sharding, and replicate the qparams on the mesh"
        raise StateError(
            explain(where, sentence, fix=f"{fix}; or params = {{n: p.full_tensor() for n, p in params.items()}}")
        )


def _checked(batches: Iterable[Tree]) -> Iterable[Tree]:
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        sentence, got = "these batches cannot be observed", type(batches).__name__
        raise StateError(explain("calibrate", sentence, got=got, allowed="a list", fix="q.calibrate(params, [x])"))
    return batches
