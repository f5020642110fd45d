"""Ranges of weights by what their layers multiply: for each scale the range with the least error at the layer's output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from sophq_func.algorithms._matrix import output_axis
from sophq_func.algorithms._measure import layer_errors
from sophq_func.algorithms._scales import Form, form_of
from sophq_func.algorithms._solve import check_second
from sophq_func.algorithms._walk import Walk, units_of, walked
from sophq_func.algorithms.contract import Start, as_batches, begin, fits
from sophq_func.config.register import algorithm
from sophq_func.core.arguments import check_reals
from sophq_func.core.errors import ConfigError, check_flags, explain, raise_all
from sophq_func.core.logs import ALGORITHMS as LOG
from sophq_func.core.progress import shown
from sophq_func.core.public import public
from sophq_func.core.types import Given, Tree
from sophq_func.model.engine import QParamsDict
from sophq_func.model.quantized import Quantized
from sophq_func.model.select import Where
from sophq_func.model.weight_quantizer import WeightQuantizer
from sophq_func.numerics.affine import fake_quantize, working
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.granularity import Axis, PerChannel
from sophq_func.numerics.kinds import check_alone
from sophq_func.numerics.layout import rows
from sophq_func.numerics.moments import Moments
from sophq_func.numerics.ranges import EPS, bounds, min_max, qparams_to_range, range_to_qparams
from sophq_func.numerics.scheme import QScheme

RATIOS = tuple(i / 20 for i in range(20, 6, -1))
"""Shares of the range that are tried, from all of it down to a third: at 2 bits, normal numbers want 0.4 of theirs."""

FINER = (0.975, 1.025)
"""By what the best of them is multiplied then: between two neighbours."""

NUDGES = (0.9, 0.95, 1.05, 1.1)
"""By what each end of an affine range is moved afterwards, while the other end stays."""

REFITS = 2
"""How often the scale is fitted to the codes, and the codes to the scale: a third time gains less than 0.1 %."""

FREE = frozenset(("enabled", "noise", "qmax", "qmin"))
"""Extras that mean the same with another scale."""

Rounding: TypeAlias = Callable[[QParams], Tensor]
"""From qparams to the rounded weight."""


@public
def clip_solve(weight: Tensor, second: Tensor, scheme: QScheme, qparams: QParams, *, axis: Axis = 0) -> QParams:
    """The scale and zero point of a weight with the least error at its layer's output.

    For each scale, the least of ``sum_r D_r H D_r``, ``D = W - Q(W)`` over the elements of the scale and ``H`` the second
    moments of the rows that the weight multiplies, as far as they belong to these elements. Tried are shares of the range of
    the weight; then, on an affine grid, each end of the range by itself; then the scale that fits the codes best,
    ``s = (u H w) / (u H u)`` with ``u`` the codes less their zero point. What was given is kept where nothing is better.

    Args:
      weight: of any shape, floating.
      second: ``(n, n)`` or ``(G, n, n)``, see :class:`~sophq_func.numerics.moments.Moments`.
      scheme: the grid: integers, per tensor, channel, group or block.
      qparams: to start from; bounds in its ``extras`` replace those of the scheme.
      axis: of the output channels, where the scheme has one scale for the tensor.

    Returns:
      Qparams of the same shapes, dtypes and extras. No gradient.

    Raises:
      StateError: second moments of another number of columns, or that are not finite.

    Example:
      >>> scheme = QScheme(bits=2, symmetric=False)
      >>> weight = torch.randn(4, 256)
      >>> start = range_to_qparams(weight.min(), weight.max(), scheme)
      >>> found = clip_solve(weight, torch.eye(256), scheme, start)
      >>> error = lambda qp: (fake_quantize(weight, qp, scheme, "kernel") - weight).square().sum()
      >>> bool(error(found) < 0.7 * error(start))
      True
    """
    check_reals("clip_solve", {"weight": weight, "second": second}, floating=True)
    check_alone("clip_solve: qparams", qparams, scheme)
    check_second("clip_solve", rows(weight, PerChannel(output_axis(scheme, axis))).shape[-1], second)
    work = working(weight.detach())
    form = form_of(work, second.detach().to(work.dtype), scheme, axis)
    search = Search(work, scheme, form, lambda qp: fake_quantize(work, qp, scheme, "kernel"))
    return _clipped(search, qparams)


class Search(NamedTuple):
    """A weight whose scales are searched.

    Attributes:
      weight: as its quantizer sees it, in float32 or wider.
      scheme: of the weight.
      form: of the error of each scale.
      rounded: from qparams to the rounded weight.
    """

    weight: Tensor
    scheme: QScheme
    form: Form
    rounded: Rounding

    def error(self, qparams: QParams) -> Tensor:
        """The error of each scale, scale-shaped."""
        change = self.rounded(qparams) - self.weight
        return self.form(change, change)


class Best(NamedTuple):
    """The best qparams so far for each scale, and their errors."""

    qparams: QParams
    error: Tensor

    def or_better(self, search: Search, new: QParams) -> Best:
        """For each scale, the new qparams where their error is smaller; NaN is never smaller."""
        error = search.error(new)
        is_better = error < self.error
        zero = torch.where(is_better, new.zero_point.to(self.qparams.zero_point.dtype), self.qparams.zero_point)
        scale = torch.where(is_better, new.scale, self.qparams.scale)
        return Best(self.qparams._replace(scale=scale, zero_point=zero), torch.where(is_better, error, self.error))


def _clipped(search: Search, start: QParams) -> QParams:
    """The best qparams of integers."""
    best = Best(start, search.error(start))
    ranged = partial(_with_range, start, search.scheme)
    lo, hi = min_max(search.weight, search.scheme.granularity)
    for ratio in RATIOS:
        best = best.or_better(search, ranged(ratio * lo, ratio * hi))
    lo, hi = qparams_to_range(best.qparams, search.scheme)
    for ratio in FINER:
        best = best.or_better(search, ranged(ratio * lo, ratio * hi))
    if not search.scheme.symmetric:
        lo, hi = qparams_to_range(best.qparams, search.scheme)
        for nudge in NUDGES:
            best = best.or_better(search, ranged(nudge * lo, hi))
        lo, hi = qparams_to_range(best.qparams, search.scheme)
        for nudge in NUDGES:
            best = best.or_better(search, ranged(lo, nudge * hi))
    if not search.scheme.pot_scale:
        for _ in range(REFITS):
            best = best.or_better(search, _refitted(search, best.qparams))
    return best.qparams


def _with_range(start: QParams, scheme: QScheme, lo: Tensor, hi: Tensor) -> QParams:
    """Qparams that cover a range, with the bounds and other extras of those given."""
    found = range_to_qparams(lo, hi, scheme, limits=bounds(start, scheme))
    return found._replace(extras=start.extras)


def _refitted(search: Search, qparams: QParams) -> QParams:
    """The scales that are best for the codes of these qparams: ``(u H w) / (u H u)``, ``u`` the rounded weight in steps."""
    rounded = search.rounded(qparams)
    ratio = search.form(rounded, search.weight) / search.form(rounded, rounded)
    # where all codes are 0, or a scale would turn negative, it stays
    scale = torch.where((ratio > 0) & ratio.isfinite(), qparams.scale * ratio, qparams.scale)
    return qparams._replace(scale=scale.to(qparams.scale.dtype).clamp(min=EPS))


def _scaled(search: Search, start: QParams) -> QParams:
    """The best qparams of values that are no integers: shares of the given scale."""
    best = Best(start, search.error(start))
    for ratio in RATIOS:
        best = best.or_better(search, start._replace(scale=ratio * start.scale))
    return best.qparams


@algorithm("clip", measure=layer_errors)
@public
def clip(
    q: Quantized,
    params: Given,
    qparams: Mapping[str, QParams],
    batches: Iterable[Tree],
    *,
    where: Where = None,
    blocks: str | None = None,
    progress: bool = True,
) -> tuple[Given, QParamsDict]:
    """Ranges of the weights that are best for the outputs of their layers: :func:`clip_solve` on each, params unchanged.

    What the weights multiply is measured in the float model, block by block. It takes some thirty roundings of each weight.
    It helps most at 2 to 4 bits, alone or before :func:`gptq`; at 8 bits there is nothing to clip.

    Args:
      q: a quantized model; it is run in eval mode.
      params: as :func:`sophq_func.params_of` returns them.
      qparams: from ``q.calibrate``: what the search starts from.
      batches: as of :meth:`Quantized.calibrate`.
      where: which weights: a name, glob, path of a module, type, or predicate on the site, or several of these; by default
        all.
      blocks: a glob of module paths, see :meth:`Quantized.blocks`.
      progress: see :meth:`Quantized.calibrate`.

    Returns:
      The params as they were given, and qparams with other scales and zero points of weights. A weight whose inputs no run
      shows (an embedding) keeps its own.

    Raises:
      ConfigError: ``where`` fits no weight; a weight whose scale is no field that can be chosen.
      StateError: names that are missing or unknown, no batches, a frozen model.

    Example:
      >>> import torch, sophq_func as sq
      >>> _ = torch.manual_seed(0)
      >>> model, x = torch.nn.Linear(8, 3), torch.randn(32, 8) @ torch.randn(8, 8)
      >>> config = sq.QuantConfig(chip=None, weight=sq.override(bits=2), activation=None)
      >>> q = sq.quantize(model, config, example_args=(x,))
      >>> params = sq.params_of(model)
      >>> start = q.calibrate(params, [x], progress=False)
      >>> _, clipped = sq.algorithms.clip(q, params, start, [x], progress=False)
      >>> error = lambda qp: (q.apply(params, qp, x) - model(x)).square().mean()
      >>> bool(error(clipped) < error(start))
      True
    """
    check_flags("clip", {"progress": progress})
    start = begin("clip", q, params, qparams, where)
    q = start.q
    raise_all([problem for name in start.weights for problem in _problems(start, name)], ConfigError)
    units = units_of(q, start.weights, blocks)
    walk = Walk(q, start.params, as_batches("clip", batches), units, None)
    new = dict(start.qparams)
    for unit, found in walked(walk, shown(units, "clip", progress)):
        for name in unit.names:
            if name not in found:
                LOG.info("clip: %s keeps its range: no run shows what it multiplies", name)
            else:
                new[name] = clipped(start.weights[name], start.params, start.qparams[name], found[name])
    return start.result(start.params, new)


def _problems(start: Start, name: str) -> Iterator[str]:
    """Why the scale of a weight cannot be chosen."""
    weight, qparams = start.weights[name], start.qparams[name]
    where, kind, fix = f"clip: {name}", weight.config.fake_quantize, "where=, to leave it out"
    doubled = qparams._replace(scale=2 * qparams.scale)
    learned = sorted(qparams.extras.keys() - FREE)
    if weight.scheme.dynamic:
        yield explain(where, "a dynamic scheme has no range", because="each tensor gives its own", fix=fix)
    elif learned:
        because = f"its {' and '.join(learned)} belong to the scale that it has"
        yield explain(where, f"the scale of {kind} cannot change", because=because, fix=fix)
    elif not weight.fake_quantize.scaled or not torch.equal(
        weight.fake_quantize.grid(doubled, weight.scheme).scale, doubled.scale
    ):
        yield explain(where, f"{kind} has no scale to choose", because="other fields decide it", fix=fix)


def clipped(weight: WeightQuantizer, params: Mapping[str, Tensor], qparams: QParams, moments: Moments) -> QParams:
    """The qparams of one weight of a model, see :func:`clip`; as given where the moments are not those of its rows.

    Args:
      weight: the quantizer.
      params: of the model, by name.
      qparams: to start from.
      moments: of what the weight multiplies.
    """
    seen, scheme = working(weight.seen(params)), weight.scheme
    if not fits(moments, seen, weight):
        return qparams
    form = form_of(seen, moments.second.to(seen.dtype), scheme, weight.output_axis)
    if weight.fake_quantize.integer:
        return _clipped(Search(seen, scheme, form, lambda qp: fake_quantize(seen, qp, scheme, "kernel")), qparams)
    return _scaled(Search(seen, scheme, form, lambda qp: weight.fake_quantize.apply(seen, qp, scheme)), qparams)
