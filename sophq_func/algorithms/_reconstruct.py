"""Reconstruction: unit by unit, weights and scales are learned such that each unit makes what it makes in float."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from sophq_func.algorithms._adam import Optimizer, adam
from sophq_func.algorithms._fit import Fit, Options
from sophq_func.algorithms._rounding import why_not
from sophq_func.algorithms.contract import Start, as_batches, begin, reference_of
from sophq_func.algorithms.resume import Resumed, StrPath
from sophq_func.algorithms.units import Stream, Unit, units_of
from sophq_func.config.register import algorithm
from sophq_func.core.arguments import MOST_REPEATS, is_count
from sophq_func.core.errors import ConfigError, PlanError, check_flags, explain, raise_all, unknown
from sophq_func.core.logs import ALGORITHMS
from sophq_func.core.modes import is_plain
from sophq_func.core.progress import shown
from sophq_func.core.public import public
from sophq_func.core.pytree import tree_map
from sophq_func.core.types import Given, Tree
from sophq_func.model.engine import QParamsDict
from sophq_func.model.flat import flat, merge
from sophq_func.model.quantized import Quantized
from sophq_func.model.select import Where
from sophq_func.numerics.contracts import QParams

Setting: TypeAlias = tuple[dict[str, Tensor], QParamsDict]
"""Params by name, and qparams."""

Learn: TypeAlias = Literal["rounding", "scales", "both"]
"""What is learned."""

Settled: TypeAlias = tuple[dict[str, Tensor], QParamsDict]
"""Params and qparams of the whole model, as the units so far leave them."""

ROUNDING_RATE = 0.1
"""Adam's rate for the rounding: from one half, an ``alpha`` is decided after 24 steps in one direction.

With it, and the defaults of ``weight`` and ``beta``, nearly all roundings are decided after 300 steps. With the paper's
0.01 and (20, 2), made for 20,000 steps, half of them are not after 150, and what was learned is lost when they are rounded.
"""

SCALE_RATE = 0.002
"""Adam's rate for scales, as a share of the scale in a step; it falls to 0 along a cosine."""


