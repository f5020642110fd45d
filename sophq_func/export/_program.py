"""A quantized model as a module for torch.export: weights as stored codes, quantizers as operations of a target.

The module runs the model as ``q.apply`` does, with another effect at each quantizer. Folded BatchNorms are skipped, and
their layers have the folded bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from inspect import Parameter, Signature
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sophq_func.capture.arguments import map_inputs
from sophq_func.codes import Refusal, Stored, share_on, stored_form
from sophq_func.core.errors import ConfigError, StateError, explain, raise_all
from sophq_func.core.types import Args, Given, Kwargs, Output, Tree
from sophq_func.export._linear import LinearCodes, LinearGrid, value_linear, weight_linear
from sophq_func.model.loop import Loop, MakeRunner
from sophq_func.model.quantized import Quantized
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.model.weight_quantizer import Params, WeightQuantizer, arranged, round_biases
from sophq_func.numerics.affine import switched
from sophq_func.numerics.contracts import QParams

BYTES = (torch.int8, torch.uint8)
"""Dtypes of codes that may be stored in four bits."""

MIXES = "its mask is neither 0 nor 1"

Call = tuple[Args, dict[str, Any]]
"""Positional and keyword arguments of a model."""


class Target(Protocol):
    """The operators with which a form of export expresses grids.

    Attributes:
      stores_biases: store biases that the plan rounds as int32; otherwise as floats, with the same values.
      computes: weights whose codes no operator can read may be read by arithmetic: look-ups, products, reshapes.
    """

    stores_biases: bool
    computes: bool

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
    """

    stored: dict[str, LinearCodes]
    computed: dict[str, Stored]
    grids: dict[str, LinearGrid]
    simulated: dict[str, Callable[[Tensor], Tensor]]


class Program(nn.Module):
    """A quantized model as a module, all of whose tensors are buffers.

    Attributes:
      names: the buffer of each parameter, code tensor, scale and zero point, by name.
      watch: makes another runner than the default one; ``None`` for the default.
    """

    watch: MakeRunner | None = None

    def __init__(self, loop: Loop, q: Quantized, params: Params, expressed: Expressed, target: Target) -> None:
        super().__init__()
        self.names: dict[str, str] = {}
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
            params[name] = self._target.dequantize(codes, scale, self._tensor(f"{name}_zero_point"), grid)
        for name, weight in self._found.computed.items():
            parts = {part: self._tensor(f"{name}_{part}") for part in weight.grid.parts}
            params[name] = weight.read(self._tensor(f"{name}_quantized"), parts)
        return self._loop.run(params, self._effect, args, kwargs, watch=self.watch)[0]

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
        return self._target.quantize(x, self._tensor(f"{value}_scale"), self._tensor(f"{value}_zero_point"), grid)


def program(
    where: str,
    q: Quantized,
    params: Given,
    qparams: Mapping[str, QParams],
    target: Target,
    simulate: bool,
) -> Program:
    """A quantized model in eval mode, ready for torch.export.

    Args:
      where: the function that the user called, for errors.
      q, params, qparams: see :meth:`Quantized.apply`.
      target: expresses grids in operators.
      simulate: compute quantizers that the target cannot express in floating point.

    Raises:
      ConfigError: the target cannot express some quantizers; the message gives the reason for each.
      StateError: the model is in training mode; see :meth:`Quantized.apply`.
    """
    _check(where, q)
    params = q.engine.check(params, qparams, where, "qparams")
    with torch.no_grad():
        expressed, problems = _activations(q, qparams, target)
        tensors = dict(round_biases(q.engine.acting, params, q.engine.effective(qparams)))  # frozen ones are rounded
        for weight in _acting(q):
            result = _stored(weight, params, qparams[weight.site.quantizer], target, q.frozen)
            if isinstance(result, str):
                problems[weight.site.quantizer] = result
                tensors[weight.site.parameter] = _folded_weight(q, weight, params, qparams[weight.site.quantizer])
            elif isinstance(result, LinearCodes):
                expressed.stored[weight.site.parameter] = result
            elif isinstance(result, Stored):
                expressed.computed[weight.site.parameter] = result
                del tensors[weight.site.parameter]
            else:
                tensors[weight.site.parameter] = arranged(weight.seen(params), weight.site)
        fix = "give it a plain grid, leave it out by a rule, or pass simulate=True to compute it in floating point"
        texts = [
            explain(name, f"{where} cannot express this quantizer", because=why, fix=fix) for name, why in problems.items()
        ]
        raise_all([] if simulate else texts, ConfigError)
        loop = _with_folded_biases(q, tensors, expressed, target.stores_biases)
    return Program(loop, q, tensors, expressed, target)


