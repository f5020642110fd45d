"""Weights are quantized as a function from params to params: folding, rounding and biases, no module in sight.

With a BatchNorm behind a layer, ``f = gamma / sqrt(var + eps)`` is folded in for the time of the rounding:
``W' = where(f == 0, W, FQ(W f) / f)``. A bias is rounded to multiples of ``S = s_weight * s_input`` (semantics.md 5.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.config.site import Site, WeightSite
from sophq_func.numerics.affine import folded, switched
from sophq_func.numerics.contracts import FakeQuantize, Observer, QParams, State
from sophq_func.numerics.ranges import positive
from sophq_func.numerics.scheme import PerChannel, PerGroup, QScheme, QuantizerConfig

Params = Mapping[str, Tensor]


class Norm(NamedTuple):
    """A BatchNorm, by the canonical names of its tensors."""

    weight: str
    bias: str
    mean: str
    var: str
    tracked: str
    eps: float
    momentum: float | None
    training: bool

    def factor(self, params: Params) -> Tensor:
        """``gamma / sqrt(var + eps)``; shape ``(C,)``."""
        return params[self.weight] / torch.sqrt(params[self.var].detach() + self.eps)


@dataclass(frozen=True)
class WeightQuantizer:
    """One weight quantizer: where it sits, its config, and the functions made from it."""

    site: WeightSite
    config: QuantizerConfig
    observer: Observer
    fake_quantize: FakeQuantize
    norm: Norm | None = None

    @property
    def scheme(self) -> QScheme:
        """The scheme, for the weight as :meth:`seen` shows it."""
        return arranged_scheme(self.config.scheme, self.site)

    def seen(self, params: Params) -> Tensor:
        """The weight that is observed: with the BatchNorm folded in; of grouped deconvolutions, output channels first."""
        weight = arranged(params[self.site.parameter], self.site)
        return weight if self.norm is None else weight * self._along(self.norm.factor(params), weight)

    def seen_part(
        self, params: Params, axis: int = 0, start: int = 0, length: int | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A part of :meth:`seen` along ``axis``, computed in ``dtype``; without a length all of it.

        A grouped deconvolution, whose weight is rearranged to be seen, has no parts.
        """
        weight = params[self.site.parameter]
        weight = arranged(weight, self.site) if length is None else weight.narrow(axis, start, length)
        weight = weight if dtype is None else weight.to(dtype)
        if self.norm is None:
            return weight
        factor = self._along(self.norm.factor(params), weight)
        if length is not None and factor.shape[axis] > 1:
            factor = factor.narrow(axis, start, length)
        return weight * factor

    def observe(self, params: Params) -> State:
        """The state after seeing the weight once."""
        weight = self.seen(params)
        return self.observer.update(self.observer.init(weight, self.scheme), weight, self.scheme)

    def quantize(self, params: Params, qparams: QParams) -> Tensor:
        """The weight on its grid, in its own layout, where the quantizer is enabled."""
        return self.prepared(params, qparams)()

    def prepared(self, params: Params, qparams: QParams) -> Callable[[], Tensor]:
        """:meth:`quantize` when called; what takes no pass over the weight is done before."""
        weight = params[self.site.parameter]
        on_grid = self._prepared(arranged(weight, self.site), params, qparams)
        return lambda: switched(weight, arranged(on_grid(), self.site), qparams)

    def _prepared(self, weight: Tensor, params: Params, qparams: QParams) -> Callable[[], Tensor]:
        factor = None if self.norm is None else self._along(self.norm.factor(params), weight)
        prepare = self.fake_quantize.prepare
        if prepare is not None and not self.scheme.dynamic:
            return prepare(weight, factor, qparams, self.scheme)
        apply = partial(self.fake_quantize.apply, qparams=qparams, scheme=self.scheme)
        return partial(apply, weight) if factor is None else partial(folded, apply, weight, factor)

    def rounded_bias(self, params: Params, qparams: Mapping[str, QParams]) -> dict[str, Tensor]:
        """What changes in ``params`` where the layer's bias is rounded to multiples of ``S``.

        ``d = round(B / S) S - B``, ``B`` the folded bias, goes into the layer's bias as ``d / f``. Without one it goes
        into BatchNorm's bias in eval; in training it only moves the running mean, see :meth:`mean_shift`.
        """
        site, norm = self.site, self.norm
        if not site.source:
            return {}
        shift = self.bias_shift(params, qparams[site.quantizer], qparams[site.source])
        if site.bias:
            shift = shift if norm is None else self._unfold(shift, norm, params)
            return {site.bias: params[site.bias] + shift.to(params[site.bias].dtype)}
        if norm is not None and not norm.training:
            return {norm.bias: params[norm.bias] + shift.to(params[norm.bias].dtype)}
        return {}

    def mean_shift(self, params: Params, qparams: QParams, source: QParams, after: Params) -> dict[str, Tensor]:
        """The running mean that a training step returns where the layer has no bias to carry ``d``."""
        norm = self.norm
        if norm is None or self.site.bias or not norm.training:
            return {}
        momentum = norm.momentum if norm.momentum is not None else 1 / after[norm.tracked]
        shift = self._unfold(self.bias_shift(params, qparams, source), norm, params).detach()
        return {norm.mean: after[norm.mean] + (momentum * shift).to(after[norm.mean].dtype)}

    def folded_bias(self, params: Params) -> Tensor:
        """``B``: the layer's bias, or 0, with the BatchNorm folded in; a constant."""
        bias = (
            params[self.site.bias].detach() if self.site.bias else torch.zeros((), device=params[self.site.parameter].device)
        )
        if self.norm is None:
            return bias
        mean, beta = params[self.norm.mean].detach(), params[self.norm.bias].detach()
        return (bias.to(mean) - mean) * self.norm.factor(params).detach() + beta

    def bias_shift(self, params: Params, qparams: QParams, source: QParams) -> Tensor:
        """``d``: straight-through in the rounding, constant in ``B``."""
        step = positive(qparams.scale) * positive(source.scale)
        ratio = self.folded_bias(params) / step.detach()
        shift = step * (ratio.round() - ratio)
        none = torch.zeros_like(shift)
        return switched(none, switched(none, shift, qparams), source)

    def _unfold(self, shift: Tensor, norm: Norm, params: Params) -> Tensor:
        factor = norm.factor(params).detach()
        return torch.where(factor == 0, 0, shift / torch.where(factor == 0, 1, factor))

    def _along(self, factor: Tensor, weight: Tensor) -> Tensor:
        axis = 0 if is_regrouped(self.site) else self.site.axis
        return factor.reshape([-1 if i == axis % weight.ndim else 1 for i in range(weight.ndim)])