@algorithm("reconstruct", rounds=True, resumes=True, options={"steps": 4, "rows": 2})
@public
def reconstruct(
    q: Quantized,
    params: Given,
    qparams: Mapping[str, QParams],
    batches: Iterable[Tree],
    *,
    units: str | Sequence[str] = "block",
    learn: Learn = "both",
    drop: float = 0.0,
    steps: int = 300,
    rows: int = 32,
    weight: float = 1.0,
    warm_up: float = 0.2,
    beta: tuple[float, float] = (4.0, 2.0),
    optimizer: Optimizer | None = None,
    scale_optimizer: Optimizer | None = None,
    generator: torch.Generator | None = None,
    reference: Given | None = None,
    where: Where = None,
    checkpoint: StrPath | None = None,
    progress: bool = True,
) -> tuple[Given, dict[str, QParams]]:
    """Round each weight up or down, and choose scales, such that each unit of a model makes what it makes in float.

    Without labels. Unit by unit in execution order, with the units before it done, Adam minimizes ``E |y - t|**2 / E |t|**2
    + weight mean(1 - |2 h - 1|**beta)``: ``t`` is what the unit makes in float, ``h`` in [0, 1] the rounding of each element
    (AdaRound, Nagel et al., arXiv:2004.10568; by blocks BRECQ, Li et al., arXiv:2102.05426; with ``drop`` QDrop, Wei et
    al., arXiv:2203.05740). Both terms are free of units, so that one ``weight`` fits layers of every size. At the end of a
    unit ``h`` is 0 or 1. A unit whose error would be larger than with weights rounded to the nearest is rounded to the
    nearest.

    Weights whose rounding cannot be learned (embeddings, grids that a threshold decides) are rounded to the nearest.
    Beyond the model, memory holds what one unit reads and makes for all batches. Where a unit reads what the unit before
    returns, only units are run; elsewhere each batch is run twice up to it.

    Args:
      q: a quantized model, in evaluation mode and not frozen.
      params, qparams: see :meth:`Quantized.apply`.
      batches: calls of the model, as for ``q.calibrate``.
      units: ``"layer"``; ``"block"``, the blocks of ``q.blocks()`` and the layers outside of them; or paths of modules.
        Weights that functions outside of modules multiply with are learned last, on the output of the model.
      learn: ``"rounding"`` of weights; ``"scales"`` of weights and values; ``"both"``: the rounding, and the scales of
        values.
      drop: probability that an element of a value stays float while a unit is learned; 0.5 in QDrop.
      steps: of the optimizer, for each unit.
      rows: how many samples of a batch a step reads. Where the tensors of a batch do not all have the same first axis, it
        reads the whole batch.
      weight: factor of the regularizer.
      warm_up: share of the steps without regularizer.
      beta: exponent of the regularizer, at its start and at its end.
      optimizer: of the rounding: a pair ``(init, update)``, such as one of torchopt's; by default
        ``sq.algorithms.adam(0.1)``.
      scale_optimizer: of scales, as multiples of what they are; by default Adam with a rate of 0.002 that falls to 0.
      generator: chooses batches, rows, and what is dropped; by default one with the seed 0.
      reference: params of the float model whose outputs are wanted, where an algorithm has changed ``params`` before; by
        default ``params``.
      where: which weights: names, globs, paths, types or predicates; by default all.
      checkpoint: path of a file that keeps the units that are done; a later call with the same arguments goes on there. It
        does not know an optimizer of your own.
      progress: show how far it is.

    Returns:
      New params, with the weights on their grids; new qparams, with other scales of values.

    Raises:
      ConfigError: an option out of its range, or a ``where`` that fits nothing.
      PlanError: none of the weights has a rounding that can be learned.
      StateError: no batches, a frozen model or one in training mode, a checkpoint of another call.

    Differs from sophgo-mq: any layer, with its BatchNorm folded in; quantizers outside of the units stay on; the loss and
    the regularizer are means; seeded.

    Example:
      >>> import torch, sophq_func as sq
      >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).eval()
      >>> x = torch.randn(64, 8)
      >>> q = sq.quantize(model, sq.QuantConfig(weight=sq.override(bits=3)), example_args=(x,))
      >>> params = sq.params_of(model)
      >>> qparams = q.calibrate(params, [x], progress=False)
      >>> better = reconstruct(q, params, qparams, [x], steps=100, progress=False)
      >>> error = lambda p, qp: (q.apply(p, qp, x) - model(x)).square().mean().item()
      >>> error(*better) < error(params, qparams)
      True
    """
    check_flags("reconstruct", {"progress": progress})
    _check(learn, drop, steps, rows, weight, warm_up, beta)
    _check_optimizers(optimizer, scale_optimizer)
    start = begin("reconstruct", q, params, qparams, where)
    data = as_batches("reconstruct", batches)
    exact = reference_of("reconstruct", start, reference)
    weights = {name: quantizer for name, quantizer in start.weights.items() if not why_not(quantizer)}
    _check_weights(start, weights.keys())
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    options = Options(
        learn in ("rounding", "both"),
        learn in ("scales", "both"),
        drop,
        steps,
        rows,
        weight,
        warm_up,
        beta,
        optimizer or adam(ROUNDING_RATE),
        scale_optimizer or adam(lambda count: SCALE_RATE * 0.5 * (1 + torch.cos(math.pi * count / steps))),
    )
    parts = units_of("reconstruct", start, units, weights)
    numbers = (*options[:8], [unit.part.path for unit in parts], sorted(weights))
    call = ("reconstruct", numbers, q.plan.digest(), start.params, flat(start.qparams), exact, data, generator.get_state())
    done = Resumed("reconstruct", checkpoint, call)
    new, new_qparams = _with(start.params, start.qparams, done.tensors)
    if done.step:
        generator.set_state(done.tensors["generator"])
    stream = Stream(start, exact, data, parts)
    for place, unit in enumerate(shown(parts, "reconstruct", progress)):
        if place < done.step:
            continue
        improved = _improved(unit, stream, exact, (new, new_qparams), options, generator)
        kept = done.keep({**_changed((new, new_qparams), improved), "generator": generator.get_state()})
        new, new_qparams = _with(*improved, kept)
    return start.result(*_on_grids(start, new, new_qparams, weights.keys()))


def _check(learn: str, drop: float, steps: int, rows: int, weight: float, warm_up: float, beta: tuple[float, float]) -> None:
    """Raise a :class:`ConfigError` that names every option out of its range."""
    problems = [] if learn in get_args(Learn) else [unknown("reconstruct", "learn", learn, get_args(Learn))]
    ranges = {
        "drop": (drop, 0 <= drop < 1, "a number from 0, less than 1"),
        "steps": (steps, is_count(steps), f"an int from 1 to {MOST_REPEATS}"),
        "rows": (rows, is_count(rows, most=sys.maxsize), "an int >= 1"),
        "weight": (weight, weight >= 0, "a number >= 0"),
        "warm_up": (warm_up, 0 <= warm_up <= 1, "a number from 0 to 1"),
        "beta": (beta, len(beta) == 2 and min(beta) > 0, "two positive numbers"),
    }
    problems += [
        explain("reconstruct", f"{name} is out of its range", got=got, allowed=allowed)
        for name, (got, fits, allowed) in ranges.items()
        if not fits
    ]
    raise_all(problems)


