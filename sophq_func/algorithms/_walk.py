"""A walk through a model block by block: what the weights of each block multiply, with one block's inputs kept at a time.

A *unit* is a block with weights that are chosen, or weights outside of all blocks that read the same value. The inputs of a
block are those with which the model calls it. Where they are what the block before was given or returned, as in a chain of
layers, each block runs once for each batch; elsewhere the model runs up to the block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from sophq_func.capture.frame import unwatched
from sophq_func.config.site import Site
from sophq_func.core.modes import is_plain
from sophq_func.core.pytree import named_leaves, refilled
from sophq_func.core.types import Args, Kwargs, Output, Tree
from sophq_func.model.quantized import Quantized
from sophq_func.model.runner import Effect, Runner
from sophq_func.model.schedule import Schedule
from sophq_func.model.statistics import Gathering
from sophq_func.model.tap import unchanged
from sophq_func.model.weight_quantizer import Params
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.moments import Moments

Call: TypeAlias = tuple[Args, Kwargs]
"""Positional and keyword arguments."""

Inputs = Literal["quantized", "float"]
"""What a weight multiplies: values behind the quantized weights and values before it, or those of the float model."""


class Unit(NamedTuple):
    """Weights whose moments are taken together.

    Attributes:
      names: of the weight quantizers, in execution order.
      part: the block; ``None`` for weights outside of all blocks.
    """

    names: tuple[str, ...]
    part: Quantized | None = None

    @property
    def path(self) -> str:
        """Of the block; empty outside of blocks."""
        return "" if self.part is None else self.part.path


def units_of(q: Quantized, names: Collection[str], blocks: str | None) -> list[Unit]:
    """The units of some weights, in execution order.

    A block that the model calls more than once, and a weight that is used outside of its block, too, are taken outside of
    blocks, since the runs of one call of one block do not show all that they multiply.

    Args:
      q: the model.
      names: of the weight quantizers.
      blocks: a glob of module paths, see :meth:`Quantized.blocks`; ``None`` finds them.
    """
    # a part of a model is not cut again
    parts = q.blocks(blocks) if q.engine.whole is None else []
    called = Counter(part.path for part in parts)
    once = [part for part in parts if called[part.path] == 1]
    chosen = [name for name in q.plan if name in names]
    place = {name: i for i, name in enumerate(chosen)}
    owner = {name: part for name in chosen for part in once if name in part.plan and _lies_in(q.plan.site(name), part.path)}
    units = [Unit(tuple(name for name in chosen if owner.get(name) is part), part) for part in once]
    outside = [name for name in chosen if name not in owner]
    by_input = groupby(outside, key=lambda name: q.plan.site(name).input)
    units += [Unit(tuple(group)) for _, group in by_input]
    return sorted((unit for unit in units if unit.names), key=lambda unit: place[unit.names[0]])


def _lies_in(site: Site, path: str) -> bool:
    """Whether every module that uses a weight lies in the module at a path."""
    return all(used == path or used.startswith(f"{path}.") for used in site.paths)


def by_input(q: Quantized, unit: Unit) -> list[tuple[str, ...]]:
    """The weights of a unit, in groups of those that read the same value, in execution order."""
    groups = groupby(unit.names, key=lambda name: q.plan.site(name).input)
    return [tuple(group) for _, group in groups]


class Walk:
    """Moments of the weights of one unit after the other.

    Args:
      q: the model.
      params: of the model, with weights that the walk reads as they are.
      batches: calls of the model.
      units: in the order of the walk.
      qparams: of activations, for inputs behind quantized values; ``None`` for those of the float model.
    """

    def __init__(
        self,
        q: Quantized,
        params: Params,
        batches: Sequence[Tree],
        units: Sequence[Unit],
        qparams: Mapping[str, QParams] | None,
    ) -> None:
        self._params = dict(params)
        self._calls: list[Call] = [q.engine.call(batch, "walk") for batch in batches]
        self._qparams = qparams
        self._q = _as_given(q)
        self._wires: dict[str, Wire] | None = None
        self._paths = [unit.path for unit in units if unit.part is not None]
        self._at = ""
        self._given: list[Call] = []
        self._returned: list[Output] = []

    def replace(self, params: Params) -> None:
        """Put other tensors in the place of some: weights that are quantized now."""
        self._params.update(params)

    def moments(self, unit: Unit, names: Collection[str]) -> dict[str, Moments]:
        """Moments of some weights of a unit, by quantizer."""
        model, calls = self._q, self._calls
        if unit.part is not None:
            model, calls = _as_given(unit.part), self._inputs(unit)
        gathering = Gathering(model.engine, self._params, self._qparams, names)
        is_float_block = unit.part is not None and self._qparams is None and self._goes_on(unit)
        returned = []
        for args, kwargs in calls:
            output = gathering.run(args, kwargs)
            if is_float_block:  # it would return the same once more when the walk leaves it
                returned.append(output)
        self._returned = returned
        return gathering.moments()

    def leave(self, unit: Unit) -> None:
        """Go on behind a unit, whose weights are final: the next block reads what it returns now."""
        if unit.part is None or self._returned or not self._goes_on(unit):
            return
        part = _as_given(unit.part)
        self._returned = [self._run(part, args, kwargs) for args, kwargs in self._inputs(unit)]

    def _inputs(self, unit: Unit) -> list[Call]:
        """The arguments with which each batch comes to a block."""
        if self._at == unit.path:
            return self._given
        if self._wires is None:
            self._wires = wires_of(self._q, self._params, self._paths, *self._calls[0])
        wire = self._wires.get(unit.path)
        if wire is not None and wire.block == self._at and self._returned:
            pairs = zip(self._given, self._returned, strict=True)
            self._given = [wire.carried(given, returned) for given, returned in pairs]
        else:
            self._given = [self._tapped(unit.path, args, kwargs) for args, kwargs in self._calls]
        self._at, self._returned = unit.path, []
        return self._given

    def _goes_on(self, unit: Unit) -> bool:
        """Whether a later block is wired to this one."""
        return any(wire.block == unit.path for wire in (self._wires or {}).values())

    def _tapped(self, path: str, args: Args, kwargs: Kwargs) -> Call:
        """The arguments of a block in a run of the model, which ends there."""
        with self._q.engine.constant():
            _, seen = self._q.tap(path, stop=True)(self._params, self._qparams, *args, **kwargs)
        call = seen[path][0]
        return call.args, call.kwargs

    def _run(self, q: Quantized, args: Args, kwargs: Kwargs) -> Output:
        with q.engine.constant():
            if self._qparams is None:
                return q.engine.run_float(self._params, unchanged, args, kwargs)
            return q.apply(self._params, self._qparams, *args, **kwargs)


def wires_of(q: Quantized, params: Params, paths: Collection[str], args: Args, kwargs: Kwargs) -> dict[str, Wire]:
    """For each block, where its arguments come from, in a run of the float model.

    Args:
      q: the model.
      params: of the float model.
      paths: of the blocks.
      args, kwargs: of the model.
    """
    found: list[Wiring] = []

    def watch(schedule: Schedule) -> Wiring:
        found.append(Wiring(schedule, unchanged, paths))
        return found[0]

    with q.engine.constant():
        q.engine.run_float(params, unchanged, args, kwargs, watch)
    return found[0].wires


def _as_given(q: Quantized) -> Quantized:
    """The model with its weights as they are given."""
    return Quantized(q.engine.skeleton, q.plan, True, q.engine.whole)


class Source(NamedTuple):
    """Where an argument of a block comes from: from the block before.

    Attributes:
      returned: whether it is in what that block returned; else in what it was given.
      leaf: its number among the leaves of that.
    """

    returned: bool
    leaf: int


class Wire(NamedTuple):
    """How a block is called with what the block before was given and returned.

    Attributes:
      block: path of the block before.
      sources: of each leaf of the arguments, which have the structure of the arguments of the block before.
    """

    block: str
    sources: tuple[Source, ...]

    def carried(self, given: Call, returned: Output) -> Call:
        """The arguments of the block, from those of the block before and what it returned."""
        leaves = [leaf for _, leaf in named_leaves(given)], [leaf for _, leaf in named_leaves(returned)]
        new: Call = refilled(given, [leaves[source.returned][source.leaf] for source in self.sources])
        return new


PLAIN = (type(None), bool, int, float, str)
"""Arguments that are the same for all calls of a chain if they are equal."""


class Wiring(Runner):
    """A runner that finds out where the arguments of each block come from: whether they are the very same tensors.

    A tensor that is written into after the block before has returned it is another one.

    Args:
      schedule, effect: see :class:`Runner`.
      paths: of the blocks.

    Attributes:
      wires: by path of a block, for those whose arguments all come from the block before.
    """

    def __init__(self, schedule: Schedule, effect: Effect, paths: Collection[str]) -> None:
        super().__init__(schedule, effect)
        self._paths = frozenset(paths)
        self._before: tuple[str, list[tuple[str, Tree]], list[Tree]] | None = None
        self._entered: list[tuple[str, Tree]] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        self.wires: dict[str, Wire] = {}

    def enter_scope(self, path: str, args: Args, kwargs: Kwargs) -> None:
        super().enter_scope(path, args, kwargs)
        self._enter(path, args, kwargs)

    def leave_scope(self, path: str, args: Args, kwargs: Kwargs, output: Output) -> None:
        super().leave_scope(path, args, kwargs, output)
        self._leave(path, output)

    def before_module(self, path: str, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        self._enter(path, args, kwargs)
        return super().before_module(path, args, kwargs)

    def after_module(self, path: str, module: nn.Module, args: Args, kwargs: Kwargs, output: Output) -> Output:
        result = super().after_module(path, module, args, kwargs, output)
        self._leave(path, result)
        return result

    def _enter(self, path: str, args: Args, kwargs: Kwargs) -> None:
        if path not in self._paths:
            return
        with self.aside(), unwatched():
            is_untouched = all(is_plain(pair) and torch.equal(*pair) for pair in self._copies)
        self._copies = []
        self._entered = named_leaves((args, dict(kwargs)))
        self._note(leaf for _, leaf in self._entered)
        if self._before is None or not is_untouched:
            return
        block, given, returned = self._before
        if [name for name, _ in given] != [name for name, _ in self._entered]:
            return
        sources = [_source(i, leaf, [old for _, old in given], returned) for i, (_, leaf) in enumerate(self._entered)]
        known = tuple(source for source in sources if source is not None)
        if len(known) == len(sources):
            self.wires[path] = Wire(block, known)

    def _leave(self, path: str, output: Output) -> None:
        if path in self._paths:
            self._before = path, self._entered, [leaf for _, leaf in named_leaves(output)]
            self._note(self._before[2])

    def _note(self, leaves: Iterable[Tree]) -> None:
        """Copy tensors as they are now: one that is written into later is still the same object."""
        with self.aside(), unwatched():
            self._copies += [(leaf, leaf.clone()) for leaf in leaves if isinstance(leaf, Tensor)]


def _source(index: int, leaf: Tree, given: Sequence[Tree], returned: Sequence[Tree]) -> Source | None:
    """Where an argument of a block comes from; ``None`` where that is not the block before."""
    if isinstance(leaf, PLAIN):
        is_same = type(given[index]) is type(leaf) and given[index] == leaf
        return Source(False, index) if is_same else None
    if not isinstance(leaf, Tensor):  # a cache, say, that the block before has written into
        return None
    # the same argument of the block before, then what it returned: where both are one tensor, it passed through
    for i in (index, *range(len(given))):
        if given[i] is leaf and not any(old is leaf for old in returned):
            return Source(False, i)
    return next((Source(True, i) for i, old in enumerate(returned) if old is leaf), None)


def walked(walk: Walk, units: Iterable[Unit]) -> Iterator[tuple[Unit, dict[str, Moments]]]:
    """Each unit with the moments of its weights, for weights that stay as they are."""
    for unit in units:
        yield unit, walk.moments(unit, unit.names)
        walk.leave(unit)
