"""From a quantized model to an artifact: every weight as codes, every bias and grid with it, nothing given changed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sophq_func.codes.codes import FORMATS, Coded, Placed, decoded, encoded, is_integer, stored, zero_of
from sophq_func.codes.integer_grids import reached_bounds
from sophq_func.core.errors import StateError, explain, raise_all
from sophq_func.core.modes import is_plain
from sophq_func.core.pytree import sorted_dict, tensors
from sophq_func.integers._artifact import Artifact
from sophq_func.model.quantized import Quantized
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.model.weight_quantizer import WeightQuantizer, arranged
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.layout import rows
from sophq_func.numerics.ranges import positive

VERSION = 1
LIMIT = 2.0**31 - 2**7
"""The largest float32 that is an int32: the largest bias."""

NO_CODES = "its values are not codes times a scale"


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
        raise StateError(explain("convert", "this model", got=type(q).__name__, allowed="a sq.Quantized", fix=fix))
    q = q.eval()
    q.engine.check(params, qparams, "convert", "qparams")
    if not is_plain([*params.values(), *tensors(dict(qparams))]):
        raise StateError(
            explain("convert", "reading codes inside a transform", fix="convert outside of vmap, grad and compile")
        )
    with torch.inference_mode(False), torch.no_grad():
        return _Conversion(q, params, qparams).artifact()


class _Conversion:
    """One conversion while it is made."""

    def __init__(self, q: Quantized, params: Mapping[str, Tensor], qparams: Mapping[str, QParams]) -> None:
        wide = {name: p.detach().clone() for name, p in params.items()}
        self.params = {n: p.float() if p.is_floating_point() and p.element_size() < 4 else p for n, p in wide.items()}
        self.q, self.qparams = q, q.engine.steps({name: qparams[name] for name in q.plan})
        self.problems: list[str] = []
        self.on = {name for name in q.plan if self._is_on(name)}
        self.tensors: dict[str, Tensor] = {}
        self.weights: dict[str, dict[str, Any]] = {}
        self.biases: dict[str, dict[str, str]] = {}
        self.values: dict[str, str] = {}
        self.grids: dict[str, Tensor] = {}
        self.floats: dict[str, QParams] = {}
        self.gone: set[str] = set()

    def artifact(self) -> Artifact:
        for name, piece in self.q.engine.running.items():
            if name in self.on:
                self._value(name, piece)
        coded = {w.site.quantizer: (w, self._coded(w)) for w in self.q.engine.weights if w.site.quantizer in self.on}
        raise_all(self.problems, StateError)
        for weight, codes in coded.values():
            if codes is not None:
                self._weight(weight, codes)
        folded = self._folded()
        rest = {name: p for name, p in self.params.items() if name not in self.weights and name not in self.gone | folded}
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
        mask = self.qparams[name].extras.get("enabled")
        share = 1.0 if mask is None else float(mask)
        if share not in (0.0, 1.0):
            self._refuse(name, "a mask that mixes", because=f"it is {share:g} on", fix="sq.enabled(qparams, {name: True})")
        return share == 1.0

    def _refuse(self, name: str, what: str, because: str = NO_CODES, fix: str = "") -> None:
        if not any(problem.startswith(f"convert: {name}:") for problem in self.problems):
            fix = fix or "sq.fake_quantize.fixed(), or sq.fake_quantize.learnable()"
            self.problems.append(explain(f"convert: {name}", what, because=because, fix=fix))

    def _is_finite(self, name: str) -> bool:
        if bool(self.qparams[name].scale.isfinite().all()):
            return True
        self._refuse(name, "this scale", "it is not finite", "qparams = q.calibrate(params, batches)")
        return False

    def _value(self, name: str, piece: RunQuantizer) -> None:
        own, kind = self.qparams[name], piece.config.fake_quantize.name
        unreached = piece.config.optional and bool(own.scale.isnan().any())
        if not unreached and not self._is_finite(name):
            return
        if unreached or kind in FORMATS:
            self.values[name] = kind
            self.floats[name] = own
            self._keep(name, scale=own.scale)
            return
        zero, limits = zero_of(own, piece.scheme), reached_bounds(piece, own)
        if limits is None or zero is None:
            self._refuse(name, f"a grid of {piece.config.fake_quantize!r}")
            return
        self.values[name] = "dynamic" if piece.scheme.dynamic else "integer"
        self._keep(name, qmin=limits[0], qmax=limits[1])
        if not piece.scheme.dynamic:
            self._keep(name, scale=positive(own.scale), zero_point=zero)

    def _keep(self, owner: str, **parts: Tensor) -> None:
        self.tensors.update({f"{owner}.{part}": tensor.detach().clone() for part, tensor in parts.items()})

    def _part(self, owner: str, part: str) -> Tensor:
        return self.tensors[f"{owner}.{part}"]

    def _coded(self, weight: WeightQuantizer) -> Coded | None:
        name = weight.site.quantizer
        own = self.qparams[name]
        if weight.fake_quantize.noise or not self._is_finite(name):
            self._refuse(name, f"codes of {weight.config.fake_quantize!r}", "it rounds at random")
            return None
        seen = weight.seen(self.params)
        grid = seen if self.q.frozen else weight.fake_quantize.apply(seen, own, weight.scheme)
        found = encoded(weight.fake_quantize, Placed(weight.site, weight.config, seen, grid, own))
        if found is None:
            self._refuse(name, f"codes of {weight.config.fake_quantize!r}")
        return found

    def _weight(self, weight: WeightQuantizer, coded: Coded) -> None:
        site, norm = weight.site, weight.norm
        bias = f"{site.path}.bias".removeprefix(".") if norm else site.bias
        self.weights[site.parameter] = {
            "quantizer": site.quantizer,
            "format": coded.format,
            "bits": coded.bits,
            "shape": list(coded.codes.shape),
            "parts": sorted(coded.tensors),
            "norm": site.norm if norm else "",
            "bias": bias if norm else "",
        }
        self._keep(site.parameter, codes=stored(coded), **coded.tensors)
        entry, part = self.weights[site.parameter], partial(self._part, site.parameter)
        self.grids[site.parameter] = decoded(coded.codes, entry, part, site, weight.config)
        if bias and (norm or self._owners(bias) == 1):
            self._bias(weight, bias, site.source if is_integer(self.weights[site.parameter]) else "")
        if norm and self._owners(site.bias) == 1:
            self.gone.add(site.bias)

    def _owners(self, parameter: str) -> int:
        """How many layers' bias a parameter is."""
        return sum(parameter in own.values() for own in self.q.engine.skeleton.owned.values()) if parameter else 0

    def _bias(self, weight: WeightQuantizer, key: str, source: str) -> None:
        """The folded bias: int32 where the plan rounds it, else real."""
        real = weight.folded_bias(self.params)
        self.gone.discard(key)
        self.biases[key] = {"source": ""}
        step = self._step(weight, source)
        if step is None:
            self.tensors[key] = real + self._shift(weight)
            return
        step = self._widened(weight, step, real)
        code = (real / step).round()
        if bool((code.abs() > LIMIT).any()):
            because, fix = "a chip adds it to sums of 32 bits", "look at the scales of the weight and of the layer's input"
            got = f"{float(code.abs().max()):.3g} steps"
            raise StateError(explain(f"convert: {key}", "a bias in int32", got=got, because=because, fix=fix))
        self.biases[key] = {"source": source}
        self.gone.add(key)
        self._keep(key, codes=code.to(torch.int32), scale=step)

    def _shift(self, weight: WeightQuantizer) -> Tensor | float:
        """What the plan's rounding adds to a bias that stays real: 16-bit floats have steps for biases, but no integers."""
        site = weight.site
        if not site.source:
            return 0.0
        return weight.bias_shift(self.params, self.qparams[site.quantizer], self.qparams[site.source])

    def _widened(self, weight: WeightQuantizer, step: Tensor, real: Tensor) -> Tensor:
        """The step, larger where all weights are 0, so that their scale plays no part, and the bias did not fit."""
        site = weight.site
        name, scheme = f"{site.parameter}.scale", weight.scheme
        over = (real / step).abs() > LIMIT
        grid = arranged(self.grids[site.parameter], site)
        over = over if step.ndim else over.any()
        idle = rows(grid, scheme.granularity).eq(0).all(-1)
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
