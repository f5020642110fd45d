"""What all algorithms of whole models have in common: how they begin and end, and how far two models are from each other.

An algorithm is a function ``(q, params, qparams, batches, **options) -> (params, qparams)``; what each promises is written
beside its registration, see :class:`~sophq_func.config.algorithms.Algorithm`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.algorithms._matrix import output_axis
from sophq_func.core.errors import ConfigError, StateError, explain, raise_all
from sophq_func.core.logs import ALGORITHMS as LOG
from sophq_func.core.modes import is_plain
from sophq_func.core.pytree import sorted_dict, tensors
from sophq_func.core.types import Given, Output, Tree
from sophq_func.model.calibrate import weight_qparams
from sophq_func.model.engine import Engine, QParamsDict
from sophq_func.model.quantized import Quantized
from sophq_func.model.select import Where, selected
from sophq_func.model.settings import with_bits
from sophq_func.model.tap import unchanged
from sophq_func.model.weight_quantizer import WeightQuantizer
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.granularity import PerChannel
from sophq_func.numerics.layout import expand, rows
from sophq_func.numerics.moments import Moments


class Start(NamedTuple):
    """What an algorithm starts from.

    Attributes:
      q: the model, in eval mode.
      given: the params as the caller gave them.
      params: the same by name, detached.
      qparams: of every quantizer.
      weights: quantizers of the weights that are chosen, by name, in execution order: those of parameters. A weight that is
        computed in the forward is no parameter that could be changed.
    """

    q: Quantized
    given: Given
    params: dict[str, Tensor]
    qparams: QParamsDict
    weights: dict[str, WeightQuantizer]

    @property
    def engine(self) -> Engine:
        """That of the model."""
        return self.q.engine

    def grid(self, name: str) -> QParams:
        """The qparams of a weight, with the scale and zero point that are in force where learned extras decide them."""
        weight = self.weights[name]
        return weight.fake_quantize.grid(self.qparams[name], weight.scheme)

    def is_on(self, name: str) -> bool:
        """Whether a quantizer is on: ``extras["enabled"]`` does not switch it off, or mix."""
        return bool(self.qparams[name].extras.get("enabled", torch.tensor(True)) == 1)

    def result(self, params: Mapping[str, Tensor], qparams: Mapping[str, QParams]) -> tuple[Given, QParamsDict]:
        """What the algorithm returns: params of the kind that was given, and qparams, sorted."""
        return self.engine.like(self.given, sorted_dict(params)), sorted_dict(qparams)


def begin(where_from: str, q: Quantized, params: Given, qparams: Mapping[str, QParams], where: Where = None) -> Start:
    """Check what an algorithm is given, and choose its weights.

    Args:
      where_from: the algorithm, for errors.
      q, params, qparams: see :meth:`Quantized.apply`.
      where: which weights, see :func:`~sophq_func.model.select.selected`.

    Raises:
      ConfigError: ``where`` fits no weight.
      StateError: names that are missing or unknown; a model whose weights are frozen.
    """
    named = q.engine.check(params, qparams, where_from, "qparams")
    if q.frozen:
        because, fix = "its weights are quantized already", "use the q that was frozen"
        raise StateError(explain(where_from, "a frozen model cannot be improved", because=because, fix=fix))
    q = q.eval()  # with the statistics and without the dropouts of inference, for which its result is
    quantizers = {weight.site.quantizer: weight for weight in q.engine.acting}
    chosen = {name: quantizers[name] for name in selected(where_from, q.plan, where) if name in quantizers}
    if where is not None and not chosen:
        because, fix = "they are computed in the forward", "choose weights that are parameters"
        raise StateError(explain(where_from, "the weights that where chooses cannot be changed", because=because, fix=fix))
    detached = {name: tensor.detach() for name, tensor in named.items()}
    return Start(q, params, detached, dict(qparams), chosen)


def as_batches(where_from: str, batches: Iterable[Tree] | None) -> list[Tree]:
    """Batches as a list, since an algorithm may run over them more than once.

    Raises:
      StateError: none, or a single tensor in the place of a list.
    """
    fix = f"sq.algorithms.{where_from}(q, params, qparams, [x])"
    if batches is None or isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        got = type(batches).__name__
        raise StateError(explain(where_from, "these batches cannot be used", got=got, allowed="a list", fix=fix))
    found = list(batches)
    if not found:
        raise StateError(explain(where_from, "there are no batches", fix=fix))
    return found


def reference_of(where_from: str, start: Start, reference: Given | None) -> dict[str, Tensor]:
    """The params, by name and detached, of the float model whose outputs an algorithm wants; by default those of the start.

    Raises:
      StateError: names that are missing or unknown.
    """
    if reference is None:
        return start.params
    named = start.engine.skeleton.check(reference, where_from)
    return {name: tensor.detach() for name, tensor in named.items()}


def check_rounding(where_from: str, start: Start) -> None:
    """Raise a :class:`ConfigError` that names each weight which has no grid of integers that is known beforehand."""
    problems = []
    for name, weight in start.weights.items():
        config = weight.config
        if not weight.fake_quantize.integer:
            because, fix = "its codes are no integers", "where=, to leave it out"
            problems.append(
                explain(f"{where_from}: {name}", f"{config.fake_quantize} cannot be solved for", because=because, fix=fix)
            )
        elif config.scheme.dynamic:
            because, fix = "its grid is computed from the weight at each call", "dynamic=False, or where= to leave it out"
            problems.append(
                explain(f"{where_from}: {name}", "a dynamic scheme cannot be solved for", because=because, fix=fix)
            )
    raise_all(problems, ConfigError)


def fits(moments: Moments, seen: Tensor, weight: WeightQuantizer) -> bool:
    """Whether moments are those of the rows that a weight multiplies.

    Calls that sum over other axes of the weight than its scales say have other ones.
    """
    axis = output_axis(weight.scheme, weight.output_axis)
    if axis == ():
        return False
    channels = rows(seen, PerChannel(axis)).shape[:-1]
    n = seen.numel() // max(1, math.prod(channels))
    return moments.second.shape[-1] == n and math.prod(channels) % moments.parts == 0


def settled(where_from: str, start: Start, name: str, solved: Tensor) -> Tensor:
    """A solved weight as its quantizer returns it, bit for bit.

    Args:
      where_from: the algorithm, for errors.
      start: with the quantizer and its qparams.
      name: of the quantizer.
      solved: the weight in its own layout, on its grid up to the rounding of floats.

    Raises:
      ConfigError: the quantizer moves it to other codes, as one does that does not round to the nearest.
    """
    weight = start.weights[name]
    params = {**start.params, weight.site.parameter: solved}
    rounded = weight.quantize(params, start.grid(name))
    # codes differ by whole steps of their own scales, floats by far less
    moved = weight.seen({**params, weight.site.parameter: rounded - solved}).abs()
    if bool((moved > 0.5 * expand(start.grid(name).scale.abs(), moved, weight.scheme.granularity)).any()):
        because, fix = "it does not round to the nearest", "fake_quantize=sq.fake_quantize.fixed()"
        raise ConfigError(
            explain(f"{where_from}: {name}", f"{weight.config.fake_quantize} moves solved codes", because=because, fix=fix)
        )
    return rounded


def observed_again(start: Start, params: Mapping[str, Tensor], names: Iterable[str]) -> QParamsDict:
    """The qparams of some weights as their observers find them for other params, at the widths and switches that they have.

    Args:
      start: with the qparams so far.
      params: by name.
      names: of the weight quantizers.
    """
    found = {}
    for name in names:
        weight, before = start.weights[name], start.qparams[name]
        width = width_of(before)
        is_whole = width is not None and float(width).is_integer()
        fresh = weight_qparams(weight, params, int(width) if width is not None and is_whole else None)
        if width is not None and not is_whole:
            fresh = with_bits({name: fresh}, start.q.plan, {name: width})[name]
        switch = {extra: before.extras[extra] for extra in ("enabled",) if extra in before.extras}
        found[name] = fresh._replace(extras=sorted_dict({**fresh.extras, **switch}))
    return found


def as_wide(start: Start, name: str, found: QParams) -> QParams:
    """Newly calibrated qparams of a value at the width and with the switch that it had before.

    Args:
      start: with the qparams so far.
      name: of the quantizer.
      found: at the width of the plan.
    """
    before = start.qparams[name]
    width = width_of(before)
    if width is not None:
        found = with_bits({name: found}, start.q.plan, {name: width})[name]
    switch = {extra: before.extras[extra] for extra in ("enabled",) if extra in before.extras}
    return found._replace(extras=sorted_dict({**found.extras, **switch}))


def width_of(qparams: QParams) -> float | None:
    """The bit width that qparams have as data; ``None`` where they have that of their config."""
    low, high = qparams.extras.get("qmin"), qparams.extras.get("qmax")
    if low is None or high is None:
        return None
    codes = float((high - low).max()) + 1
    # a symmetric range leaves one code out
    return math.log2(codes + 1) if codes % 2 else math.log2(codes)


def output_distance(
    q: Quantized, float_params: Given, params: Given, qparams: Mapping[str, QParams], batches: Sequence[Tree]
) -> Tensor:
    """How far the quantized model is from the float one: ``mean |y_q - y_f|**2 / mean |y_f|**2`` over outputs and batches.

    Args:
      q: a quantized model in eval mode.
      float_params: of the float model.
      params, qparams: of the quantized model.
      batches: a list.

    Returns:
      Shape ``()``, float64: 0 where both agree.
    """
    frozen, baked = q.freeze(params, qparams)
    named = q.engine.skeleton.check(float_params, "output_distance")
    error = power = torch.zeros((), dtype=torch.float64)
    with q.engine.constant():
        for batch in batches:
            args, kwargs = q.engine.call(batch, "output_distance")
            expected = q.engine.run_float(named, unchanged, args, kwargs)
            actual = frozen.apply(baked, qparams, *args, **kwargs)
            for y, target in zip(_floating(actual), _floating(expected), strict=True):
                error = error + (y.double() - target.double()).square().sum()
                power = power + target.double().square().sum()
    return error / power.clamp(min=torch.finfo(torch.float64).tiny)


def rolled_back(
    where: str, start: Start, new: tuple[Given, QParamsDict], batches: Sequence[Tree]
) -> tuple[Given, QParamsDict]:
    """A result, or the start where that is nearer to the float model on the batches; a mapped result cannot be compared."""
    params, qparams = new
    if not is_plain([*tensors(params), *tensors(qparams)]):
        return new
    before = output_distance(start.q, start.given, start.given, start.qparams, batches)
    after = output_distance(start.q, start.given, params, qparams, batches)
    if bool(after <= before):
        return new
    LOG.warning("%s: nothing is changed: the distance to the float model would rise from %.3g to %.3g", where, before, after)
    return start.result(start.params, start.qparams)


def _floating(output: Output) -> list[Tensor]:
    return [tensor for tensor in tensors(output) if tensor.is_floating_point()]
