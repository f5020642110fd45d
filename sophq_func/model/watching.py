"""Runs in which a function sees each call that reads certain parameters, such as the product with a weight.

A run keeps nothing: what a visitor wants to know of a call, it computes there, so that no activation outlives its layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TypeAlias

from torch import Tensor

from sophq_func.capture.frame import unwatched
from sophq_func.core.types import Args, Kwargs, Output, Tree
from sophq_func.model.quantized import Quantized
from sophq_func.model.runner import Effect, Function, Runner
from sophq_func.model.schedule import Schedule
from sophq_func.model.weight_quantizer import Params
from sophq_func.numerics.contracts import QParams

Visit: TypeAlias = Callable[[str, Function, Args, Kwargs], Output]
"""Makes a call in the place of the run: takes the name of the parameter, and what the call was given; returns its result."""


class Watching(Runner):
    """A runner that lets a visitor make the calls of torch functions that read one of some parameters or buffers.

    Args:
      schedule, effect: see :class:`Runner`.
      names: of the parameters and buffers.
      visit: makes each such call, also inside layers.
    """

    def __init__(self, schedule: Schedule, effect: Effect, names: Collection[str], visit: Visit) -> None:
        super().__init__(schedule, effect)
        self._names = names
        self._visit = visit
        self._tensors: dict[int, tuple[str, Tensor]] = {}

    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        super().begin(tensors)
        # with the tensor itself, whose id is that of no other as long as it lives
        self._tensors = {id(tensors[name]): (name, tensors[name]) for name in self._names}

    def looks_inside(self) -> bool:
        return True

    def compute(self, func: Function, args: Args, kwargs: Kwargs) -> Output:
        for operand in (*args, *kwargs.values()):
            found = self._tensors.get(id(operand))
            if found is not None:
                with self.aside(), unwatched():
                    return self._visit(found[0], func, args, kwargs)
        return super().compute(func, args, kwargs)


def run_float(q: Quantized, params: Params, batch: Tree, names: Collection[str], visit: Visit) -> Output:
    """The output of the float model, with a visitor at the calls that read some parameters."""

    def unchanged(name: str, x: Tensor) -> Tensor:
        return x

    args, kwargs = q.engine.call(batch, "batches")
    with q.engine.constant():
        return q.engine.run_float(params, unchanged, args, kwargs, lambda s: Watching(s, unchanged, names, visit))


def run_frozen(
    q: Quantized, params: Params, qparams: Mapping[str, QParams], batch: Tree, names: Collection[str], visit: Visit
) -> Output:
    """The output of a frozen quantized model, with a visitor at the calls that read some parameters.

    Args:
      q: frozen: a weight that waits for its layer would not be known by its name.
      params: as ``q.freeze`` returned them.
      qparams: of every quantizer.
      batch: one call of the model.
      names: of the parameters and buffers.
      visit: makes the calls.
    """
    effect = q.engine.quantizing(qparams)
    args, kwargs = q.engine.call(batch, "batches")
    with q.engine.constant():
        output, _ = q.engine.run_quantized(
            params, qparams, effect, args, kwargs, lambda s: Watching(s, effect, names, visit)
        )
    return output
