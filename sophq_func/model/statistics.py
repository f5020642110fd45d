"""What each weight of a model multiplies, as moments: gathered at the calls themselves, so that no input is kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from sophq_func.capture.frame import unwatched
from sophq_func.capture.products import multiplied
from sophq_func.config.site import NOTHING, WeightSite
from sophq_func.core.errors import StateError, check_flags, explain
from sophq_func.core.operations import called
from sophq_func.core.progress import shown
from sophq_func.core.public import public
from sophq_func.core.pytree import sorted_dict
from sophq_func.core.types import Args, Given, Kwargs, Output, Tree
from sophq_func.model.engine import Engine
from sophq_func.model.quantized import Quantized
from sophq_func.model.reads import rows_read
from sophq_func.model.runner import Effect, Function, Runner
from sophq_func.model.schedule import Schedule
from sophq_func.model.select import Where, selected
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.moments import Moments, in_part, merged, moments_of

LINEAR = frozenset(("linear",))
"""Operations of which all weights that read one value read the same rows."""


@public
def statistics(
    q: Quantized,
    params: Given,
    batches: Iterable[Tree],
    qparams: Mapping[str, QParams] | None = None,
    *,
    where: Where = None,
    progress: bool = True,
) -> dict[str, Moments]:
    """Moments of what each weight multiplies, from one pass over the batches.

    Rows are added up while the model runs; no input is kept. Linear layers that read the same value share one entry.
    Second moments take ``4 n**2`` bytes for ``n`` inputs of a layer: for a large model, name the weights of a few layers
    by ``where``, or take the statistics of one of ``q.blocks()`` at a time.

    Args:
      q: a quantized model, or a part of one.
      params: as :func:`sophq_func.params_of` returns them.
      batches: as of :meth:`Quantized.calibrate`.
      qparams: with them, the model runs quantized; without, in float.
      where: which weights: a name, glob, path of a module, type, or predicate on the site, or several of these; by default
        all.
      progress: see :meth:`Quantized.calibrate`.

    Returns:
      ``{weight quantizer: Moments}``, sorted. Without weights that multiply nothing (embeddings look rows up), that no
      batch reaches, or that are multiplied by a function of which it is not known how: products of matrices and vectors,
      ``einsum`` and ``tensordot``, the experts of a ``grouped_mm``, linear layers, convolutions and transposed convolutions
      are. Moments of two data sets are joined by :func:`sophq_func.numerics.moments.merged`.

    Raises:
      ConfigError: ``where`` fits no weight.
      StateError: no batches; see :meth:`Quantized.apply`.

    Example:
      >>> import torch, sophq_func as sq
      >>> model, x = torch.nn.Linear(2, 3), torch.tensor([[1.0, -2.0], [3.0, 0.0]])
      >>> q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
      >>> sq.statistics(q, sq.params_of(model), [x], progress=False)["weight_fake_quant"].amax
      tensor([3., 2.])
    """
    named = q.engine.skeleton.check(params, "statistics")
    check_flags("statistics", {"progress": progress})
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        got, fix = type(batches).__name__, "sq.statistics(q, params, [x])"
        raise StateError(explain("statistics", "these batches cannot be read", got=got, allowed="a list", fix=fix))
    gathering = Gathering.of(q, named, qparams, selected("statistics", q.plan, where))
    count = 0
    for batch in shown(batches, "statistics", progress):
        gathering.run(*q.engine.call(batch, "statistics"))
        count += 1
    if not count:
        fix = "pass a list of tensors, tuples or dicts"
        raise StateError(explain("statistics", "there are no batches to read", fix=fix))
    return gathering.moments()


class Gathering:
    """Moments of some weights, gathered over several runs of a model.

    Args:
      engine: with weights frozen where ``qparams`` are given.
      params: with the weights that the runs multiply with.
      qparams: of values; ``None`` for runs in float.
      names: of the weight quantizers.
    """

    def __init__(
        self, engine: Engine, params: Mapping[str, Tensor], qparams: Mapping[str, QParams] | None, names: Collection[str]
    ) -> None:
        self._engine, self._params, self._qparams = engine, params, qparams
        sites = [engine.plan.site(name) for name in names]
        self._sites = [site for site in sites if isinstance(site, WeightSite)]
        self._as = _same_reads(self._sites)
        read = {*self._as.values()}
        self._weights = {site.parameter: site.quantizer for site in self._sites if site.quantizer in read}
        self._found: dict[str, Moments] = {}
        self._mixed: set[str] = set()

    @staticmethod
    def of(
        q: Quantized, params: Mapping[str, Tensor], qparams: Mapping[str, QParams] | None, names: Collection[str]
    ) -> Gathering:
        """The gathering of a model: in float, or quantized with its weights quantized once."""
        if qparams is None:
            return Gathering(q.engine, params, None, names)
        frozen, baked = q.freeze(params, qparams)
        named = frozen.engine.skeleton.check(baked, "statistics")
        return Gathering(frozen.engine, named, qparams, names)

    def run(self, args: Args, kwargs: Kwargs) -> Output:
        """Run one batch, and add to the moments; returns the model's output."""
        engine = self._engine
        params = {name: tensor.detach() for name, tensor in self._params.items()}

        def watch(schedule: Schedule) -> Reader:
            return Reader(schedule, effect, self._weights, self._add)

        with engine.constant():
            if self._qparams is None:
                effect: Effect = _unchanged
                return engine.run_float(params, effect, args, kwargs, watch)
            effect = engine.quantizing(self._qparams)
            output, _ = engine.run_quantized(params, self._qparams, effect, args, kwargs, watch)
            return output

    def moments(self) -> dict[str, Moments]:
        """The moments so far, by weight quantizer, sorted; weights that share their rows share an entry."""
        read = self._found.keys() - self._mixed
        return sorted_dict({name: self._found[first] for name, first in self._as.items() if first in read})

    def _add(self, place: Place, rows: Tensor) -> None:
        """Add rows to the moments of a weight, unless its calls sum over different axes, so that it has none."""
        found = moments_of(rows)
        if place.item >= 0 and rows.ndim == 2:
            found = in_part(found, place.item, place.items)
        before = self._found.get(place.name)
        if before is not None and before.second.shape != found.second.shape:
            self._mixed.add(place.name)
        elif before is not None:
            found = merged(before, found)
        self._found[place.name] = found


