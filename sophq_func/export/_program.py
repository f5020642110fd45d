"""A quantized model as a module for torch.export: weights as stored codes, quantizers as operations of a target.

The module runs the model as ``q.apply`` does, with another effect at each quantizer. Folded BatchNorms are skipped, and
their layers have the folded bias. Weights that the model computes from its parameters are stored like any other. All of it
computes in float32; inputs and outputs keep the dtypes that they have in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from inspect import Parameter, Signature
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from sophq_func.capture.arguments import map_inputs
from sophq_func.codes import (
    Refusal,
    Stored,
    bias_codes,
    bias_step,
    share_on,
    stored_form,
    widened_beside,
)
from sophq_func.core.errors import ConfigError, StateError, explain, raise_all
from sophq_func.core.pytree import named_leaves, tensors, tree_map, without_dataclasses
from sophq_func.core.types import Args, Given, Kwargs, Output, Tree
from sophq_func.export._linear import LinearCodes, LinearGrid, value_linear, weight_linear
from sophq_func.model.derived import as_weight, derived, derived_names
from sophq_func.model.finite import check_numbers
from sophq_func.model.loop import Loop
from sophq_func.model.quantized import Quantized
from sophq_func.model.runner import Effect, Runner
from sophq_func.model.schedule import Schedule
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.model.weight_quantizer import Params, WeightQuantizer, arranged, round_biases
from sophq_func.numerics.affine import switched
from sophq_func.numerics.contracts import QParams

BYTES = (torch.int8, torch.uint8)
"""Dtypes of codes that may be stored in four bits."""

OTHER_FLOATS = (torch.float16, torch.bfloat16, torch.float64)
"""Dtypes of models that are computed in float32: the operators of grids have no others on every runtime."""

Plain: TypeAlias = bool | int | float | str
"""A value in an output that depends on no input."""

PLAIN = (bool, int, float, str)

RETURN_TENSORS = "return its tensors; a language model returns no cache where the example has use_cache=False"
"""What to do about an output that no file can hold; the cache of transformers is the one that most people meet."""

MIXES = "its mask is neither 0 nor 1"

Call = tuple[Args, dict[str, Any]]
"""Positional and keyword arguments of a model."""


class Target(Protocol):
    """The operators with which a form of export expresses grids.

    Attributes:
      stores_biases: store biases that the plan rounds as int32; otherwise as floats, with the same values.
      computes: weights whose codes no operator can read may be read by arithmetic: look-ups, products, reshapes.
      named: outputs are tensors with names; other values in what the model returns are noted beside the program.
    """

    stores_biases: bool
    computes: bool
    named: bool

    def fitted(self, grid: LinearGrid, stored: bool) -> LinearGrid | str:
        """The grid in the form that the target expresses; or why it cannot, as a clause.

        Args:
          grid: of a quantizer.
          stored: whether it is the grid of a stored weight, which is only read.
        """

    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor, grid: LinearGrid) -> Tensor:
        """``x`` rounded to codes and read back."""

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor, grid: LinearGrid) -> Tensor:
        """The real numbers of stored codes, float32."""


class Expressed(NamedTuple):
    """How each quantizer is expressed; switched-off ones are in none of these.

    Attributes:
      stored: codes of weights and of rounded biases, by parameter.
      computed: weights whose codes are read by arithmetic, by parameter.
      grids: of activations, by quantizer.
      simulated: quantizers of activations that are computed in floating point, by quantizer.
      derived: names in ``stored``, ``computed`` or the params of weights that the model computes from its parameters, by
        quantizer.
    """

    stored: dict[str, LinearCodes]
    computed: dict[str, Stored]
    grids: dict[str, LinearGrid]
    simulated: dict[str, Callable[[Tensor], Tensor]]
    derived: dict[str, str]


class _Noted:
    """What a run notes beside its output; an object of its own, as torch.export puts back the attributes of modules."""

    beside: Mapping[str, Plain] = MappingProxyType({})


class Program(nn.Module):
    """A quantized model as a module, all of whose tensors are buffers.

    Attributes:
      names: the buffer of each parameter, code tensor, scale and zero point, by name.
      watch: makes another runner, of an effect and a schedule, than the default one; ``None`` for the default.
      dtypes: of inputs that become float32; those of the model's parameters.
      returned: the dtypes of the floating tensors that ``q.apply`` returns, where they may differ from float32.
    """

    watch: Callable[[Effect, Schedule], Runner] | None = None

    def __init__(self, loop: Loop, q: Quantized, params: Params, expressed: Expressed, target: Target) -> None:
        super().__init__()
        self.names: dict[str, str] = {}
        self.dtypes: frozenset[torch.dtype] = frozenset()
        self.returned: list[torch.dtype] = []
        self._noted = _Noted()
        self._loop = loop
        self._found, self._target = expressed, target
        self._plain = sorted(params.keys() - expressed.stored.keys())
        for name in self._plain:
            self._hold(name, params[name])
        for name, (codes, grid) in expressed.stored.items():
            self._hold(f"{name}_quantized", codes)
            self._hold_grid(name, grid)
        for name, weight in expressed.computed.items():
            self._hold(f"{name}_quantized", weight.codes)
            for part, tensor in weight.grid.parts.items():
                self._hold(f"{name}_{part}", tensor)
        self._values = {name: q.plan.site(name).value or name for name in expressed.grids}
        for name, grid in expressed.grids.items():
            self._hold_grid(self._values[name], grid)

    def _hold(self, name: str, tensor: Tensor) -> None:
        """Register a copy of a tensor as a buffer."""
        key = f"t{len(self.names)}"  # names of buffers may not have dots
        self.names[name] = key
        self.register_buffer(key, tensor.detach().clone())

    @property
    def beside(self) -> Mapping[str, Plain]:
        """Values in the output that are no tensors, by their names, after a run of a target with named outputs."""
        return self._noted.beside

    def put(self, quantizer: str, name: str, tensor: Tensor) -> None:
        """Replace the value of a quantizer by a constant, which is held under ``name``."""
        self._hold(name, tensor)
        self._plain.append(name)
        self._found.derived[quantizer] = name

    def _hold_grid(self, name: str, grid: LinearGrid) -> None:
        self._hold(f"{name}_scale", grid.scale)
        self._hold(f"{name}_zero_point", grid.zero_point)

    def _tensor(self, name: str) -> Tensor:
        return self.get_buffer(self.names[name])

    def run(self, *args: Any, **kwargs: Any) -> Output:
        """Run the quantized model."""
        params = {name: self._tensor(name) for name in self._plain}
        for name, (_, grid) in self._found.stored.items():
            codes, scale = self._tensor(f"{name}_quantized"), self._tensor(f"{name}_scale")
            real = self._target.dequantize(codes, scale, self._tensor(f"{name}_zero_point"), grid)
            params[name] = grid.in_own_layout(real)
        for name, weight in self._found.computed.items():
            parts = {part: self._tensor(f"{name}_{part}") for part in weight.grid.parts}
            params[name] = weight.read(self._tensor(f"{name}_quantized"), parts)
        # what the model computes itself is no parameter: it takes the place of a value
        of_values = {quantizer: params.pop(name) for quantizer, name in self._found.derived.items()}

        def effect(name: str, x: Tensor) -> Tensor:
            return of_values[name] if name in of_values else self._effect(name, x)

        args, kwargs = tree_map(self._narrowed, (args, kwargs))
        watch = None if self.watch is None else partial(self.watch, effect)
        output = self._loop.run(params, effect, args, kwargs, watch=watch)[0]
        return self._returned(without_dataclasses(output))

    def _narrowed(self, leaf: Tree) -> Tree:
        """An argument in the dtype in which the program computes."""
        return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in self.dtypes else leaf

    def _returned(self, output: Output) -> Output:
        """What the model returns, in its dtypes; of a target with named outputs, its tensors by name.

        Raises:
          ConfigError: the output holds an object that no file can hold.
        """
        dtypes = iter(self.returned)

        def leaf(item: Tree) -> Tree:
            if isinstance(item, Tensor) and item.is_floating_point():
                return item.to(next(dtypes, item.dtype))
            return item

        output = tree_map(leaf, output)
        items = {name or "output": item for name, item in named_leaves(output)}
        allowed = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, type(None), *PLAIN)
        for name, item in items.items():
            if not isinstance(item, allowed):
                sentence, got = f"the output {name!r} cannot be exported", type(item).__name__
                words = "tensors, numbers, strings and None, in containers, NamedTuples and dataclasses"
                raise ConfigError(explain("export", sentence, got=got, allowed=words, fix=RETURN_TENSORS))
        if not self._target.named:
            return output
        self._noted.beside = {name: item for name, item in items.items() if isinstance(item, PLAIN)}
        made = {name: item for name, item in items.items() if not isinstance(item, (*PLAIN, type(None)))}
        # a size that the model returns is a number that depends on the input
        return {name: item if isinstance(item, Tensor) else torch.scalar_tensor(item) for name, item in made.items()}

    def narrow(self) -> list[str]:
        """Names of parameters whose codes fit in four bits."""
        return [name for name, (_, grid) in self._found.stored.items() if grid.dtype in BYTES and grid.bits <= 4]

    def signature(self, count: int, kwargs: Kwargs) -> Signature:
        """A signature for calls with ``count`` positional arguments and these keyword arguments.

        Arguments that the model takes as ``*rest`` are ``rest_0``, ``rest_1``, ...
        """
        names, rest = self._loop.arguments
        extra = [f"{rest}_{i}" for i in range(count - len(names))]
        positional = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in (*names[:count], *extra)]
        keywords = [Parameter(name, Parameter.KEYWORD_ONLY) for name in kwargs]
        return Signature([*positional, *keywords])

    def inputs(self, args: Args, kwargs: Kwargs) -> list[str]:
        """Names of the tensors among a call's arguments, in order."""
        names: list[str] = []

        def note(name: str, x: Tensor) -> Tensor:
            names.append(name)
            return x

        self.map_inputs(args, kwargs, note)
        return names

    def map_inputs(self, args: Args, kwargs: Kwargs, f: Callable[[str, Tensor], Tree]) -> Call:
        """A call's arguments with ``f(name, tensor)`` in the place of each tensor."""
        return map_inputs(self._loop.arguments, args, kwargs, f)

    def called_as(self, signature: Signature) -> None:
        """Set the signature of ``forward``, from which torch.export takes the names of the arguments."""

        def forward(*args: Any, **kwargs: Any) -> Output:
            return self.run(*args, **kwargs)

        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.forward = forward

    def _effect(self, name: str, x: Tensor) -> Tensor:
        """What the quantizer ``name`` does to an activation."""
        if name in self._found.simulated:
            return self._found.simulated[name](x)
        grid = self._found.grids.get(name)
        if grid is None:
            return x
        value = self._values[name]
        work = _in_float32(x)
        scale, zero_point = self._tensor(f"{value}_scale"), self._tensor(f"{value}_zero_point")
        y = grid.in_own_layout(self._target.quantize(grid.as_matrix(work), scale, zero_point, grid))
        return y if y.dtype == x.dtype else y.to(x.dtype)


