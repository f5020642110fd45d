"""Cross-layer equalization: factors for each channel move between layers until both have equal ranges there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sophq_func.algorithms._error import floating, no_worse
from sophq_func.algorithms._layers import as_stored, outputs_first
from sophq_func.algorithms.chains import Chain, Reader, chains_of
from sophq_func.algorithms.contract import Start, as_batches, as_wide, begin, observed_again, output_distance
from sophq_func.config.register import algorithm
from sophq_func.core.errors import StateError, check_flags, explain
from sophq_func.core.logs import ALGORITHMS
from sophq_func.core.progress import shown
from sophq_func.core.public import public
from sophq_func.core.types import Given, Output, Tree
from sophq_func.model.engine import QParamsDict
from sophq_func.model.quantized import Quantized
from sophq_func.model.select import Where
from sophq_func.model.tap import unchanged
from sophq_func.model.weight_quantizer import Params, WeightQuantizer
from sophq_func.numerics.contracts import QParams

SWEEPS = 20
"""How often all chains are equalized. A layer between two others changes with both; each sweep halves what is left."""

LARGEST_FACTOR = 1e3
"""A channel is scaled by at most this and at least its inverse: one that is nearly 0 would get any factor."""

TOLERANCE = 1e-4
"""How far the float model may move, in units of its largest output: about 1000 roundings of float32."""


@algorithm("equalize", keeps_float=True, measure=output_distance)
@public
def equalize(
    q: Quantized,
    params: Given,
    qparams: Mapping[str, QParams],
    batches: Iterable[Tree],
    *,
    where: Where = None,
    progress: bool = True,
) -> tuple[Given, dict[str, QParams]]:
    """Give the channels between two layers equal ranges in both: a factor moves from one weight into the other.

    ``W1 <- W1 / s``, ``b1 <- b1 / s``, ``W2 <- W2 s`` with ``s = sqrt(r1 / r2)``, ``r`` the largest magnitude of a channel
    with its BatchNorm folded in (Nagel et al., arXiv:1906.04721, section 4.1), until nothing changes. Where a BatchNorm
    lies behind the first layer, ``1 / s`` goes into its weight and bias. Several layers may read one output: ``r2`` is the
    largest of theirs. The float model stays the same, since only what is positively homogeneous lies between: ReLU and
    pooling, never ReLU6. What is left, and why, is told by :func:`sophq_func.algorithms.equalizable` and the logger
    ``sophq_func.algorithms``.

    Helps where weights have one scale for the tensor. The qparams of the weights that changed, and of values between them,
    are calibrated anew. If the relative error of the model's outputs does not fall, everything stays as it was.

    Args:
      q: a quantized model, in evaluation mode and not frozen.
      params, qparams: see :meth:`Quantized.apply`.
      batches: calls of the model, as for ``q.calibrate``.
      where: which layers may be the first of a pair: names, globs, paths, types or predicates; by default all.
      progress: show how far it is.

    Returns:
      New params, in which weights, biases, and weights of BatchNorms differ; new qparams.

    Raises:
      ConfigError: a ``where`` that fits nothing.
      StateError: no batches, a frozen model or one in training mode; the float model would not stay the same.

    Differs from sophgo-mq: reads the pairs off the graph, with BatchNorms, groups, transposed convolutions and several
    readers; looks at all channels; no absolute threshold.

    Example:
      >>> import torch, sophq_func as sq
      >>> _ = torch.manual_seed(0)
      >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).eval()
      >>> x = torch.randn(64, 4)
      >>> with torch.no_grad():
      ...     factor = torch.tensor([0.01, 1.0] * 4)
      ...     _ = model[0].weight.mul_(factor[:, None]), model[0].bias.mul_(factor), model[2].weight.div_(factor)
      >>> config = sq.QuantConfig(weight=sq.override(bits=4, granularity=sq.PerTensor()))
      >>> q = sq.quantize(model, config, example_args=(x,))
      >>> params = sq.params_of(model)
      >>> qparams = q.calibrate(params, [x], progress=False)
      >>> better = equalize(q, params, qparams, [x], progress=False)
      >>> error = lambda p, qp: (q.apply(p, qp, x) - model(x)).square().mean().item()
      >>> error(*better) < error(params, qparams)
      True
    """
    check_flags("equalize", {"progress": progress})
    start = begin("equalize", q, params, qparams, where)
    data = as_batches("equalize", batches)
    chains = _chains(start, data[0])
    if not chains:
        return start.result(start.params, start.qparams)
    new = start.params
    for _ in range(SWEEPS):
        for chain in chains:
            new = {**new, **_equalized(new, chain)}
    targets = _float_outputs(start, start.params, shown(data, "equalize", progress))
    _check_float(start, new, data, targets)
    return no_worse("equalize", start, new, _calibrated(start, new, chains, data), data, targets)


@public
def equalizable(q: Quantized, params: Given, batch: Tree) -> dict[str, str]:
    """For each weight, ``""`` where :func:`sophq_func.algorithms.equalize` scales its output channels, else the reason.

    Args:
      q: a quantized model.
      params: as :func:`sophq_func.params_of` returns them.
      batch: one call of the model.

    Returns:
      ``{weight quantizer: reason}``, in execution order.

    Example:
      >>> import torch, sophq_func as sq
      >>> _ = torch.manual_seed(0)
      >>> model, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU6(), torch.nn.Linear(8, 4)), torch.randn(2, 4)
      >>> q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
      >>> equalizable(q, sq.params_of(model), x)["0.weight_fake_quant"]
      'its output reaches 1 (relu6), which a factor does not pass'
    """
    args, kwargs = q.engine.call(batch, "equalizable")
    named = q.engine.skeleton.check(params, "equalizable")
    weights = {weight.site.quantizer: weight for weight in q.engine.weights}
    chains, left = chains_of(q.engine.retrace(named, args, kwargs), weights)
    reasons = {found.name: found.because for found in left} | {chain.first.site.quantizer: "" for chain in chains}
    return {name: reasons[name] for name in weights}


def _chains(start: Start, batch: Tree) -> list[Chain]:
    """The chains whose first layer is chosen; the log tells which others there are not, and why."""
    args, kwargs = start.engine.call(batch, "equalize")
    weights = {weight.site.quantizer: weight for weight in start.engine.acting}
    chains, left = chains_of(start.engine.retrace(start.params, args, kwargs), weights)
    for name, because in left:
        ALGORITHMS.info("equalize: the channels of %s stay as they are, as %s", name, because)
    return [chain for chain in chains if chain.first.site.quantizer in start.weights]


def _equalized(params: Params, chain: Chain) -> dict[str, Tensor]:
    """The tensors that change when one chain is equalized."""
    first = _magnitudes(params, chain.first).flatten(1).amax(1)
    ranges = [_inputs(_magnitudes(params, reader.quantizer), reader) for reader in chain.readers]
    second = torch.stack(ranges).amax(0)
    alive = (first > 0) & (second > 0)
    ratio = torch.where(alive, first / torch.where(alive, second, 1), 1)
    factor = ratio.sqrt().clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR)
    new = _scaled_outputs(params, chain, 1 / factor)
    for reader in chain.readers:
        new.update(_scaled_inputs(params, reader, factor))
    return new


def _magnitudes(params: Params, quantizer: WeightQuantizer) -> Tensor:
    """The magnitudes of a weight with its BatchNorm folded in, output channels first."""
    rows = outputs_first(params[quantizer.site.parameter], quantizer).abs()
    if quantizer.norm is None:
        return rows
    return rows * quantizer.norm.factor(params).abs().reshape(-1, *[1] * (rows.ndim - 1))


def _inputs(rows: Tensor, reader: Reader) -> Tensor:
    """The largest of a weight for each channel that its layer reads; shape ``(C,)``."""
    groups = reader.quantizer.site.groups
    outputs, inputs = rows.shape[:2]
    largest = rows.reshape(groups, outputs // groups, inputs, -1).amax((1, 3))
    return largest.reshape(-1, reader.places).amax(1)


def _scaled_outputs(params: Params, chain: Chain, factor: Tensor) -> dict[str, Tensor]:
    """The tensors of the first layer of a chain when it makes each channel times a factor."""
    quantizer = chain.first
    site, norm = quantizer.site, quantizer.norm
    if norm is not None:
        return {name: params[name] * factor for name in (norm.weight, norm.bias)}
    rows = outputs_first(params[site.parameter], quantizer)
    new = {site.parameter: as_stored(rows * factor.reshape(-1, *[1] * (rows.ndim - 1)), quantizer).contiguous()}
    if chain.bias:
        new[chain.bias] = params[chain.bias] * factor
    return new


def _scaled_inputs(params: Params, reader: Reader, factor: Tensor) -> dict[str, Tensor]:
    """The weight of a layer that reads each channel divided by a factor, and makes what it made."""
    quantizer = reader.quantizer
    rows = outputs_first(params[quantizer.site.parameter], quantizer)
    groups, (outputs, inputs) = quantizer.site.groups, rows.shape[:2]
    columns = factor.repeat_interleave(reader.places).reshape(groups, 1, inputs, 1)
    scaled = rows.reshape(groups, outputs // groups, inputs, -1) * columns
    return {quantizer.site.parameter: as_stored(scaled.reshape(rows.shape), quantizer).contiguous()}


def _float_outputs(start: Start, params: Params, data: Iterable[Tree]) -> list[Output]:
    """What the float model returns for each batch."""
    outputs = []
    with start.engine.constant():
        for batch in data:
            args, kwargs = start.engine.call(batch, "equalize")
            outputs.append(start.engine.run_float(params, unchanged, args, kwargs))
    return outputs


def _check_float(start: Start, params: Params, data: Iterable[Tree], targets: Iterable[Output]) -> None:
    """Raise a :class:`StateError` where the float model has moved: something between two layers is not homogeneous."""
    for output, target in zip(_float_outputs(start, params, data), targets, strict=True):
        for y, t in zip(floating(output), floating(target), strict=True):
            error, size = float((y - t).abs().max()), float(t.abs().max())
            if error > TOLERANCE * size:
                because = "something between two of its layers does not pass a factor on"
                fix = 'where="..." leaves out the layer before it'
                raise StateError(
                    explain(
                        "equalize",
                        "the float model would change",
                        got=error / size,
                        allowed=TOLERANCE,
                        because=because,
                        fix=fix,
                    )
                )


def _calibrated(start: Start, params: Params, chains: Sequence[Chain], data: list[Tree]) -> QParamsDict:
    """The qparams, calibrated anew where a tensor changed: weights, and values from the first layer to its readers."""
    acting = {weight.site.quantizer: weight for weight in start.engine.acting}
    readers = [reader.quantizer for chain in chains for reader in chain.readers]
    weights = {weight.site.quantizer for weight in (*(chain.first for chain in chains), *readers)}
    read = {each.quantizer for weight in readers for each in weight.site.inputs}
    passed = {node for chain in chains for node in chain.nodes}
    sites = [start.q.plan.site(name) for name in start.q.plan]
    values = [site.quantizer for site in sites if site.value in passed or site.quantizer in read]
    found = start.q.calibrate(start.engine.like(start.given, params), data, progress=False)
    again = {name: as_wide(start, name, found[name]) for name in values}
    return {**start.qparams, **again, **observed_again(start._replace(weights=acting), params, sorted(weights))}
