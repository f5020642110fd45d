"""Learns how to round the weights of one unit, and the scales in it, such that the unit makes what it makes in float."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad

from sophq_func.algorithms._adam import Optimizer
from sophq_func.algorithms._error import Error, floating
from sophq_func.algorithms._rounding import Rounding, undecided
from sophq_func.algorithms.units import Sample, Unit, rows_of
from sophq_func.capture.transforms import depth
from sophq_func.core.modes import is_plain, outside_of_transforms
from sophq_func.core.pytree import flatten
from sophq_func.core.types import Args, Kwargs, Tree
from sophq_func.model.engine import Engine, QParamsDict
from sophq_func.model.runner import Effect
from sophq_func.model.weight_quantizer import Params
from sophq_func.numerics import eager
from sophq_func.numerics.affine import fake_quantize
from sophq_func.numerics.contracts import QParams, as_stored
from sophq_func.numerics.ranges import bounds
from sophq_func.numerics.rectified import rectified_sigmoid
from sophq_func.numerics.scheme import QScheme

TINY = torch.finfo(torch.float32).tiny
"""Keeps the quotient finite where a target is 0 everywhere."""

ALPHA, RATIO = ".alpha", ".ratio"
"""Behind a quantizer's name, what is learned: the rounding of each element; the scale, as a multiple of what it was."""

Learned = dict[str, Tensor]


class Options(NamedTuple):
    """How a unit is learned; see :func:`sophq_func.algorithms.reconstruct`."""

    rounding: bool
    scales: bool
    drop: float
    steps: int
    rows: int
    weight: float
    warm_up: float
    beta: tuple[float, float]
    optimizer: Optimizer
    scale_optimizer: Optimizer

    def beta_at(self, step: int) -> float:
        """The exponent of the regularizer: constant while it is off, then linear from the first to the second."""
        first, last = self.beta
        done = max(0.0, (step / self.steps - self.warm_up) / (1 - self.warm_up)) if self.warm_up < 1 else 0.0
        return first + (last - first) * done

    def weight_at(self, step: int) -> float:
        """The factor of the regularizer."""
        return 0.0 if step < self.warm_up * self.steps else self.weight


class _ValueGrid(NamedTuple):
    """The grid of a value whose scale is learned.

    Attributes:
      scheme, qparams: of the quantizer.
      bounds: where they are two numbers, the outermost codes less the zero point: a grid without zero point, whose gradient
        takes half of the passes over memory.
    """

    scheme: QScheme
    qparams: QParams
    bounds: tuple[int, int] | None

    @staticmethod
    def of(scheme: QScheme, qparams: QParams) -> _ValueGrid:
        """That of a quantizer with its qparams."""
        limits = bounds(qparams, scheme)
        numbers = [qparams.zero_point, *(limit for limit in limits if isinstance(limit, Tensor))]
        if qparams.zero_point.is_floating_point() or any(t.numel() != 1 for t in numbers) or not is_plain(numbers):
            return _ValueGrid(scheme, qparams, None)
        low, high, zero = (float(number) for number in (*limits, qparams.zero_point))
        zero = 0.0 if scheme.symmetric else min(max(zero, low), high)
        whole = all(number.is_integer() for number in (low, high, zero))
        return _ValueGrid(scheme, qparams, (int(low - zero), int(high - zero)) if whole else None)

    def rounded(self, x: Tensor, ratio: Tensor) -> Tensor:
        """A value on the grid whose scale is a multiple of what it was; differentiable."""
        qparams = _times(self.qparams, ratio)
        scale = qparams.scale
        if self.bounds is None or not eager.fits(x, scale, *self.bounds):
            return fake_quantize(x, qparams, self.scheme, "quotient")
        return eager.prepared(x, scale, None, self.bounds, reciprocal=False, shifted=False)()


