"""Rotations: the residual stream and the values of attention are turned, so that no channel stands out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.algorithms._folding import report_skipped, with_values_observed
from sophq_func.algorithms._hadamard import rotation
from sophq_func.algorithms._pairs import Pair, Probe, Skipped, pairs_of
from sophq_func.algorithms._stream import Stream, streams_of
from sophq_func.algorithms.contract import as_batches, begin, observed_again, output_distance, rolled_back
from sophq_func.config.register import algorithm
from sophq_func.core.errors import ConfigError, check_flags, explain
from sophq_func.core.public import public
from sophq_func.core.types import Given, Tree
from sophq_func.model.engine import QParamsDict
from sophq_func.model.quantized import Quantized
from sophq_func.model.weight_quantizer import Params
from sophq_func.numerics.contracts import QParams


@algorithm("rotate", keeps_float=True, measure=output_distance)
@public
def rotate(
    q: Quantized,
    params: Given,
    qparams: Mapping[str, QParams],
    batches: Iterable[Tree],
    *,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> tuple[Given, QParamsDict]:
    """Turn values by Hadamard matrices, so that large channels are spread over all (QuaRot, arXiv:2404.00456).

    Two kinds of values are turned, wherever the graph has them and a run shows that the float model stays as it is. The
    residual stream: what writes to it (embeddings, rows of linear layers) and what reads it behind its norms (columns) is
    multiplied by an orthogonal matrix. A norm by the root mean square does not see that, once its weight is folded into its
    readers. And the values of attention, head by head, between the rows of the layer that makes them and the columns of the
    one that reads the result.

    It helps activations of 4 to 8 bits with outliers, and weights with large columns; alone, 3-bit weights in groups gain
    little. LayerNorm subtracts a mean and is not turned. A head that is tied to the embedding would need both turned alike,
    which its norm prevents: plan what :func:`untie` returns. What stays as it is, and why, is said by the logger
    ``sophq_func.algorithms``; where the quantized model would be farther from the float model on the batches, nothing is
    changed.

    Args:
      q: a quantized model; it is run in eval mode.
      params: as :func:`sophq_func.params_of` returns them.
      qparams: from ``q.calibrate``.
      batches: as of :meth:`Quantized.calibrate`.
      generator: for random signs; without one the same matrix is taken each time.
      progress: taken for uniformity; it is short.

    Returns:
      New params, and qparams with the ranges of what changed observed anew.

    Raises:
      ConfigError: a generator that is none.
      StateError: names that are missing or unknown, no batches, a frozen model.

    Example:
      >>> import torch, sophq_func as sq
      >>> _ = torch.manual_seed(0)
      >>> class Residual(torch.nn.Module):
      ...     def __init__(self):
      ...         super().__init__()
      ...         self.enter, self.inner, self.leave = (torch.nn.Linear(8, 8, bias=False) for _ in range(3))
      ...         self.norms = torch.nn.ModuleList([torch.nn.RMSNorm(8), torch.nn.RMSNorm(8)])
      ...     def forward(self, x):
      ...         x = self.enter(x)
      ...         x = x + self.inner(self.norms[0](x))
      ...         return self.leave(self.norms[1](x))
      >>> model, x = Residual(), torch.randn(16, 8)
      >>> model.enter.weight.data[0] *= 100  # one channel of the stream is much larger than the others
      >>> q = sq.quantize(model, sq.QuantConfig(chip=None), example_args=(x,))
      >>> params = sq.params_of(model)
      >>> start = q.calibrate(params, [x], progress=False)
      >>> turned, qparams = sq.algorithms.rotate(q, params, start, [x], progress=False)
      >>> float(turned["enter.weight"].abs().max()) < 0.6 * float(params["enter.weight"].abs().max())
      True
    """
    check_flags("rotate", {"progress": progress})
    if not isinstance(generator, torch.Generator | None):
        allowed = "a torch.Generator, or None"
        raise ConfigError(explain("rotate", "this is no generator", got=generator, allowed=allowed))
    start = begin("rotate", q, params, qparams)
    q = start.q
    batches = as_batches("rotate", batches)
    args, kwargs = q.engine.call(batches[0], "rotate")
    graph = q.engine.retrace(start.params, args, kwargs)
    streams, skipped = streams_of(graph)
    turns = [_turn_of_stream(stream, generator) for stream in streams]
    turns += [_turn_of_heads(pair, generator) for pair in pairs_of(graph)[0] if pair.head]
    probe = Probe(start, batches[0])
    now: dict[str, Tensor] = dict(start.params)
    values: set[str] = set()
    for turn in turns:
        new = {**now, **turn.turned(now)}
        if probe.agrees(new):
            now, values = new, values | set(turn.values)
        else:
            skipped.append(Skipped(turn.values[0], "a run shows that turning it changes the model"))
    report_skipped("rotate", skipped)
    parameters = {name: weight.site.parameter for name, weight in start.weights.items()}
    changed = [name for name, parameter in parameters.items() if now[parameter] is not start.params[parameter]]
    ranges = {**start.qparams, **observed_again(start, now, changed)}
    ranges = with_values_observed(start, now, ranges, values, batches)
    return rolled_back("rotate", start, start.result(now, ranges), batches)


class Turn(NamedTuple):
    """One rotation of a model.

    Attributes:
      turned: from params to those that change.
      values: names of the values that are turned.
    """

    turned: Callable[[Params], dict[str, Tensor]]
    values: tuple[str, ...]


def _turn_of_stream(stream: Stream, generator: torch.Generator | None) -> Turn:
    """The rotation of a residual stream, with the weights of its norms folded into their readers."""
    matrix = rotation(stream.channels, generator)

    def turned(params: Params) -> dict[str, Tensor]:
        new = {fold.parameter: along(params[fold.parameter], fold.axis, matrix) for fold in stream.writers}
        for norm in stream.norms:
            weight = params[norm.weight]
            new[norm.weight] = torch.ones_like(weight)
            for reader in norm.readers:
                before = {**params, **new}
                new[reader.weight] = along(reader.scaled(before, weight), reader.columns, matrix)
        return new

    return Turn(turned, stream.values)


def _turn_of_heads(pair: Pair, generator: torch.Generator | None) -> Turn:
    """The rotation of the values of each head of attention."""
    matrix = rotation(pair.head, generator)

    def turned(params: Params) -> dict[str, Tensor]:
        new = {fold.parameter: along(params[fold.parameter], fold.axis, matrix) for fold in pair.folds}
        for reader in pair.readers:
            new[reader.weight] = along(params[reader.weight], reader.columns, matrix)
        return new

    return Turn(turned, pair.values)


def along(x: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Each run of ``len(matrix)`` numbers along an axis, as a row, times the matrix; computed in float64.

    Example:
      >>> along(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 1, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
      tensor([[2., 1., 4., 3.]])
    """
    last = x.movedim(axis, -1)
    pieces = last.reshape(*last.shape[:-1], -1, len(matrix)).double()
    turned = (pieces @ matrix.to(x.device).double()).reshape(last.shape)
    return turned.movedim(-1, axis).to(x.dtype).contiguous()
