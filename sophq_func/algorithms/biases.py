"""Bias correction: the mean error that rounded weights cause at the output of a layer goes into its bias."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from sophq_func.algorithms._error import no_worse
from sophq_func.algorithms._layers import SPATIAL, Product, biases_of
from sophq_func.algorithms.contract import Start, as_batches, begin, output_distance, reference_of
from sophq_func.config.register import algorithm
from sophq_func.core.errors import ConfigError, check_flags, unknown
from sophq_func.core.progress import shown
from sophq_func.core.public import public
from sophq_func.core.types import Args, Given, Kwargs, Output, Tree
from sophq_func.model.quantized import Quantized
from sophq_func.model.runner import Function
from sophq_func.model.select import Where
from sophq_func.model.watching import run_float, run_frozen
from sophq_func.model.weight_quantizer import Params, WeightQuantizer
from sophq_func.numerics.contracts import QParams

Order: TypeAlias = Literal["local", "sequential"]
"""What a layer reads while its error is measured."""

FOLDS = 2
"""Into how many parts the samples of a batch are cut, to tell an error of the layer from chance.

The fewest with which what one part shows can be tried on another; more parts cost more and decide alike.
"""


class Layer(NamedTuple):
    """A layer whose output a bias can shift. Its output is that of the BatchNorm, where one is folded into the weight.

    Attributes:
      quantizer: of its weight.
      bias: canonical name of the bias that is corrected: of the BatchNorm, or else of the layer.
      spatial: how many axes a sample has behind its channels.
    """

    quantizer: WeightQuantizer
    bias: str
    spatial: int

    def is_batched(self, x: Tensor) -> bool:
        """Whether the first axis of what the layer reads or makes runs over samples."""
        return x.ndim > self.spatial + 1

    def means(self, params: Params, product: Tensor) -> Tensor:
        """The mean of the layer's output for each channel, from the result of its function; shape ``(C,)``."""
        channel = product.ndim - 1 - self.spatial
        others = [axis for axis in range(product.ndim) if axis != channel]
        means = product.mean(others) if others else product
        norm = self.quantizer.norm
        if norm is None:
            return means
        return (means - params[norm.mean]) * norm.factor(params) + params[norm.bias]

    def shifted(self, params: Params, product: Tensor, shift: Tensor) -> Tensor:
        """The result of its function such that each channel of the layer's output is shifted."""
        norm = self.quantizer.norm
        if norm is not None:
            factor = norm.factor(params)
            # a channel with the factor 0 is constant behind the BatchNorm, whatever the layer makes
            shift = torch.where(factor == 0, 0, shift / torch.where(factor == 0, 1, factor))
        return product + shift.reshape(-1, *[1] * self.spatial)


Layers: TypeAlias = Mapping[str, Layer]
"""By canonical name of the weight."""


