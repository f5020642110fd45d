"""A quantized model as a module that torch.export captures: stored codes for weights, a target's own operations for grids.

It is the run that ``q.apply`` makes, with another effect at each quantizer. BatchNorms that were folded into weights are
gone; their layers have the folded bias.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sophq_func.capture.arguments import map_inputs
from sophq_func.capture.skeleton import Skeleton
from sophq_func.codes import Refusal, Stored, share_on, stored_form
from sophq_func.core.errors import ConfigError, StateError, explain, raise_all
from sophq_func.export._linear import LinearCodes, LinearGrid, value_linear, weight_linear
from sophq_func.model.loop import Watch
from sophq_func.model.quantized import Quantized
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.model.weight_quantizer import Params, WeightQuantizer, arranged, round_biases
from sophq_func.numerics.affine import switched
from sophq_func.numerics.contracts import QParams

BYTES = (torch.int8, torch.uint8)
MIXES = "its mask is neither 0 nor 1"

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Target(Protocol):
    """How an export spells grids.

    Attributes:
      stores_biases: biases that the plan rounds are stored as int32; otherwise as floats, with the same values.
      computes: weights whose codes no operator reads may be read by arithmetic: looked up, multiplied, reshaped.
    """

    stores_biases: bool
    computes: bool

    def fitted(self, grid: LinearGrid, stored: bool) -> LinearGrid | str:
        """A grid, of a stored weight or not, as the target has it; or why it cannot be spelled."""

    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor, grid: LinearGrid) -> Tensor:
        """``x`` as codes and back."""

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor, grid: LinearGrid) -> Tensor:
        """What stored codes stand for."""


class Found(NamedTuple):
    """What becomes of each quantizer.

    Attributes:
      stored: codes of weights and of rounded biases, by parameter.
      computed: weights whose codes are read by arithmetic, by parameter.
      grids: of activations, by quantizer.
      simulated: quantizers that keep their own arithmetic.
    """

    stored: dict[str, LinearCodes]
    computed: dict[str, Stored]
    grids: dict[str, LinearGrid]
    simulated: dict[str, Callable[[Tensor], Tensor]]


class Program(nn.Module):
    """A quantized model whose tensors are its buffers.

    Attributes:
      names: the buffer of each parameter, code, scale and zero point, by name.
      watch: makes the runner of a run, where it shall do more than to act on values.
    """

    watch: Watch | None = None

    def __init__(self, skeleton: Skeleton, q: Quantized, params: Params, found: Found, target: Target) -> None:
        super().__init__()
        self.names: dict[str, str] = {}
        self._loop = q.engine.loop.on(skeleton)
        self._found, self._target = found, target
        self._plain = sorted(params.keys() - found.stored.keys())
        for name in self._plain:
            self._hold(name, params[name])
        for name, (codes, grid) in found.stored.items():
            self._hold(f"{name}_quantized", codes)
            self._hold_grid(name, grid)
        for name, own in found.computed.items():
            self._hold(f"{name}_quantized", own.codes)
            for part, tensor in own.grid.parts.items():
                self._hold(f"{name}_{part}", tensor)
        self._values = {name: q.plan.site(name).value or name for name in found.grids}
        for name, grid in found.grids.items():
            self._hold_grid(self._values[name], grid)

    def _hold(self, name: str, tensor: Tensor) -> None:
        key = f"t{len(self.names)}"
        self.names[name] = key
        self.register_buffer(key, tensor.detach().clone())

    def _hold_grid(self, name: str, grid: LinearGrid) -> None:
        self._hold(f"{name}_scale", grid.scale)
        self._hold(f"{name}_zero_point", grid.zero_point)

    def _tensor(self, name: str) -> Tensor:
        return self.get_buffer(self.names[name])

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The quantized model."""
        params = {name: self._tensor(name) for name in self._plain}
        for name, (_, grid) in self._found.stored.items():
            codes, scale = self._tensor(f"{name}_quantized"), self._tensor(f"{name}_scale")
            params[name] = self._target.dequantize(codes, scale, self._tensor(f"{name}_zero_point"), grid)
        for name, own in self._found.computed.items():
            parts = {part: self._tensor(f"{name}_{part}") for part in own.grid.parts}
            params[name] = own.read(self._tensor(f"{name}_quantized"), parts)
        return self._loop.run(params, self._effect, args, kwargs, watch=self.watch)[0]

    def narrow(self) -> list[str]:
        """Parameters whose codes need no more than four bits."""
        return [name for name, (_, grid) in self._found.stored.items() if grid.dtype in BYTES and grid.bits <= 4]

    def signature(self, count: int, kwargs: Mapping[str, Any]) -> inspect.Signature:
        """That of a call with ``count`` positional arguments, each by its name."""
        kinds, (names, rest) = inspect.Parameter, self._loop.arguments
        given = [*names[:count], *(f"{rest}_{i}" for i in range(count - len(names)))]
        positional = [kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in given]
        return inspect.Signature([*positional, *(kinds(name, kinds.KEYWORD_ONLY) for name in kwargs)])

    def inputs(self, args: Any, kwargs: Any) -> list[str]:
        """Names of the tensors among a call's arguments."""
        found: list[str] = []

        def note(name: str, x: Tensor) -> Tensor:
            found.append(name)
            return x

        self.map_inputs(args, kwargs, note)
        return found

    def map_inputs(self, args: Any, kwargs: Any, f: Callable[[str, Tensor], Any]) -> Call:
        """``f`` applied to each tensor among a call's arguments, which is told its name."""
        return map_inputs(self._loop.arguments, args, kwargs, f)

    def called_as(self, signature: inspect.Signature) -> None:
        """Take calls of this signature, by whose names torch.export speaks of the arguments."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.run(*args, **kwargs)

        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.forward = forward

    def _effect(self, name: str, x: Tensor) -> Tensor:
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
    params: Params,
    qparams: Mapping[str, QParams],
    target: Target,
    simulate: bool,
) -> Program:
    """A quantized model in eval mode, ready for torch.export.

    Args:
      where: who asks, for errors.
      q, params, qparams: see :meth:`Quantized.apply`.
      target: how grids are spelled, and which.
      simulate: quantizers that it cannot spell keep their arithmetic, in floating point.

    Raises:
      ConfigError: quantizers that the target cannot spell, each with the reason.
      StateError: training mode; see :meth:`Quantized.apply`.
    """
    _check(where, q)
    q.engine.check(params, qparams, where, "qparams")
    with torch.no_grad():
        found, problems = _activations(q, qparams, target)
        tensors = dict(round_biases(q.engine.acting, params, q.engine.steps(qparams)))  # of frozen ones they are
        for weight in _acting(q):
            result = _stored(weight, params, qparams[weight.site.quantizer], target, q.frozen)
            if isinstance(result, str):
                problems[weight.site.quantizer] = result
                tensors[weight.site.parameter] = _folded_weight(q, weight, params, qparams[weight.site.quantizer])
            elif isinstance(result, LinearCodes):
                found.stored[weight.site.parameter] = result
            elif isinstance(result, Stored):
                found.computed[weight.site.parameter] = result
                del tensors[weight.site.parameter]
            else:
                tensors[weight.site.parameter] = arranged(weight.seen(params), weight.site)
        fix = "give it a plain grid, leave it out by a rule, or pass simulate=True to compute it in floating point"
        texts = [
            explain(name, f"{where} cannot express this quantizer", because=why, fix=fix) for name, why in problems.items()
        ]
        raise_all([] if simulate else texts, ConfigError)
        skeleton = _with_folded_biases(q, tensors, found, target.stores_biases)
    return Program(skeleton, q, tensors, found, target)


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


def _activations(q: Quantized, qparams: Mapping[str, QParams], target: Target) -> tuple[Found, dict[str, str]]:
    """The grids of quantizers that act while the model runs; and those without one, with the reason."""
    found, problems = Found({}, {}, {}, {}), {}
    for name, piece in q.engine.running.items():
        own = qparams[name]
        share = share_on(own)
        if piece.config.observe_only or share == 0:
            continue
        result = _grid(piece, own) if share == 1 else MIXES
        if isinstance(result, LinearGrid):
            result = target.fitted(result, False)
        if isinstance(result, LinearGrid):
            found.grids[name] = result
        else:
            problems[name] = result
            found.simulated[name] = partial(piece.quantize, qparams=own)
    return found, problems


def _grid(piece: RunQuantizer, qparams: QParams) -> LinearGrid | str:
    grid = stored_form(piece, qparams)
    if isinstance(grid, Refusal):
        return grid.because
    assert not isinstance(grid, Stored)
    return value_linear(piece, grid)


def _stored(
    weight: WeightQuantizer, params: Params, qparams: QParams, target: Target, frozen: bool
) -> LinearCodes | Stored | str | None:
    """A weight as codes for the target's operators, or for arithmetic; or why not; ``None`` where it is switched off."""
    share = share_on(qparams)
    if share != 1:
        return None if share == 0 else MIXES
    found = stored_form(weight, qparams, params, frozen=frozen)
    if isinstance(found, Refusal):
        return found.because
    assert isinstance(found, Stored)
    linear = weight_linear(found)
    grid = linear if isinstance(linear, str) else target.fitted(linear.grid, True)
    if isinstance(linear, LinearCodes) and isinstance(grid, LinearGrid):
        return linear._replace(grid=grid)
    assert isinstance(grid, str)
    return found if target.computes else grid


