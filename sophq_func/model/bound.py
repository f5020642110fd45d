"""A quantized model as a module of the model's own class, with tensors of its own."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from sophq_func.capture.calls import one_call
from sophq_func.capture.live import Live, without_hooks
from sophq_func.config.names import underscored
from sophq_func.core.errors import ConfigError, StateError, explain
from sophq_func.core.modes import is_compiling, outside_inference
from sophq_func.core.pytree import sorted_dict
from sophq_func.core.types import Given, Output
from sophq_func.model.engine import Engine, QParamsDict
from sophq_func.model.flat import flat, merge, split
from sophq_func.model.weight_quantizer import Params
from sophq_func.numerics.contracts import QParams

if TYPE_CHECKING:
    from sophq_func.model.quantized import Quantized

Learn: TypeAlias = Literal["scales", "params", "all"] | None
"""What of a bound model is learned."""

LEARN = ("scales", "params", "all", None)
"""All values of :data:`Learn`."""

HOLDER = "fake_quantizers"
"""Name of the attribute that holds the qparams; an underscore follows where the model has one of this name."""

FROZEN = "weights_are_quantized"
"""Name of a buffer that frozen bound models have: it keeps float weights from being loaded into one, and the reverse."""


class Binding(NamedTuple):
    """What a bound model was made of, without its tensors.

    Attributes:
      q: the quantized model.
      kind: the class of the model.
      learn: what is learned.
      holder: name of the attribute that holds the qparams.
      forward: what the model has in the place of the forward of its class, if anything.
      plain: whether the model's own forward is run as it is: no value in it is quantized, and weights are quantized already.
    """

    q: Quantized
    kind: type[nn.Module]
    learn: Learn
    holder: str
    forward: Callable[..., Output] | None
    plain: bool

    @property
    def frozen(self) -> bool:
        """Whether weights are quantized already."""
        return self.learn is None or self.q.frozen


class QuantizerTensors(nn.Module):
    """The qparams of one quantizer: its scale, its zero point and its extras, each a parameter or a buffer."""

    def __init__(self, qparams: QParams, learned: Collection[str]) -> None:
        super().__init__()
        self.extras = tuple(sorted(qparams.extras))
        for field, tensor in {"scale": qparams.scale, "zero_point": qparams.zero_point, **qparams.extras}.items():
            own = outside_inference(tensor.detach().clone())
            if field in learned:
                self.register_parameter(field, nn.Parameter(own))
            else:
                self.register_buffer(field, own)

    def qparams(self) -> QParams:
        """The tensors that the module holds now."""
        extras = {name: getattr(self, name) for name in self.extras}
        return QParams(self.scale, self.zero_point, extras)  # type: ignore[arg-type]


class FakeQuantizers(nn.Module):
    """The qparams of all quantizers, each in a :class:`QuantizerTensors` under its name with underscores for dots.

    Scales keep their dtype: ``module.to(torch.bfloat16)``, or ``half()``, converts the model, not its grids.
    """

    def __init__(self, qparams: Mapping[str, QParams], learned: Collection[str], frozen: bool) -> None:
        super().__init__()
        self.names: dict[str, str] = {}
        for name, entry in qparams.items():
            key = _free(underscored(name), self.names.values())
            self.names[name] = key
            fields = {leaf.rpartition(".")[2] for leaf in learned if leaf.rpartition(".")[0] == name}
            self.add_module(key, QuantizerTensors(entry, fields))
        if frozen:
            self.register_buffer(FROZEN, torch.tensor(True))

    def qparams(self) -> QParamsDict:
        """What the module holds, by quantizer."""
        children: Mapping[str, Any] = self._modules
        return {name: children[key].qparams() for name, key in self.names.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantizers:
        def kept(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        return super()._apply(kept, recurse)  # type: ignore[no-untyped-call, no-any-return]


class Bound(nn.Module):
    """A quantized model as a module; made by :meth:`sophq_func.Quantized.bind`, which also says what it can do.

    Its class is a subclass of this one and of the model's class.
    """

    _sophq_binding: Binding
    _sophq_engine: Engine

    if TYPE_CHECKING:  # it has what the model has, such as ``generate``; of a module a type checker expects tensors

        def __getattr__(self, name: str) -> Any: ...

    @property
    def is_plain(self) -> bool:
        """Whether the model's own forward runs as it is: weights are quantized already, and nothing else is."""
        return self._sophq_binding.plain

    def state(self) -> tuple[Given, QParamsDict]:
        """The params and qparams that the module holds now, for the functions of the library: detached, not copied.

        Of a frozen module the params hold weights that lie on their grids already.

        Example:
          >>> import torch, sophq_func as sq
          >>> model, x = torch.nn.Linear(2, 3), torch.randn(4, 2)
          >>> q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
          >>> params = sq.params_of(model)
          >>> bound = q.bind(params, q.calibrate(params, [x], progress=False), learn="params")
          >>> torch.equal(q.apply(*bound.state(), x), bound(x))
          True
        """
        live = self._live()
        with live.alone():
            named = {name: tensor.detach() for name, tensor in live.tensors().items()}
        leaves = {name: leaf.detach() for name, leaf in flat(self._quantizers().qparams()).items()}
        return self._sophq_engine.tree(sorted_dict(named), "state"), merge(leaves, {})

    def train(self, mode: bool = True) -> Bound:
        """Set the training flag of all modules; BatchNorms that are folded into frozen weights stay in evaluation mode."""
        super().train(mode)
        if self._sophq_binding.frozen:
            for path in self._folded():
                self.get_submodule(path).eval()
        return self

    def extra_repr(self) -> str:
        """What the class of the model says about itself, and what is quantized and learned."""
        binding = self._sophq_binding
        mine = f"quantized by {binding.q.plan!r}, learn={binding.learn!r}"
        return ", ".join(filter(None, [super().extra_repr(), mine]))

    def _quantizers(self) -> FakeQuantizers:
        holder: FakeQuantizers = vars(self)[self._sophq_binding.holder]
        return holder

    def _live(self) -> Live:
        live = self._sophq_engine.skeleton
        assert isinstance(live, Live)
        return live

    def _folded(self) -> list[str]:
        """Paths of the BatchNorms that are folded into weights."""
        return [weight.site.norm for weight in self._sophq_engine.weights if weight.norm]

    def _engine(self, live: Live) -> Engine:
        """The engine, made anew where a BatchNorm that is folded into a weight has another mode since."""
        if not is_compiling() and vars(live.entry) is not vars(self):
            sentence = "a replica shares the modules of the bound model, and cannot run with tensors of its own"
            fix = "torch.nn.parallel.DistributedDataParallel instead of nn.DataParallel, or copy.deepcopy(bound)"
            raise StateError(explain("bind", sentence, fix=fix))
        norms = [weight.norm for weight in self._sophq_engine.weights if weight.norm]
        if any(live.is_training(path) is not norm.training for path, norm in zip(self._folded(), norms, strict=True)):
            binding = self._sophq_binding
            if binding.frozen:
                sentence = "frozen weights have a BatchNorm folded in, whose statistics would change with each batch"
                fix = "bound.eval(), or q.bind(params, qparams, learn='params') for a model that is trained"
                raise StateError(explain("bind", sentence, got=self._folded()[0], fix=fix))
            vars(self)["_sophq_engine"] = Engine(live, binding.q.plan, binding.frozen, kernels=binding.q.kernels)
        return self._sophq_engine

    @one_call("quantized_forward")
    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Output:
        """A run of the quantized model with the tensors that the modules hold now."""
        live = self._live()
        with live.alone():  # from the start, as a run puts other tensors in the place of those that the modules hold
            engine = self._engine(live)
            params, qparams = live.tensors(), self._quantizers().qparams()
            engine.check_kinds(qparams)
            output, written = engine.run_quantized(params, qparams, engine.quantizing(qparams), args, kwargs)
            live.write(_with_shifted_means(engine, params, qparams, written))
        return output

    def _attach(self) -> None:
        """Make what runs the module from its attributes and the modules in it."""
        binding = self._sophq_binding
        q = binding.q
        live = Live(q.engine.skeleton, self, binding.kind, binding.forward)
        engine = Engine(live, q.plan, binding.frozen, kernels=q.kernels)
        if not binding.plain:
            live.close(_closed(engine))
        vars(self)["_sophq_engine"] = engine

    # The qparams are no child of the model, whose forward may run all of its children, as that of ``nn.Sequential`` does.
    # So what torch does with children is done with them here.

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The modules of the model, and those that hold the qparams."""
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        inside = f"{prefix}.{self._sophq_binding.holder}".lstrip(".")
        yield from self._quantizers().named_modules(memo, inside, remove_duplicate)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Bound:
        self._quantizers()._apply(fn, recurse)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        inside = f"{prefix}{self._sophq_binding.holder}."
        self._quantizers().state_dict(destination=destination, prefix=inside, keep_vars=keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        unexpected: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs)  # type: ignore[no-untyped-call]
        inside = f"{prefix}{self._sophq_binding.holder}."
        # where the model is a function, paths of leaves are names of parameters, which torch takes for those of submodules
        own = self._sophq_binding.q.engine.skeleton.names
        unexpected_keys += [key for key in unexpected if key.removeprefix(prefix) not in own and not key.startswith(inside)]
        for path, module in self._quantizers().named_modules(prefix=inside[:-1]):
            module._load_from_state_dict(state_dict, f"{path}.", {}, strict, missing_keys, unexpected_keys, error_msgs)  # type: ignore[no-untyped-call]

    # copies take the attributes, and make what runs them anew, since it refers to the modules of the original

    def __getstate__(self) -> dict[str, Any]:
        get = getattr(super(), "__getstate__", None)  # Python 3.10 has none in ``object``
        # that of a parametrized module refuses, since pickle cannot find its class
        state = dict(vars(self)) if get is None or "parametrizations" in self._modules else dict(get())
        state.pop("_sophq_engine", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._attach()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        binding = self._sophq_binding
        return _empty, (binding.kind, binding.plain), self.__getstate__()

    def __deepcopy__(self, memo: dict[int, Any]) -> Bound:
        binding = self._sophq_binding
        other = _empty(binding.kind, binding.plain)
        memo[id(self)] = other
        memo[id(binding.q)] = binding.q  # nothing in it changes
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return other


def bind(q: Quantized, params: Given, qparams: Mapping[str, QParams], learn: Learn) -> Bound:
    """See :meth:`sophq_func.Quantized.bind`."""
    engine = q.engine
    _check(q, learn)
    named = engine.check(params, qparams, "bind", "qparams")
    scales = _learned_scales(engine, qparams, learn)
    frozen = learn is None or q.frozen
    if frozen and not q.frozen:
        named = engine.quantized_params(named, qparams)
        engine = engine.as_frozen()
    module = copy.deepcopy(engine.skeleton).module
    kind = type(module)
    plain = frozen and not engine.loop.schedule
    forward = None if plain else vars(module).pop("forward", None)
    holder = _free(HOLDER, dir(module))
    without_hooks(module, inside=plain)
    module.__class__ = _class(kind, plain)
    assert isinstance(module, Bound)
    vars(module)["_sophq_binding"] = Binding(q, kind, learn, holder, forward, plain)
    module._attach()
    module._live().fill(_own(engine, named, learn in ("params", "all")))
    vars(module)[holder] = FakeQuantizers(sorted_dict(qparams), scales, frozen)
    return module


def _check(q: Quantized, learn: Learn) -> None:
    """Raise an error of the library where a quantized model cannot be bound, or not so."""
    if learn not in LEARN:
        fix = "learn='scales' for quantizers, 'params' for weights, 'all' for both, None for a frozen model"
        raise ConfigError(explain("bind", "learn names what is trained", got=learn, allowed=LEARN, fix=fix))
    if q.engine.whole is not None:
        fix = "bind the whole model, and take the module out of it: q.bind(params, qparams)"
        raise ConfigError(explain("bind", "a part cannot be bound", got=q.path, fix=fix))
    if isinstance(q.engine.skeleton.entry, torch.jit.ScriptModule):
        because, fix = "its class cannot have a subclass", "quantize the module before torch.jit.script"
        raise ConfigError(explain("bind", "a ScriptModule cannot be bound", because=because, fix=fix))
    if q.frozen and learn in ("params", "all"):
        fix = "bind the q that was frozen, or learn='scales'"
        raise StateError(explain("bind", "frozen weights cannot be trained", got=learn, fix=fix))
    folded = [weight.site.norm for weight in q.engine.weights if weight.norm is not None]
    if learn is None and q.training and folded and not q.frozen:
        sentence = "a model in training mode cannot be frozen"
        because = f"the statistics of {folded[0]} are folded into a weight and change with each batch"
        fix = "q.eval().bind(params, qparams), or learn='params'"
        raise StateError(explain("bind", sentence, because=because, fix=fix))


def _learned_scales(engine: Engine, qparams: Mapping[str, QParams], learn: Learn) -> Collection[str]:
    """Names of the leaves of the qparams that are learned."""
    if learn not in ("scales", "all"):
        return ()
    learnable, _ = split(engine, qparams)
    if learn == "scales" and not learnable:
        sentence = "the plan has no scale that can be learned"
        fix = "fake_quantize=sq.fake_quantize.learnable() in the config, or learn='params'"
        raise ConfigError(explain("bind", sentence, got=learn, fix=fix))
    return learnable


def _own(engine: Engine, params: Params, learned: bool) -> dict[str, Tensor]:
    """Clones of all tensors, parameters where the model has parameters; they are learned where the model's were."""
    own: dict[str, Tensor] = {}
    for name, like in engine.empty_params().items():
        tensor = outside_inference(params[name].detach().clone())
        is_parameter = isinstance(like, nn.Parameter)
        own[name] = nn.Parameter(tensor, learned and like.requires_grad) if is_parameter else tensor
    if learned and not any(tensor.requires_grad for tensor in own.values()):
        sentence, fix = "no parameter of the model requires a gradient", "model.requires_grad_(True) before sq.quantize"
        raise ConfigError(explain("bind", sentence, because="learn='params' keeps what the model says", fix=fix))
    return own