def program(
    where: str,
    q: Quantized,
    params: Given,
    qparams: Mapping[str, QParams],
    target: Target,
    simulate: bool,
    example: Call,
) -> Program:
    """A quantized model in eval mode, ready for torch.export.

    Args:
      where: the function that the user called, for errors.
      q, params, qparams: see :meth:`Quantized.apply`.
      target: expresses grids in operators.
      simulate: compute quantizers that the target cannot express in floating point.
      example: one call of the model.

    Raises:
      ConfigError: the target cannot express some quantizers; the message gives the reason for each.
      StateError: the model is in training mode; NaN in a scale, a weight or a bias; see :meth:`Quantized.apply`.
    """
    _check(where, q)
    params = q.engine.check(params, qparams, where, "qparams")
    check_numbers(where, q.plan, q.engine.quantizers, params, qparams)
    with torch.no_grad():
        made = _Expressing(q, params, tree_map(_in_float32, dict(qparams)), target, example)
        fix = "give it a plain grid, leave it out by a rule, or pass simulate=True to compute it in floating point"
        texts = [
            explain(name, f"{where} cannot express this quantizer", because=why, fix=fix)
            for name, why in made.problems.items()
        ]
        raise_all([] if simulate else texts, ConfigError)
        loop = q.engine.altered(made.skipped, made.biases)
        module = Program(loop, q, made.tensors, made.expressed, target)
        module.dtypes = frozenset(p.dtype for p in params.values()) & frozenset(OTHER_FLOATS)
        if module.dtypes:  # one run of the model, which float32 models are spared
            output = q.apply(params, qparams, *example[0], **example[1])
            module.returned = [t.dtype for t in tensors(output) if t.is_floating_point()]
    return module