class Fit:
    """One unit while it is learned.

    Args:
      unit: what is learned.
      params: by name, as the units before left them.
      qparams: likewise.
      exact: params of the float model.
      options: how.
      generator: chooses rows, and what is dropped.
    """

    def __init__(
        self,
        unit: Unit,
        params: Params,
        qparams: Mapping[str, QParams],
        exact: Params,
        options: Options,
        generator: torch.Generator,
    ) -> None:
        self._unit, self._options, self._generator = unit, options, generator
        self._params, self._qparams = dict(params), dict(qparams)
        frozen, baked = unit.part.freeze(self._params, self._qparams)
        self._engine, self._baked = frozen.engine, dict(baked)
        self._roundings = {name: Rounding.of(weight, params, qparams[name]) for name, weight in unit.weights.items()}
        values = _scaled_values(frozen.engine) if options.scales else ()
        self._values = {name: _ValueGrid.of(frozen.engine.running[name].scheme, self._qparams[name]) for name in values}
        self._comparable = unit.comparable(exact)

    def start(self) -> Learned:
        """What is learned, at its start: every weight where it is in float, and every scale what it is."""
        learned: Learned = {}
        scaled = set(self._values.keys())
        if self._options.rounding:
            learned.update({name + ALPHA: rounding.start() for name, rounding in self._roundings.items()})
        elif self._options.scales:
            scaled |= self._roundings.keys()
        learned.update({name + RATIO: torch.ones_like(self._qparams[name].scale) for name in scaled})
        return dict(sorted(learned.items()))

    def learn(self, samples: Sequence[Sample]) -> Learned:
        """What is learned, after the steps."""
        options, learned = self._options, self.start()
        groups = [
            (ending, optimizer, optimizer.init(_ending(learned, ending)))
            for ending, optimizer in ((ALPHA, options.optimizer), (RATIO, options.scale_optimizer))
        ]
        for step in range(options.steps):
            sample = self._mixed(self._drawn(samples))
            gradients = self._gradients(learned, sample, options.beta_at(step), options.weight_at(step))
            for place, (ending, optimizer, state) in enumerate(groups):
                own = _ending(learned, ending)
                updates, state = optimizer.update(_ending(gradients, ending), state, params=own)
                learned = {**learned, **{name: own[name] + updates[name] for name in own}}
                groups[place] = (ending, optimizer, state)
        return learned

    def loss(self, learned: Learned, sample: Sample, beta: float, weight: float) -> Tensor:
        """The relative error of the unit's outputs, and the regularizer of roundings that are not decided."""
        shares = {name: rectified_sigmoid(alpha) for name, alpha in _ending(learned, ALPHA).items()}
        output, _ = self._engine.run_quantized(
            self._weights(learned, shares), self._qparams, self._effect(learned), sample.args, sample.kwargs
        )
        pairs = zip(floating(self._comparable(output)), floating(self._comparable(sample.target)), strict=True)
        errors = [(y - t).float().square().mean() / t.float().square().mean().clamp(min=TINY) for y, t in pairs]
        error = torch.stack(errors).mean()
        return error + weight * undecided(list(shares.values()), beta) if shares and weight else error

    def _gradients(self, learned: Learned, sample: Sample, beta: float, weight: float) -> Learned:
        """Those of the loss; by autograd's own tape, which takes a third of the time of ``torch.func.grad``.

        Under a transform, as a ``vmap`` over learning rates, the tape does not see what the transform wraps.
        """
        if depth():
            slopes: Learned = grad(self.loss)(learned, sample, beta, weight)
            return slopes
        with torch.enable_grad():
            leaves = {name: value.detach().requires_grad_() for name, value in learned.items()}
            loss = self.loss(leaves, sample, beta, weight)
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    def settled(self, learned: Learned | None) -> tuple[dict[str, Tensor], QParamsDict]:
        """Params and qparams of the whole model with what was learned, the unit's weights on their grids.

        Args:
          learned: ``None``: nothing was, and weights are rounded to the nearest.
        """
        params, qparams = dict(self._params), dict(self._qparams)
        for key, ratio in _ending(learned or {}, RATIO).items():
            name = key.removesuffix(RATIO)
            qparams[name] = qparams[name]._replace(scale=(qparams[name].scale * ratio).abs().detach())
        for name, rounding in self._roundings.items():
            alpha = (learned or {}).get(name + ALPHA)
            weight = rounding.quantizer
            parameter = weight.site.parameter
            if alpha is not None:
                params[parameter] = rounding.hard(alpha).detach()
                qparams[name] = rounding.decided(params, qparams[name])
            # by the plan's own quantizer, so that it finds the same bits again
            params[parameter] = weight.quantize(params, qparams[name]).detach()
            qparams[name] = rounding.decided(params, qparams[name])
        return params, qparams

    def error(self, params: Params, qparams: Mapping[str, QParams], samples: Sequence[Sample]) -> Tensor:
        """The relative error of the unit's outputs, as the plan computes them; shape ``()``."""
        frozen, baked = self._unit.part.freeze(params, qparams)
        error = Error()
        with frozen.engine.constant():
            for sample in samples:
                output = frozen.apply(baked, qparams, *sample.args, **sample.kwargs)
                error.add(self._comparable(output), self._comparable(sample.target))
        return error.value

    def _weights(self, learned: Learned, shares: Learned) -> dict[str, Tensor]:
        """The params with weights between two neighbours of their grids, by shares, or with scales that are learned."""
        params = dict(self._baked)
        for name, rounding in self._roundings.items():
            parameter = rounding.quantizer.site.parameter
            if name + ALPHA in shares:
                params[parameter] = rounding.soft(shares[name + ALPHA])
            elif name + RATIO in learned:
                qparams = _times(self._qparams[name], learned[name + RATIO])
                weight = rounding.quantizer
                seen = fake_quantize(weight.seen(self._params), qparams, weight.scheme, "quotient")
                params[parameter] = weight.unseen(seen, self._params)
        return params

    def _effect(self, learned: Learned) -> Effect:
        """What happens to values: they are quantized, by the scales that are learned; some elements stay as they are."""
        others, drop = self._engine.quantizing(self._qparams), self._options.drop

        def effect(name: str, x: Tensor) -> Tensor:
            ratio = learned.get(name + RATIO)
            rounded = others(name, x) if ratio is None else self._values[name].rounded(x, ratio)
            return self._dropped(rounded, x) if drop else rounded

        return effect

    def _dropped(self, rounded: Tensor, x: Tensor) -> Tensor:
        """QDrop (arXiv:2203.05740): each element stays float with a probability."""
        noise = self._random(partial(torch.rand, x.shape)).to(x.device)
        return torch.where(noise < self._options.drop, x, rounded)

    def _drawn(self, samples: Sequence[Sample]) -> Sample:
        """Some rows of one batch."""
        index = int(self._random(partial(torch.randint, len(samples), ())))
        return rows_of(samples[index], self._rows)

    def _rows(self, count: int) -> Tensor:
        return self._random(partial(torch.randperm, count))[: self._options.rows]

    def _random(self, draw: Callable[..., Tensor]) -> Tensor:
        """Random numbers, the same for all members of a ``vmap`` around the algorithm."""
        return outside_of_transforms(lambda: draw(generator=self._generator, device=self._generator.device), 0)

    def _mixed(self, sample: Sample) -> Sample:
        """A sample whose elements are those of the float model with the probability of dropping."""
        if not self._options.drop:
            return sample
        given, rebuild = flatten((sample.args, sample.kwargs))
        wanted, _ = flatten(sample.exact)
        mixed: tuple[Args, Kwargs] = rebuild([self._either(x, y) for x, y in zip(given, wanted, strict=True)])
        return sample._replace(args=mixed[0], kwargs=mixed[1])

    def _either(self, rounded: Tree, exact: Tree) -> Tree:
        is_floating = isinstance(rounded, Tensor) and rounded.is_floating_point()
        return self._dropped(rounded, exact) if is_floating else rounded


def _ending(learned: Mapping[str, Tensor], ending: str) -> Learned:
    return {name: value for name, value in learned.items() if name.endswith(ending)}


def _times(qparams: QParams, ratio: Tensor) -> QParams:
    """Qparams with a multiple of the scale."""
    return qparams._replace(scale=qparams.scale * ratio)


def _scaled_values(engine: Engine) -> frozenset[str]:
    """The quantizers of values whose scales can be learned: of integers, with one grid for all runs."""
    return frozenset(
        name
        for name, quantizer in engine.running.items()
        if quantizer.site.role == "activation"
        and quantizer.fake_quantize.integer
        and quantizer.fake_quantize.grid is as_stored
        and not quantizer.scheme.dynamic
        and not quantizer.scheme.pot_scale
        and not quantizer.config.observe_only
        and not quantizer.fake_quantize.noise
    )
