"""Statistics of BatchNorms, moved as far as quantization moves what these normalize."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sophq_func.algorithms._error import no_worse
from sophq_func.algorithms.contract import Start, as_batches, begin, output_distance, reference_of
from sophq_func.config.register import algorithm
from sophq_func.core.errors import check_flags
from sophq_func.core.progress import shown
from sophq_func.core.public import public
from sophq_func.core.types import Args, Given, Kwargs, Output, Tree
from sophq_func.model.quantized import Quantized
from sophq_func.model.runner import Function
from sophq_func.model.select import Where
from sophq_func.model.watching import run_float, run_frozen
from sophq_func.model.weight_quantizer import Norm, Params, WeightQuantizer
from sophq_func.numerics.contracts import QParams, as_stored
from sophq_func.numerics.granularity import PerChannel, PerGroup

LARGEST_RATIO = 10.0
"""Variances are multiplied by 0.1 to 10: a channel that is nearly constant in the data gives quotients without meaning."""

IN_CACHE = 2**16
"""Elements of what is measured at once: 256 KiB, so that deviations are in the cache when they are squared."""


class Statistics(NamedTuple):
    """Mean and variance of what a BatchNorm normalizes, for each channel; shape ``(C,)``, float32."""

    mean: Tensor
    var: Tensor

    @staticmethod
    def of(x: Tensor) -> Statistics:
        """Those of one batch, over all axes but the channels'."""
        rows = x.float().reshape(*x.shape[:2], -1)
        mean = rows.mean((0, 2))
        # torch.var_mean takes thrice the time over axes that are apart; a difference of sums loses digits
        parts = torch.split(rows, max(1, IN_CACHE // max(1, math.prod(rows.shape[1:]))))
        powers = [torch.linalg.vector_norm(part - mean.unsqueeze(1), dim=2).square().sum(0) for part in parts]
        var = torch.stack(powers).sum(0) / (rows.shape[0] * rows.shape[2])
        return Statistics(mean, var)


class Move(NamedTuple):
    """How far statistics move: ``shift`` is added to the mean, ``ratio`` multiplies the variance."""

    shift: Tensor
    ratio: Tensor

    @staticmethod
    def between(exact: Statistics, rounded: Statistics, eps: float, keeps_variance: bool) -> Move:
        """From those of the float model to those of the quantized one.

        Args:
          exact, rounded: the statistics.
          eps: what the BatchNorm adds to a variance; added here, too, so that dead channels stay as they are.
          keeps_variance: leave the variance alone.
        """
        ratio = (rounded.var + eps) / (exact.var + eps)
        ratio = torch.ones_like(ratio) if keeps_variance else ratio.clamp(1 / LARGEST_RATIO, LARGEST_RATIO)
        return Move(rounded.mean - exact.mean, ratio)


class Place(NamedTuple):
    """A BatchNorm, and the weight that it is folded into.

    Attributes:
      norm: names of its tensors.
      quantizer: of the weight.
      keeps_variance: the variance decides the fold, and there is no scale for each channel that could follow it.
    """

    norm: Norm
    quantizer: WeightQuantizer
    keeps_variance: bool


@algorithm("reestimate_norms", measure=output_distance)
@public
def reestimate_norms(
    q: Quantized,
    params: Given,
    qparams: Mapping[str, QParams],
    batches: Iterable[Tree],
    *,
    reference: Given | None = None,
    where: Where = None,
    progress: bool = True,
) -> tuple[Given, dict[str, QParams]]:
    """Move the statistics of folded BatchNorms as far as quantization moves the mean and variance of what they normalize.

    ``mean <- mean + m_q - m_f``, ``var <- (var + eps) v_q / v_f - eps`` with the statistics of the same batches in the
    quantized and in the float model, for each channel (after Sun et al., arXiv:1911.10270, and Finkelstein et al.,
    arXiv:1906.03193, who take the statistics of the quantized model itself, which few images do not give well). What is
    measured behind a BatchNorm counts it as moved already. A module's momentum plays no part.

    A variance changes the factor that is folded into the weight: scales for each channel are multiplied by its change, so
    that all codes stay. Where the weight has no such scales, only the mean moves. If the relative error of the model's
    outputs does not fall, everything stays as it was.

    Args:
      q: a quantized model, in evaluation mode and not frozen.
      params, qparams: see :meth:`Quantized.apply`.
      batches: calls of the model, as for ``q.calibrate``; no labels. Large ones: each gives statistics of its own.
      reference: see :func:`sophq_func.algorithms.correct_biases`.
      where: which weights, see there; the BatchNorm behind each.
      progress: show how far it is.

    Returns:
      New params, in which running means and variances differ; new qparams, in which scales of weights do.

    Raises:
      ConfigError: a ``where`` that fits nothing.
      StateError: no batches, a frozen model or one in training mode.

    Example:
      >>> import torch, sophq_func as sq
      >>> _ = torch.manual_seed(0)
      >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
      >>> x = torch.randn(16, 3, 8, 8)
      >>> q = sq.quantize(model, sq.QuantConfig(weight=sq.override(bits=2)), example_args=(x,))
      >>> params = sq.params_of(model)
      >>> qparams = q.calibrate(params, [x], progress=False)
      >>> better = reestimate_norms(q, params, qparams, [x], progress=False)
      >>> error = lambda p, qp: (q.apply(p, qp, x) - model(x)).square().mean().item()
      >>> error(*better) < error(params, qparams)
      True
    """
    check_flags("reestimate_norms", {"progress": progress})
    start = begin("reestimate_norms", q, params, qparams, where)
    data = as_batches("reestimate_norms", batches)
    exact = reference_of("reestimate_norms", start, reference)
    places = {place.norm.mean: place for place in _places(start.weights.values())}
    moves, targets, last = _measure(start, exact, places, shown(data, "reestimate_norms", progress))
    new, new_qparams = dict(start.params), dict(start.qparams)
    for name, move in moves.items():
        place = places[name]
        new.update(_moved(exact, place.norm, move))
        _follow(new_qparams, place, start.params, new)
    return no_worse("reestimate_norms", start, new, new_qparams, data, targets, {len(data) - 1: last})


def _places(weights: Iterable[WeightQuantizer]) -> list[Place]:
    """The BatchNorms that are folded into some weights."""
    return [Place(weight.norm, weight, not _has_scale_per_channel(weight)) for weight in weights if weight.norm is not None]


def _has_scale_per_channel(weight: WeightQuantizer) -> bool:
    """Whether a factor for each output channel may go into the scales of a weight, and leaves its codes."""
    fake = weight.fake_quantize
    # learned extras, such as a threshold or the rounding of each element, belong to the weight as it was
    is_plain = fake.grid is as_stored and fake.integer and set(fake.learnable) <= {"scale", "zero_point"}
    return is_plain and isinstance(weight.scheme.granularity, PerChannel | PerGroup) and not weight.scheme.dynamic


def _measure(
    start: Start, exact: Params, places: Mapping[str, Place], data: Iterable[Tree]
) -> tuple[dict[str, Move], list[Output], Output]:
    """How far each BatchNorm has to move, by name of its running mean; what the float model returns; the last output.

    The mean of what the batches so far show is applied while a batch runs, so that one run measures all BatchNorms, and the
    output of the last batch is that of the model with all moves.

    Args:
      start: what the algorithm was given.
      exact: params of the float model.
      places: the BatchNorms, by name of the running mean.
      data: batches.
    """
    frozen, baked = start.q.freeze(start.params, start.qparams)
    wanted: dict[str, list[Statistics]] = {name: [] for name in places}
    found: dict[str, list[tuple[int, Move]]] = {name: [] for name in places}
    targets, outputs = [], []

    def visit_float(name: str, func: Function, args: Args, kwargs: Kwargs) -> Output:
        wanted[name].append(Statistics.of(args[0]))
        return func(*args, **kwargs)

    def visit_quantized(name: str, func: Function, args: Args, kwargs: Kwargs) -> Output:
        norm, x = places[name].norm, args[0]
        move = Move.between(wanted[name].pop(0), Statistics.of(x), norm.eps, places[name].keeps_variance)
        found[name].append((len(x), move))
        moved = _moved(exact, norm, _mean(found[name]))
        return F.batch_norm(x, moved[norm.mean], moved[norm.var], baked[norm.weight], moved[norm.bias], eps=norm.eps)

    for batch in data:
        targets.append(run_float(start.q, exact, batch, places, visit_float))
        outputs.append(run_frozen(frozen, baked, start.qparams, batch, places, visit_quantized))
    return {name: _mean(moves) for name, moves in found.items() if moves}, targets, outputs[-1]


def _mean(moves: Sequence[tuple[int, Move]]) -> Move:
    """The mean of what batches showed, each by its number of samples; of ratios the geometric one."""
    total = sum(count for count, _ in moves)
    shift = sum(count / total * move.shift for count, move in moves)
    log_ratio = sum(count / total * move.ratio.log() for count, move in moves)
    return Move(torch.as_tensor(shift), torch.as_tensor(log_ratio).exp())


def _moved(exact: Params, norm: Norm, move: Move) -> dict[str, Tensor]:
    """The moved statistics by name, with the bias of the float model: what corrected it before is in the mean now."""
    mean, var = exact[norm.mean], exact[norm.var]
    ratio = move.ratio.to(var)
    return {
        norm.mean: mean + move.shift.to(mean),
        norm.var: ((var + norm.eps) * ratio - norm.eps).clamp(min=0),
        norm.bias: exact[norm.bias],
    }


def _follow(qparams: dict[str, QParams], place: Place, before: Params, after: Params) -> None:
    """Multiply the scales of a weight by the change of the factor that is folded into it."""
    if place.keeps_variance:
        return
    name = place.quantizer.site.quantizer
    old, new = place.norm.factor(before), place.norm.factor(after)
    ratio = torch.where(old == 0, 1, new / torch.where(old == 0, 1, old))
    scale = qparams[name].scale
    qparams[name] = qparams[name]._replace(scale=scale * ratio.to(scale).reshape(-1, *[1] * (scale.ndim - 1)))
