"""Scaling pairs of a model: what becomes of its params and qparams, and of the errors of the weights that change."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.algorithms._measure import relative_error
from sophq_func.algorithms._pairs import Linear, Pair, Skipped, found_pairs
from sophq_func.algorithms._walk import Unit, Walk, units_of
from sophq_func.algorithms.contract import Start, as_batches, begin, fits, observed_again, width_of
from sophq_func.core.errors import ConfigError, explain
from sophq_func.core.logs import ALGORITHMS as LOG
from sophq_func.core.modes import is_plain
from sophq_func.core.types import Given, Tree
from sophq_func.model.engine import QParamsDict
from sophq_func.model.quantized import Quantized
from sophq_func.model.select import Where, selected
from sophq_func.model.settings import with_bits
from sophq_func.model.weight_quantizer import Params
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.moments import Moments


class Setting(NamedTuple):
    """Params, qparams, and the moments of what each weight multiplies, as far as pairs are scaled.

    Attributes:
      params: by name.
      qparams: by quantizer.
      moments: by weight quantizer.
    """

    params: dict[str, Tensor]
    qparams: QParamsDict
    moments: dict[str, Moments]


def scaled(start: Start, setting: Setting, pair: Pair, factors: Tensor) -> Setting:
    """A setting with one more pair scaled, and the ranges of the weights that changed observed again."""
    changed = pair.scaled(setting.params, factors)
    params = {**setting.params, **changed}
    qparams = {**setting.qparams, **observed_again(start, params, touched(start, pair))}
    read = {reader.weight for reader in pair.readers}
    moments = dict(setting.moments)
    for name, own in moments.items():
        if start.weights[name].site.parameter in read:
            moments[name] = divided(own, factors)
    return Setting(params, qparams, moments)


class Queue:
    """The pairs that are still to be scaled, and the moments that they need: of a unit, and of weights before it.

    Args:
      start: what the algorithm starts from.
      pairs: in execution order.
    """

    def __init__(self, start: Start, pairs: Sequence[Pair]) -> None:
        self._start = start
        self._left = list(pairs)

    def take(self, unit: Unit) -> list[Pair]:
        """The pairs whose first reader is in a unit."""
        mine = [pair for pair in self._left if next(iter(quantized_readers(self._start, pair))) in unit.names]
        self._left = [pair for pair in self._left if pair not in mine]
        return mine

    def needed(self, setting: Setting, new: Mapping[str, Moments]) -> Setting:
        """A setting with the moments of a unit's weights, and those of before that a pair in this or a later unit needs."""
        later = {name for pair in self._left for name in touched(self._start, pair)}
        kept = {name: own for name, own in setting.moments.items() if name in later}
        return setting._replace(moments={**kept, **fitting(self._start, new)})


class Scaling(NamedTuple):
    """What an algorithm that scales pairs begins with.

    Attributes:
      start: the model, params and qparams.
      batches: a list.
      pairs: those that are chosen, in execution order.
      units: in which the weights of the pairs lie.
      walk: through these, in float.
      setting: nothing scaled yet.
      queue: of the pairs.
    """

    start: Start
    batches: Sequence[Tree]
    pairs: list[Pair]
    units: list[Unit]
    walk: Walk
    setting: Setting
    queue: Queue


def scaling(
    caller: str,
    q: Quantized,
    params: Given,
    qparams: Mapping[str, QParams],
    batches: Iterable[Tree],
    where: Where,
    blocks: str | None,
) -> Scaling:
    """Check the arguments, find the pairs, and say which values have none.

    Args:
      caller: the algorithm, for errors and the log.
      q, params, qparams, batches, where, blocks: see :func:`sophq_func.algorithms.awq`.
    """
    start, batches = begin(caller, q, params, qparams), as_batches(caller, batches)
    pairs, skipped = found_pairs(start, batches[0])
    report_skipped(caller, skipped)
    chosen = chosen_pairs(start, pairs, selected(caller, start.q.plan, where))
    units = units_of(start.q, [name for pair in chosen for name in touched(start, pair)], blocks)
    walk = Walk(start.q, start.params, batches, units, None)
    setting = Setting(dict(start.params), dict(start.qparams), {})
    return Scaling(start, batches, chosen, units, walk, setting, Queue(start, chosen))


