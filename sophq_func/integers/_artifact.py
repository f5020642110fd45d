"""A converted model: integer tensors, the plan they were made by, and metadata that describes each tensor."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sophq_func.codes import BY_BLOCKS, Grid, Stored, is_integer, unpack
from sophq_func.core.arguments import check_reals
from sophq_func.core.errors import StateError, explain, near
from sophq_func.core.modes import is_plain
from sophq_func.core.pytree import tensors, tree_map
from sophq_func.core.tables import Table
from sophq_func.core.types import Args, Kwargs, Output, Tree
from sophq_func.integers._integers import IntegerModel, Integers, IntegerTensor, ValueGrid
from sophq_func.model.derived import absent, derived_site
from sophq_func.model.finite import check_reached
from sophq_func.model.quantized import Quantized
from sophq_func.model.schedule import Schedule
from sophq_func.model.weight_quantizer import arranged, arranged_scheme, block_axis
from sophq_func.numerics import pieces
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.layout import expand
from sophq_func.planning.plan import Plan

HALF = (torch.float16, torch.bfloat16)
"""Dtypes of arguments that a run widens: integers are exact in float32 up to 2 ** 24, in float16 only up to 2 ** 11."""

PACKED = 4
"""Largest width, in bits, at which two or more codes fit in a byte, so that weights are packed."""

Entry: TypeAlias = Mapping[str, Any]
"""What the metadata say of one weight: its quantizer, format, bits, shape, parts, BatchNorm and bias."""


@dataclass(frozen=True, eq=False, repr=False)
class Artifact:
    """A quantized model as integers, made by :func:`convert`; it cannot be changed.

    Two artifacts are equal if their plans, their metadata and every bit of their tensors are equal.

    Attributes:
      plan: the plan of the model that was converted.
    """

    plan: Plan
    _metadata: Mapping[str, Any]
    _tensors: Mapping[str, Tensor]
    _q: Quantized
    _floats: Mapping[str, QParams]

    @property
    def metadata(self) -> dict[str, Any]:
        """Describes the tensors; a copy that :mod:`json` can write.

        Keys: ``"version"`` of this format, ``"digest"`` of the plan, ``"torch"``: the version that converted the model,
        ``"weights"``, ``"biases"`` and ``"values"``: an entry for each by name, ``"folded"``: names of the BatchNorm
        parameters that are folded into weights and biases, and where there are any ``"derived"``: names of the
        parameters that only stored weights are computed from.
        """
        return copy.deepcopy(dict(self._metadata))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors in a new dict, sorted by name; ``docs/convert.md`` explains each name."""
        return dict(self._tensors)

    @property
    def size_bytes(self) -> int:
        """The size of all tensors together, in bytes."""
        return sum(t.numel() * t.element_size() for t in self._tensors.values())

    def __repr__(self) -> str:
        weights, values = self._metadata["weights"], self._metadata["values"]
        formats = ", ".join(sorted({entry["format"] for entry in weights.values()})) or "none"
        size_of_codes = sum(self._size(f"{name}.codes") for name in weights)
        parts = f"{len(weights)} weights ({formats}) in {size_of_codes} bytes, {len(values)} grids of values"
        return f"Artifact({parts}, {self.size_bytes} bytes in all, plan {self._metadata['digest'][:12]})"

    def _repr_html_(self) -> str:
        """The weights and the grids of values as a table for a notebook."""
        rows = [self._weight_row(name, entry) for name, entry in self._metadata["weights"].items()]
        rows += [(name, "value", kind, "", "") for name, kind in self._metadata["values"].items()]
        headings = ("name", "role", "format", "shape", "bytes")
        return Table(headings=headings, rows=tuple(rows), right=frozenset(("bytes",))).html(repr(self))

    def _weight_row(self, name: str, entry: Entry) -> tuple[str, ...]:
        """One weight, with the bytes of its codes alone."""
        shape = " x ".join(map(str, entry["shape"]))
        return name, "weight", entry["format"], shape, str(self._size(f"{name}.codes"))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Artifact):
            return NotImplemented
        if self.plan != other.plan or self._metadata != other._metadata:
            return False
        if self._tensors.keys() != other._tensors.keys():
            return False
        return all(_are_equal(tensor, other._tensors[name]) for name, tensor in self._tensors.items())

    def __hash__(self) -> int:
        return hash(self._metadata["digest"])

    def codes(self, name: str) -> Tensor:
        """The unpacked codes of a weight; of integer formats, ``real = (code - zero_point) * scale``.

        Args:
          name: of the parameter, such as ``"layer1.conv.weight"``.

        Returns:
          Shape of the weight; int8, uint8, int16 or int32; of FP8 formats the bit patterns, uint8;
          of 16-bit floats the numbers themselves.

        Raises:
          StateError: the artifact has no codes for this name.
        """
        entry, stored = self._entry(name), self._part(name, "codes")
        if entry["bits"] > PACKED:
            return stored
        return unpack(stored, entry["bits"], entry["shape"], signed=entry["format"].startswith("int"))

    def weight(self, name: str) -> Tensor:
        """The real numbers that the codes of a weight stand for, with the BatchNorm behind it folded in.

        Args:
          name: of the parameter.

        Returns:
          float32, shape of the weight.

        Raises:
          StateError: the artifact has no codes for this name.
        """
        return self._stored(name).read()

    def run(self, *args: Any, **kwargs: Any) -> Output:
        """Run the model on its integers: a reference for what a chip computes, exact and slow, without gradients.

        ``docs/convert.md`` lists what is computed in integers and what in floating point.

        Args:
          args, kwargs: those of the model; float16 and bfloat16 tensors are widened to float32.

        Returns:
          What the model returns, in real numbers.

        Raises:
          StateError: a sum does not fit in int32; a quantizer meets NaN; it is called inside a transform; see also
            :meth:`Quantized.apply`.
        """
        return self._run(args, kwargs)[0]

    def computed(self, *args: Any, **kwargs: Any) -> dict[str, int]:
        """Run the model, and count the operations that are computed in integers.

        Args:
          args, kwargs: see :meth:`run`.

        Returns:
          The count of each operation by name. ``"quantize"`` is a quantizer that takes real numbers, ``"requantize"``
          one that takes integers.
        """
        return dict(sorted(self._run(args, kwargs)[1].computed.items()))

    def _run(self, args: Args, kwargs: Kwargs) -> tuple[Output, Integers]:
        runs: list[Integers] = []

        def watch(schedule: Schedule) -> Integers:
            runs.append(Integers(schedule, model))
            return runs[0]

        args, kwargs = _widened((args, kwargs))
        with torch.inference_mode(False), torch.no_grad():
            model = self._given()
            output, _ = self._q.engine.loop.run(self._parameters(model), model.other, args, kwargs, watch=watch)
        return output, runs[0]

    def _given(self) -> IntegerModel:
        """The tensors in the form in which the executor computes with them."""
        weights, biases = self._metadata["weights"], self._metadata["biases"]
        integers = {name: self._weight_integers(name) for name, entry in weights.items() if is_integer(entry["format"])}
        derived: dict[str, IntegerTensor | Tensor] = {}
        for name, entry in weights.items():
            if not self.plan.site(entry["quantizer"]).parameter:
                derived[entry["quantizer"]] = integers.pop(name) if name in integers else self.weight(name)
        rounded = {name: self._bias_integers(name) for name, entry in biases.items() if entry["source"]}
        # The executor itself adds the bias of a folded BatchNorm; all other rounded biases are parameters like weights.
        folded = {name: (entry["bias"], entry["norm"]) for name, entry in weights.items() if entry["norm"]}
        names = {bias for bias, _ in folded.values()}
        extra: dict[str, IntegerTensor | Tensor] = {}
        for name in names:
            extra[name] = rounded[name] if name in rounded else self._tensors[name]
        integers |= {name: bias for name, bias in rounded.items() if name not in names}
        values = {name: self._value(name) for name in self._metadata["values"] if name not in self._floats}
        dropped = frozenset(self._metadata["folded"])
        return IntegerModel(values, self._other, integers, folded, extra, dropped, derived)

    def _parameters(self, model: IntegerModel) -> dict[str, Tensor]:
        """The parameters that the model is called with, in real numbers; the executor looks up which have integers."""
        parameters, device = {}, next((t.device for t in self._tensors.values()), None)
        for name, empty in self._q.engine.empty_params().items():
            if name in model.wholes:
                parameters[name] = model.wholes[name].real(torch.float32)
            elif name in self._metadata.get("derived", ()):
                parameters[name] = absent(torch.empty(empty.shape, dtype=empty.dtype, device=device))
            elif name in self._metadata["weights"]:
                parameters[name] = self.weight(name)
            elif name in model.dropped:  # of a folded BatchNorm, which is not computed
                parameters[name] = torch.zeros(empty.shape, dtype=empty.dtype, device=device)
            elif name in self._tensors:
                parameters[name] = self._tensors[name].clone()
            else:  # the bias of a layer with a folded BatchNorm, which the executor replaces: NaN shows a use of it
                parameters[name] = torch.full(empty.shape, torch.nan, device=device)
        return parameters

    def _other(self, name: str, x: Tensor) -> Tensor:
        """``x``, quantized in floating point where its quantizer has a grid that is none of integers."""
        qparams = self._floats.get(name)
        if qparams is None:
            return x
        check_reached(name, qparams)
        return self._q.quantize_value(name, x, qparams)

    def _weight_integers(self, name: str) -> IntegerTensor:
        entry, stored = self._entry(name), self._stored(name)
        # Scales are laid out for the weight as its quantizer sees it; the result has the layout of the parameter.
        codes = arranged(stored.codes.to(torch.int32), stored.site)
        granularity, parts = stored.grid.granularity, stored.grid.parts
        level = codes - expand(parts["zero_point"], codes, granularity)
        scale = expand(parts["scale"].double(), codes, granularity)
        if scale.ndim:
            scale = arranged(scale.expand(level.shape), stored.site)
        largest = (1 << entry["bits"]) - 1  # a code less its zero point: the distance of the outermost codes
        return IntegerTensor(arranged(level, stored.site), scale, entry["quantizer"], largest)

    def _stored(self, name: str) -> Stored:
        """The codes of a weight with their grid."""
        entry = self._entry(name)
        site, config = self.plan.site(entry["quantizer"]), self.plan[entry["quantizer"]]
        if not site.parameter:
            site = derived_site(site, ())
        parts = {part: self._part(name, part) for part in entry["parts"]}
        grid = Grid(
            format=entry["format"],
            bits=entry["bits"],
            granularity=arranged_scheme(config.scheme, site).granularity,
            parts={part: arranged(tensor, site) if part in BY_BLOCKS else tensor for part, tensor in parts.items()},
            block_size=pieces.build(config.fake_quantize).block_size,
            block_axis=block_axis(site, config.scheme.granularity, len(entry["shape"])),
        )
        return Stored(self.codes(name), grid, site)

    def _bias_integers(self, name: str) -> IntegerTensor:
        scale = self._part(name, "scale").double()
        level = self._part(name, "codes")
        return IntegerTensor(
            level, scale.expand(level.shape) if scale.ndim else scale, self._metadata["biases"][name]["source"]
        )

    def _value(self, name: str) -> ValueGrid:
        low, high = self._part(name, "qmin"), self._part(name, "qmax")
        scheme = self.plan[name].scheme
        if scheme.dynamic:  # scale and zero point come from each tensor; these are placeholders of the same shape
            return ValueGrid(scheme, low.float(), low, low, high)
        return ValueGrid(scheme, self._part(name, "scale"), self._part(name, "zero_point"), low, high)

    def _entry(self, name: str) -> Entry:
        weights = self._metadata["weights"]
        if not isinstance(name, str) or name not in weights:
            fix = near(name, weights) or "artifact.metadata['weights'] has the names"
            raise StateError(explain("artifact", f"there are no codes of {name!r}", because="it was not converted", fix=fix))
        return dict(weights[name])

    def _part(self, name: str, part: str) -> Tensor:
        return self._tensors[f"{name}.{part}"]

    def _size(self, name: str) -> int:
        return math.prod(self._tensors[name].shape) * self._tensors[name].element_size()


def _widened(call: tuple[Args, Kwargs]) -> tuple[Args, Kwargs]:
    """The arguments of a call, with 16-bit floats as float32.

    Raises:
      StateError: a tensor belongs to a transform of torch.func or to a compiler.
    """
    if not is_plain(tensors(call)):
        fix = "run outside of vmap, grad and compile"
        raise StateError(explain("artifact.run", "an artifact cannot run inside a transform", fix=fix))
    check_reals("artifact.run", {f"input {i}": leaf for i, leaf in enumerate(tensors(call))})
    widened: tuple[Args, Kwargs] = tree_map(_as_float32, call)
    return widened


def _as_float32(leaf: Tree) -> Tree:
    return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in HALF else leaf


def _are_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; NaN equals the same NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8) if x.numel() else x.reshape(-1).to(torch.uint8)
