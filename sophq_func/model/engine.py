"""A plan bound to a skeleton: every quantizer ready to act, and runs of the model with them.

Users meet it as :class:`~sophq_func.model.quantized.Quantized`; conversions and exports use an :class:`Engine` directly.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from secrets import token_hex

import torch
from torch import Tensor

from sophq_func.capture.arguments import arguments, as_call, check_call
from sophq_func.capture.graph import Graph
from sophq_func.capture.skeleton import Skeleton
from sophq_func.capture.trace import retrace
from sophq_func.capture.transforms import depth, is_inside, members, on_whole, whole
from sophq_func.core.arguments import check_reals
from sophq_func.core.errors import StateError, explain, raise_all
from sophq_func.core.modes import as_constant, is_compiling, is_distributed, may_differentiate, outside_of_transforms
from sophq_func.core.public import is_absent
from sophq_func.core.pytree import sorted_dict
from sophq_func.core.types import Args, Given, Kwargs, Output, Tree
from sophq_func.model.bind import Quantizers, make_quantizers, state_types, value_quantizer
from sophq_func.model.finite import check_reached
from sophq_func.model.loop import Loop, MakeRunner
from sophq_func.model.requantizing import Requantizer
from sophq_func.model.runner import Effect
from sophq_func.model.schedule import Schedule
from sophq_func.model.states import StateCheck
from sophq_func.model.together import values_together, weights_together
from sophq_func.model.usage import refuse_absent
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.model.weight_quantizer import Params, WeightQuantizer, quantize_weights, round_biases
from sophq_func.numerics.affine import switched
from sophq_func.numerics.contracts import QParams, State
from sophq_func.numerics.granularity import PerToken
from sophq_func.numerics.kernels import Kernels, find
from sophq_func.numerics.kinds import KindCheck, kind_of
from sophq_func.planning.plan import Plan

DERIVATIVES = ("grad", "unpack_dual")
"""Functions that end a derivative: of reverse mode, and of forward mode."""

IDENTITY = "identity"
"""The attribute of an :class:`Engine` by which a compiled program knows it."""

OState = dict[str, State]
"""Observer states, by quantizer."""

QParamsDict = dict[str, QParams]
"""Qparams, by quantizer."""


class Engine:
    """A model and its plan, ready to run. Nothing in it changes once it is made, but what ``check_kinds`` remembers.

    Attributes:
      identity: a name that no other engine has.
      skeleton: the model without its weights, or a part of it. Other rooms use the methods below instead.
      plan: the plan of the same.
      frozen: weights are used as they are given, not quantized.
      whole: for a part of a model, the plan of the whole model; else ``None``.
      kernels: whether quantizers use a compiled kernel, see :func:`sophq_func.build`.
      loop: runs the model with an effect on its planned values.
      weights: the weight quantizers.
      acting: the weight quantizers that change their weight. None in a frozen model; never one that only observes.
      deferrable: parameters that may be quantized as late as when their layer starts, see :meth:`run_quantized`: large ones,
        since small ones are rounded together.
      running: by name, the quantizers that act while the model runs.
      quantizers: all quantizers, by name.
      requantizers: by name, of those among them that simulate a chip's multipliers.
      unsigned: names of those whose zero point is 0, whatever is learned.
      sources: in a part, by name, the quantizers outside of it whose scales the part needs.
      differentiates: whether the model itself takes a derivative in its forward.
      check_kinds: raises a :class:`StateError` that names all qparams whose shapes, dtypes, extras or numbers are not the
        plan's, see :class:`~sophq_func.numerics.kinds.KindCheck`.
      entry_types: for ``"ostate"`` and for ``"qparams"``, the class of each entry, by quantizer.

    Args:
      skeleton, plan, frozen, whole, kernels: see above.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        plan: Plan,
        frozen: bool = False,
        whole: Plan | None = None,
        kernels: Kernels = "auto",
    ) -> None:
        # a string, of which a compiler makes no variable, as it would of a number that differs from one call to the next
        self.identity = token_hex()
        self.skeleton = skeleton
        self.plan = plan
        self.frozen = frozen
        self.whole = whole
        self.kernels = kernels
        self.weights, self.running = make_quantizers(skeleton, plan, find(kernels))
        self.quantizers: Quantizers = {**{weight.site.quantizer: weight for weight in self.weights}, **self.running}
        requants = {name: quantizer.site.requant for name, quantizer in self.running.items()}
        self.requantizers = {name: Requantizer(requant) for name, requant in requants.items() if requant}
        self.unsigned = frozenset(name for name, quantizer in self.running.items() if quantizer.site.unsigned)
        self.acting = () if frozen else tuple(weight for weight in self.weights if not weight.config.observe_only)
        self.differentiates = any(made.function in DERIVATIVES for run in plan.runs for made in run.calls)
        shapes = {name: tensor.shape for name, tensor in skeleton.registered().items()}
        self._weights_together = weights_together(self.acting, shapes)
        self._values_together = values_together(self.running, self.unsigned | self.requantizers.keys())
        small = {weight.site.parameter for group in self._weights_together for weight in group.quantizers}
        # a derivative wraps the parameter itself, where no mode sees it
        waiting = [weight for weight in self.acting if not self.differentiates and _is_read_by_its_layer(weight, skeleton)]
        self.deferrable = frozenset(weight.site.parameter for weight in waiting) - small
        self.sources = _sources_outside(self.weights, self.requantizers.values(), self.quantizers, whole)
        scales = [name for weight in self.acting for name in (weight.site.quantizer, weight.site.source) if name]
        self._read_by_weights = tuple(dict.fromkeys(scales))
        self._needing = tuple(
            name for name, own in self.quantizers.items() if own.fake_quantize.needs and not own.config.observe_only
        )
        self._names_of_whole = frozenset(whole or ())
        self.entry_types: dict[str, dict[str, type]] = {
            "ostate": state_types(self.quantizers),
            "qparams": dict.fromkeys((*self.quantizers, *self.sources), QParams),
        }
        # those of frozen weights are not read
        read = self.running if frozen else self.quantizers
        kinds = {
            name: kind_of(quantizer.config, quantizer.scheme, quantizer.fake_quantize.learnable)
            for name, quantizer in (*read.items(), *self.sources.items())
        }
        self.check_kinds = KindCheck(kinds)
        self._check_states = StateCheck(self.quantizers, skeleton.registered())
        # A plan records into which of the model's arguments the model writes. It does not for the arguments of a part.
        copied = frozenset(plan.written) if whole is None else None
        late = frozenset(path for name in self.deferrable for path, _ in skeleton.holders(name))
        loop = Loop(skeleton, Schedule(plan, skeleton.owners()), arguments(skeleton.entry), copied, late)
        # a part shares the modules of the whole, of which a copy for each part would be too much
        self.loop = loop.bared() if whole is None else loop

    def check(self, params: Given, state: Mapping[str, State], where: str, what: str) -> Params:
        """The params by name, after a check that they and a state fit.

        Args:
          params: parameters and buffers by name; or, where the model is a function, the tree that it takes.
          state: observer states or qparams, by quantizer.
          where: the function that was called, for errors.
          what: what ``state`` is: ``"ostate"`` or ``"qparams"``.

        Raises:
          ConfigError: the call lacked one of them.
          StateError: it names each parameter, and each entry of a state, that does not fit.
        """
        if is_absent(state):
            refuse_absent(where, **{"params": params, what: state})
        named = self.skeleton.check(params, where)
        self.check_state(state, what)
        if what == "qparams":
            self.check_kinds(state)
        if what == "qparams" and is_distributed(named.values()):
            self._check_distributed(state, where)
        return named

    def _check_distributed(self, qparams: Mapping[str, State], where: str) -> None:
        """Raise a :class:`StateError` unless qparams are DTensors, as the params are: torch cannot mix the two."""
        plain = sorted(name for name in self.plan if not is_distributed([qparams[name].scale]))
        if plain:
            shown = plain[:3] + ["..."] * (len(plain) > 3)
            sentence = "params are DTensors, and qparams are plain tensors"
            fix = "tree_map(lambda t: distribute_tensor(t, mesh, [Replicate()]), qparams)"
            raise StateError(explain(where, sentence, got=shown, because="torch cannot mix them", fix=fix))

    def call(self, batch: Tree, where: str) -> tuple[Args, dict[str, Tree]]:
        """A batch as positional and keyword arguments of the model; an error names the function ``where``.

        Raises:
          StateError: it is no call of the model, or gives by position a tensor that no example gives.
        """
        args, kwargs = as_call(batch, where)
        # a part is called with other arguments than its model
        examples = self.plan.given if self.whole is None else None
        check_call(self.skeleton.entry, examples, args, kwargs, where)
        return args, kwargs

    def tree(self, params: Given, where: str) -> Given:
        """Params by name as the tree that the function takes; where the model is a module, as a sorted dict."""
        named, structure = self.skeleton.check(params, where), self.skeleton.structure
        return sorted_dict(named) if structure is None else structure.filled([named[name] for name in structure.names])

    def like(self, params: Given, named: Params) -> Given:
        """Params of the kind that was given: a dict by name, or the tree that the function takes."""
        structure = self.skeleton.structure
        return sorted_dict(named) if structure is None else structure.like(params, named)

    def check_state(self, state: Mapping[str, State], what: str) -> None:
        """:meth:`check` without params. The state of a part may have entries for the rest of the whole model."""
        # a compiler asks at each call for what was read here, and need ask nothing else about the engine, see ``guards``
        assert self.identity
        self.plan.check(state, what, self.entry_types[what], self._names_of_whole)
        if what == "ostate":
            self._check_states(state)
        if what == "qparams" and self._needing:
            raise_all([problem for name in self._needing for problem in self._lacking(name, state[name])], StateError)

    def _lacking(self, name: str, qparams: QParams) -> Iterator[str]:
        """What a quantizer needs and its qparams do not have, in a line each."""
        for extra in self.quantizers[name].fake_quantize.needs:
            if extra not in qparams.extras:
                sentence = f"{self.plan[name].fake_quantize.name} cannot quantize without extras[{extra!r}]"
                because = "no observer makes it"
                fix = f"qparams[{name!r}]._replace(extras={{{extra!r}: ...}}), or another fake quantizer"
                yield explain(name, sentence, because=because, fix=fix)

    def constant(self) -> AbstractContextManager[object]:
        """A context for runs of which nobody takes a derivative, but the model itself where it does."""
        return nullcontext() if self.differentiates else torch.no_grad()

    def observing(self, states: OState) -> Effect:
        """The effect of a run that observes: values stay, and their observers' states in ``states`` are replaced."""
        outer = depth()

        def update(name: str, seen: Iterable[Tensor]) -> None:
            quantizer = self.running[name]
            for x in seen:
                states[name] = quantizer.observed(states[name], x)

        def effect(name: str, x: Tensor) -> Tensor:
            quantizer = self.running[name]
            _refuse_unfit(name, x)
            if isinstance(quantizer.scheme.granularity, PerToken):  # the next batch has other tokens
                return x
            if is_inside(x, outer):  # a state outlives the transform that wraps the value
                each = members if quantizer.is_inner else _whole_alone
                outside_of_transforms(lambda: update(name, each(x, outer)), outer)
            else:
                update(name, [x])
            return x

        return effect

    def quantizing(self, qparams: Mapping[str, QParams]) -> Effect:
        """The effect of a run that quantizes: values are rounded to their grids."""
        outer, compiling = depth(), is_compiling()
        # a compiler sees the whole program, in which calls cost nothing
        together = () if compiling else self._values_together
        ready = {name: rounded for group in together for name, rounded in group.rounded(qparams).items()}

        def quantized(name: str, x: Tensor) -> Tensor:
            return ready[name](x) if name in ready else self.quantized(name, x, qparams)

        def effect(name: str, x: Tensor) -> Tensor:
            quantizer = self.running[name]
            if quantizer.config.observe_only:
                return x
            _refuse_unfit(name, x)
            if quantizer.config.optional:
                check_reached(name, qparams[name])
            if compiling:
                quantizer.check_members(x)
            elif is_inside(x, outer) and not quantizer.is_inner:
                return on_whole(partial(quantized, name), x, outer)
            return quantized(name, x)

        return effect

    def quantized(self, name: str, x: Tensor, qparams: Mapping[str, QParams]) -> Tensor:
        """A planned value, rounded to its grid; on its way there as a chip computes it, where the plan says so."""
        quantizer = self.running[name]
        requantizer = self.requantizers.get(name)
        own = self.in_force(name, qparams)
        if requantizer is None:
            return quantizer.quantize(x, own)
        exact = quantizer.fake_quantize.apply(requantizer.integers(x, own, qparams), own, quantizer.scheme)
        sources = [qparams[source] for source in requantizer.sources]
        if may_differentiate() or any("enabled" in source.extras for source in sources):
            plain = quantizer.fake_quantize.apply(x, own, quantizer.scheme)
            # the value of the one with the gradient of the other: the difference of equal numbers is 0
            exact = exact.detach() + (plain - plain.detach())
            for source in sources:  # a value whose quantizer is switched off is on no grid
                exact = switched(plain, exact, source)
        return switched(x, exact, own)

    def run_float(
        self, params: Params, effect: Effect, args: Args, kwargs: Kwargs, watch: MakeRunner | None = None
    ) -> Output:
        """The output of a run with weights as they are given; arguments as of :meth:`run_quantized`."""
        output, _ = self.loop.run(self.skeleton.detached(params), effect, args, kwargs, watch=watch)
        return output

    def run_quantized(
        self,
        params: Params,
        qparams: Mapping[str, QParams],
        effect: Effect,
        args: Args,
        kwargs: Kwargs,
        watch: MakeRunner | None = None,
    ) -> tuple[Output, dict[str, Tensor]]:
        """A run with quantized weights.

        In eager, a weight that only its layer reads is quantized when that layer starts: it is in the cache when it is read,
        and its memory is soon free for the next one. A compiler sees the whole program and chooses the order itself.

        Args:
          params: parameters and buffers, by name.
          qparams: of every quantizer.
          effect: what happens to planned values.
          args, kwargs: of the model.
          watch: makes the runner, see :meth:`Loop.run`.

        Returns:
          The model's output, and its buffers afterwards.
        """
        given = self.skeleton.detached(params)
        effective = self.effective(qparams, self._read_by_weights)
        # without a schedule the loop runs without a frame, which is what defers parameters
        deferrable = frozenset() if is_compiling() or not self.loop.schedule else self.deferrable
        rounded = self._rounded_together(given, effective)
        alone = [weight for weight in self.acting if weight.site.parameter not in rounded]
        at_once = [weight for weight in alone if weight.site.parameter not in deferrable]
        deferred = [weight for weight in alone if weight.site.parameter in deferrable]
        new = round_biases(self.acting, given, effective) | rounded
        for weight in at_once:
            new[weight.site.parameter] = weight.quantize(given, effective[weight.site.quantizer])
        later = {weight.site.parameter: weight.thunk(given, effective[weight.site.quantizer]) for weight in deferred}
        return self.loop.run(new, effect, args, kwargs, later, watch)

    def _rounded_together(self, params: Params, qparams: Mapping[str, QParams]) -> dict[str, Tensor]:
        """The weights that are rounded as one with others, in eager; a compiler makes one loop of many anyway."""
        groups = () if is_compiling() else self._weights_together
        fitting = (group for group in groups if group.fit(params, qparams))
        return {name: weight for group in fitting for name, weight in group.quantized(params, qparams)}

    def quantized_params(self, params: Params, qparams: Mapping[str, QParams]) -> dict[str, Tensor]:
        """The params with weights quantized and biases rounded; a new dict."""
        return quantize_weights(self.acting, self.skeleton.detached(params), self.effective(qparams))

    def effective(self, qparams: Mapping[str, QParams], names: Collection[str] | None = None) -> QParamsDict:
        """The qparams whose scale and zero point are those in force, where learned extras decide them.

        A scale that its quantizer does not learn is a constant, for weights and for the biases that it rounds.

        Args:
          qparams: of every quantizer.
          names: of those that are wanted; ``None``: all.
        """
        everyone = {**self.quantizers, **self.sources}
        effective = {}
        for name in everyone if names is None else names:
            quantizer = everyone[name]
            given = self.in_force(name, qparams)
            if "scale" not in quantizer.fake_quantize.learnable:
                given = given._replace(scale=as_constant(given.scale))
            effective[name] = quantizer.fake_quantize.grid(given, quantizer.scheme)
        return effective

    def in_force(self, name: str, qparams: Mapping[str, QParams]) -> QParams:
        """The qparams of a quantizer; of a term of a sum those with the step of the result, of unsigned codes without a
        zero point."""
        own = qparams[name]
        if name in self.unsigned:
            own = own._replace(zero_point=own.zero_point * 0)  # a product, so that what is learned has a gradient: 0
        requantizer = self.requantizers.get(name)
        return own if requantizer is None else requantizer.in_force(own, qparams)

    def as_frozen(self) -> Engine:
        """The same engine, for weights that are quantized already."""
        return Engine(self.skeleton, self.plan, True, self.whole, self.kernels)

    def holders(self, parameter: str) -> list[tuple[str, str]]:
        """Path and attribute of each module that holds a parameter or buffer, by its canonical name."""
        return self.skeleton.holders(parameter)

    def tensors_of(self, path: str) -> Mapping[str, str]:
        """Canonical names of the tensors of the module at a path, by attribute; empty where there is no module."""
        return self.skeleton.tensors_of(path)

    def empty_params(self) -> dict[str, Tensor]:
        """Params of the whole model without numbers: tensors on the ``meta`` device, by name, sorted."""
        return sorted_dict(self.skeleton.registered())

    def retrace(self, params: Params, args: Args, kwargs: Kwargs) -> Graph:
        """The graph of one run of the float model, see :func:`sophq_func.trace`."""
        return retrace(self.skeleton, params, args, kwargs, self.loop.arguments)

    def altered(self, skipped: Collection[str], biases: Mapping[str, tuple[str, Tensor]]) -> Loop:
        """The loop over a copy of the model in which some modules return their input, and some layers have a bias.

        Args:
          skipped: paths of modules that return their first argument.
          biases: by path of a layer, the canonical name of its bias and a tensor of its shape.
        """
        return self.loop.on(self.skeleton.altered(skipped, biases))