def _check(where: str, q: Quantized) -> None:
    if not isinstance(q, Quantized):
        fix = "q = sq.quantize(model, config, example_args=(x,))"
        got = type(q).__name__
        raise StateError(explain(where, "the model is not quantized", got=got, allowed="a sq.Quantized", fix=fix))
    if q.training:
        because = "BatchNorm would use the statistics of the batch"
        raise StateError(explain(where, "a model in training mode cannot be exported", because=because, fix="q.eval()"))


class _Expressing:
    """Finds how each quantizer is expressed, quantizer by quantizer, and every problem on the way.

    Attributes:
      expressed: see :class:`Expressed`.
      problems: by quantizer, why the target cannot express it.
      tensors: the params of the program: float32, biases rounded and folded.
      skipped: paths of folded BatchNorms.
      biases: by path of a layer, the name of its folded bias, and the bias.
    """

    def __init__(self, q: Quantized, params: Params, qparams: Mapping[str, QParams], target: Target, example: Call) -> None:
        self.q, self.qparams, self.target = q, qparams, target
        self.params = widened_beside(q.engine.weights, params)
        self.expressed = Expressed({}, {}, {}, {}, {})
        self.problems: dict[str, str] = {}
        self.skipped: list[str] = []
        self.biases: dict[str, tuple[str, Tensor]] = {}
        effective = q.engine.effective(qparams)
        rounded = round_biases(q.engine.acting, self.params, effective)  # those of frozen models are rounded already
        self.tensors = {name: _in_float32(p) for name, p in rounded.items()}
        wanted = [name for name in derived_names(q.engine) if share_on(qparams[name]) and not q.plan[name].observe_only]
        found = derived(q.engine, params, effective, example, wanted)
        for name, piece in q.engine.running.items():
            if name in found.weights:
                self._derived(name, piece, found.weights[name], params.keys())
            elif name not in found.inner:
                self._activation(name, piece)
        for weight in q.engine.weights:
            if not weight.config.observe_only:  # put on its grid by a run, or frozen
                self._weight(weight)

    def _activation(self, name: str, piece: RunQuantizer) -> None:
        """Express the quantizer of an activation."""
        qparams = self.qparams[name]
        share = share_on(qparams)
        if piece.config.observe_only or share == 0:
            return
        result = _grid(piece, qparams) if share == 1 else MIXES
        if isinstance(result, LinearGrid):
            result = self.target.fitted(result, False)
        if isinstance(result, LinearGrid):
            self.expressed.grids[name] = result
        else:
            self.problems[name] = result
            self.expressed.simulated[name] = partial(piece.quantize, qparams=qparams)

    def _derived(self, name: str, piece: RunQuantizer, tensor: Tensor, taken: Collection[str]) -> None:
        """Express a weight that the model computes from its parameters."""
        weight, params = as_weight(piece, tensor, taken)
        self.expressed.derived[name] = weight.site.parameter
        self._put(weight, self._form(weight, params, frozen=False), params)

    def _weight(self, weight: WeightQuantizer) -> None:
        """Express the weight of a layer, and its bias."""
        form = self._form(weight, self.params, self.q.frozen)
        name = weight.site.bias or f"{weight.site.path}.bias".lstrip(".")
        if weight.norm is not None:
            self._fold(weight, name)
        if isinstance(form, _Coded) and name in self.tensors:
            form = self._with_bias(weight, form, name)
        self._put(weight, form, self.params)

    def _form(self, weight: WeightQuantizer, params: Params, frozen: bool) -> _Coded | Stored | str | None:
        """A weight as codes for the target's operators, or for arithmetic; or why it has none; ``None``: switched off."""
        qparams = self.qparams[weight.site.quantizer]
        share = share_on(qparams)
        if share != 1:
            return None if share == 0 else MIXES
        form = stored_form(weight, qparams, params, frozen=frozen, wide=True)
        if isinstance(form, Refusal):
            return form.because
        assert isinstance(form, Stored)
        linear = weight_linear(form)
        grid = linear if isinstance(linear, str) else self.target.fitted(linear.grid, True)
        if isinstance(linear, LinearCodes) and isinstance(grid, LinearGrid):
            return _Coded(linear._replace(grid=grid), form)
        assert isinstance(grid, str)
        return form if self.target.computes else grid

    def _put(self, weight: WeightQuantizer, form: _Coded | Stored | str | None, params: Params) -> None:
        """Put a weight, or why it cannot be expressed, where the program finds it."""
        name, quantizer = weight.site.parameter, weight.site.quantizer
        if isinstance(form, _Coded):
            self.expressed.stored[name] = form.linear
        elif isinstance(form, Stored):
            self.expressed.computed[name] = form
            self.tensors.pop(name, None)
        elif isinstance(form, str):
            self.problems[quantizer] = form
            self.tensors[name] = _in_float32(self._on_grid(weight, params))
        else:
            self.tensors[name] = _in_float32(arranged(weight.seen(params), weight.site))

    def _on_grid(self, weight: WeightQuantizer, params: Params) -> Tensor:
        """A quantized weight with its BatchNorm folded in, in floating point."""
        seen, qparams = weight.seen(params), self.qparams[weight.site.quantizer]
        is_on_grid = self.q.frozen and params is self.params  # derived weights are not frozen
        on_grid = seen if is_on_grid else weight.fake_quantize.apply(seen, qparams, weight.scheme)
        return arranged(switched(seen, on_grid, qparams), weight.site)

    def _fold(self, weight: WeightQuantizer, name: str) -> None:
        """Fold a BatchNorm into the bias ``name`` of the layer before it, which the layer need not have had."""
        site, norm, tensors = weight.site, weight.norm, self.tensors
        assert norm is not None
        bias = tensors[site.bias] if site.bias else torch.zeros_like(tensors[norm.mean])
        tensors[name] = (bias - tensors[norm.mean]) * norm.factor(tensors) + tensors[norm.bias]
        self.skipped.append(site.norm)
        self.biases[site.path] = name, tensors[name]

    def _with_bias(self, weight: WeightQuantizer, coded: _Coded, name: str) -> _Coded | str:
        """The weight, whose scale may change for the bias; or why its bias cannot be expressed.

        A rounded bias goes into ``expressed.stored`` as int32, if the target stores biases.
        """
        if not self.target.stores_biases:
            return coded
        site, grids, bias = weight.site, self.expressed.grids, self.tensors[name]
        if site.source not in grids:
            return coded
        step = bias_step(coded.stored, grids[site.source].scale)
        if step is None:
            return coded
        form = bias_codes(coded.stored, step, bias)
        if isinstance(form, Refusal):
            return form.because
        zero = torch.zeros_like(form.step, dtype=torch.int32)
        grid = LinearGrid(form.step, zero, -(2**31), 2**31 - 1, 0 if form.step.ndim else None)
        self.expressed.stored[name] = LinearCodes(form.codes, grid)
        scale = form.scale.float()
        number = (float(scale), coded.linear.grid.number[1]) if scale.ndim == 0 else coded.linear.grid.number
        return coded._replace(linear=coded.linear._replace(grid=coded.linear.grid._replace(scale=scale, number=number)))


class _Coded(NamedTuple):
    """A weight as codes for the target's operators, and in the form from which they were made."""

    linear: LinearCodes
    stored: Stored


def _grid(piece: RunQuantizer, qparams: QParams) -> LinearGrid | str:
    """The grid of an activation; or why it has none that operators take."""
    grid = stored_form(piece, qparams)
    if isinstance(grid, Refusal):
        return grid.because
    assert not isinstance(grid, Stored)
    return value_linear(piece, grid)


def _in_float32(p: Tensor) -> Tensor:
    """A parameter as the program holds it."""
    return p.float() if p.dtype in OTHER_FLOATS else p
