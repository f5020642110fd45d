"""SmoothQuant: the range of large activations is moved into the weights that read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sophq_func.algorithms._folding import (
    check_share,
    quantized_readers,
    scaled,
    scaling,
    values_of,
    with_values_observed,
)
from sophq_func.algorithms._pairs import Pair
from sophq_func.algorithms._walk import walked
from sophq_func.algorithms.contract import output_distance, rolled_back
from sophq_func.config.register import algorithm
from sophq_func.core.errors import check_flags
from sophq_func.core.progress import shown
from sophq_func.core.public import public
from sophq_func.core.types import Given, Tree
from sophq_func.model.engine import QParamsDict
from sophq_func.model.quantized import Quantized
from sophq_func.model.select import Where
from sophq_func.model.weight_quantizer import Params
from sophq_func.numerics.contracts import QParams

LEAST = 1e-5
"""Smaller maxima count as this: a channel that is always 0 must not have an infinite factor."""


def migration(pair: Pair, params: Params, amax: Tensor, alpha: float | Tensor) -> Tensor:
    """The factors ``s = max|x|**alpha / max|w|**(1 - alpha)`` of each channel, ``w`` the columns of all readers.

    Args:
      pair: the value and its readers.
      params: by name.
      amax: largest magnitude of each channel of the value.
      alpha: from 0 to 1.
    """
    columns = [params[reader.weight].detach().abs().amax(1 - reader.columns) for reader in pair.readers]
    of_weights = torch.stack(columns).amax(0)
    return pair.tied(amax).clamp(min=LEAST) ** alpha / pair.tied(of_weights).clamp(min=LEAST) ** (1 - alpha)


@algorithm("smooth", keeps_float=True, measure=output_distance)
@public
def smooth(
    q: Quantized,
    params: Given,
    qparams: Mapping[str, QParams],
    batches: Iterable[Tree],
    *,
    alpha: float | Tensor = 0.5,
    where: Where = None,
    blocks: str | None = None,
    progress: bool = True,
) -> tuple[Given, QParamsDict]:
    """Move the range of activations into the weights that read them (SmoothQuant, arXiv:2211.10438).

    Each channel of a value that linear layers read is divided by ``s = max|x|**alpha / max|w|**(1 - alpha)``, their columns
    are multiplied by it, and the division is folded into what makes the value, as in :func:`awq`. Then all channels of the
    value have about the same range, and one scale serves them. The float model stays as it is.

    It helps where activations have few large channels and one static scale for the tensor, as in large language models at
    8 bits. It can hurt weights of 4 bits and less. Where the quantized model would be farther from the float model on the
    batches than before, nothing is changed, which the logger ``sophq_func.algorithms`` says.

    Args:
      q: a quantized model; it is run in eval mode.
      params: as :func:`sophq_func.params_of` returns them.
      qparams: from ``q.calibrate``.
      batches: as of :meth:`Quantized.calibrate`; the first one also finds and checks what can be scaled.
      alpha: how much of the range moves: 0.5 in the paper, 0.75 to 0.9 for models with larger outliers. Where it is mapped
        over, nothing is compared.
      where, blocks, progress: see :func:`awq`.

    Returns:
      New params, and qparams with the ranges of what changed observed anew.

    Raises:
      ConfigError: ``alpha`` outside of [0, 1]; ``where`` fits no weight.
      StateError: names that are missing or unknown, no batches, a frozen model.

    Example:
      >>> import torch, sophq_func as sq
      >>> _ = torch.manual_seed(0)
      >>> model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))
      >>> x = torch.randn(32, 8)
      >>> params = sq.params_of(model)
      >>> params["0.weight"] = torch.tensor([90.0, 1, 1, 1, 1, 1, 1, 1])
      >>> q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
      >>> start = q.calibrate(params, [x], progress=False)
      >>> smoothed, qparams = sq.algorithms.smooth(q, params, start, [x], progress=False)
      >>> float(qparams["0.post_act_fake_quantizer"].scale) < float(start["0.post_act_fake_quantizer"].scale) / 4
      True
    """
    check_flags("smooth", {"progress": progress})
    check_share("smooth", alpha)
    begun = scaling("smooth", q, params, qparams, batches, where, blocks)
    start, setting, queue = begun.start, begun.setting, begun.queue
    for unit, moments in walked(begun.walk, shown(begun.units, "smooth", progress)):
        setting = queue.needed(setting, moments)
        for pair in queue.take(unit):
            first = next(iter(quantized_readers(start, pair)))
            if first in setting.moments:
                factors = migration(pair, setting.params, setting.moments[first].amax, alpha)
                setting = scaled(start, setting, pair, factors)
    ranges = with_values_observed(start, setting.params, setting.qparams, values_of(begun.pairs), begun.batches)
    return rolled_back("smooth", start, start.result(setting.params, ranges), begun.batches)
