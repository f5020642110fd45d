"""One batch under many settings: a weight is quantized once per distinct setting, a small model runs under one vmap."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sophq_func.core.errors import StateError, explain
from sophq_func.core.progress import shown
from sophq_func.core.pytree import flatten, leaves
from sophq_func.model.settings import stack
from sophq_func.model.weight_quantizer import Params, WeightQuantizer
from sophq_func.numerics.contracts import QParams
from sophq_func.planning.plan import Plan

Setting = Mapping[str, QParams]
Run = Callable[[Setting], Any]
"""One setting's output, reduced."""

WAYS = ("auto", "loop", "vmap", "compile")

SMALL = 2**15
"""Up to how many elements of weights and values ``"auto"`` maps: what costs then is calling torch, not its arithmetic."""

ROOM = 2**22
"""How many elements of weights and values a chunk of mapped settings may hold."""

KEPT = 2
"""How many versions of a weight are kept: on and off, where a sweep switches quantizers one by one."""


class Versions:
    """Weights on their grids, remembered by their quantizer's leaves, so that settings which agree share them."""

    def __init__(self, quantizers: Sequence[WeightQuantizer], params: Params) -> None:
        self.quantizers, self.params = quantizers, params
        self.known: dict[str, list[tuple[list[Tensor], Tensor]]] = {}

    def __call__(self, steps: Setting) -> dict[str, Tensor]:
        """The params of a setting."""
        new = dict(self.params)
        for quantizer in self.quantizers:
            new[quantizer.site.parameter] = self._weight(quantizer, steps[quantizer.site.quantizer])
            new.update(quantizer.rounded_bias(self.params, steps))
        return new

    def _weight(self, quantizer: WeightQuantizer, step: QParams) -> Tensor:
        key, known = leaves(step), self.known.setdefault(quantizer.site.quantizer, [])
        for own, weight in known:
            if len(own) == len(key) and all(a is b or torch.equal(a, b) for a, b in zip(own, key, strict=True)):
                return weight
        known.append((key, quantizer.quantize(self.params, step)))
        del known[:-KEPT]
        return known[-1][1]


def size_of(plan: Plan, params: Params) -> int:
    """How many elements the quantized weights and values of one setting have."""
    sites = [plan.site(name) for name in plan]
    return sum(params[site.parameter].numel() if site.parameter else math.prod(site.shape) for site in sites)


def sweep(size: int, each: Sequence[Setting], one: Run, whole: Run, how: str, progress: bool) -> Any:
    """See :meth:`sophq_func.Quantized.sweep`.

    Args:
      size: how many elements one setting holds, see :func:`size_of`.
      each: the settings.
      one: runs a setting, sharing weights with others.
      whole: runs a setting and knows no other; may be mapped and compiled.
      how: one of :data:`WAYS`.
      progress: show a bar.
    """
    if how not in WAYS:
        raise StateError(explain("sweep", "this way is not possible", got=how, allowed=" or ".join(map(repr, WAYS))))
    if not each:
        raise StateError(explain("sweep", "no settings is not possible", fix="pass a list of qparams, or sq.stack of one"))
    with torch.no_grad():
        if how == "vmap":
            return _mapped(whole, each, size)
        if how == "auto" and len(each) > 1 and size <= SMALL:
            try:
                return _mapped(whole, each, size)
            except RuntimeError as error:
                why = str(error).strip().partition("\n")[0]
                warnings.warn(f"sweep: settings run one by one, as vmap fails: {why}", RuntimeWarning, stacklevel=3)
        run = torch.compile(whole) if how == "compile" else one
        return _joined([run(setting) for setting in shown(each, "sweep", progress)])


def _mapped(run: Run, each: Sequence[Setting], size: int) -> Any:
    """Chunks of settings as a vmap."""
    step = max(1, ROOM // max(1, size))
    chunks = [each[start : start + step] for start in range(0, len(each), step)]
    found = []

    def tensors(setting: Setting) -> list[Tensor]:
        found.append(flatten(run(setting)))
        return [leaf for leaf in found[-1][0] if isinstance(leaf, Tensor)]

    outputs = [torch.vmap(tensors)(stack(chunk)) for chunk in chunks]
    return _rebuilt(*found[0], [torch.cat(column) for column in zip(*outputs, strict=True)])


def _joined(outputs: Sequence[Any]) -> Any:
    """The tensors of all outputs as one tree of batches."""
    columns = zip(*([leaf for leaf in flatten(output)[0] if isinstance(leaf, Tensor)] for output in outputs), strict=True)
    return _rebuilt(*flatten(outputs[0]), [torch.stack(column) for column in columns])


def _rebuilt(found: list[Any], rebuild: Callable[[list[Any]], Any], tensors: list[Tensor]) -> Any:
    """The tree of ``found`` with other tensors; what is no tensor stays."""
    new = iter(tensors)
    return rebuild([next(new) if isinstance(leaf, Tensor) else leaf for leaf in found])