def _check_optimizers(*optimizers: object) -> None:
    for given in optimizers:
        if given is not None and not all(callable(getattr(given, name, None)) for name in ("init", "update")):
            allowed, fix = "a pair of functions (init, update), as those of optax", "sq.algorithms.adam(0.01)"
            raise ConfigError(explain("reconstruct", "this is no optimizer", got=given, allowed=allowed, fix=fix))


def _check_weights(start: Start, learned: Iterable[str]) -> None:
    """Say which weights are rounded to the nearest; a :class:`PlanError` where all are."""
    kept = {name: why_not(quantizer) for name, quantizer in start.weights.items() if name not in set(learned)}
    for name, reason in kept.items():
        ALGORITHMS.info("reconstruct: %s is rounded to the nearest, as %s", name, reason)
    if len(kept) == len(start.weights):
        name, reason = next(iter(kept.items()), ("no weight", "the plan has none"))
        fix = 'weight=sq.override(fake_quantize="fixed")'
        raise PlanError(explain("reconstruct", f"the rounding of {name} cannot be learned", because=reason, fix=fix))


def _improved(
    unit: Unit,
    stream: Stream,
    exact: Mapping[str, Tensor],
    so_far: Settled,
    options: Options,
    generator: torch.Generator,
) -> Settled:
    """Params and qparams with one more unit done."""
    samples = stream.samples(unit, *so_far)
    fit = Fit(unit, *so_far, exact, options, generator)
    nearest = fit.settled(None)
    found = fit.settled(fit.learn(samples))
    before, after = fit.error(*nearest, samples), fit.error(*found, samples)
    path, errors = unit.part.path or "model", [float(e) if is_plain([e]) else math.nan for e in (before, after)]
    ALGORITHMS.info("reconstruct: %s: relative error %.4g to the nearest, %.4g", path, *errors)
    best = _chosen(after <= before, found, nearest)  # not where it is NaN
    stream.leave(unit, *best)
    return best


def _chosen(which: Tensor, found: Settled, nearest: Settled) -> Settled:
    """The first setting where a condition of shape ``()`` holds, else the second; under a ``vmap`` member by member."""
    if is_plain([which]):
        return found if which else nearest
    chosen: Settled = tree_map(lambda one, other: one if one is other else torch.where(which, one, other), found, nearest)
    return chosen


def _changed(before: Setting, after: Setting) -> dict[str, Tensor]:
    """What a step has made, as a file keeps it."""
    (old, old_qparams), (new, new_qparams) = before, after
    leaves = flat(old_qparams)
    tensors = {f"params/{name}": tensor for name, tensor in new.items() if tensor is not old[name]}
    return tensors | {f"qparams/{name}": leaf for name, leaf in flat(new_qparams).items() if leaf is not leaves[name]}


def _with(params: Mapping[str, Tensor], qparams: Mapping[str, QParams], kept: Mapping[str, Tensor]) -> Setting:
    """Params and qparams, of which some are those that a file keeps."""
    new = {name: kept.get(f"params/{name}", tensor) for name, tensor in params.items()}
    leaves = {name: kept.get(f"qparams/{name}", leaf) for name, leaf in flat(qparams).items()}
    return new, merge(leaves, {})


def _on_grids(
    start: Start, params: Mapping[str, Tensor], qparams: QParamsDict, learned: Iterable[str]
) -> tuple[dict[str, Tensor], QParamsDict]:
    """Params in which the other weights are rounded to the nearest, so that all lie on their grids."""
    new = dict(params)
    for name in start.weights.keys() - set(learned):
        weight = start.weights[name]
        new[weight.site.parameter] = weight.quantize(params, qparams[name]).detach()
    return new, qparams


@public
def adaround(
    q: Quantized, params: Given, qparams: Mapping[str, QParams], batches: Iterable[Tree], **options: Any
) -> tuple[Given, dict[str, QParams]]:
    """:func:`reconstruct` layer by layer, the rounding alone (AdaRound, arXiv:2004.10568)."""
    return reconstruct(q, params, qparams, batches, **{"units": "layer", "learn": "rounding", **options})


@public
def brecq(
    q: Quantized, params: Given, qparams: Mapping[str, QParams], batches: Iterable[Tree], **options: Any
) -> tuple[Given, dict[str, QParams]]:
    """:func:`reconstruct` block by block, rounding and scales of values (BRECQ, arXiv:2102.05426)."""
    return reconstruct(q, params, qparams, batches, **{"units": "block", "learn": "both", **options})


@public
def qdrop(
    q: Quantized, params: Given, qparams: Mapping[str, QParams], batches: Iterable[Tree], **options: Any
) -> tuple[Given, dict[str, QParams]]:
    """:func:`brecq` in which half of the elements of values stay float while a block is learned (QDrop, 2203.05740)."""
    return reconstruct(q, params, qparams, batches, **{"units": "block", "learn": "both", "drop": 0.5, **options})