def is_regrouped(site: Site) -> bool:
    """Whether it is a grouped deconvolution, whose weight has no axis with all output channels."""
    return site.groups > 1 and site.axis == 1


def arranged_scheme(scheme: QScheme, site: Site) -> QScheme:
    """The scheme of a site's weight, for the weight as :func:`arranged` shows it."""
    granularity = scheme.granularity
    if not is_regrouped(site) or not isinstance(granularity, PerChannel | PerGroup):
        return scheme
    return replace(scheme, granularity=replace(granularity, axis=0))


def arranged(weight: Tensor, site: Site) -> Tensor:
    """Of a grouped deconvolution ``(in, out / groups, ...)`` as ``(out, in / groups, ...)``, and back; others as they are.

    The exchange is its own inverse.
    """
    if not is_regrouped(site):
        return weight
    groups, (rows, columns) = site.groups, weight.shape[:2]
    split = weight.reshape(groups, rows // groups, columns, *weight.shape[2:])
    return split.transpose(1, 2).reshape(groups * columns, rows // groups, *weight.shape[2:])


def quantize_weights(
    quantizers: Iterable[WeightQuantizer], params: Params, qparams: Mapping[str, QParams]
) -> dict[str, Tensor]:
    """``params`` with weights on their grids and biases rounded; a new dict."""
    new = round_biases(quantizers, params, qparams)
    for quantizer in quantizers:
        new[quantizer.site.parameter] = quantizer.quantize(params, qparams[quantizer.site.quantizer])
    return new


def round_biases(quantizers: Iterable[WeightQuantizer], params: Params, qparams: Mapping[str, QParams]) -> dict[str, Tensor]:
    """``params`` with biases rounded; a new dict."""
    new = dict(params)
    for quantizer in quantizers:
        new.update(quantizer.rounded_bias(params, qparams))
    return new