@algorithm("correct_biases", measure=output_distance)
@public
def correct_biases(
    q: Quantized,
    params: Given,
    qparams: Mapping[str, QParams],
    batches: Iterable[Tree],
    *,
    order: Order = "local",
    reference: Given | None = None,
    where: Where = None,
    progress: bool = True,
) -> tuple[Given, dict[str, QParams]]:
    """Correct biases by the mean error that quantization causes at the output of their layer.

    ``b <- b + E[y_float - y_quantized]`` for each output channel (Nagel et al., arXiv:1906.04721, section 4.2; Finkelstein
    et al., arXiv:1906.03193). ``"local"``: both from the float model's inputs, that is ``b <- b + E[(W - Q(W)) x]``, in one
    run; errors of activations, and those of earlier layers, do not count. ``"sequential"``: the layer of the quantized
    model reads what the layers before it, corrected already, hand on.

    A layer is corrected only where the correction that some samples show makes the error of others smaller. If the relative
    error of the model's outputs does not fall, everything stays as it was. The data is run once, or twice in
    ``"sequential"``, and at most twice more to compare. Beyond the model, memory holds the activations of one batch.

    Left as they are: layers without bias and BatchNorm, weights that are computed in the forward, and what is no convolution
    or linear layer.

    Args:
      q: a quantized model, in evaluation mode and not frozen.
      params, qparams: see :meth:`Quantized.apply`.
      batches: calls of the model, as for ``q.calibrate``; no labels.
      order: ``"local"`` or ``"sequential"``.
      reference: params of the float model whose outputs are wanted, where an algorithm has changed ``params`` before; by
        default ``params``.
      where: which weights: names, globs, paths, types or predicates, as in :func:`sophq_func.statistics`; by default all.
      progress: show how far it is.

    Returns:
      New params, in which biases differ; and the qparams.

    Raises:
      ConfigError: an unknown order, or a ``where`` that fits nothing.
      StateError: no batches, a frozen model or one in training mode.

    Example:
      >>> import torch, sophq_func as sq
      >>> _ = torch.manual_seed(0)
      >>> model, x = torch.nn.Linear(8, 3).eval(), torch.rand(64, 8)
      >>> q = sq.quantize(model, sq.QuantConfig(weight=sq.override(bits=2), activation=None), example_args=(x,))
      >>> params = sq.params_of(model)
      >>> qparams = q.calibrate(params, [x], progress=False)
      >>> better, _ = correct_biases(q, params, qparams, [x], progress=False)
      >>> error = lambda p: (q.apply(p, qparams, x) - model(x)).mean(0).abs().max().item()
      >>> error(better) < 1e-5 < error(params)
      True
    """
    check_flags("correct_biases", {"progress": progress})
    if order not in get_args(Order):
        raise ConfigError(unknown("correct_biases", "order", order, get_args(Order)))
    start = begin("correct_biases", q, params, qparams, where)
    data = as_batches("correct_biases", batches)
    exact = reference_of("correct_biases", start, reference)
    added = _added(start, data[0])
    found = [_layer(weight, added) for weight in start.weights.values()]
    layers = {layer.quantizer.site.parameter: layer for layer in found if layer is not None}
    measure = _local if order == "local" else _sequential
    new, targets = measure(start, exact, layers, shown(data, "correct_biases", progress))
    return no_worse("correct_biases", start, {**start.params, **new}, start.qparams, data, targets)


def _added(start: Start, batch: Tree) -> dict[str, str]:
    """By weight, the biases of functions, of which a plan does not know; a run tells them, where one may be needed."""
    if all(weight.norm is not None or weight.site.bias for weight in start.weights.values()):
        return {}
    args, kwargs = start.engine.call(batch, "correct_biases")
    return biases_of(start.engine.retrace(start.params, args, kwargs))


def _layer(weight: WeightQuantizer, added: Mapping[str, str]) -> Layer | None:
    """The layer of a weight; ``None`` where no bias shifts its output, or its operation has no one channel axis.

    Args:
      weight: its quantizer.
      added: by weight, the biases of functions, of which a plan does not know.
    """
    site, norm = weight.site, weight.norm
    bias = norm.bias if norm is not None else site.bias or added.get(site.parameter, "")
    spatial = SPATIAL.get(site.operation)
    return None if not bias or spatial is None else Layer(weight, bias, spatial)


class Folds:
    """The mean errors of one layer, each found from other samples."""

    def __init__(self) -> None:
        self._shifts: list[Tensor] = []
        self._counts: list[int] = []

    def add(self, shift: Tensor, count: int) -> None:
        """The mean error of ``count`` further samples."""
        self._shifts.append(shift)
        self._counts.append(count)

    @property
    def count(self) -> int:
        """The number of samples."""
        return sum(self._counts)

    @property
    def shift(self) -> Tensor | None:
        """The mean error of all samples, or ``None`` where it would make errors larger.

        The squared error of a fold falls by ``2 c d - c**2`` when a shift ``c`` is added to an output whose mean error is
        ``d``. Here ``c`` is the mean error of the other folds, so that it is tried on samples that it was not made from.
        """
        if not self._shifts:
            return None
        shifts = torch.stack(self._shifts)
        counts = torch.tensor(self._counts, dtype=shifts.dtype, device=shifts.device).unsqueeze(1)
        total, count = (counts * shifts).sum(0), counts.sum()
        if len(shifts) > 1:
            others = (total - counts * shifts) / (count - counts)
            fall = (counts * (2 * others * shifts - others.square())).sum()
            if not fall > 0:
                return None
        return total / count


