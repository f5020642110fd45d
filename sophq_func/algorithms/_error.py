"""The comparison at the end of an algorithm: what it found counts only if the model's outputs are no farther from float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sophq_func.algorithms.contract import Start
from sophq_func.core.logs import ALGORITHMS
from sophq_func.core.pytree import tensors
from sophq_func.core.types import Given, Output, Tree
from sophq_func.model.engine import QParamsDict
from sophq_func.numerics.contracts import QParams


class Error:
    """``sum |y - t|**2 / sum |t|**2`` over batches of outputs; 0 so far without batches."""

    def __init__(self) -> None:
        self._error = self._power = torch.zeros((), dtype=torch.float64)

    def add(self, output: Output, target: Output) -> None:
        """One more batch: the floating tensors of an output, and those that they should be."""
        for y, t in zip(floating(output), floating(target), strict=True):
            self._error = self._error + (y.double() - t.double()).square().sum()
            self._power = self._power + t.double().square().sum()

    @property
    def value(self) -> float:
        """The quotient so far."""
        return float(self._error / self._power.clamp(min=torch.finfo(torch.float64).tiny))


def floating(output: Output) -> list[Tensor]:
    """The floating tensors of an output, in order."""
    return [tensor for tensor in tensors(output) if tensor.is_floating_point()]


def output_error(
    start: Start, params: Given, qparams: Mapping[str, QParams], batches: Sequence[Tree], targets: Sequence[Output]
) -> float:
    """The :class:`Error` of the quantized model's outputs; its weights are quantized once.

    Args:
      start: with the model.
      params, qparams: see :meth:`Quantized.apply`.
      batches: calls of the model.
      targets: what the float model returns for them.
    """
    frozen, baked = start.q.freeze(params, qparams)
    error = Error()
    with start.engine.constant():
        for batch, target in zip(batches, targets, strict=True):
            args, kwargs = start.engine.call(batch, "batches")
            error.add(frozen.apply(baked, qparams, *args, **kwargs), target)
    return error.value


def no_worse(
    where_from: str,
    start: Start,
    params: Mapping[str, Tensor],
    qparams: Mapping[str, QParams],
    batches: Sequence[Tree],
    targets: Sequence[Output],
) -> tuple[Given, QParamsDict]:
    """What an algorithm found, if the model's outputs are no farther from the float ones with it; else what it was given.

    Args:
      where_from: the algorithm.
      start: what it was given.
      params: what it found, by name.
      qparams: what it found.
      batches: the data.
      targets: what the float model returns for these.
    """
    before = output_error(start, start.params, start.qparams, batches, targets)
    found = start.result(params, qparams)
    after = output_error(start, *found, batches, targets)
    if after <= before:  # not where it is NaN
        ALGORITHMS.info("%s: the relative error of the outputs goes from %.4g to %.4g", where_from, before, after)
        return found
    text = "%s: nothing is changed, as the relative error of the outputs would go from %.4g to %.4g"
    ALGORITHMS.warning(text, where_from, before, after)
    return start.result(start.params, start.qparams)
