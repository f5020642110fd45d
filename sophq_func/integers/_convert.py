"""From a quantized model to an artifact: every weight as codes, every bias and grid with it, nothing given changed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sophq_func.codes import BY_BLOCKS, Refusal, Stored, pack, share_on, stored_form
from sophq_func.core.errors import StateError, explain, raise_all
from sophq_func.core.modes import is_plain
from sophq_func.core.pytree import sorted_dict, tensors
from sophq_func.integers._artifact import PACKED, Artifact
from sophq_func.model.quantized import Quantized
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.model.weight_quantizer import WeightQuantizer, arranged
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.formats import FLOAT8
from sophq_func.numerics.layout import rows

VERSION = 1
LIMIT = 2.0**31 - 2**7
"""The largest float32 that is an int32: the largest bias."""


def convert(q: Quantized, params: Mapping[str, Tensor], qparams: Mapping[str, QParams], /) -> Artifact:
    """A quantized model, in eval mode, as integers: weights, biases, scales, zero points, BatchNorm folded.

    A weight is ``real = (code - zero_point) * scale`` with the BatchNorm behind it folded in, its codes packed where they
    have at most 4 bits (:func:`sophq_func.pack`); a bias ``round(B / (s_weight s_input))``, int32; tables, FP8 and MX keep
    their codes. ``docs/convert.md`` goes through all tensors name by name.

    Args:
      q: what :func:`sophq_func.quantize` or ``q.freeze`` returned.
      params, qparams: see :meth:`Quantized.apply`; they are not changed.

    Returns:
      The :class:`Artifact`; ``artifact.run`` computes with these integers.

    Raises:
      StateError: quantizers whose values are no codes (all of them in one message), scales that are not finite, biases
        beyond int32; inside a transform; see also :meth:`Quantized.apply`.

    Example:
      >>> import sophq_func as sq
      >>> model, x = torch.nn.Linear(8, 4), torch.randn(16, 8)
      >>> q = sq.quantize(model, sq.QuantConfig(weight=sq.override(bits=4)), example_args=(x,))
      >>> params = sq.params_of(model)
      >>> artifact = sq.convert(q, params, q.calibrate(params, [x], progress=False))
      >>> artifact.tensors["weight.codes"].shape, artifact.run(x).shape
      (torch.Size([16]), torch.Size([16, 4]))
    """
    if not isinstance(q, Quantized):
        fix = "q = sq.quantize(model, config, example_args=(x,))"
        raise StateError(
            explain("convert", "the model is not quantized", got=type(q).__name__, allowed="a sq.Quantized", fix=fix)
        )
    q = q.eval()
    q.engine.check(params, qparams, "convert", "qparams")
    if not is_plain([*params.values(), *tensors(dict(qparams))]):
        raise StateError(
            explain(
                "convert",
                "codes cannot be read inside a transform",
                fix="convert outside of vmap, grad and compile",
            )
        )
    with torch.inference_mode(False), torch.no_grad():
        return _Conversion(q, params, qparams).artifact()


class _Conversion:
    """One conversion while it is made."""

    def __init__(self, q: Quantized, params: Mapping[str, Tensor], qparams: Mapping[str, QParams]) -> None:
        small = {name for weight in q.engine.weights for name in _beside(weight)}  # weights are widened slice by slice
        self.params = {name: _wide(p) if name in small else p.detach() for name, p in params.items()}
        self.q, self.qparams = q, q.engine.steps({name: qparams[name] for name in q.plan})
        self.problems: list[str] = []
        self.on = {name for name in q.plan if self._is_on(name)}
        self.tensors: dict[str, Tensor] = {}
        self.weights: dict[str, dict[str, Any]] = {}
        self.biases: dict[str, dict[str, str]] = {}
        self.values: dict[str, str] = {}
        self.floats: dict[str, QParams] = {}
        self.gone: set[str] = set()

    def artifact(self) -> Artifact:
        for name, piece in self.q.engine.running.items():
            if name in self.on:
                self._value(name, piece)
        for weight in self.q.engine.weights:
            if weight.site.quantizer in self.on:
                self._weight(weight)
        raise_all(self.problems, StateError)
        folded = self._folded()
        gone = self.gone | folded | self.weights.keys()
        rest = {name: _copied(p) for name, p in self.params.items() if name not in gone}
        metadata = {
            "version": VERSION,
            "digest": self.q.plan.digest(),
            "torch": torch.__version__,
            "weights": sorted_dict(self.weights),
            "biases": sorted_dict(self.biases),
            "values": sorted_dict(self.values),
            "folded": sorted(folded),
        }
        return Artifact(self.q.plan, metadata, sorted_dict({**rest, **self.tensors}), self.q, sorted_dict(self.floats))

    def _is_on(self, name: str) -> bool:
        """Whether a quantizer acts; one that is half on has no codes."""
        if self.q.plan[name].observe_only:
            return False
        share = share_on(self.qparams[name])
        if share not in (0.0, 1.0):
            self._refuse(name, "a mask must be 0 or 1", because=f"it is {share:g}", fix="sq.enabled(qparams, {name: True})")
        return share == 1.0

    def _refuse(self, name: str, sentence: str, because: str, fix: str = "") -> None:
        if not any(problem.startswith(f"convert: {name}:") for problem in self.problems):
            fix = fix or "sq.fake_quantize.fixed(), or sq.fake_quantize.learnable()"
            self.problems.append(explain(f"convert: {name}", sentence, because=because, fix=fix))

    def _is_finite(self, name: str) -> bool:
        if bool(self.qparams[name].scale.isfinite().all()):
            return True
        self._refuse(
            name, "the scale is not finite", "no code stands for such a value", "qparams = q.calibrate(params, batches)"
        )
        return False

    def _value(self, name: str, piece: RunQuantizer) -> None:
        own, spec = self.qparams[name], piece.config.fake_quantize
        if piece.config.optional and bool(own.scale.isnan().any()):  # no batch has reached it
            self._keep_float(name, spec.name, own)
            return
        if not self._is_finite(name):
            return
        grid = stored_form(piece, own)
        if isinstance(grid, Refusal):
            self._refuse(name, f"the values of {spec!r} have no grid", grid.because)
            return
        assert not isinstance(grid, Stored)
        if not grid.is_integer:
            self._keep_float(name, spec.name, own)
            return
        assert grid.low is not None and grid.high is not None
        self.values[name] = "dynamic" if grid.dynamic else "integer"
        self._keep(name, qmin=grid.low, qmax=grid.high, **grid.parts)

    def _keep_float(self, name: str, kind: str, own: QParams) -> None:
        """A quantizer that is no integer grid, which runs as it is."""
        self.values[name] = kind
        self.floats[name] = own
        self._keep(name, scale=own.scale)

    def _keep(self, owner: str, **parts: Tensor) -> None:
        self.tensors.update({f"{owner}.{part}": tensor.detach().clone() for part, tensor in parts.items()})

    def _weight(self, weight: WeightQuantizer) -> None:
        name = weight.site.quantizer
        if not self._is_finite(name):
            return
        found = stored_form(weight, self.qparams[name], self.params, frozen=self.q.frozen, wide=True)
        if isinstance(found, Refusal):
            self._refuse(name, f"the values of {weight.config.fake_quantize!r} have no codes", found.because)
            return
        assert isinstance(found, Stored)
        self._keep_weight(weight, found)

    def _keep_weight(self, weight: WeightQuantizer, found: Stored) -> None:
        site, norm, grid = weight.site, weight.norm, found.grid
        bias = f"{site.path}.bias".removeprefix(".") if norm else site.bias
        self.weights[site.parameter] = {
            "quantizer": site.quantizer,
            "format": grid.format,
            "bits": grid.bits,
            "shape": list(found.codes.shape),
            "parts": sorted(grid.parts),
            "norm": site.norm if norm else "",
            "bias": bias if norm else "",
        }
        own_layout = {name: arranged(part, site) if name in BY_BLOCKS else part for name, part in grid.parts.items()}
        codes = pack(found.codes, grid.bits) if grid.bits <= PACKED else _bit_patterns(found.codes)
        self.tensors[f"{site.parameter}.codes"] = codes  # made here, so that it need not be copied
        self._keep(site.parameter, **{name: _bit_patterns(part) for name, part in own_layout.items()})
        if bias and (norm or self._owners(bias) == 1):
            self._bias(weight, found, bias, site.source if grid.is_integer else "")
        if norm and self._owners(site.bias) == 1:
            self.gone.add(site.bias)

    def _owners(self, parameter: str) -> int:
        """How many layers' bias a parameter is."""
        return sum(parameter in own.values() for own in self.q.engine.skeleton.owned.values()) if parameter else 0

    def _bias(self, weight: WeightQuantizer, found: Stored, key: str, source: str) -> None:
        """The folded bias: int32 where the plan rounds it, else real."""
        real = weight.folded_bias(self.params)
        self.gone.discard(key)
        self.biases[key] = {"source": ""}
        step = self._step(weight, source)
        if step is None:
            self.tensors[key] = real + self._shift(weight)
            return
        step = self._widened(weight, found, step, real)
        code = (real / step).round()
        if bool((code.abs() > LIMIT).any()):
            because, fix = "a chip adds it to sums of 32 bits", "look at the scales of the weight and of the layer's input"
            got = f"{float(code.abs().max()):.3g} steps"
            self.problems.append(
                explain(f"convert: {key}", "the bias does not fit in int32", got=got, because=because, fix=fix)
            )
            return
        self.biases[key] = {"source": source}
        self.gone.add(key)
        self._keep(key, codes=code.to(torch.int32), scale=step)

    def _shift(self, weight: WeightQuantizer) -> Tensor | float:
        """What the plan's rounding adds to a bias that stays real: 16-bit floats have steps for biases, but no integers."""
        site = weight.site
        if not site.source:
            return 0.0
        return weight.bias_shift(self.params, self.qparams[site.quantizer], self.qparams[site.source])

    def _widened(self, weight: WeightQuantizer, found: Stored, step: Tensor, real: Tensor) -> Tensor:
        """The step, larger where all weights are 0, so that their scale plays no part, and the bias did not fit."""
        site = weight.site
        name, scheme = f"{site.parameter}.scale", weight.scheme
        over = (real / step).abs() > LIMIT
        over = over if step.ndim else over.any()
        if not bool(over.any()):
            return step
        idle = rows(arranged(found.read(), site), scheme.granularity).eq(0).all(-1)
        wider = torch.where(over & idle, (real if step.ndim else real.abs().max()).abs() / 2**30, step)
        self.tensors[name] = torch.where(over & idle, self.tensors[name] * (wider / step), self.tensors[name])
        return wider

    def _step(self, weight: WeightQuantizer, source: str) -> Tensor | None:
        """``s_weight s_input``, ``()`` or one for each output channel; ``None`` where it is no such thing."""
        if self.values.get(source) != "integer":
            return None
        given, own = self.tensors[f"{source}.scale"], self.tensors[f"{weight.site.parameter}.scale"]
        per_channel = own.ndim == 1 and getattr(weight.config.scheme.granularity, "axis", None) == weight.site.axis
        return own * given if given.ndim == 0 and (own.ndim == 0 or per_channel) else None

    def _folded(self) -> set[str]:
        """The tensors of each BatchNorm that is called behind converted layers only."""
        behind: dict[str, list[str]] = {}
        for weight in self.q.engine.weights:
            if weight.norm:
                behind.setdefault(weight.site.norm, []).append(weight.site.parameter)
        lone = {re.sub(r"_\d+$", "", call.name) for call in self.q.plan.calls} | {call.name for call in self.q.plan.calls}
        owned = self.q.engine.skeleton.owned
        paths = {norm for norm, layers in behind.items() if self.weights.keys() >= set(layers) and norm not in lone}
        others = {name for path, own in owned.items() if path not in paths for name in own.values()}
        return {name for path in paths for name in owned[path].values()} - others


def _beside(weight: WeightQuantizer) -> list[str]:
    """The parameters that a weight is converted with: the bias of its layer, and the BatchNorm behind it."""
    norm = weight.norm
    folded = [] if norm is None else [norm.weight, norm.bias, norm.mean, norm.var]
    return [weight.site.bias, *folded]


def _wide(p: Tensor) -> Tensor:
    """A constant, narrow floats as float32."""
    return p.detach().float() if p.is_floating_point() and p.element_size() < 4 else p.detach()


def _copied(p: Tensor) -> Tensor:
    """A copy that shares nothing with what was given, as :func:`_wide` has it."""
    return _wide(p) if p.is_floating_point() and p.element_size() < 4 else p.clone()


def _bit_patterns(codes: Tensor) -> Tensor:
    """Codes of float8 as bytes; others as they are."""
    return codes.view(torch.uint8) if codes.dtype in FLOAT8 else codes
