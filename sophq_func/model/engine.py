"""A plan bound to a skeleton: every quantizer made ready, and runs of the model with them.

:class:`~sophq_func.model.quantized.Quantized` is its face for users; what converts or exports a model uses it directly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sophq_func.capture.arguments import arguments
from sophq_func.capture.skeleton import Skeleton
from sophq_func.core.modes import is_compiling
from sophq_func.model.bind import make_quantizers, state_types, value_quantizer
from sophq_func.model.finite import check_reached
from sophq_func.model.loop import Loop, Watch
from sophq_func.model.runner import Effect
from sophq_func.model.schedule import Schedule
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.model.weight_quantizer import Params, WeightQuantizer, quantize_weights, round_biases
from sophq_func.numerics.contracts import QParams, State
from sophq_func.numerics.scheme import PerToken
from sophq_func.planning.plan import Plan

OState = dict[str, State]
QParamsDict = dict[str, QParams]


class Engine:
    """What a plan means for one model. Nothing in it changes once it is made.

    Attributes:
      skeleton: the model without its weights.
      plan: the plan.
      frozen: weights come as they are.
      loop: runs the model with an effect on its planned values.
      weights: the weight quantizers.
      acting: those of them that change their weight.
      deferrable: parameters whose quantizer may wait until their layer starts.
      running: by name, the quantizers that act while the model runs.
      pieces: all quantizers by name.
      sources: in a part, the quantizers outside of it whose scales round biases in it.
      types: classes of the entries of an ``"ostate"`` and of ``"qparams"``, by quantizer.
      known: in a part, names of all quantizers of the whole model: states may have entries for them.

    Args:
      skeleton: the model, or a part of it.
      plan: of the same.
      frozen: weights come as they are.
      whole: of a part, the plan of the whole model.
    """

    def __init__(self, skeleton: Skeleton, plan: Plan, frozen: bool = False, whole: Plan | None = None) -> None:
        self.skeleton, self.plan, self.frozen = skeleton, plan, frozen
        copied = frozenset(plan.written) if whole is None else None  # what a part writes into is not known
        self.loop = Loop(skeleton, Schedule(plan), arguments(skeleton.entry), copied)
        self.weights, self.running = make_quantizers(skeleton, plan)
        self.acting = () if frozen else tuple(weight for weight in self.weights if not weight.config.observe_only)
        self.deferrable = frozenset(w.site.parameter for w in self.acting if _is_read_by_its_layer(w, skeleton))
        self.pieces: dict[str, WeightQuantizer | RunQuantizer] = {w.site.quantizer: w for w in self.weights}
        self.pieces.update(self.running)
        outside = {} if whole is None else {w.site.source for w in self.weights if w.site.source} - self.pieces.keys()
        self.sources = {name: value_quantizer(whole, name) for name in outside} if whole is not None else {}
        self.known = frozenset(whole or ())
        self.types: dict[str, dict[str, type]] = {
            "ostate": state_types(self.pieces),
            "qparams": dict.fromkeys((*self.pieces, *self.sources), QParams),
        }

    def check(self, params: Params, state: Mapping[str, Any], where: str, what: str) -> None:
        """Raise a :class:`StateError` that names each parameter, and each entry of ``what``, that does not fit."""
        self.skeleton.check(params, where)
        self.check_state(state, what)

    def check_state(self, state: Mapping[str, Any], what: str) -> None:
        """Raise a :class:`StateError` that names each entry of ``what`` that does not fit."""
        self.plan.check(state, what, self.types[what], self.known)

    def observing(self, states: OState) -> Effect:
        """Observers see the values, and their states in ``states`` are replaced."""

        def effect(name: str, x: Tensor) -> Tensor:
            piece = self.running[name]
            if isinstance(piece.scheme.granularity, PerToken):  # another batch has other tokens
                return x
            states[name] = piece.observer.update(states[name], x, piece.scheme)
            return x

        return effect

    def quantizing(self, qparams: Mapping[str, QParams]) -> Effect:
        """Values are put on their grids."""

        def effect(name: str, x: Tensor) -> Tensor:
            piece = self.running[name]
            if piece.config.observe_only:
                return x
            if piece.config.optional:
                check_reached(name, qparams[name])
            return piece.quantize(x, qparams[name])

        return effect

    def run_quantized(
        self,
        params: Params,
        qparams: Mapping[str, QParams],
        effect: Effect,
        args: Any,
        kwargs: Any,
        watch: Watch | None = None,
    ) -> tuple[Any, dict[str, Tensor]]:
        """A run with weights on their grids: in eager, those that only a layer reads when that layer starts."""
        raw, steps = self.skeleton.detached(params), self.steps(qparams)
        waiting = () if is_compiling() or not self.loop.schedule else self.deferrable
        now = [weight for weight in self.acting if weight.site.parameter not in waiting]
        deferred = [weight for weight in self.acting if weight.site.parameter in waiting]
        new = round_biases(deferred, quantize_weights(now, raw, steps), steps)
        later = {w.site.parameter: w.prepared(raw, steps[w.site.quantizer]) for w in deferred}
        return self.loop.run(new, effect, args, kwargs, later, watch)

    def on_grids(self, params: Params, qparams: Mapping[str, QParams]) -> dict[str, Tensor]:
        """Weights and biases quantized."""
        return quantize_weights(self.acting, self.skeleton.detached(params), self.steps(qparams))

    def steps(self, qparams: Mapping[str, QParams]) -> QParamsDict:
        """The scales in force; one that its quantizer does not learn is a constant for weights and biases, too."""
        steps = {}
        for name, piece in (*self.pieces.items(), *self.sources.items()):
            own = qparams[name]
            fixed = own if "scale" in piece.fake_quantize.learnable else own._replace(scale=own.scale.detach())
            steps[name] = piece.fake_quantize.grid(fixed, piece.scheme)
        return steps


def _is_read_by_its_layer(weight: WeightQuantizer, skeleton: Skeleton) -> bool:
    """Whether a weight may wait for the layer that it belongs to, which the example called."""
    path, function, _ = weight.site.anchor
    return not function and skeleton.deferrable(path, weight.site.parameter)
