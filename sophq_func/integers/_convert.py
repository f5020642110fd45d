"""Convert a quantized model to an artifact: weights as codes, biases and grids as integers. No argument is changed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sophq_func.capture.arguments import as_call
from sophq_func.codes import (
    BY_BLOCKS,
    Refusal,
    Stored,
    beside,
    bias_codes,
    bias_step,
    pack,
    share_on,
    stored_form,
    widened,
    widened_beside,
)
from sophq_func.core.errors import StateError, explain, raise_all
from sophq_func.core.modes import is_plain
from sophq_func.core.public import public
from sophq_func.core.pytree import sorted_dict, tensors
from sophq_func.core.types import Given
from sophq_func.integers._artifact import PACKED, Artifact
from sophq_func.model.derived import Call, as_weight, derived, derived_names
from sophq_func.model.finite import check_numbers
from sophq_func.model.quantized import Quantized, refuse_multipliers
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.model.weight_quantizer import WeightQuantizer, arranged
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.formats import FLOAT8

VERSION = 1
"""Version of the metadata's format."""


@public
def convert(q: Quantized, params: Given, qparams: Mapping[str, QParams], /, *, example_args: object = None) -> Artifact:
    """Convert a quantized model to integers: weights, biases, scales and zero points, with BatchNorms folded in.

    A weight is stored as codes, ``real = (code - zero_point) * scale``; up to 4 bits they are packed
    (:func:`sophq_func.pack`). A bias is ``round(B / (s_weight s_input))``, int32. Weights in FP8, MX formats and tables are
    stored as the codes of these formats. The model is converted as it computes in eval mode. ``docs/convert.md`` explains
    every tensor by name.

    Args:
      q: from :func:`sophq_func.quantize` or ``q.freeze``.
      params, qparams: see :meth:`Quantized.apply`; they are not changed.
      example_args: a tensor, a tuple of positional arguments, or a dict of keyword arguments. It is needed where the model
        computes weights from its parameters (``w * s``, a parametrization) and the plan was read from JSON, a pickle or a
        checkpoint; any other plan knows the shapes of its examples. Without it such weights stay as they are, with a
        warning that names them.

    Returns:
      An :class:`Artifact`; ``artifact.run`` computes with its integers.

    Raises:
      StateError: quantizers whose values have no codes (one message lists all of them); a scale, a weight or a bias is not
        finite; a bias does not fit in int32; it is called inside a transform; see also :meth:`Quantized.apply`.

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
    refuse_multipliers("convert", q)
    named = q.engine.check(params, qparams, "convert", "qparams")
    if not is_plain([*named.values(), *tensors(dict(qparams))]):
        raise StateError(
            explain(
                "convert",
                "codes cannot be read inside a transform",
                fix="convert outside of vmap, grad and compile",
            )
        )
    check_numbers("convert", q.plan, q.engine.quantizers, named, qparams)
    example = None if example_args is None else as_call(example_args, "convert")
    with torch.inference_mode(False), torch.no_grad():
        return _Conversion(q, named, qparams, example).artifact()


class _Conversion:
    """Collects the tensors and metadata of an artifact, quantizer by quantizer, and every problem on the way.

    Attributes:
      params: of the model; biases and BatchNorms in float32.
      on: quantizers that act.
      problems: what cannot be converted, as error sentences; they are raised together.
      tensors, weights, biases, values: of the artifact; see :class:`Artifact`.
      floats: qparams of activations that have no integer grid.
      gone: parameters that the artifact does not hold, because codes or a folded bias replace them.
    """

    def __init__(
        self, q: Quantized, params: Mapping[str, Tensor], qparams: Mapping[str, QParams], example: Call | None
    ) -> None:
        self.params = widened_beside(q.engine.weights, params)  # weights are widened slice by slice
        self.q, self.qparams = q, q.engine.effective({name: qparams[name] for name in q.plan})
        self.problems: list[str] = []
        self.on = {name for name in q.plan if self._is_on(name)}
        self.tensors: dict[str, Tensor] = {}
        self.weights: dict[str, dict[str, Any]] = {}
        self.biases: dict[str, dict[str, str]] = {}
        self.values: dict[str, str] = {}
        self.floats: dict[str, QParams] = {}
        self.gone: set[str] = set()
        wanted = [name for name in derived_names(q.engine) if name in self.on]
        self.derived = derived(q.engine, params, self.qparams, example, wanted)
        self.on -= self.derived.inner  # what these quantize is part of a stored weight
        self._warn_of(set(wanted) - self.derived.weights.keys())

    def _warn_of(self, names: set[str]) -> None:
        """Warn where derived weights are stored as the parameters that they are computed from."""
        if names:
            sentence = f"{', '.join(sorted(names))}: weights that are computed in the forward stay parameters"
            because, fix = "the plan has no example to compute them with", "sq.convert(q, params, qparams, example_args=x)"
            warnings.warn(explain("convert", sentence, because=because, fix=fix), stacklevel=4)

    def artifact(self) -> Artifact:
        """The converted model.

        Raises:
          StateError: all problems, in one message.
        """
        # Values first: the step of a bias is that of its layer's input times that of the weight.
        for name, piece in self.q.engine.running.items():
            if name in self.derived.weights:
                self._derived_weight(name, piece)
            elif name in self.on:
                self._value(name, piece)
        for weight in self.q.engine.weights:
            if weight.site.quantizer in self.on:
                self._weight(weight)
        raise_all(self.problems, StateError)
        folded = self._folded()
        parents = self.derived.parents - {name for weight in self.q.engine.weights for name in beside(weight)}
        gone = self.gone | folded | parents | self.weights.keys()
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
        if unread := sorted(parents - folded - self.gone):
            metadata["derived"] = unread
        return Artifact(self.q.plan, metadata, sorted_dict({**rest, **self.tensors}), self.q, sorted_dict(self.floats))

    def _is_on(self, name: str) -> bool:
        """Whether a quantizer acts; one with a mask between 0 and 1 is a problem, because mixed values have no codes."""
        if self.q.plan[name].observe_only:
            return False
        share = share_on(self.qparams[name])
        if share not in (0.0, 1.0):
            self._refuse(name, "a mask must be 0 or 1", because=f"it is {share:g}", fix="sq.enabled(qparams, {name: True})")
        return share == 1.0

    def _refuse(self, name: str, sentence: str, because: str, fix: str = "") -> None:
        """Note the first problem of a quantizer; later ones follow from it."""
        where = f"convert: {name}"
        if not any(problem.startswith(f"{where}:") for problem in self.problems):
            fix = fix or "sq.fake_quantize.fixed(), or sq.fake_quantize.learnable()"
            self.problems.append(explain(where, sentence, because=because, fix=fix))

    def _is_finite(self, name: str) -> bool:
        if bool(self.qparams[name].scale.isfinite().all()):
            return True
        self._refuse(
            name, "the scale is not finite", "no code stands for such a value", "qparams = q.calibrate(params, batches)"
        )
        return False

    def _value(self, name: str, piece: RunQuantizer) -> None:
        """Convert the grid of an activation."""
        qparams, spec = self.qparams[name], piece.config.fake_quantize
        is_unused = piece.config.optional and bool(qparams.scale.isnan().any())  # no batch has reached it
        if is_unused:
            self._keep_float(name, spec.name, qparams)
            return
        if not self._is_finite(name):
            return
        grid = stored_form(piece, qparams)
        if isinstance(grid, Refusal):
            self._refuse(name, f"the values of {spec!r} have no grid", grid.because)
            return
        assert not isinstance(grid, Stored)
        if not grid.is_integer:
            self._keep_float(name, spec.name, qparams)
            return
        assert grid.low is not None and grid.high is not None
        self.values[name] = "dynamic" if grid.dynamic else "integer"
        self._keep(name, qmin=grid.low, qmax=grid.high, **grid.parts)

    def _keep_float(self, name: str, kind: str, qparams: QParams) -> None:
        """Keep a quantizer without an integer grid, which the artifact runs in floating point."""
        self.values[name] = kind
        self.floats[name] = qparams
        self._keep(name, scale=qparams.scale)

    def _keep(self, owner: str, **parts: Tensor) -> None:
        """Put copies of tensors into the artifact as ``<owner>.<part>``."""
        self.tensors.update({f"{owner}.{part}": tensor.detach().clone() for part, tensor in parts.items()})

    def _derived_weight(self, name: str, piece: RunQuantizer) -> None:
        """Convert a weight that is computed from parameters alone."""
        taken = self.params.keys() - self.derived.parents
        weight, params = as_weight(piece, self.derived.weights[name], taken)
        stored = stored_form(weight, self.qparams[name], params, wide=True)
        if isinstance(stored, Refusal):
            self._refuse(name, f"the values of {piece.config.fake_quantize!r} have no codes", stored.because)
            return
        assert isinstance(stored, Stored)
        self._keep_weight(weight, stored)

    def _weight(self, weight: WeightQuantizer) -> None:
        """Convert a weight, and the bias of its layer."""
        name = weight.site.quantizer
        if not self._is_finite(name):
            return
        stored = stored_form(weight, self.qparams[name], self.params, frozen=self.q.frozen, wide=True)
        if isinstance(stored, Refusal):
            self._refuse(name, f"the values of {weight.config.fake_quantize!r} have no codes", stored.because)
            return
        assert isinstance(stored, Stored)
        self._keep_weight(weight, stored)

    def _keep_weight(self, weight: WeightQuantizer, stored: Stored) -> None:
        """Put the codes of a weight, its grid and its entry into the artifact."""
        site, norm, grid = weight.site, weight.norm, stored.grid
        # A folded BatchNorm gives its layer a bias, also where the layer has none or shares its own.
        bias = f"{site.path}.bias".removeprefix(".") if norm else site.bias
        self.weights[site.parameter] = {
            "quantizer": site.quantizer,
            "format": grid.format,
            "bits": grid.bits,
            "shape": list(stored.codes.shape),
            "parts": sorted(grid.parts),
            "norm": site.norm if norm else "",
            "bias": bias if norm else "",
        }
        codes = pack(stored.codes, grid.bits) if grid.bits <= PACKED else _bit_patterns(stored.codes)
        self.tensors[f"{site.parameter}.codes"] = codes  # a new tensor already, which need not be copied
        for name, part in grid.parts.items():
            in_own_layout = arranged(part, site) if name in BY_BLOCKS else part
            self._keep(site.parameter, **{name: _bit_patterns(in_own_layout)})
        # A bias that several layers share has no single step, and stays a parameter.
        if bias and (norm or self._owners(bias) == 1):
            self._bias(weight, stored, bias, site.source if grid.is_integer else "")
        if norm and self._owners(site.bias) == 1:
            self.gone.add(site.bias)

    def _owners(self, parameter: str) -> int:
        """How many layers have this parameter as their bias."""
        return len({path for path, _ in self.q.engine.holders(parameter)})

    def _bias(self, weight: WeightQuantizer, stored: Stored, key: str, source: str) -> None:
        """Convert the folded bias of a layer: int32 where the plan rounds it, else real numbers.

        Args:
          weight, stored: the layer's weight, and its codes.
          key: name of the bias in the artifact.
          source: the quantizer of the layer's input; empty where the plan does not round the bias.
        """
        real = weight.folded_bias(self.params)
        self.gone.discard(key)
        self.biases[key] = {"source": ""}
        is_rounded = self.values.get(source) == "integer"
        step = bias_step(stored, self.tensors[f"{source}.scale"]) if is_rounded else None
        if step is None:
            self.tensors[key] = real + self._shift(weight)
            return
        form = bias_codes(stored, step, real)
        if isinstance(form, Refusal):
            sentence, fix = "the bias does not fit in int32", "raise the scales of these channels, or use fewer bits"
            self.problems.append(explain(f"convert: {key}", sentence, because=form.because, fix=fix))
            return
        self.biases[key] = {"source": source}
        self.gone.add(key)
        self.tensors[f"{weight.site.parameter}.scale"] = form.scale.detach().clone()
        self._keep(key, codes=form.codes, scale=form.step)

    def _shift(self, weight: WeightQuantizer) -> Tensor | float:
        """What the plan's rounding adds to a bias that is stored in real numbers, as beside weights in 16-bit floats."""
        site = weight.site
        if not site.source:
            return 0.0
        return weight.bias_shift(self.params, self.qparams[site.quantizer], self.qparams[site.source])

    def _folded(self) -> set[str]:
        """The tensors of BatchNorms that are folded wherever they are called: behind converted layers, and nowhere else."""
        behind: dict[str, list[str]] = {}
        for weight in self.q.engine.weights:
            if weight.norm:
                behind.setdefault(weight.site.norm, []).append(weight.site.parameter)
        lone = {re.sub(r"_\d+$", "", call.name) for call in self.q.plan.calls} | {call.name for call in self.q.plan.calls}
        paths = {norm for norm, layers in behind.items() if self.weights.keys() >= set(layers) and norm not in lone}
        held = {name for path in paths for name in self.q.engine.tensors_of(path).values()}
        return {name for name in held if all(path in paths for path, _ in self.q.engine.holders(name))}


def _copied(p: Tensor) -> Tensor:
    """The same in memory of its own."""
    return widened(p) if p.is_floating_point() and p.element_size() < 4 else p.clone()


def _bit_patterns(codes: Tensor) -> Tensor:
    """FP8 codes as uint8, which every file format holds; other codes unchanged."""
    return codes.view(torch.uint8) if codes.dtype in FLOAT8 else codes
