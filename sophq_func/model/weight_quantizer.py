"""Weights are quantized as a function from params to params: folding, rounding and biases, no module in sight.

With a BatchNorm behind a layer, its factor ``f = gamma / sqrt(var + eps)`` is folded in for the time of the rounding only:
``W' = where(f == 0, W, FQ(W f) / f)``, so that the BatchNorm itself still runs. A bias is rounded to multiples of
``S = s_weight * s_input``, the step of the integer sums that it is added to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.config.site import Site, WeightSite
from sophq_func.core.modes import beside
from sophq_func.numerics.affine import folded, switched
from sophq_func.numerics.contracts import FakeQuantize, Observer, QParams, State
from sophq_func.numerics.granularity import Axis, Granularity, PerBlock, PerChannel, PerGroup, PerToken
from sophq_func.numerics.ranges import guarded, positive
from sophq_func.numerics.scheme import QScheme, QuantizerConfig

Params = Mapping[str, Tensor]
"""Parameters and buffers of a model, by canonical name."""


class Norm(NamedTuple):
    """A BatchNorm that is folded into a weight.

    Attributes:
      weight, bias, mean, var, tracked: canonical names of its tensors; ``tracked`` counts batches.
      eps: what is added to the variance.
      momentum: share of a new batch in the running statistics; ``None``: all batches have the same share.
      training: whether it normalizes with the statistics of the batch.
    """

    weight: str
    bias: str
    mean: str
    var: str
    tracked: str
    eps: float
    momentum: float | None
    training: bool

    def factor(self, params: Params) -> Tensor:
        """``gamma / sqrt(var + eps)``; shape ``(C,)``. The statistic is a constant, as all buffers are."""
        gamma, deviation = params[self.weight], torch.sqrt(params[self.var].detach() + self.eps)
        return gamma / beside(deviation, gamma)


@dataclass(frozen=True)
class WeightQuantizer:
    """The quantizer of a weight.

    Attributes:
      site: where it sits.
      config: its scheme, observer and fake quantizer, as the plan names them.
      observer, fake_quantize: the functions that the config names.
      norm: the BatchNorm that is folded into the weight; ``None`` without.
    """

    site: WeightSite
    config: QuantizerConfig
    observer: Observer
    fake_quantize: FakeQuantize
    norm: Norm | None = None

    @property
    def scheme(self) -> QScheme:
        """The scheme, for the weight as :meth:`seen` returns it."""
        return arranged_scheme(self.config.scheme, self.site)

    def seen(self, params: Params) -> Tensor:
        """The weight that is observed: with the BatchNorm folded in; of grouped deconvolutions, output channels first."""
        weight = arranged(params[self.site.parameter], self.site)
        return weight if self.norm is None else weight * self._along(self.norm.factor(params), weight)

    def seen_part(
        self, params: Params, axis: int = 0, start: int = 0, length: int | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A part of :meth:`seen`, so that a large weight need not be converted whole.

        A grouped deconvolution, whose weight is rearranged to be seen, has no parts.

        Args:
          params: of the model.
          axis, start, length: which part, as of ``Tensor.narrow``; without a length the whole weight.
          dtype: in which it is computed; ``None``: the weight's.
        """
        weight = params[self.site.parameter]
        if length is None:
            weight = arranged(weight, self.site)
        else:
            weight = weight.narrow(axis, start, length)
        if dtype is not None:
            weight = weight.to(dtype)
        if self.norm is None:
            return weight
        factor = self._along(self.norm.factor(params), weight)
        if length is not None and factor.shape[axis] > 1:  # cut along the output channels
            factor = factor.narrow(axis, start, length)
        return weight * factor

    def unseen(self, seen: Tensor, params: Params) -> Tensor:
        """The inverse of :meth:`seen`: another weight as it is seen, in the layer's own layout.

        Where a BatchNorm's factor is 0, the layer's output does not depend on the weight, which stays as it is.
        """
        if self.norm is not None:
            dead, divisor = guarded(self._along(self.norm.factor(params), seen))
            seen = torch.where(dead, arranged(params[self.site.parameter], self.site), seen / divisor)
        return arranged(seen, self.site)

    @property
    def output_axis(self) -> Axis:
        """The axes of the output channels of the weight as :meth:`seen` returns it."""
        return 0 if is_regrouped(self.site) else self.site.axis

    def observe(self, params: Params) -> State:
        """The observer's state after one look at the weight."""
        weight = self.seen(params)
        neutral = self.observer.init(weight, self.scheme)
        return self.observer.update(neutral, weight, self.scheme)

    def quantize(self, params: Params, qparams: QParams) -> Tensor:
        """The weight rounded to its grid, in its own layout, unless ``extras["enabled"]`` switches the quantizer off."""
        return self.thunk(params, qparams)()

    def thunk(self, params: Params, qparams: QParams) -> Callable[[], Tensor]:
        """A function without arguments that returns :meth:`quantize`; work that takes no pass over the weight runs now."""
        weight = params[self.site.parameter]
        rounded = self._rounded(arranged(weight, self.site), params, qparams)
        return lambda: switched(weight, arranged(rounded(), self.site), qparams)

    def _rounded(self, weight: Tensor, params: Params, qparams: QParams) -> Callable[[], Tensor]:
        """A function that returns the arranged weight, rounded with the BatchNorm folded in and divided out again."""
        factor = None if self.norm is None else self._along(self.norm.factor(params), weight)
        prepare = self.fake_quantize.prepare
        if prepare is not None and not self.scheme.dynamic:
            return prepare(weight, factor, qparams, self.scheme)
        apply = partial(self.fake_quantize.apply, qparams=qparams, scheme=self.scheme)
        if factor is None:
            return partial(apply, weight)
        return partial(folded, apply, weight, factor)

    def rounded_bias(self, params: Params, qparams: Mapping[str, QParams]) -> dict[str, Tensor]:
        """What changes in ``params`` where the layer's bias is rounded to multiples of ``S``.

        ``d = round(B / S) S - B``, ``B`` the folded bias, goes into the layer's bias as ``d / f``. A layer without bias
        has it in the BatchNorm's bias in eval; in training it only moves the running mean, see :meth:`mean_shift`.
        """
        site, norm = self.site, self.norm
        if not site.source:
            return {}
        shift = self.bias_shift(params, qparams[site.quantizer], qparams[site.source])
        if site.bias:
            shift = shift if norm is None else _unfolded(shift, norm, params)
            return {site.bias: params[site.bias] + shift.to(params[site.bias].dtype)}
        if norm is not None and not norm.training:
            return {norm.bias: params[norm.bias] + shift.to(params[norm.bias].dtype)}
        return {}

    def mean_shift(self, params: Params, qparams: QParams, source: QParams, after: Params) -> dict[str, Tensor]:
        """The running mean that a training step returns where the layer has no bias to carry ``d``.

        In training the BatchNorm subtracts the mean of the batch, so that a constant ``d / f`` in the layer's output changes
        nothing but that mean, of which ``momentum`` goes into the running mean.

        Args:
          params: before the step.
          qparams, source: of this quantizer, and of the one whose scale rounds the bias.
          after: the params as the step left them.

        Returns:
          The running mean by its name; nothing where the layer has a bias or the BatchNorm does not train.
        """
        norm = self.norm
        if norm is None or self.site.bias or not norm.training:
            return {}
        momentum = norm.momentum if norm.momentum is not None else 1 / after[norm.tracked]
        shift = _unfolded(self.bias_shift(params, qparams, source), norm, params).detach()
        mean = after[norm.mean]
        return {norm.mean: mean + (momentum * shift).to(mean.dtype)}

    def folded_bias(self, params: Params) -> Tensor:
        """``B``: the layer's bias, or 0, with the BatchNorm folded in; a constant. Shape ``(C,)``, or ``()`` for 0."""
        if self.site.bias:
            bias = params[self.site.bias].detach()
        else:
            bias = torch.zeros((), device=params[self.site.parameter].device)
        if self.norm is None:
            return bias
        mean, beta = params[self.norm.mean].detach(), params[self.norm.bias].detach()
        factor = self.norm.factor(params).detach()
        return (bias.to(mean) - mean) * factor + beta

    def bias_shift(self, params: Params, qparams: QParams, source: QParams) -> Tensor:
        """``d = round(B / S) S - B``; constant in ``B``, and its gradient in ``S`` is ``round(B / S) - B / S``."""
        step = positive(qparams.scale) * positive(source.scale)
        ratio = self.folded_bias(params) / step.detach()
        shift = step * (ratio.round() - ratio)
        none = torch.zeros_like(shift)
        # a bias is rounded only where both quantizers are on
        return switched(none, switched(none, shift, qparams), source)

    def _along(self, factor: Tensor, weight: Tensor) -> Tensor:
        """A factor of shape ``(C,)``, shaped to broadcast along the output channels of the arranged weight."""
        axis = 0 if is_regrouped(self.site) else self.site.axis
        assert isinstance(axis, int), "a BatchNorm is folded into weights of layers alone, which have one output axis"
        shape = [1] * weight.ndim
        shape[axis] = -1
        return factor.reshape(shape)


