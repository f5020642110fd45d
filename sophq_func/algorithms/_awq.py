"""AWQ: input channels that are large get finer steps, by factors that are folded into what makes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sophq_func.algorithms._folding import (
    Setting,
    check_share,
    error_of,
    quantized_readers,
    scaled,
    scaling,
    touched,
    values_of,
    with_values_observed,
)
from sophq_func.algorithms._matrix import output_axis
from sophq_func.algorithms._measure import layer_errors
from sophq_func.algorithms._pairs import Linear, Pair
from sophq_func.algorithms._walk import walked
from sophq_func.algorithms.contract import Start
from sophq_func.config.register import algorithm
from sophq_func.core.errors import check_flags
from sophq_func.core.progress import shown
from sophq_func.core.public import public
from sophq_func.core.types import Given, Tree
from sophq_func.model.engine import QParamsDict
from sophq_func.model.quantized import Quantized
from sophq_func.model.select import Where
from sophq_func.model.weight_quantizer import WeightQuantizer
from sophq_func.numerics.affine import fake_quantize
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.granularity import PerChannel
from sophq_func.numerics.layout import rows
from sophq_func.numerics.moments import output_error
from sophq_func.numerics.ranges import bounds, min_max, range_to_qparams

POINTS = 20
"""How many exponents are tried, from 0 on, as in the paper."""

LEAST = 1e-4
"""Channels with a smaller mean magnitude count as one of this: 0 has no power below 0."""


def importance(mean_abs: Tensor, alpha: float | Tensor) -> Tensor:
    """The factors ``s = m**alpha``, scaled so that the largest and the smallest are reciprocal.

    Args:
      mean_abs: mean magnitude ``m`` of each channel.
      alpha: from 0, which leaves all as it is, to 1. May be mapped over.

    Example:
      >>> importance(torch.tensor([1.0, 4.0]), 0.5)
      tensor([0.7071, 1.4142])
    """
    factors = mean_abs.clamp(min=LEAST) ** alpha
    return factors / (factors.amax() * factors.amin()).sqrt()


def own_errors(
    q: Quantized, float_params: Given, params: Given, qparams: Mapping[str, QParams], batches: Sequence[Tree]
) -> Tensor:
    """The errors of all layers against the float model with the same params, which computes what the first one did."""
    return layer_errors(q, params, params, qparams, batches)


@algorithm("awq", keeps_float=True, measure=own_errors)
@public
def awq(
    q: Quantized,
    params: Given,
    qparams: Mapping[str, QParams],
    batches: Iterable[Tree],
    *,
    alpha: float | Tensor | None = None,
    where: Where = None,
    blocks: str | None = None,
    progress: bool = True,
) -> tuple[Given, QParamsDict]:
    """Scale the inputs of linear layers by their magnitudes, so that large ones are rounded finer (AWQ, arXiv:2306.00978).

    The columns of all layers that read a value are multiplied by ``s = m**alpha``, ``m`` the mean magnitude of each channel,
    and what makes the value is divided by ``s``: the weight of a norm, the rows of the layer before, also behind a gate or
    behind attention with shared values. So the float model stays as it is. ``alpha`` is chosen for each value, out of 20
    from 0 on, by the least error at the outputs of the layers that read it. A value for which nothing is better stays as it
    is; so does one whose makers and readers are not all known, which the logger ``sophq_func.algorithms`` says.

    It helps at 3 and 4 bits with coarse groups, most of all before :func:`clip`. Weights come back off their grids:
    :func:`gptq` or ``q.apply`` rounds them.

    Args:
      q: a quantized model; it is run in eval mode.
      params: as :func:`sophq_func.params_of` returns them.
      qparams: from ``q.calibrate``.
      batches: as of :meth:`Quantized.calibrate`; the first one also finds and checks what can be scaled.
      alpha: one exponent for all values instead of a search; then nothing is compared, and it may be mapped over.
      where: the layers whose inputs are scaled, all readers of a value or none: a name, glob, path of a module, type, or
        predicate on the site, or several of these; by default all.
      blocks: a glob of module paths, see :meth:`Quantized.blocks`.
      progress: see :meth:`Quantized.calibrate`.

    Returns:
      New params, and qparams with the ranges of what changed observed anew: of weights by their observers, of values from
      the batches.

    Raises:
      ConfigError: ``alpha`` outside of [0, 1]; ``where`` fits no weight.
      StateError: names that are missing or unknown, no batches, a frozen model.

    Example:
      >>> import torch, sophq_func as sq
      >>> _ = torch.manual_seed(0)
      >>> model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))
      >>> x = torch.randn(32, 8) * torch.tensor([9.0, 1, 1, 1, 1, 1, 1, 1])
      >>> config = sq.QuantConfig(chip=None, weight=sq.override(bits=3), activation=None)
      >>> q = sq.quantize(model, config, example_args=(x,))
      >>> params = sq.params_of(model)
      >>> start = q.calibrate(params, [x], progress=False)
      >>> scaled, qparams = sq.algorithms.awq(q, params, start, [x], progress=False)
      >>> y = torch.func.functional_call(model, params, x)
      >>> torch.allclose(torch.func.functional_call(model, scaled, x), y, atol=1e-5)
      True
      >>> error = lambda p, qp: (q.apply(p, qp, x) - y).square().mean()
      >>> bool(error(scaled, qparams) <= error(params, start))
      True
    """
    check_flags("awq", {"progress": progress})
    if alpha is not None:
        check_share("awq", alpha)
    begun = scaling("awq", q, params, qparams, batches, where, blocks)
    start, setting, queue = begun.start, begun.setting, begun.queue
    done: list[Pair] = []
    for unit, moments in walked(begun.walk, shown(begun.units, "awq", progress)):
        setting = queue.needed(setting, moments)
        for pair in queue.take(unit):
            new = _with_pair(start, setting, pair, alpha)
            if new is not setting:
                done.append(pair)
            setting = new
    return start.result(
        setting.params, with_values_observed(start, setting.params, setting.qparams, values_of(done), begun.batches)
    )


def _with_pair(start: Start, setting: Setting, pair: Pair, alpha: float | Tensor | None) -> Setting:
    """A setting with one pair scaled; as it was where nothing is better, or where the readers' inputs are not known."""
    readers = {name: reader for name, reader in quantized_readers(start, pair).items() if name in setting.moments}
    if not readers:
        return setting
    mean_abs = pair.tied(next(setting.moments[name].mean_abs for name in readers))
    if alpha is not None:
        return scaled(start, setting, pair, importance(mean_abs, alpha))
    exponents = [point / POINTS for point in range(POINTS)]
    errors = [_error_at(start, setting, readers, importance(mean_abs, exponent)) for exponent in exponents]
    best = exponents[int(torch.stack(errors).argmin())]
    if best == 0:
        return setting
    new, names = scaled(start, setting, pair, importance(mean_abs, best)), touched(start, pair)
    # the search rounds by the extremes of each weight, which is quick; what counts are the ranges of the observers
    return new if bool(error_of(start, new, names) < error_of(start, setting, names)) else setting


def _error_at(start: Start, setting: Setting, readers: Mapping[str, Linear], factors: Tensor) -> Tensor:
    """The error at the outputs of the layers that read a value, if it were divided by factors; shape ``()``."""
    errors = []
    for name, reader in readers.items():
        weight = start.weights[name]
        wide = weight.seen({**setting.params, reader.weight: reader.scaled(setting.params, factors)})
        change = _rounded(weight, setting.qparams[name], wide) - wide
        along = PerChannel(output_axis(weight.scheme, weight.output_axis))
        errors.append(output_error(rows(change, along) / factors, setting.moments[name].second).sum())
    return torch.stack(errors).sum()


def _rounded(weight: WeightQuantizer, qparams: QParams, seen: Tensor) -> Tensor:
    """A weight rounded on a grid that covers its extremes."""
    scheme = weight.scheme
    found = range_to_qparams(*min_max(seen, scheme.granularity), scheme, limits=bounds(qparams, scheme))
    if weight.fake_quantize.integer:
        return fake_quantize(seen, found, scheme, "kernel")
    return weight.fake_quantize.apply(seen, found, scheme)
