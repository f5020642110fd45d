"""A quantized model as integers: tensors, a plan, and what is what."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sophq_func.codes import BY_BLOCKS, Grid, Stored, is_integer, unpack
from sophq_func.core.errors import StateError, explain, near
from sophq_func.core.modes import is_plain
from sophq_func.core.pytree import tensors, tree_map
from sophq_func.integers._integers import Given, Integers, Value, Whole
from sophq_func.model.finite import check_reached
from sophq_func.model.quantized import Quantized
from sophq_func.model.schedule import Schedule
from sophq_func.model.weight_quantizer import arranged, arranged_scheme
from sophq_func.numerics import pieces
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.layout import expand
from sophq_func.planning.plan import Plan

HALF = (torch.float16, torch.bfloat16)
PACKED = 4
"""Codes of at most so many bits share bytes."""


@dataclass(frozen=True, eq=False, repr=False)
class Artifact:
    """A quantized model as integers: a frozen value, made by :func:`convert`, equal by plan, metadata and every bit.

    Attributes:
      plan: the plan it was made by.
    """

    plan: Plan
    _metadata: Mapping[str, Any]
    _tensors: Mapping[str, Tensor]
    _q: Quantized
    _floats: Mapping[str, QParams]

    @property
    def metadata(self) -> dict[str, Any]:
        """What is what, JSON-able, a copy.

        ``"version"``, ``"digest"`` of the plan, ``"torch"``, ``"weights"``, ``"biases"`` and ``"values"`` by name, and
        ``"folded"``: the parameters that are folded away.
        """
        return copy.deepcopy(dict(self._metadata))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, sorted; a new dict. ``docs/convert.md`` goes through them name by name."""
        return dict(self._tensors)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self._tensors.values())

    def __repr__(self) -> str:
        found = self._metadata
        kinds = ", ".join(sorted({entry["format"] for entry in found["weights"].values()})) or "none"
        coded = sum(self._size(f"{name}.codes") for name in found["weights"])
        parts = f"{len(found['weights'])} weights ({kinds}) in {coded} bytes, {len(found['values'])} grids of values"
        return f"Artifact({parts}, {self.size_bytes} bytes in all, plan {found['digest'][:12]})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Artifact):
            return NotImplemented
        same = (
            self.plan == other.plan and self._metadata == other._metadata and self._tensors.keys() == other._tensors.keys()
        )
        return same and all(_same(tensor, other._tensors[name]) for name, tensor in self._tensors.items())

    def __hash__(self) -> int:
        return hash(self._metadata["digest"])

    def codes(self, name: str) -> Tensor:
        """The codes of a weight, unpacked, in its own shape; integers are ``real = (code - zero_point) * scale``.

        Args:
          name: of the parameter.

        Raises:
          StateError: it has no codes.
        """
        entry, kept = self._entry(name), self._part(name, "codes")
        if entry["bits"] > PACKED:
            return kept
        return unpack(kept, entry["bits"], entry["shape"], signed=entry["format"].startswith("int"))

    def weight(self, name: str) -> Tensor:
        """The numbers that the codes of a weight stand for, float32, with a BatchNorm behind it folded in."""
        return self._stored(name).read()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on integers: the reference for what a chip computes. Exact, slow, without gradients.

        ``docs/convert.md`` says what is computed in integers and what in float.

        Returns:
          What the model returns, in real numbers.

        Raises:
          StateError: a sum that does not fit int32; see also :meth:`Quantized.apply`.
        """
        return self._run(args, kwargs)[0]

    def computed(self, *args: Any, **kwargs: Any) -> dict[str, int]:
        """How often a run computes each operation in integers; ``"quantize"`` starts from real numbers."""
        return dict(sorted(self._run(args, kwargs)[1].computed.items()))

    def _run(self, args: Any, kwargs: Any) -> tuple[Any, Integers]:
        runs: list[Integers] = []

        def watch(schedule: Schedule) -> Integers:
            runs.append(Integers(schedule, given))
            return runs[0]

        args, kwargs = _taken((args, kwargs))
        with torch.inference_mode(False), torch.no_grad():
            given = self._given()
            output, _ = self._q.engine.loop.run(self._parameters(given), given.other, args, kwargs, watch=watch)
        return output, runs[0]

    def _given(self) -> Given:
        weights, biases = self._metadata["weights"], self._metadata["biases"]
        wholes = {name: self._whole(name) for name, entry in weights.items() if is_integer(entry["format"])}
        rounded = {name: self._whole_bias(name) for name, entry in biases.items() if entry["source"]}
        folds = {name: (entry["bias"], entry["norm"]) for name, entry in weights.items() if entry["norm"]}
        keys = {key for key, _ in folds.values()}
        extra: dict[str, Whole | Tensor] = {key: rounded[key] if key in rounded else self._tensors[key] for key in keys}
        wholes |= {name: whole for name, whole in rounded.items() if name not in keys}
        values = {name: self._value(name) for name in self._metadata["values"] if name not in self._floats}
        return Given(values, self._other, wholes, folds, extra, frozenset(self._metadata["folded"]))

    def _parameters(self, given: Given) -> dict[str, Tensor]:
        """What the model runs with: real numbers for what the executor has no integers for."""
        found, device = {}, next((t.device for t in self._tensors.values()), None)
        for name, empty in self._q.engine.skeleton.registered().items():
            if name in given.wholes:
                found[name] = given.wholes[name].real(torch.float32)
            elif name in self._metadata["weights"]:
                found[name] = self.weight(name)
            elif name in given.dropped:
                found[name] = torch.zeros(empty.shape, dtype=empty.dtype, device=device)
            elif name in self._tensors:
                found[name] = self._tensors[name].clone()
            else:  # the bias of a layer that a BatchNorm is folded into, which the executor adds itself
                found[name] = torch.full(empty.shape, torch.nan, device=device)
        return found

    def _other(self, name: str, x: Tensor) -> Tensor:
        """A value whose quantizer is no integer grid."""
        own = self._floats.get(name)
        if own is None:
            return x
        check_reached(name, own)
        return self._q.quantize_value(name, x, own)

    def _whole(self, name: str) -> Whole:
        entry, stored = self._entry(name), self._stored(name)
        codes = arranged(stored.codes.to(torch.int32), stored.site)
        granularity, parts = stored.grid.granularity, stored.grid.parts
        level = codes - expand(parts["zero_point"], codes, granularity)
        scale = expand(parts["scale"].double(), codes, granularity)
        spread = arranged(scale.expand(level.shape), stored.site) if scale.ndim else scale
        return Whole(arranged(level, stored.site), spread, entry["quantizer"], (1 << entry["bits"]) - 1)

    def _stored(self, name: str) -> Stored:
        """The codes of a weight, on their grid."""
        entry = self._entry(name)
        site, config = self.plan.site(entry["quantizer"]), self.plan[entry["quantizer"]]
        parts = {part: self._part(name, part) for part in entry["parts"]}
        grid = Grid(
            format=entry["format"],
            bits=entry["bits"],
            granularity=arranged_scheme(config.scheme, site).granularity,
            parts={part: arranged(own, site) if part in BY_BLOCKS else own for part, own in parts.items()},
            block_size=pieces.build(config.fake_quantize).block_size,
        )
        return Stored(self.codes(name), grid, site)

    def _whole_bias(self, name: str) -> Whole:
        scale = self._part(name, "scale").double()
        level = self._part(name, "codes")
        return Whole(level, scale.expand(level.shape) if scale.ndim else scale, self._metadata["biases"][name]["source"])

    def _value(self, name: str) -> Value:
        low, high = self._part(name, "qmin"), self._part(name, "qmax")
        scheme = self.plan[name].scheme
        scale, zero = (low.float(), low) if scheme.dynamic else (self._part(name, "scale"), self._part(name, "zero_point"))
        return Value(scheme, scale, zero, low, high)

    def _entry(self, name: str) -> Mapping[str, Any]:
        weights = self._metadata["weights"]
        if name not in weights:
            fix = near(name, weights) or "artifact.metadata['weights'] has the names"
            raise StateError(explain("artifact", f"there are no codes of {name!r}", because="it was not converted", fix=fix))
        return dict(weights[name])

    def _part(self, name: str, part: str) -> Tensor:
        return self._tensors[f"{name}.{part}"]

    def _size(self, name: str) -> int:
        return math.prod(self._tensors[name].shape) * self._tensors[name].element_size()


def _taken(call: Any) -> Any:
    """The arguments of a run, 16-bit floats as float32."""
    if not is_plain(tensors(call)):
        fix = "run outside of vmap, grad and compile"
        raise StateError(explain("artifact.run", "an artifact cannot run inside a transform", fix=fix))
    return tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.dtype in HALF else x, call)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8) if x.numel() else x.reshape(-1).to(torch.uint8)
