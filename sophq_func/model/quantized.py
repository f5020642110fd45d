"""A model and a plan as pure functions of ``(params, state, batch)``.

What the methods do lies beside this file, by topic: ``apply``, ``calibrate``, ``tap``, ``cut``, ``noise``, ``flat``,
``sweep``, and ``engine`` below all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from sophq_func.capture.functions import name_of
from sophq_func.capture.skeleton import Skeleton
from sophq_func.core.errors import ConfigError, StateError, explain
from sophq_func.core.public import in_loops, public
from sophq_func.core.pytree import sorted_dict
from sophq_func.core.texts import printable
from sophq_func.core.types import Given, Output, Tree
from sophq_func.model import apply, bound, calibrate, cut, flat, no_module, noise, sweep, tap
from sophq_func.model.bound import Bound, Learn
from sophq_func.model.engine import Engine, OState, QParamsDict
from sophq_func.model.tap import Tapped
from sophq_func.numerics.contracts import QParams, State
from sophq_func.numerics.kernels import Kernels
from sophq_func.numerics.scheme import QScheme
from sophq_func.planning.plan import Plan


class Quantized:
    """A quantized model. Every method is a pure function; ``params`` and states are dicts of tensors.

    Made by :func:`sophq_func.build`, :func:`sophq_func.quantize` or :func:`sophq_func.prepare_by_platform`. It holds no
    weights, and its attributes cannot be set. ``params``, ``ostate`` and ``qparams`` are positional-only; all further
    arguments go to the model. Where the model is a function, ``params`` is the tree that it takes, or a flat dict of its
    names; new params come back in the form that was given.

    Attributes:
      plan: the :class:`~sophq_func.planning.plan.Plan`: which quantizers there are, and where.
      training: whether the model's modules are in training mode, see :meth:`train` and :meth:`eval`.
      frozen: whether weights are used as they are given, not quantized, see :meth:`freeze`.
      kernels: whether quantizers use a compiled kernel, as :func:`sophq_func.build` was told.
      engine: the :class:`~sophq_func.model.engine.Engine` that runs the model, for code that converts or exports it.

    Example:
      >>> import torch, sophq_func as sq
      >>> model, x = torch.nn.Linear(2, 3), torch.randn(4, 2)
      >>> q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
      >>> params = sq.params_of(model)
      >>> ostate = q.init(params)
      >>> _, ostate = q.observe(params, ostate, x)
      >>> qparams = q.qparams(params, ostate)
      >>> q.apply(params, qparams, x).shape
      torch.Size([4, 3])
    """

    plan: Plan
    training: bool
    frozen: bool
    kernels: Kernels
    engine: Engine

    # Methods that run in loops are ``in_loops``; all others are ``public``, which costs a frame

    def __init__(
        self,
        skeleton: Skeleton,
        plan: Plan,
        frozen: bool = False,
        whole: Plan | None = None,
        kernels: Kernels = "auto",
    ) -> None:
        # ``skeleton`` is the model without its weights; ``whole``, for a part of a model, the plan of the whole model.
        # The setter is that of object, since __setattr__ of this class refuses
        set_attribute = object.__setattr__
        set_attribute(self, "plan", plan)
        set_attribute(self, "training", skeleton.entry.training)
        set_attribute(self, "frozen", frozen)
        set_attribute(self, "kernels", kernels)
        set_attribute(self, "engine", Engine(skeleton, plan, frozen, whole, kernels))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        fix = "make a new one with sq.build(model, plan)"
        raise AttributeError(explain("Quantized", f"{name!r} cannot be set", because="it is frozen", fix=fix))

    def __delattr__(self, name: str) -> NoReturn:
        fix = "make a new one with sq.build(model, plan)"
        raise AttributeError(explain("Quantized", f"{name!r} cannot be deleted", because="it is frozen", fix=fix))

    if not TYPE_CHECKING:  # a type checker shall say that there is no such attribute, before anything runs

        def __call__(self, *args: object, **kwargs: object) -> NoReturn:
            no_module.refuse_call()

        def __getattr__(self, name: str) -> NoReturn:
            # asked only for what there is not; nothing is there yet while a copy is being made
            engine: Engine | None = vars(self).get("engine")
            no_module.refuse_attribute(name, None if engine is None else engine.skeleton.entry, dir(type(self)))

    def __repr__(self) -> str:
        flags = f"training={self.training}" + (", frozen=True" if self.frozen else "")
        return f"Quantized({printable(self.model_name)}, {self.plan!r}, {flags})"

    def __reduce__(self) -> tuple[type[Quantized], tuple[Skeleton, Plan, bool, Plan | None, Kernels]]:
        return Quantized, (self.engine.skeleton, self.plan, self.frozen, self.engine.whole, self.kernels)

    def __deepcopy__(self, memo: dict[int, Any]) -> Quantized:
        # A plan cannot be changed, so that copies may share it
        return self._with(copy.deepcopy(self.engine.skeleton, memo), self.frozen)

    def _with(self, skeleton: Skeleton, frozen: bool) -> Quantized:
        """The same plan for another skeleton of the same model, or for the same skeleton with weights frozen or not."""
        return Quantized(skeleton, self.plan, frozen, self.engine.whole, self.kernels)

    @property
    def model_name(self) -> str:
        """Name of the model's class, or of the function."""
        return name_of(self.engine.skeleton.entry)

    @property
    def path(self) -> str:
        """Of a :meth:`part`, the path of its module in the whole model; else empty."""
        return self.engine.skeleton.root

    @public
    def init(self, params: Given, ostate: Mapping[str, State] | None = None, /) -> OState:
        """Observer states before any batch: those of weights have seen their weight, those of activations nothing.

        Args:
          params: as :func:`sophq_func.params_of` returns them.
          ostate: states from which those of activations are taken instead; weights are observed anew.

        Returns:
          ``{quantizer name: state}``, sorted.

        Raises:
          StateError: names that are missing or unknown.
        """
        return calibrate.init(self.engine, params, ostate)

    @in_loops
    def observe(self, params: Given, ostate: Mapping[str, State], /, *args: Any, **kwargs: Any) -> tuple[Output, OState]:
        """Run the float model and update the observers of activations.

        Args:
          params: as :func:`sophq_func.params_of` returns them.
          ostate: from :meth:`init` or an earlier call.
          *args, **kwargs: of the model.

        Returns:
          The model's output, and the new states.

        Raises:
          StateError: names that are missing or unknown; the run makes other calls than the examples.
        """
        return calibrate.observe(self.engine, params, ostate, args, kwargs)

    @in_loops
    def observe_quantized(
        self, params: Given, ostate: Mapping[str, State], qparams: Mapping[str, QParams], /, *args: Any, **kwargs: Any
    ) -> tuple[Output, OState]:
        """Run the quantized model, and update the observers of activations with the values before they are rounded.

        Args:
          params, ostate: see :meth:`observe`.
          qparams: see :meth:`apply`.
          *args, **kwargs: of the model.

        Returns:
          The model's output, and the new states.

        Raises:
          StateError: see :meth:`observe`.
        """
        return calibrate.observe_quantized(self.engine, params, ostate, qparams, args, kwargs)

    @in_loops
    def qparams(
        self, params: Given, ostate: Mapping[str, State], /, *, bits: int | Mapping[str, int] | None = None
    ) -> QParamsDict:
        """Scales and zero points from observer states.

        Args:
          params: as :func:`sophq_func.params_of` returns them.
          ostate: from :meth:`init` and :meth:`observe`.
          bits: other widths than those of the plan, as in :meth:`Plan.with_bits`: the result has the ranges that each
            observer finds for these widths, and the bounds of their codes in ``extras``, so that it serves this plan as well
            as ``plan.with_bits(bits)``. Weights are observed anew. An observer of values that searched its range for one
            width while it observed (``mse``, ``pot_mode``) keeps that range.

        Returns:
          ``{quantizer name: QParams}``, sorted.

        Raises:
          ConfigError: ``bits`` of quantizers that there are not, or whose codes have no width to change.
          StateError: in eager on plain tensors, a quantizer that has seen nothing, or NaN or infinity. Inside a transform
            nothing is checked, and such a quantizer has a NaN scale.

        Example:
          >>> import torch, sophq_func as sq
          >>> model, x = torch.nn.Linear(2, 3), torch.randn(4, 2)
          >>> q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
          >>> params = sq.params_of(model)
          >>> _, ostate = q.observe(params, q.init(params), x)
          >>> narrow = q.qparams(params, ostate, bits={"weight_fake_quant": 3})
          >>> q.apply(params, narrow, x).shape
          torch.Size([4, 3])
        """
        return calibrate.resolve(self.engine, params, ostate, bits)

    @public
    def calibrate(
        self,
        params: Given,
        batches: Iterable[Tree],
        *,
        inputs: Callable[[Tree], Tree] | None = None,
        progress: bool = True,
    ) -> QParamsDict:
        """Observe the weights and every batch, and return qparams: :meth:`init`, :meth:`observe`, :meth:`qparams`.

        Args:
          params: as :func:`sophq_func.params_of` returns them.
          batches: each a tensor, a tuple of positional arguments, or a dict of keyword arguments.
          inputs: takes one of these out of what ``batches`` yields, for example ``lambda batch: batch[0]`` where a loader
            yields pairs of image and label.
          progress: show how far it is: a line in a notebook, a bar in a terminal where the package ``rich`` is installed.

        Returns:
          ``{quantizer name: QParams}``, sorted.

        Raises:
          ConfigError: ``inputs`` is no function.
          StateError: no batches, one that is no call of the model, or that gives by position a tensor that no example gives;
            a value that no batch reached, or data with NaN or infinity.

        Example:
          >>> import torch, sophq_func as sq
          >>> model, x = torch.nn.Linear(2, 3), torch.tensor([[-1.0, 2.54]])
          >>> q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
          >>> qparams = q.calibrate(sq.params_of(model), [x], progress=False)
          >>> sorted(qparams) == sorted(q.plan)
          True
        """
        return calibrate.calibrate(self.engine, params, batches, inputs, progress)

    @in_loops
    def apply(self, params: Given, qparams: Mapping[str, QParams], /, *args: Any, **kwargs: Any) -> Output:
        """Run the model with fake quantization; differentiable in ``params``, ``qparams`` and the batch.

        To differentiate in qparams, take the leaves that can be learned, ``learned, rest = q.split(qparams)``, and call this
        with ``sq.merge(learned, rest)``: qparams hold integers, too, of which ``torch.func.grad`` says
        ``only Tensors of floating point dtype can require gradients`` before it calls anything. So do params with buffers:
        :func:`sophq_func.split_params`.

        Args:
          params: as :func:`sophq_func.params_of` returns them.
          qparams: from :meth:`calibrate` or :meth:`qparams`.
          *args, **kwargs: of the model.

        Returns:
          What the model returns. Updates of buffers are dropped.

        Raises:
          StateError: names that are missing or unknown; the run makes other calls than the examples.
        """
        return apply.apply(self.engine, params, qparams, args, kwargs)

    @in_loops
    def apply_and_update(
        self, params: Given, qparams: Mapping[str, QParams], /, *args: Any, **kwargs: Any
    ) -> tuple[Output, Given]:
        """:meth:`apply`, and the params with new buffers (BatchNorm statistics).

        Args:
          params, qparams, *args, **kwargs: see :meth:`apply`.

        Returns:
          What the model returns; and all params, with the buffers as the run left them.

        Raises:
          StateError: see :meth:`apply`.
        """
        return apply.apply_and_update(self.engine, params, qparams, args, kwargs)

    @in_loops
    def capture(
        self, params: Given, qparams: Mapping[str, QParams], /, *args: Any, **kwargs: Any
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Each quantizer's tensor in a run of the quantized model, before and after quantization.

        Weights are in the layer's layout, with the BatchNorm divided out again. For a quantizer that only observes, the
        second tensor is what it would return.

        Args:
          params, qparams, *args, **kwargs: see :meth:`apply`.

        Returns:
          ``{quantizer name: (before, after)}``, sorted.

        Raises:
          StateError: see :meth:`apply`.
        """
        return apply.capture(self.engine, params, qparams, args, kwargs)

    @public
    def tap(self, at: str | Collection[str], stop: bool = False) -> Tapped:
        """A function that runs the model, and returns its output and the calls of modules and functions that it made.

        A call can be named whether or not a quantizer sits there.

        Args:
          at: paths of modules, names of values (``"layer1.0.add"``, an input's name) and globs; one or several.
          stop: end the run after the last of them; the output is ``None`` then. A compiled run goes on to its end.

        Returns:
          ``tapped(params, qparams, *args, **kwargs) -> (output, seen)``. ``seen`` is a dict from each name to a list of
          its calls in the order of execution, each a ``Call(args, kwargs, output)`` of copies: arguments as the call
          received them, the output quantized where a quantizer sits. A module that was not called has an empty list.
          With ``qparams=None`` the float model runs.

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
        return tap.tap(self.engine, at, stop)

    @public
    def part(self, path: str, call: int = 0) -> Quantized:
        """One module of the model as a quantized model of its own, with the configs and names of the whole plan.

        Its methods take the params and qparams of the whole model, or at least those of the part. An input of the part is
        quantized by the module that makes it, so not here: call the part with the arguments that :meth:`tap` returns.

        Args:
          path: of the module.
          call: which of its calls, from 0, where the model calls it several times.

        Returns:
          The part. ``part("")`` of a whole model is that model.

        Raises:
          PlanError: the model has no such module, the examples make fewer calls of it, or this is a part already.

        Example:
          >>> import torch, sophq_func as sq
          >>> model, x = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()), torch.ones(1, 2)
          >>> q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
          >>> list(q.part("0").plan)
          ['0.weight_fake_quant']
        """
        if path == "" and call == 0 and self.engine.whole is None:
            return self
        skeleton, plan = cut.part(self.engine, path, call)
        return Quantized(skeleton, plan, self.frozen, self.plan, self.kernels)

    @public
    def blocks(self, pattern: str | None = None) -> list[Quantized]:
        """The :meth:`part` at each module that a glob fits, none inside another, in execution order.

        Args:
          pattern: a glob of module paths. ``None`` finds the residual blocks, and outside of them the items of each
            ``ModuleList`` or ``Sequential`` that are not single layers. A residual block is the smallest module around
            ``x + f(x)`` or ``g(x) + f(x)``; where one lies inside another, the outer one is taken.

        Returns:
          The parts; several of a module that the model calls several times.

        Raises:
          ConfigError: the pattern fits no module that the example calls.

        Example:
          >>> import torch, sophq_func as sq
          >>> model, x = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()), torch.ones(1, 2)
          >>> q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
          >>> [list(part.plan) for part in q.blocks("*")]
          [['0.weight_fake_quant'], []]
        """
        return [self.part(path, call) for path, call in cut.blocks(self.engine, pattern)]

    @public
    def with_noise(
        self, params: Given, qparams: Mapping[str, QParams], generator: torch.Generator, /, *args: Any, **kwargs: Any
    ) -> QParamsDict:
        """The qparams with uniform numbers in [0, 1) under ``extras["noise"]`` of each quantizer that needs them.

        The shapes come from one run without quantization. The numbers are drawn in the order of the quantizers' names, so
        the same generator state gives the same noise. A run with other shapes needs other noise.

        Args:
          params, qparams: see :meth:`apply`.
          generator: the source of randomness; its state changes.
          *args, **kwargs: of the model.

        Returns:
          ``{quantizer name: QParams}``, sorted.

        Raises:
          StateError: see :meth:`apply`; ``generator`` is not a ``torch.Generator``.
        """
        return noise.with_noise(self.engine, params, qparams, generator, args, kwargs)

    @public
    def split(self, qparams: Mapping[str, QParams], /) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The leaves of qparams that can be learned, and the rest; :func:`sophq_func.merge` is the inverse.

        The first half is what to differentiate in, or to give an optimizer; :func:`torch.func.grad` takes no whole qparams,
        since zero points are integers.

        Learnable are the floating fields that the fake quantizer names in ``learnable``, except for the zero point of a
        symmetric scheme, and for quantizers that only observe, have a dynamic scheme, or belong to frozen weights.

        Args:
          qparams: of every quantizer.

        Returns:
          Two flat dicts ``{"<quantizer>.<field>": Tensor}``, sorted.

        Raises:
          StateError: names that are missing or unknown.

        Example:
          >>> import torch, sophq_func as sq
          >>> model, x = torch.nn.Linear(2, 3), torch.randn(4, 2)
          >>> lsq = sq.override(fake_quantize=sq.fake_quantize.learnable())
          >>> q = sq.quantize(model, sq.QuantConfig(weight=lsq, activation=None), example_args=(x,))
          >>> learnable, rest = q.split(q.calibrate(sq.params_of(model), [x], progress=False))
          >>> list(learnable)
          ['weight_fake_quant.scale']
        """
        return flat.split(self.engine, qparams)

    @public
    def train(self, mode: bool = True) -> Quantized:
        """The same model and plan with all modules in training mode; a new object.

        Args:
          mode: ``False`` is :meth:`eval`, as of a module.

        Raises:
          StateError: the weights are frozen.
        """
        if not mode:
            return self.eval()
        if self.frozen:
            fix = "go on with the q that was frozen"
            raise StateError(explain("train", "frozen weights cannot be trained", fix=fix))
        return self._with(self.engine.skeleton.in_mode(True), frozen=False)

    @public
    def eval(self) -> Quantized:
        """The same model and plan with all modules in evaluation mode; a new object."""
        return self._with(self.engine.skeleton.in_mode(False), self.frozen)

    @public
    def freeze(self, params: Given, qparams: Mapping[str, QParams], /) -> tuple[Quantized, Given]:
        """Quantize the weights once, for inference.

        Args:
          params, qparams: see :meth:`apply`.

        Returns:
          A quantized model that uses weights as they are given; and params with weights quantized and biases rounded,
          detached. With these params and the same qparams it returns the same outputs bit for bit. It takes all qparams,
          but no longer reads those of weights.

        Raises:
          StateError: names that are missing or unknown; the model is in training mode, in which the statistics that are
            folded into weights change with each batch.

        Example:
          >>> import torch, sophq_func as sq
          >>> model, x = torch.nn.Linear(2, 3).eval(), torch.randn(4, 2)
          >>> q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
          >>> params = sq.params_of(model)
          >>> qparams = q.calibrate(params, [x], progress=False)
          >>> frozen, baked = q.freeze(params, qparams)
          >>> torch.equal(frozen.apply(baked, qparams, x), q.apply(params, qparams, x))
          True
        """
        weights = apply.freeze(self.engine, params, qparams)
        return self._with(self.engine.skeleton, frozen=True), weights

    @public
    def bind(self, params: Given, qparams: Mapping[str, QParams], /, learn: Learn = None) -> Bound:
        """The quantized model as a module of the model's own class, for whatever wants a module.

        It has the attributes, methods and layers of the model, and runs as :meth:`apply` does. Its tensors are copies, so
        that neither the model nor ``params`` changes. Qparams are in its submodule ``fake_quantizers``. ``bound.state()``
        gives params and qparams back. It can be copied, pickled and saved.

        Args:
          params, qparams: see :meth:`apply`.
          learn: which tensors require a gradient: ``"scales"``, what :meth:`split` calls learnable; ``"params"``, the
            parameters of the model that require one there; ``"all"``, both. ``None``: none; the weights are quantized once,
            which makes it as fast as the float model where no activation is quantized.

        Raises:
          ConfigError: an unknown ``learn``, nothing to learn, or a part of a model.
          StateError: names that are missing or unknown; a model in training mode, with a BatchNorm folded into a weight,
            that is to be frozen.

        Example:
          >>> import torch, sophq_func as sq
          >>> model, x = torch.nn.Linear(2, 3), torch.randn(4, 2)
          >>> q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
          >>> params = sq.params_of(model)
          >>> qparams = q.calibrate(params, [x], progress=False)
          >>> bound = q.bind(params, qparams)
          >>> isinstance(bound, torch.nn.Linear), torch.equal(bound(x), q.apply(params, qparams, x))
          (True, True)
        """
        return bound.bind(self, params, qparams, learn)

    @public
    def tree(self, params: Given, /) -> Given:
        """Params by name, such as those of a file, as the tree that the function takes; of a module they stay a dict.

        Args:
          params: tensors by name.

        Raises:
          StateError: names that are missing or unknown.

        Example:
          >>> import torch, sophq_func as sq
          >>> params, x = {"l1": {"w": torch.ones(2, 3)}}, torch.ones(1, 2)
          >>> q = sq.quantize(lambda p, x: x @ p["l1"]["w"], sq.QuantConfig(), params=params, example_args=(x,))
          >>> q.tree(sq.params_of(params))["l1"]["w"].shape
          torch.Size([2, 3])
        """
        return self.engine.tree(params, "tree")

    @public
    def sweep(
        self,
        params: Given,
        settings: Sequence[Mapping[str, QParams]] | Mapping[str, QParams],
        batch: Tree,
        *,
        reduce: Callable[[Output], Tree] | None = None,
        how: str = "auto",
        progress: bool = True,
    ) -> Tree:
        """Run one batch under many settings of the qparams, without gradients.

        Args:
          params: as :func:`sophq_func.params_of` returns them.
          settings: a list of qparams, or a batch of them as :func:`sophq_func.stack` returns it.
          batch: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
          reduce: what to keep of an output, such as a loss; by default all of it.
          how: ``"loop"`` runs one setting after the other, and quantizes a weight once for settings that agree on it.
            ``"vmap"`` runs chunks of the settings, each chunk as one batch. ``"compile"`` is a loop over one compiled
            function; compiling pays where settings are many. ``"auto"`` is ``"vmap"`` for four or more settings of a model
            whose weights and values are so small that calling torch costs more than arithmetic, if torch can map it, else
            ``"loop"``. It depends on sizes alone: the ways round differently, and the same sweep has the same numbers.
          progress: show how far it is: a line in a notebook, a bar in a terminal where the package ``rich`` is installed.

        Returns:
          What ``reduce`` returns, each tensor with a new first axis, one entry a setting.

        Raises:
          StateError: no settings, an unknown ``how``; see :meth:`apply`.
        """
        return sweep.sweep(self.engine, params, settings, batch, reduce, how, progress)

    @public
    def weights_seen(self, params: Given, /) -> dict[str, tuple[Tensor, QScheme]]:
        """Each weight as its quantizer sees it, and the scheme with axes of that layout.

        The BatchNorm is folded in; the weights of grouped deconvolutions have output channels first.

        Args:
          params: as :func:`sophq_func.params_of` returns them.

        Returns:
          ``{quantizer name: (weight, scheme)}``, sorted.
        """
        named = self.engine.skeleton.check(params, "weights_seen")
        return sorted_dict({weight.site.quantizer: (weight.seen(named), weight.scheme) for weight in self.engine.weights})

    @public
    def quantize_value(self, name: str, x: Tensor, qparams: QParams) -> Tensor:
        """``x`` quantized and dequantized by one quantizer, also where it only observes.

        Args:
          name: of the quantizer, dotted or underscored.
          x: a tensor like those that it quantizes in the model.
          qparams: its entry of the qparams.

        Raises:
          ConfigError: the plan has no such quantizer (a ``KeyError``, too).
          StateError: ``qparams`` is no entry of it, or ``x`` no tensor.
        """
        return apply.quantize_value(self.engine, name, x, qparams)


def refuse_multipliers(where: str, q: Quantized) -> None:
    """Raise a :class:`ConfigError` where a plan simulates a chip's multipliers, which the form to be written cannot hold."""
    names = list(q.engine.requantizers) if isinstance(q, Quantized) else []
    if names:
        because = f"it holds scales alone, and {names[0]} and {len(names) - 1} others have multipliers of the chip"
        fix = 'sq.QuantConfig(chip=..., strategy="CNN"), or sq.export.tables for the chip'
        raise ConfigError(explain(where, 'a plan of strategy "Chip" cannot be written so', because=because, fix=fix))