def _parts(x: Tensor, is_batched: bool) -> Sequence[Tensor]:
    """A tensor in parts of its samples; whole where it is one sample."""
    return x.chunk(FOLDS) if is_batched else [x]


def _local(start: Start, exact: Params, layers: Layers, data: Iterable[Tree]) -> tuple[dict[str, Tensor], list[Output]]:
    """The corrected biases by name, and the outputs of the float model.

    Args:
      start: what the algorithm was given.
      exact: params of the float model.
      layers: to correct.
      data: batches.
    """
    _, baked = start.q.freeze(start.params, start.qparams)
    found = {name: Folds() for name in layers}

    def visit(name: str, func: Function, args: Args, kwargs: Kwargs) -> Output:
        layer, call = layers[name], Product(func, args, kwargs)
        # a layer that adds none has the bias of its BatchNorm
        bias = layer.bias if layer.quantizer.norm is None else layer.quantizer.site.bias
        replaced = {"weight": baked[name], **({"bias": baked[bias]} if bias else {})}
        batched = layer.is_batched(call.x)
        for part in _parts(call.x, batched):
            # a layer is affine in what it reads: the mean error of samples is the error of the mean sample
            mean = part.mean(0, keepdim=True) if batched else part
            shift = layer.means(exact, call.of(mean, {})) - layer.means(baked, call.of(mean, replaced))
            found[name].add(shift, len(part) if batched else 1)
        return func(*args, **kwargs)

    outputs = [run_float(start.q, exact, batch, layers, visit) for batch in data]
    return _corrected(start.params, layers, found), outputs


def _sequential(start: Start, exact: Params, layers: Layers, data: Iterable[Tree]) -> tuple[dict[str, Tensor], list[Output]]:
    """The same, where each layer of the quantized model reads what the corrected ones before it hand on.

    The correction that a batch shows is added while this batch runs, so that one run measures all layers.
    """
    frozen, baked = start.q.freeze(start.params, start.qparams)
    found = {name: Folds() for name in layers}
    wanted: dict[str, list[Tensor]] = {name: [] for name in layers}
    outputs = []

    def visit_float(name: str, func: Function, args: Args, kwargs: Kwargs) -> Output:
        layer, product = layers[name], func(*args, **kwargs)
        wanted[name] += [layer.means(exact, part) for part in _parts(product, layer.is_batched(product))]
        return product

    def visit_quantized(name: str, func: Function, args: Args, kwargs: Kwargs) -> Output:
        layer, product, here = layers[name], func(*args, **kwargs), Folds()
        batched = layer.is_batched(product)
        for part in _parts(product, batched):
            here.add(wanted[name].pop(0) - layer.means(baked, part), len(part) if batched else 1)
        shift = here.shift
        # a correction that is refused for this batch counts as none, and makes that of all batches smaller
        found[name].add(torch.zeros_like(start.params[layer.bias]) if shift is None else shift, here.count)
        return product if shift is None else layer.shifted(baked, product, shift)

    for batch in data:
        outputs.append(run_float(start.q, exact, batch, layers, visit_float))
        run_frozen(frozen, baked, start.qparams, batch, layers, visit_quantized)
    return _corrected(start.params, layers, found), outputs


def _corrected(params: Params, layers: Layers, found: Mapping[str, Folds]) -> dict[str, Tensor]:
    """The biases, by name, of the layers whose correction counts."""
    new: dict[str, Tensor] = {}
    for name, layer in layers.items():
        shift = found[name].shift
        if shift is not None:
            bias = new.get(layer.bias, params[layer.bias])  # several weights may share one
            new[layer.bias] = bias + shift.to(bias.dtype)
    return new