def _folded_weight(q: Quantized, weight: WeightQuantizer, params: Params, qparams: QParams) -> Tensor:
    """A quantized weight with its BatchNorm folded in, in floating point."""
    seen = weight.seen(params)
    on_grid = seen if q.frozen else weight.fake_quantize.apply(seen, qparams, weight.scheme)
    return arranged(switched(seen, on_grid, qparams), weight.site)


def _with_folded_biases(q: Quantized, tensors: dict[str, Tensor], found: Found, stores: bool) -> Skeleton:
    """The skeleton with BatchNorms that do nothing and layers that have their bias, which goes into ``tensors``.

    A bias that is rounded is stored as int32 on its grid, where the target ``stores`` biases.
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
        if stores and site.source in found.grids and site.parameter in found.stored and name in tensors:
            found.stored[name] = _stored_bias(tensors[name], found.stored[site.parameter].grid, found.grids[site.source])
    return q.engine.skeleton.altered(skipped, biases)


def _stored_bias(bias: Tensor, weight: LinearGrid, source: LinearGrid) -> LinearCodes:
    """A bias as multiples of weight scale times input scale."""
    step = weight.scale * source.scale
    codes = (bias.float() / step).round().clamp(-(2.0**31), 2.0**31 - 128).to(torch.int32)
    grid = LinearGrid(step, torch.zeros_like(step, dtype=torch.int32), -(2**31), 2**31 - 1, 0 if step.ndim else None)
    return LinearCodes(codes, grid)