def _check(where: str, q: Quantized) -> None:
    if not isinstance(q, Quantized):
        fix = "q = sq.quantize(model, config, example_args=(x,))"
        got = type(q).__name__
        raise StateError(explain(where, "the model is not quantized", got=got, allowed="a sq.Quantized", fix=fix))
    if q.training:
        because = "BatchNorm would use the statistics of the batch"
        raise StateError(explain(where, "a model in training mode cannot be exported", because=because, fix="q.eval()"))


def _acting(q: Quantized) -> list[WeightQuantizer]:
    """The quantizers whose weights are on a grid: put there by a run, or frozen."""
    return [weight for weight in q.engine.weights if not weight.config.observe_only]


def _activations(q: Quantized, qparams: Mapping[str, QParams], target: Target) -> tuple[Expressed, dict[str, str]]:
    """How the quantizers of activations are expressed; and by quantizer, why one cannot be."""
    expressed, problems = Expressed({}, {}, {}, {}), {}
    for name, piece in q.engine.running.items():
        share = share_on(qparams[name])
        if piece.config.observe_only or share == 0:
            continue
        result = _grid(piece, qparams[name]) if share == 1 else MIXES
        if isinstance(result, LinearGrid):
            result = target.fitted(result, False)
        if isinstance(result, LinearGrid):
            expressed.grids[name] = result
        else:
            problems[name] = result
            expressed.simulated[name] = partial(piece.quantize, qparams=qparams[name])
    return expressed, problems


def _grid(piece: RunQuantizer, qparams: QParams) -> LinearGrid | str:
    """The grid of an activation; or why it has none that operators take."""
    grid = stored_form(piece, qparams)
    if isinstance(grid, Refusal):
        return grid.because
    assert not isinstance(grid, Stored)
    return value_linear(piece, grid)


def _stored(
    weight: WeightQuantizer, params: Params, qparams: QParams, target: Target, frozen: bool
) -> LinearCodes | Stored | str | None:
    """A weight as codes for the target's operators, or for arithmetic; or why it has none; ``None`` if switched off."""
    share = share_on(qparams)
    if share != 1:
        return None if share == 0 else MIXES
    form = stored_form(weight, qparams, params, frozen=frozen)
    if isinstance(form, Refusal):
        return form.because
    assert isinstance(form, Stored)
    linear = weight_linear(form)
    grid = linear if isinstance(linear, str) else target.fitted(linear.grid, True)
    if isinstance(linear, LinearCodes) and isinstance(grid, LinearGrid):
        return linear._replace(grid=grid)
    assert isinstance(grid, str)
    return form if target.computes else grid


def _folded_weight(q: Quantized, weight: WeightQuantizer, params: Params, qparams: QParams) -> Tensor:
    """A quantized weight with its BatchNorm folded in, in floating point."""
    seen = weight.seen(params)
    on_grid = seen if q.frozen else weight.fake_quantize.apply(seen, qparams, weight.scheme)
    return arranged(switched(seen, on_grid, qparams), weight.site)


def _with_folded_biases(q: Quantized, tensors: dict[str, Tensor], expressed: Expressed, stores: bool) -> Loop:
    """The loop over a model without folded BatchNorms, whose layers get the folded bias; it is written into ``tensors``.

    A rounded bias goes into ``expressed.stored`` as int32, if the target ``stores`` biases.
    """
    skipped: list[str] = []
    biases: dict[str, tuple[str, Tensor]] = {}
    for weight in _acting(q):
        site, norm = weight.site, weight.norm
        name = site.bias or f"{site.path}.bias".lstrip(".")
        if norm is not None:
            bias = tensors[site.bias] if site.bias else torch.zeros_like(tensors[norm.mean])
            tensors[name] = (bias - tensors[norm.mean]) * norm.factor(tensors) + tensors[norm.bias]
            skipped.append(site.norm)
            biases[site.path] = name, tensors[name]
        if stores and site.source in expressed.grids and site.parameter in expressed.stored and name in tensors:
            expressed.stored[name] = _stored_bias(
                tensors[name], expressed.stored[site.parameter].grid, expressed.grids[site.source]
            )
    return q.engine.altered(skipped, biases)


def _stored_bias(bias: Tensor, weight: LinearGrid, source: LinearGrid) -> LinearCodes:
    """A bias in int32, as multiples of the weight's scale times the input's scale."""
    step = weight.scale * source.scale
    # 2 ** 31 - 128 is the largest float32 that fits in int32.
    codes = (bias.float() / step).round().clamp(-(2.0**31), 2.0**31 - 128).to(torch.int32)
    grid = LinearGrid(step, torch.zeros_like(step, dtype=torch.int32), -(2**31), 2**31 - 1, 0 if step.ndim else None)
    return LinearCodes(codes, grid)