def _whole_alone(x: Tensor, outer: int) -> list[Tensor]:
    """The whole tensor, in the form of :func:`members`."""
    return [whole(x, outer)]


def _refuse_unfit(name: str, x: Tensor) -> None:
    """Raise a :class:`StateError` for a value that has another kind of numbers, or of memory, than the example's."""
    if x.is_nested:
        sentence, fix = "a nested tensor cannot be observed or quantized", "torch.nested.to_padded_tensor(x, 0.0)"
        raise StateError(explain(name, sentence, fix=fix))
    if x.layout is not torch.strided or x.is_complex():
        check_reals(name, {"the value": x})


def _is_read_by_its_layer(weight: WeightQuantizer, skeleton: Skeleton) -> bool:
    """Whether a weight may wait for its layer: a module that the example called, and that alone reads the weight."""
    path, function, _ = weight.site.anchor
    return not function and skeleton.deferrable(path, weight.site.parameter)


def _sources_outside(
    weights: Collection[WeightQuantizer],
    requantizers: Collection[Requantizer],
    quantizers: Collection[str],
    whole: Plan | None,
) -> dict[str, RunQuantizer]:
    """In a part, the quantizers outside of it whose scales round biases in it, or from whose grids integers come."""
    if whole is None:
        return {}
    sources = {weight.site.source for weight in weights if weight.site.source}
    sources |= {name for requantizer in requantizers for name in (*requantizer.sources, requantizer.result) if name}
    return {name: value_quantizer(whole, name) for name in sorted(sources) if name not in quantizers}
