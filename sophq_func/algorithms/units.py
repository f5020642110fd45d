"""Parts of a model whose outputs are reconstructed one after the other, and what they read and make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sophq_func.algorithms._layers import SPATIAL
from sophq_func.algorithms._walk import Wire, wires_of
from sophq_func.algorithms.contract import Start
from sophq_func.core.errors import ConfigError, explain
from sophq_func.core.pytree import flatten, tensors
from sophq_func.core.types import Args, Given, Kwargs, Output, Tree
from sophq_func.model.quantized import Quantized
from sophq_func.model.tap import Call, unchanged
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


class Stream:
    """What each unit reads and makes, in float and behind the units that are done; kept for one unit at a time.

    Where a unit reads what the unit before was given or returned, as in a chain of blocks, only the two units are run;
    elsewhere the model is run up to the unit, in float and quantized.

    Args:
      start: with the model.
      exact: params of the float model.
      data: the batches.
      units: in the order in which they are asked for.
    """

    def __init__(self, start: Start, exact: Params, data: Sequence[Tree], units: Sequence[Unit]) -> None:
        self._start, self._exact = start, exact
        self._calls = [start.q.engine.call(batch, "batches") for batch in data]
        calls = _calls_of_modules(start.q)
        # the samples are those of a module's first call: what its last one returned goes to others
        self._wires = self._wired([unit.part.path for unit in units if calls[unit.part.path] == 1])
        self._at = ""
        self._samples: list[Sample] = []
        self._returned: list[Output] = []

    def samples(self, unit: Unit, params: Params, qparams: Mapping[str, QParams]) -> list[Sample]:
        """The call of a unit for each batch.

        Args:
          unit: to run.
          params, qparams: as the units before left them.
        """
        wire = self._wires.get(unit.part.path)
        with self._start.engine.constant():
            if wire is not None and wire.block == self._at and self._returned:
                pairs = zip(self._samples, self._returned, strict=True)
                self._samples = [self._carried(unit, wire, before, returned) for before, returned in pairs]
            else:
                frozen = self._start.q.freeze(self._start.engine.like(self._start.given, params), qparams)
                self._samples = [self._tapped(unit, *frozen, qparams, args, kwargs) for args, kwargs in self._calls]
        self._at, self._returned = unit.part.path, []
        return self._samples

    def leave(self, unit: Unit, params: Params, qparams: Mapping[str, QParams]) -> None:
        """Go on behind a unit, with its params and qparams as they are final."""
        if any(wire.block == unit.part.path for wire in self._wires.values()):
            frozen, baked = unit.part.freeze(params, qparams)
            with self._start.engine.constant():
                self._returned = [frozen.apply(baked, qparams, *call.args, **call.kwargs) for call in self._samples]

    def _wired(self, paths: Sequence[str]) -> Mapping[str, Wire]:
        """Where the arguments of the units come from, as a run of the float model shows."""
        args, kwargs = self._calls[0]
        return wires_of(self._start.q, self._exact, paths, args, kwargs) if len(paths) > 1 else {}

    def _carried(self, unit: Unit, wire: Wire, before: Sample, returned: Output) -> Sample:
        """The call of a unit, from that of the unit before and what this returned."""
        args, kwargs = wire.carried((before.args, before.kwargs), returned)
        exact = wire.carried(before.exact, before.target)
        return Sample(args, kwargs, exact, unit.part.engine.run_float(self._exact, unchanged, *exact))

    def _tapped(
        self, unit: Unit, frozen: Quantized, baked: Given, qparams: Mapping[str, QParams], args: Args, kwargs: Kwargs
    ) -> Sample:
        """The call of a unit in two runs of the model, which end there."""
        q, path = self._start.q, unit.part.path
        if unit.is_whole:
            return Sample(args, kwargs, (args, kwargs), q.engine.run_float(self._exact, unchanged, args, kwargs))
        wanted: Call = q.tap(path, stop=True)(self._exact, None, *args, **kwargs)[1][path][0]
        given: Call = frozen.tap(path, stop=True)(baked, qparams, *args, **kwargs)[1][path][0]
        return Sample(given.args, given.kwargs, (wanted.args, wanted.kwargs), wanted.output)


def _calls_of_modules(q: Quantized) -> Counter[str]:
    """How often a run calls each module, by path; empty where runs may differ, or the plan does not know them."""
    if len(q.plan.runs) != 1:
        return Counter()
    (run,) = q.plan.runs
    return Counter([made.path for made in run.calls if not made.function] + [scope.path for scope in run.scopes])


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