def _unfolded(shift: Tensor, norm: Norm, params: Params) -> Tensor:
    """``shift / f``, and 0 where ``f`` is 0."""
    factor = norm.factor(params).detach()
    dead = factor == 0
    divisor = torch.where(dead, 1, factor)  # a division by 0, though not selected, gives NaN gradients
    return torch.where(dead, 0, shift / divisor)


LOOKUPS = frozenset(("embedding", "embedding_bag"))
"""Operations that sum over no axis of their weight."""


def block_axis(site: Site, granularity: Granularity, ndim: int) -> int:
    """The axis along which the blocks of a weight lie, counted from the end: the last one that is summed over.

    It is the last of all where no axis is summed over; for values, too, and where scales belong to blocks or rows of the
    weight as it is.

    Args:
      site: of the weight.
      granularity: of its scales.
      ndim: how many axes the weight has.
    """
    if site.role != "weight" or site.operation in LOOKUPS or isinstance(granularity, PerBlock | PerToken):
        return -1
    kept = site.axis if isinstance(site.axis, tuple) else (site.axis,)
    summed = set(range(-ndim, 0)) - {axis if axis < 0 else axis - ndim for axis in kept}
    return max(summed, default=-1)


def is_regrouped(site: Site) -> bool:
    """Whether a site is of a grouped deconvolution, whose weight has no axis with all output channels."""
    return site.groups > 1 and site.axis == 1


def arranged_scheme(scheme: QScheme, site: Site) -> QScheme:
    """The scheme of a site's weight, for the weight as :func:`arranged` returns it."""
    granularity = scheme.granularity
    if not is_regrouped(site) or not isinstance(granularity, PerChannel | PerGroup):
        return scheme
    return replace(scheme, granularity=replace(granularity, axis=0))


def arranged(weight: Tensor, site: Site) -> Tensor:
    """A weight with its output channels along one axis.

    Only a grouped deconvolution's weight is rearranged, from ``(in, out / groups, ...)`` to ``(out, in / groups, ...)``.
    The function is its own inverse.
    """
    if not is_regrouped(site):
        return weight
    groups = site.groups
    rows, columns, *kernel = weight.shape
    split = weight.reshape(groups, rows // groups, columns, *kernel)
    return split.transpose(1, 2).reshape(groups * columns, rows // groups, *kernel)


def quantize_weights(
    quantizers: Iterable[WeightQuantizer], params: Params, qparams: Mapping[str, QParams]
) -> dict[str, Tensor]:
    """``params`` with weights quantized and biases rounded; a new dict."""
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
