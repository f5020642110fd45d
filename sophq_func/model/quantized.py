"""A model and a plan as pure functions of ``(params, state, batch)``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sophq_func.capture.arguments import as_call
from sophq_func.capture.skeleton import Skeleton
from sophq_func.core.errors import PlanError, StateError, explain, unknown
from sophq_func.core.pytree import sorted_dict
from sophq_func.model.calibrate import calibrate
from sophq_func.model.engine import Engine, OState, QParamsDict
from sophq_func.model.finite import check_finite
from sophq_func.model.flat import flat
from sophq_func.model.runner import Effect
from sophq_func.model.schedule import Schedule
from sophq_func.model.settings import unstack
from sophq_func.model.sweep import Versions, size_of, sweep
from sophq_func.model.tap import Call, Enough, Tap, calls_of, unchanged, wanted
from sophq_func.model.weight_quantizer import Params
from sophq_func.numerics.contracts import QParams, State
from sophq_func.numerics.scheme import QScheme
from sophq_func.planning import parts
from sophq_func.planning.plan import Plan


class Quantized:
    """A model and a plan, frozen. Every method is a pure function; ``params`` and states are dicts of tensors.

    Made by :func:`sophq_func.build`, :func:`sophq_func.quantize` or :func:`sophq_func.prepare_by_platform`.
    Attributes cannot be set. ``params``, ``ostate`` and ``qparams`` are positional-only; all further arguments go to
    the model.

    Attributes:
      plan: the :class:`~sophq_func.planning.plan.Plan`.
      training: the training flag of the model at hand, see :meth:`train` and :meth:`eval`.
      frozen: weights come as they are, see :meth:`freeze`.
      engine: what runs it, for code that converts or exports the model.
    """

    plan: Plan
    training: bool
    frozen: bool
    engine: Engine
    _whole: Plan | None

    def __init__(self, skeleton: Skeleton, plan: Plan, frozen: bool = False, whole: Plan | None = None) -> None:
        set_ = object.__setattr__
        set_(self, "plan", plan)
        set_(self, "training", skeleton.entry.training)
        set_(self, "frozen", frozen)
        set_(self, "engine", Engine(skeleton, plan, frozen, whole))
        set_(self, "_whole", whole)

    def __setattr__(self, name: str, value: object) -> None:
        fix = "make a new one with sq.build(model, plan)"
        raise AttributeError(explain("Quantized", f"setting {name!r} is not possible", because="it is frozen", fix=fix))

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    def __repr__(self) -> str:
        flags = f"training={self.training}" + (", frozen=True" if self.frozen else "")
        return f"Quantized({self.model_name}, {self.plan!r}, {flags})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Quantized, (self.engine.skeleton, self.plan, self.frozen, self._whole)

    def __deepcopy__(self, memo: dict[int, Any]) -> Quantized:
        return Quantized(copy.deepcopy(self.engine.skeleton, memo), self.plan, self.frozen, self._whole)

    @property
    def model_name(self) -> str:
        """Name of the model's class."""
        return type(self.engine.skeleton.entry).__name__

    @property
    def path(self) -> str:
        """Of a :meth:`part`, the path of its module in the whole model; else empty."""
        return self.engine.skeleton.root

    def init(self, params: Params, ostate: Mapping[str, State] | None = None, /) -> OState:
        """Observer states before any batch: weights are observed here, activations start neutral.

        Args:
          params: as :func:`sophq_func.params_of` returns them.
          ostate: states to keep for activations; weights are observed anew all the same.

        Returns:
          ``{quantizer name: state}``, sorted.

        Raises:
          StateError: names that are missing or unknown.
        """
        self.engine.skeleton.check(params, "init")
        if ostate is not None:
            self.engine.check_state(ostate, "ostate")
        states = {w.site.quantizer: w.observe(params) for w in self.engine.weights}
        for name, piece in self.engine.running.items():
            states[name] = piece.observer.init(piece.seen(params), piece.scheme) if ostate is None else ostate[name]
        return sorted_dict(states)

    def observe(self, params: Params, ostate: Mapping[str, State], /, *args: Any, **kwargs: Any) -> tuple[Any, OState]:
        """Run the float model and update the observers of activations.

        Returns:
          The model's output, and the new states.
        """
        self.engine.check(params, ostate, "observe", "ostate")
        states = dict(ostate)
        output, _ = self.engine.loop.run(self.engine.skeleton.detached(params), self.engine.observing(states), args, kwargs)
        return output, sorted_dict(states)

    def observe_quantized(
        self, params: Params, ostate: Mapping[str, State], qparams: Mapping[str, QParams], /, *args: Any, **kwargs: Any
    ) -> tuple[Any, OState]:
        """Run the quantized model and update the observers of activations with what it sees before each quantizer.

        Returns:
          The model's output, and the new states.
        """
        self.engine.check(params, ostate, "observe_quantized", "ostate")
        self.engine.check_state(qparams, "qparams")
        states = dict(ostate)
        observe, quantize = self.engine.observing(states), self.engine.quantizing(qparams)

        def effect(name: str, x: Tensor) -> Tensor:
            return quantize(name, observe(name, x))

        output, _ = self.engine.run_quantized(params, qparams, effect, args, kwargs)
        return output, sorted_dict(states)

    def qparams(self, params: Params, ostate: Mapping[str, State], /) -> QParamsDict:
        """Scales and zero points from observer states.

        Returns:
          ``{quantizer name: QParams}``, sorted.

        Raises:
          StateError: in eager on plain tensors, a quantizer that has seen nothing, or NaN or infinity. Inside a transform
            nothing is checked, and such a quantizer has a NaN scale.
        """
        self.engine.check(params, ostate, "qparams", "ostate")
        check_finite(self.plan, self.engine.pieces, ostate)
        found = {}
        for name, piece in self.engine.pieces.items():
            resolved = piece.observer.qparams(ostate[name], piece.scheme)
            if piece.scheme.dynamic:
                resolved = resolved._replace(scale=torch.ones_like(resolved.scale))
            found[name] = piece.fake_quantize.init(resolved, piece.seen(params), piece.scheme)
        return sorted_dict(found)

    def calibrate(self, params: Params, batches: Iterable[Any], *, progress: bool = True) -> QParamsDict:
        """Observe the weights and every batch, and return qparams: :meth:`init`, :meth:`observe`, :meth:`qparams`.

        Args:
          params: as :func:`sophq_func.params_of` returns them.
          batches: each a tensor, a tuple of positional arguments, or a dict of keyword arguments.
          progress: show a bar, where the package ``rich`` is installed and the output is a terminal.

        Raises:
          StateError: no batches, a value that no batch reached, or data with NaN or infinity.
        """
        return calibrate(self, params, batches, progress)

    def apply(self, params: Params, qparams: Mapping[str, QParams], /, *args: Any, **kwargs: Any) -> Any:
        """Run the model with fake quantization; differentiable in ``params``, ``qparams`` and the batch.

        Returns:
          What the model returns. Updates of buffers are dropped.
        """
        return self._apply(params, qparams, "apply", args, kwargs)[0]

    def apply_and_update(
        self, params: Params, qparams: Mapping[str, QParams], /, *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """:meth:`apply`, and the params with new buffers (BatchNorm statistics).

        Returns:
          What the model returns; all params, with the buffers as the run left them.
        """
        output, buffers = self._apply(params, qparams, "apply_and_update", args, kwargs)
        kept = {weight.site.parameter for weight in self.engine.acting}
        after: dict[str, Tensor] = {**params, **{n: buffer for n, buffer in buffers.items() if n not in kept}}
        for weight in self.engine.acting:
            if weight.site.source:
                own, source = qparams[weight.site.quantizer], qparams[weight.site.source]
                after.update(weight.mean_shift(params, own, source, after))
        return output, sorted_dict(after)

    def capture(
        self, params: Params, qparams: Mapping[str, QParams], /, *args: Any, **kwargs: Any
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """What each quantizer sees in a run of the quantized model, and what it makes of it.

        Weights are shown as the layer holds them, with the BatchNorm divided out again. Of a quantizer that only observes
        it is shown what it would make.

        Returns:
          ``{quantizer name: (before, after)}``, sorted.
        """
        self.engine.check(params, qparams, "capture", "qparams")
        seen = {}
        for weight in () if self.frozen else self.engine.weights:
            name, parameter = weight.site.quantizer, weight.site.parameter
            seen[name] = params[parameter], weight.quantize(params, qparams[name])
        quantize = self.engine.quantizing(qparams)

        def effect(name: str, x: Tensor) -> Tensor:
            seen[name] = x.clone(), self.quantize_value(name, x, qparams[name])
            return quantize(name, x)

        self.engine.run_quantized(params, qparams, effect, args, kwargs)
        return sorted_dict(seen)

    def tap(self, at: str | Collection[str], stop: bool = False) -> Callable[..., tuple[Any, dict[str, list[Call]]]]:
        """A function that runs the model and also returns what it called on the way, where no quantizer sits, too.

        Args:
          at: paths of modules, names of values (``"layer1.0.add"``, an input's name) and globs; one or several.
          stop: end the run behind the last of them; the output is ``None`` then. A compiled run goes on to its end.

        Returns:
          ``tapped(params, qparams, *args, **kwargs) -> (output, seen)``. ``seen`` holds for each name the calls in the
          order of execution, each a ``Call(args, kwargs, output)`` of copies: inputs as the call was given them, the
          output on its grid where it has one. A module that was not called has an empty list. With ``qparams=None`` the
          float model runs.

        Raises:
          ConfigError: a name that fits nothing.

        Example:
          >>> import torch, sophq_func as sq
          >>> model, x = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()), torch.ones(1, 2)
          >>> q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
          >>> params = sq.params_of(model)
          >>> _, seen = q.tap("0", stop=True)(params, None, x)
          >>> bool((seen["0"][0].output == model[0](x)).all())
          True
        """
        skeleton, runs = self.engine.skeleton, self.plan.runs
        values = {made.name for run in runs for made in run.calls}
        what = wanted(at, skeleton.paths, values)
        if stop and runs:
            what = what._replace(ends=max(calls_of(what, run) for run in runs))
        name = type(skeleton.entry).__name__.lower()

        def tapped(params: Params, qparams: Mapping[str, QParams] | None, /, *args: Any, **kwargs: Any) -> Any:
            made: list[Tap] = []

            def watch(schedule: Schedule) -> Tap:
                made.append(Tap(schedule, effect, what, name))
                return made[0]

            effect: Effect = unchanged
            if qparams is None:
                skeleton.check(params, "tap")
            else:
                self.engine.check(params, qparams, "tap", "qparams")
                effect = self.engine.quantizing(qparams)
            try:
                if qparams is None:
                    output, _ = self.engine.loop.run(skeleton.detached(params), effect, args, kwargs, watch=watch)
                else:
                    output, _ = self.engine.run_quantized(params, qparams, effect, args, kwargs, watch)
            except Enough:
                made[0].check_so_far()
                output = None
            return None if stop else output, made[0].seen

        return tapped

    def part(self, path: str, call: int = 0) -> Quantized:
        """One module of the model as a quantized model of its own, with the decisions and the names of the whole.

        It takes the whole params and qparams, or at least those that it needs, and uses its own. A value that another
        module makes is quantized there and not here: what the part is given is what :meth:`tap` sees it called with.

        Args:
          path: of the module.
          call: which of its calls, from 0, where the model calls it several times.

        Raises:
          PlanError: the model has no such module, or the examples do not call it so often.

        Example:
          >>> import torch, sophq_func as sq
          >>> model, x = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()), torch.ones(1, 2)
          >>> q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
          >>> list(q.part("0").plan)
          ['0.weight_fake_quant']
        """
        if self._whole is not None:
            raise PlanError(explain("part", "a part of a part is not possible", fix="take it from the whole model"))
        if path == "" and call == 0:
            return self
        skeleton = self.engine.skeleton
        first = skeleton.first_path(path)
        if first is None:
            every = [own for paths in skeleton.paths.values() for own in paths if own]
            raise PlanError(unknown("part", "module", path, every))
        plan = parts.part(self.plan, first, call, skeleton.part(first).names)
        norms = {plan.site(name).norm for name in plan} - {""}
        folded = [name for norm in norms for name in skeleton.tensors_of(norm).values()]
        return Quantized(skeleton.part(first, folded), plan, self.frozen, self.plan)

    def blocks(self, pattern: str | None = None) -> list[Quantized]:
        """The parts of the model at the modules that a glob fits, none inside another, in execution order.

        Without a pattern: the residual blocks (the smallest module around ``x + f(x)`` or ``g(x) + f(x)``, and of those
        the outermost), and beside them the modules that stand in a ``ModuleList`` or ``Sequential`` and are no leaves.

        Raises:
          ConfigError: the pattern fits no module that the example calls.

        Example:
          >>> import torch, sophq_func as sq
          >>> model, x = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()), torch.ones(1, 2)
          >>> q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
          >>> [list(part.plan) for part in q.blocks("*")]
          [['0.weight_fake_quant'], []]
        """
        if pattern is None:
            found = parts.blocks(self.plan, self.engine.skeleton.is_list_item)
        else:
            found = parts.matching(self.plan, pattern)
        return [self.part(path, call) for path, call in found]

    def with_noise(
        self, params: Params, qparams: Mapping[str, QParams], generator: torch.Generator, /, *args: Any, **kwargs: Any
    ) -> QParamsDict:
        """The qparams with uniform numbers in [0, 1) under ``extras["noise"]`` of each quantizer that needs them.

        One run without quantization tells the shapes; the numbers are drawn in the order of the quantizers' names, so the
        same generator state gives the same noise. A run with other shapes needs other noise.

        Args:
          params, qparams: see :meth:`apply`.
          generator: the source of randomness; its state moves on.
          *args, **kwargs: of the model.

        Raises:
          StateError: see :meth:`apply`; ``generator`` is none.
        """
        self.engine.check(params, qparams, "with_noise", "qparams")
        if not isinstance(generator, torch.Generator):
            got, fix = type(generator).__name__, "torch.Generator().manual_seed(0)"
            raise StateError(
                explain("with_noise", "this generator is not possible", got=got, allowed="a torch.Generator", fix=fix)
            )
        running = self.engine.running.items()
        noisy = {n for n, piece in running if piece.fake_quantize.noise and not piece.config.observe_only}
        seen = {weight.site.quantizer: weight.seen(params) for weight in self.engine.acting if weight.fake_quantize.noise}

        def effect(name: str, x: Tensor) -> Tensor:
            seen.update({name: x} if name in noisy else {})
            return x

        with torch.random.fork_rng(), torch.no_grad():
            self.engine.loop.run(self.engine.skeleton.detached(params), effect, args, kwargs)
        new = dict(qparams)
        for name in sorted(seen):
            noise = torch.rand(seen[name].shape, generator=generator, device=generator.device).to(seen[name].device)
            new[name] = new[name]._replace(extras=sorted_dict({**new[name].extras, "noise": noise}))
        return sorted_dict(new)

    def split(self, qparams: Mapping[str, QParams], /) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is learned, and the rest, both flat: ``{"<quantizer>.<field>": Tensor}``. :func:`merge` is the inverse.

        Learned are the floating fields that a fake quantizer names: not the zero point of a symmetric scheme, nothing of
        a quantizer that only observes or whose scheme is dynamic.
        """
        self.engine.check_state(qparams, "qparams")
        leaves = flat(qparams)
        learned = {leaf for leaf, value in leaves.items() if value.is_floating_point() and self._is_learned(leaf)}
        rest = {leaf: value for leaf, value in leaves.items() if leaf not in learned}
        return {leaf: leaves[leaf] for leaf in sorted(learned)}, rest

    def _is_learned(self, leaf: str) -> bool:
        name, _, field = leaf.rpartition(".")
        if name not in self.engine.pieces:
            return False
        config = self.plan[name]
        if config.observe_only or config.scheme.dynamic or (field == "zero_point" and config.scheme.symmetric):
            return False
        if self.frozen and name not in self.engine.running:
            return False
        return field in self.engine.pieces[name].fake_quantize.learnable

    def train(self) -> Quantized:
        """The same plan with the model's training flag set; a new object.

        Raises:
          StateError: the weights are frozen.
        """
        if self.frozen:
            raise StateError(
                explain("train", "training frozen weights is not possible", fix="go on with the q that was frozen")
            )
        return Quantized(self.engine.skeleton.in_mode(True), self.plan, whole=self._whole)

    def eval(self) -> Quantized:
        """The same plan with the model's training flag cleared; a new object."""
        return Quantized(self.engine.skeleton.in_mode(False), self.plan, self.frozen, self._whole)

    def freeze(self, params: Params, qparams: Mapping[str, QParams], /) -> tuple[Quantized, dict[str, Tensor]]:
        """Quantize the weights once, for inference.

        Returns:
          A quantized model that takes weights as they are, and params with weights on their grids and biases rounded,
          detached. With the same qparams, whose entries for weights no longer matter, outputs are the same bit for bit.

        Raises:
          StateError: names that are missing or unknown; the model is in training mode, where BatchNorm folds into
            weights what it has just seen.
        """
        self.engine.check(params, qparams, "freeze", "qparams")
        if self.training:
            raise StateError(
                explain("freeze", "freezing in training mode is not possible", fix="q.eval().freeze(params, qparams)")
            )
        new = {name: tensor.detach() for name, tensor in self.engine.on_grids(params, qparams).items()}
        return Quantized(self.engine.skeleton, self.plan, True, self._whole), sorted_dict(new)

    def sweep(
        self,
        params: Params,
        settings: Sequence[Mapping[str, QParams]] | Mapping[str, QParams],
        batch: Any,
        *,
        reduce: Callable[[Any], Any] | None = None,
        how: str = "auto",
        progress: bool = True,
    ) -> Any:
        """One batch under many settings, without gradients.

        Args:
          params: as :func:`sophq_func.params_of` returns them.
          settings: a list of qparams, or a batch of them as :func:`sophq_func.stack` returns it.
          batch: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
          reduce: what to keep of an output, such as a loss; by default all of it.
          how: ``"loop"`` runs one setting after the other, and quantizes a weight once for settings that agree on it.
            ``"vmap"`` runs chunks of them as one. ``"compile"`` is a loop over one compiled function, worth the wait where
            settings are many. ``"auto"`` is ``"vmap"`` for a model so small that calling torch costs more than arithmetic,
            if torch can map it, else ``"loop"``.
          progress: show a bar, where the package ``rich`` is installed and the output is a terminal.

        Returns:
          What ``reduce`` returns, each tensor with a new first axis, one entry a setting.

        Raises:
          StateError: no settings; see :meth:`apply`.
        """
        args, kwargs = as_call(batch, "sweep")
        self.engine.skeleton.check(params, "sweep")
        frozen, versions = (
            Quantized(self.engine.skeleton, self.plan, True, self._whole),
            Versions(self.engine.acting, self.engine.skeleton.detached(params)),
        )
        keep = reduce or (lambda output: output)

        def one(setting: Mapping[str, QParams]) -> Any:
            return keep(frozen.apply(versions(self.engine.steps(setting)), setting, *args, **kwargs))

        def whole(setting: Mapping[str, QParams]) -> Any:
            return keep(self.apply(params, setting, *args, **kwargs))

        each = unstack(settings) if isinstance(settings, Mapping) else list(settings)
        for setting in each:
            self.engine.check_state(setting, "qparams")
        return sweep(size_of(self.plan, params), each, one, whole, how, progress)

    def weights_seen(self, params: Params, /) -> dict[str, tuple[Tensor, QScheme]]:
        """Each weight as its quantizer sees it, and the scheme for it as it lies there.

        With the BatchNorm folded in; of grouped deconvolutions, output channels first.

        Returns:
          ``{quantizer name: (weight, scheme)}``, sorted.
        """
        self.engine.skeleton.check(params, "weights_seen")
        return sorted_dict({weight.site.quantizer: (weight.seen(params), weight.scheme) for weight in self.engine.weights})

    def quantize_value(self, name: str, x: Tensor, qparams: QParams) -> Tensor:
        """``x`` as the quantizer ``name`` represents it, also where it only observes."""
        piece = self.engine.pieces[self.plan.find(name)]
        return piece.fake_quantize.apply(x, qparams, piece.scheme)

    def _apply(
        self, params: Params, qparams: Mapping[str, QParams], where: str, args: Any, kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        self.engine.check(params, qparams, where, "qparams")
        return self.engine.run_quantized(params, qparams, self.engine.quantizing(qparams), args, kwargs)