def _unchanged(name: str, x: Tensor) -> Tensor:
    """The effect of a run in float."""
    return x


def _same_reads(sites: Iterable[WeightSite]) -> dict[str, str]:
    """By weight quantizer, the first one whose layer reads the same rows; itself where there is none."""
    first: dict[object, str] = {}
    found = {}
    for site in sites:
        name = site.quantizer
        # one call alone, of a layer that reads a value as it is
        is_shared = site.operation in LINEAR and len(site.inputs) == 1 and site.input != NOTHING and len(site.paths) == 1
        found[name] = first.setdefault((site.input, site.shape[-1:]), name) if is_shared else name
    return found


class Place(NamedTuple):
    """Where an operand lies in a weight: it is the whole weight, or one item along the first axis.

    Attributes:
      name: of the weight's quantizer.
      item: which item; -1 for the whole.
      items: how many there are.
    """

    name: str
    item: int = -1
    items: int = 1


Add: TypeAlias = Callable[[Place, Tensor], None]
"""Takes rows that an operand was multiplied with."""


class Reader(Runner):
    """A runner that shows what each of some weights multiplies.

    Args:
      schedule, effect: see :class:`Runner`.
      weights: quantizer by the parameter's name.
      add: is given where an operand lies in a weight, and the rows.
    """

    def __init__(self, schedule: Schedule, effect: Effect, weights: Mapping[str, str], add: Add) -> None:
        super().__init__(schedule, effect)
        self._weights = weights
        self._add = add
        self._by_memory: dict[int, tuple[str, Tensor]] = {}

    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        super().begin(tensors)
        held = ((name, tensors[parameter]) for parameter, name in self._weights.items() if parameter in tensors)
        # a view of a weight (its transpose, one matrix of a batch) shares its memory
        self._by_memory = {_memory(tensor): (name, tensor) for name, tensor in held}

    def looks_inside(self) -> bool:
        return True

    def compute(self, func: Function, args: Args, kwargs: Kwargs) -> Output:
        output = super().compute(func, args, kwargs)
        if not self.computing:  # a parametrization computes a weight: it multiplies no input
            with self.aside(), unwatched(), torch.no_grad():
                self._read(called(func), args, kwargs)
        return output

    def _read(self, function: str, args: Args, kwargs: Kwargs) -> None:
        """Add the rows of a call, for each weight among its operands."""
        for slot, operand in multiplied(function, args, kwargs):
            place = self._place(operand)
            rows = None if place is None else rows_read(function, args, kwargs, slot)
            if place is None or rows is None:
                continue
            if isinstance(rows, Tensor):
                self._add(place, rows)
            elif place.item < 0:
                for item, own in enumerate(rows):
                    self._add(Place(place.name, item, len(rows)), own)

    def _place(self, operand: Tensor) -> Place | None:
        """The weight that an operand is, or of which it is a view; ``None`` where there is none."""
        name, weight = self._by_memory.get(_memory(operand), ("", operand))
        if not name:
            return None
        if operand.numel() == weight.numel():
            return Place(name)
        items = weight.shape[0]
        if operand.numel() * items != weight.numel():
            return None
        offset = operand.storage_offset() - weight.storage_offset()
        return Place(name, offset // weight.stride(0), items)


def _memory(tensor: Tensor) -> int:
    """What tensors that share memory have in common."""
    return tensor.untyped_storage().data_ptr()