def quantized_readers(start: Start, pair: Pair) -> dict[str, Linear]:
    """The linear layers that read a pair's value and whose weights are quantized, by weight quantizer."""
    readers = {reader.weight: reader for reader in pair.readers}
    parameters = {name: weight.site.parameter for name, weight in start.weights.items()}
    return {name: readers[parameter] for name, parameter in parameters.items() if parameter in readers}


def chosen_pairs(start: Start, pairs: Iterable[Pair], names: Collection[str]) -> list[Pair]:
    """The pairs with quantized readers, all of which are among some weights."""
    readers = [(pair, quantized_readers(start, pair).keys()) for pair in pairs]
    return [pair for pair, own in readers if own and own <= set(names)]


def fitting(start: Start, moments: Mapping[str, Moments]) -> dict[str, Moments]:
    """Those of some moments that are of the rows which the weights multiply."""
    weights = {name: start.weights[name] for name in moments}
    return {name: own for name, own in moments.items() if fits(own, weights[name].seen(start.params), weights[name])}


def divided(moments: Moments, factors: Tensor) -> Moments:
    """The moments of rows ``x / factors``.

    Example:
      >>> from sophq_func.numerics.moments import moments_of
      >>> x = torch.tensor([[2.0, 3.0]])
      >>> divided(moments_of(x), torch.tensor([2.0, 1.0])).second
      tensor([[1., 3.],
              [3., 9.]])
    """
    return Moments(
        moments.count,
        moments.mean / factors,
        moments.mean_abs / factors,
        moments.amax / factors,
        moments.second / (factors[:, None] * factors),
    )


def touched(start: Start, pair: Pair) -> list[str]:
    """The weight quantizers whose weights change where a pair is scaled."""
    parameters = {reader.weight for reader in pair.readers} | {fold.parameter for fold in pair.folds}
    return [name for name, weight in start.weights.items() if weight.site.parameter in parameters]


def values_of(pairs: Iterable[Pair]) -> set[str]:
    """The names of all values that are scaled where some pairs are."""
    return {value for pair in pairs for value in pair.values}


def error_of(start: Start, setting: Setting, names: Iterable[str]) -> Tensor:
    """The sum of the relative errors of some weights; of those whose moments are known."""
    total = torch.zeros(())
    for name in names:
        if name in setting.moments:
            weight = start.weights[name]
            grid = weight.fake_quantize.grid(setting.qparams[name], weight.scheme)
            total = total + relative_error(weight, setting.params, setting.params, grid, setting.moments[name])
    return total


def with_values_observed(
    start: Start, params: Params, qparams: QParamsDict, values: Collection[str], batches: Sequence[Tree]
) -> QParamsDict:
    """The qparams, with those of some values calibrated again, at the widths that they have.

    Args:
      start: what the algorithm starts from.
      params: with which the values are other ones now, by name.
      qparams: so far.
      values: names of the values.
      batches: to calibrate on.
    """
    plan = start.q.plan
    sites = [plan.site(name) for name in plan]
    names = [site.quantizer for site in sites if site.value in values and not plan[site.quantizer].scheme.dynamic]
    if not names:
        return qparams
    given = start.engine.like(start.given, params)
    fresh = start.q.calibrate(given, batches, progress=False)
    new = dict(qparams)
    for name in names:
        width = width_of(qparams[name])
        new[name] = fresh[name] if width is None else with_bits(fresh, plan, {name: width})[name]
    return new


def report_skipped(where: str, skipped: Iterable[Skipped]) -> None:
    """Say which values are not scaled, and why."""
    for value, why in skipped:
        LOG.info("%s: %s stays as it is: %s", where, value, why)


def check_share(where: str, alpha: object) -> None:
    """Raise a :class:`ConfigError` unless this is a number from 0 to 1; one inside a transform cannot be read and passes."""
    if isinstance(alpha, Tensor) and not is_plain([alpha]):
        return
    is_scalar = isinstance(alpha, Tensor) and alpha.numel() == 1 and not alpha.is_complex()
    is_number = is_scalar or (isinstance(alpha, int | float) and not isinstance(alpha, bool))
    if not is_number or not 0 <= alpha <= 1:  # type: ignore[operator]
        raise ConfigError(
            explain(where, "this exponent means nothing", got=alpha, allowed="a number from 0 to 1", fix="alpha=0.5")
        )
