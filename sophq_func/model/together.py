"""Quantizers that act together, since one call for all of them costs as much as one call for each.

The channels of small weights are rows of one matrix, which is rounded at once. Scales of values lie side by side in one
tensor, from which all that does not depend on the values is computed at once. Numbers are those of each quantizer alone,
bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sophq_func.core.modes import is_distributed, is_mapped
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.model.weight_quantizer import Params, WeightQuantizer, is_regrouped
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.eager import LARGE
from sophq_func.numerics.granularity import PerChannel, PerGroup, PerTensor

NO_ZERO_POINT = torch.zeros((), dtype=torch.int32)
"""In the place of zero points that a symmetric scheme does not read."""

Rounded = Mapping[str, Callable[[Tensor], Tensor]]
"""By name of a quantizer, the function that quantizes its value."""


class Weights(NamedTuple):
    """Weights that are rounded as one.

    Attributes:
      quantizers: theirs, two or more, alike but for their channels.
      length: elements of each channel.
    """

    quantizers: tuple[WeightQuantizer, ...]
    length: int

    def fit(self, params: Params, qparams: Mapping[str, QParams]) -> bool:
        """Whether these tensors can lie side by side: nothing in the qparams but scales, one dtype and device."""
        own = [qparams[quantizer.site.quantizer] for quantizer in self.quantizers]
        weights = [params[quantizer.site.parameter] for quantizer in self.quantizers]
        return not any(one.extras for one in own) and _are_alike(weights) and _are_alike([one.scale for one in own])

    def quantized(self, params: Params, qparams: Mapping[str, QParams]) -> Iterator[tuple[str, Tensor]]:
        """Name and rounded weight of each."""
        first = self.quantizers[0]
        weights = [params[quantizer.site.parameter] for quantizer in self.quantizers]
        own = [qparams[quantizer.site.quantizer] for quantizer in self.quantizers]
        matrix = torch.cat([weight.reshape(-1, self.length) for weight in weights])
        scale = torch.cat([one.scale for one in own])
        zero_point = NO_ZERO_POINT if first.scheme.symmetric else torch.cat([one.zero_point for one in own])
        scales = QParams(scale, zero_point, {})
        factor = self._factor(params)
        if first.fake_quantize.prepare is None or factor is None:
            rounded = first.fake_quantize.apply(matrix, scales, first.scheme)
        else:
            rounded = first.fake_quantize.prepare(matrix, factor, scales, first.scheme)()
        parts = torch.split(rounded, [len(weight) for weight in weights])
        for quantizer, weight, part in zip(self.quantizers, weights, parts, strict=True):
            yield quantizer.site.parameter, part.view(weight.shape)

    def _factor(self, params: Params) -> Tensor | None:
        """The factors of the BatchNorms that are folded into the weights, of shape ``(rows, 1)``."""
        norms = [quantizer.norm for quantizer in self.quantizers if quantizer.norm is not None]
        if not norms:
            return None
        side_by_side = {
            "weight": torch.cat([params[norm.weight] for norm in norms]),
            "var": torch.cat([params[norm.var].detach() for norm in norms]),
        }
        return norms[0]._replace(weight="weight", var="var").factor(side_by_side).unsqueeze(-1)


class Values(NamedTuple):
    """Quantizers of values, alike, whose scales are prepared as one.

    Attributes:
      names: theirs, two or more.
      first: one of them.
    """

    names: tuple[str, ...]
    first: RunQuantizer

    def rounded(self, qparams: Mapping[str, QParams]) -> Rounded:
        """The function of each; of none where their scales cannot lie side by side."""
        own = [qparams[name] for name in self.names]
        fake_quantize, scheme = self.first.fake_quantize, self.first.scheme
        is_for_kernel = fake_quantize.kernel and own[0].scale.is_cpu and not is_mapped()
        if is_for_kernel and not any(one.extras for one in own):
            # it reads the scales themselves, so that nothing is to be prepared
            alone = (partial(fake_quantize.apply, qparams=one, scheme=scheme) for one in own)
            return dict(zip(self.names, alone, strict=True))
        scales, zero_points = [one.scale for one in own], [one.zero_point for one in own]
        if any(one.extras for one in own) or not _are_alike(scales) or not _are_alike(zero_points):
            return {}
        many = fake_quantize.many
        assert many is not None, "only quantizers that have it are put together"
        side_by_side = QParams(torch.stack(scales), NO_ZERO_POINT if scheme.symmetric else torch.stack(zero_points), {})
        return dict(zip(self.names, many(side_by_side, scheme), strict=True))


def weights_together(quantizers: Iterable[WeightQuantizer], shapes: Mapping[str, torch.Size]) -> list[Weights]:
    """The small weights among some that can be rounded as one.

    Args:
      quantizers: of the weights.
      shapes: of the parameters, by name.
    """
    groups: dict[Any, list[WeightQuantizer]] = {}
    for quantizer in quantizers:
        shape = shapes[quantizer.site.parameter]
        if _is_row_by_row(quantizer) and 0 < math.prod(shape) < LARGE:
            norm = quantizer.norm
            alike = quantizer.config.scheme, quantizer.config.fake_quantize, None if norm is None else norm.eps
            groups.setdefault((math.prod(shape[1:]), *map(repr, alike)), []).append(quantizer)
    return [Weights(tuple(members), length) for (length, *_), members in groups.items() if len(members) > 1]


def _is_row_by_row(quantizer: WeightQuantizer) -> bool:
    """Whether channels lie along the first axis of the parameter itself, and each is rounded by itself."""
    granularity = quantizer.scheme.granularity
    has_rows = isinstance(granularity, PerChannel | PerGroup) and granularity.axis in (None, 0)
    folds_rows = quantizer.norm is None or quantizer.output_axis == 0
    fake_quantize = quantizer.fake_quantize
    return has_rows and folds_rows and fake_quantize.rowwise and not is_regrouped(quantizer.site)


def values_together(quantizers: Mapping[str, RunQuantizer], alone: Iterable[str]) -> list[Values]:
    """The quantizers among some whose scales can be prepared as one.

    Args:
      quantizers: of values, by name.
      alone: names of those that are not as they are stored.
    """
    groups: dict[Any, list[str]] = {}
    for name in quantizers.keys() - set(alone):
        config, scheme = quantizers[name].config, quantizers[name].scheme
        has_one_scale = isinstance(scheme.granularity, PerTensor) and not scheme.dynamic
        # that of an optional one may never have been observed
        acts = not config.observe_only and not config.optional
        if has_one_scale and acts and quantizers[name].fake_quantize.many is not None:
            groups.setdefault((repr(scheme), repr(config.fake_quantize)), []).append(name)
    return [Values(tuple(sorted(names)), quantizers[names[0]]) for names in groups.values() if len(names) > 1]


def _are_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of equally many axes can lie side by side."""
    first = tensors[0]
    kinds = {(tensor.dtype, tensor.device, tensor.ndim) for tensor in tensors}
    return len(kinds) == 1 and not is_distributed(tensors) and not first.is_nested
