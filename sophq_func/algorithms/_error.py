"""The comparison at the end of an algorithm: what it found counts only if the model's outputs are no farther from float."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sophq_func.algorithms.contract import Start
from sophq_func.core.logs import ALGORITHMS
from sophq_func.core.pytree import tensors
from sophq_func.core.types import Given, Output, Tree
from sophq_func.model.engine import QParamsDict
from sophq_func.numerics.contracts import QParams

TINY = torch.finfo(torch.float64).tiny
"""Keeps the quotient finite where every target is 0."""

CLEARLY = 0.9
"""An error below this share of another is smaller, whatever rounding does: of floats, and of a code that lies at a tie."""


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
    def value(self) -> Tensor:
        """The quotient so far, of shape ``()``."""
        return self._error / self._power.clamp(min=TINY)


def floating(output: Output) -> list[Tensor]:
    """The floating tensors of an output, in order."""
    return [tensor for tensor in tensors(output) if tensor.is_floating_point()]


def _power(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The sum of squares of differences, over all elements of pairs of tensors."""
    return float(sum((y.double() - t.double()).square().sum() for y, t in pairs))


def _errors(
    start: Start,
    params: Given,
    qparams: Mapping[str, QParams],
    batches: Sequence[Tree],
    targets: Sequence[Output],
    made: Mapping[int, Output],
) -> Iterator[float]:
    """For each batch, the squared error of the quantized model's outputs; its weights are quantized once.

    Args:
      start: with the model.
      params, qparams: see :meth:`Quantized.apply`.
      batches: calls of the model.
      targets: what the float model returns for them.
      made: by the number of a batch, outputs that are known already.
    """
    frozen, baked = start.q.freeze(params, qparams)
    for number, (batch, target) in enumerate(zip(batches, targets, strict=True)):
        args, kwargs = start.engine.call(batch, "batches")
        with start.engine.constant():
            output = made[number] if number in made else frozen.apply(baked, qparams, *args, **kwargs)
        yield _power(zip(floating(output), floating(target), strict=True))


def no_worse(
    where_from: str,
    start: Start,
    params: Mapping[str, Tensor],
    qparams: Mapping[str, QParams],
    batches: Sequence[Tree],
    targets: Sequence[Output],
    made: Mapping[int, Output] | None = None,
) -> tuple[Given, QParamsDict]:
    """What an algorithm found, if the model's outputs are no farther from the float ones with it; else what it was given.

    Each batch is run once with what was found. With what was given only so many are, as show that it is worse.

    Args:
      where_from: the algorithm.
      start: what it was given.
      params: what it found, by name.
      qparams: what it found.
      batches: the data.
      targets: what the float model returns for these.
      made: by the number of a batch, outputs of a run whose weights and statistics are those that were found up to the
        rounding of floats.
    """
    known = made or {}
    found, given = start.result(params, qparams), start.result(start.params, start.qparams)
    power = max(_power((t, torch.zeros_like(t)) for target in targets for t in floating(target)), TINY)
    after = sum(_errors(start, *found, batches, targets, known))
    before = 0.0
    for error in _errors(start, *given, batches, targets, {}):
        before += error
        if after <= CLEARLY * before:
            break
    if known and not after <= CLEARLY * before:  # too close for outputs of weights that a rounding error tells apart
        after = sum(_errors(start, *found, batches, targets, {}))
    if after <= before:  # not where it is NaN
        text = "%s: the relative error of the outputs goes from at least %.4g to %.4g"
        ALGORITHMS.info(text, where_from, before / power, after / power)
        return found
    text = "%s: nothing is changed, as the relative error of the outputs would go from %.4g to %.4g"
    ALGORITHMS.warning(text, where_from, before / power, after / power)
    return given
