"""Parts of a model whose outputs are reconstructed one after the other, and what they read and make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sophq_func.algorithms._layers import SPATIAL
from sophq_func.algorithms.contract import Start
from sophq_func.core.errors import ConfigError, explain
from sophq_func.core.pytree import flatten, tensors
from sophq_func.core.types import Args, Kwargs, Output, Tree
from sophq_func.model.quantized import Quantized
from sophq_func.model.tap import Call
from sophq_func.model.weight_quantizer import Params, WeightQuantizer
from sophq_func.numerics.contracts import QParams

KINDS = ("layer", "block")


class Unit(NamedTuple):
    """A part of a model, and the weights that are learned in it.

    Attributes:
      part: the module as a quantized model of its own; the whole model where a weight belongs to no module.
      weights: by quantizer, those that no unit before it has.
    """

    part: Quantized
    weights: dict[str, WeightQuantizer]

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole model."""
        return self.part.engine.whole is None

    def comparable(self, params: Params) -> Callable[[Output], Output]:
        """What of an output is compared: of a layer with a BatchNorm behind it, the output times the BatchNorm's factor.

        Args:
          params: of the float model.
        """
        weight = next(iter(self.weights.values()))
        spatial = SPATIAL.get(weight.site.operation)
        is_layer = len(self.part.plan.runs[0].calls) == 1 if self.part.plan.runs else False
        if not is_layer or weight.norm is None or spatial is None:
            return lambda output: output
        factor = weight.norm.factor(params).reshape(-1, *[1] * spatial)
        return lambda output: output * factor


def units_of(
    where_from: str, start: Start, units: str | Sequence[str], weights: Mapping[str, WeightQuantizer]
) -> list[Unit]:
    """The units of a model, in execution order.

    Args:
      where_from: the algorithm, for errors.
      start: with the model.
      units: ``"layer"``: each layer. ``"block"``: the blocks of ``q.blocks()``, and the layers outside of them. Paths of
        modules: these alone, and no weight outside.
      weights: by quantizer, those to learn.

    Raises:
      ConfigError: an unknown kind.
      PlanError: a path that the model does not have.
    """
    q = start.q
    if isinstance(units, str) and units not in KINDS:
        allowed = "'layer', 'block', or a list of paths"
        raise ConfigError(
            explain(where_from, "units of this kind are not known", got=units, allowed=allowed, fix=f"[{units!r}]")
        )
    if isinstance(units, str):
        blocks = q.blocks() if units == "block" else []
        layers = [_layer(q, weight) for weight in weights.values()]
        parts = [*blocks, *(part for part in layers if part is not None)]
    else:
        parts = [q.part(path) for path in units]
    found = _disjoint(parts, weights)
    left = {name: weight for name, weight in weights.items() if not any(name in unit.weights for unit in found)}
    if left and isinstance(units, str):  # of functions, or called where no module is
        found.append(Unit(q, left))
    order = {name: place for place, name in enumerate(q.plan)}
    return sorted(found, key=lambda unit: (unit.is_whole, min(order[name] for name in unit.weights)))


def _layer(q: Quantized, weight: WeightQuantizer) -> Quantized | None:
    """The module that multiplies with a weight; ``None`` where a function outside of modules does."""
    path = weight.site.anchor.path
    return q.part(path) if path else None


def _disjoint(parts: Sequence[Quantized], weights: Mapping[str, WeightQuantizer]) -> list[Unit]:
    """A unit for each part that has weights which no part before it has: each weight belongs to one unit."""
    taken: set[str] = set()
    found = []
    for part in parts:
        own = {name: weight for name, weight in weights.items() if name in part.plan and name not in taken}
        if own:
            found.append(Unit(part, own))
            taken |= own.keys()
    return found


class Sample(NamedTuple):
    """One call of a unit: what it reads, and what it should make.

    Attributes:
      args, kwargs: of the quantized model, in which the units before are done.
      exact: the same of the float model.
      target: the output of the float model.
    """

    args: Args
    kwargs: Kwargs
    exact: tuple[Args, Kwargs]
    target: Output


def samples_of(
    unit: Unit, start: Start, exact: Params, params: Params, qparams: Mapping[str, QParams], data: Sequence[Tree]
) -> list[Sample]:
    """The call of a unit for each batch.

    Two runs up to the unit for each batch: one in float, one quantized.

    Args:
      unit: to run.
      start: with the model.
      exact: params of the float model.
      params, qparams: as the units before left them.
      data: the batches.
    """
    q = start.q
    frozen, baked = q.freeze(start.engine.like(start.given, params), qparams)
    found = []
    with start.engine.constant():
        for batch in data:
            args, kwargs = q.engine.call(batch, "batches")
            if unit.is_whole:
                output, _ = q.tap([], stop=False)(exact, None, *args, **kwargs)
                found.append(Sample(args, kwargs, (args, kwargs), output))
                continue
            path = unit.part.path
            wanted: Call = q.tap(path, stop=True)(exact, None, *args, **kwargs)[1][path][0]
            given: Call = frozen.tap(path, stop=True)(baked, qparams, *args, **kwargs)[1][path][0]
            found.append(Sample(given.args, given.kwargs, (wanted.args, wanted.kwargs), wanted.output))
    return found


def rows_of(sample: Sample, choose: Callable[[int], Tensor]) -> Sample:
    """A part of the rows of a sample, where the first axis of every tensor runs over them; else the sample as it is.

    Args:
      sample: a call.
      choose: from the number of rows, the indices of those that are taken.
    """
    found = tensors(sample)
    counts = {tensor.shape[:1] for tensor in found}
    if len(counts) != 1 or counts == {torch.Size()}:
        return sample
    index = choose(found[0].shape[0])
    leaves, rebuild = flatten(tuple(sample))
    chosen: Any = rebuild([leaf[index] if isinstance(leaf, Tensor) else leaf for leaf in leaves])
    return Sample(*chosen)