def _with_shifted_means(
    engine: Engine, params: Params, qparams: Mapping[str, QParams], written: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The buffers that a run has written, with the running means that rounded biases shift, as of a pure run."""
    new = dict(written)
    for weight in engine.acting:
        new.pop(weight.site.parameter, None)  # what the run had in its place is the rounded one, which is not kept
    for weight in engine.acting if new else ():
        site = weight.site
        if site.source:
            shifted = weight.mean_shift(params, qparams[site.quantizer], qparams[site.source], {**params, **new})
            new.update(shifted)
    return new


def _closed(engine: Engine) -> dict[str, str]:
    """By path, what the modules in which a quantizer acts say when they are called alone: they would compute in float."""
    paths = {weight.site.path for weight in engine.acting} | {path for path, _ in engine.loop.schedule.actions}
    return {outer: _called_alone(outer) for path in paths for outer in _around(path)}


def _called_alone(path: str) -> str:
    sentence = "it is called outside the forward of the bound model, where its quantizers would not act"
    fix = f"q.part({path!r}).apply(params, qparams, ...) with params, qparams = bound.state()"
    return explain(path, sentence, fix=fix)


def _around(path: str) -> Iterator[str]:
    """A path and those of the modules around it, without the model itself."""
    parts = path.split(".") if path else []
    yield from (".".join(parts[:length]) for length in range(1, len(parts) + 1))


def _free(name: str, taken: Collection[str]) -> str:
    """A name with as many underscores behind it as make it a new one."""
    while name in taken:
        name += "_"
    return name


def _class(kind: type[nn.Module], plain: bool) -> type[nn.Module]:
    """The class of a bound model of a class ``kind``; a plain one has the forward of the model itself."""
    hashable: Any = kind  # which a type checker denies of modules' classes
    return _made_class(hashable, plain)


@functools.cache  # so that copies of a module have its class
def _made_class(kind: Any, plain: bool) -> type[nn.Module]:
    # names are those of the model's class, by which libraries look it up
    members: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    if not plain:

        @functools.wraps(kind.forward)
        def forward(self: Bound, *args: Any, **kwargs: Any) -> Output:
            return self._run(args, kwargs)

        members["forward"] = forward
    return types.new_class(kind.__name__, (Bound, kind), exec_body=lambda namespace: namespace.update(members))


def _empty(kind: type[nn.Module], plain: bool) -> Bound:
    """A bound model without attributes, to be filled with those of another."""
    made = object.__new__(_class(kind, plain))
    assert isinstance(made, Bound)
    return made
