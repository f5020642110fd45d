"""Real numbers on a grid as codes, and codes as real numbers, for one tensor: integers, tables, floats of few bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sophq_func.codes.pack import pack, unpack
from sophq_func.config.site import Site
from sophq_func.model.weight_quantizer import arranged, arranged_scheme
from sophq_func.numerics.blocks import block_amax, from_blocks, to_blocks
from sophq_func.numerics.codebooks import CODEBOOKS
from sophq_func.numerics.contracts import FakeQuantize, QParams
from sophq_func.numerics.formats import E2M1, E2M3, E3M2, E4M3, E5M2, MXINT8, Format, shared_exponent
from sophq_func.numerics.layout import expand
from sophq_func.numerics.pieces import in_force
from sophq_func.numerics.ranges import EPS, bounds, positive
from sophq_func.numerics.scheme import QScheme, QuantizerConfig

FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
BLOCKS: Mapping[tuple[str, str], Format] = {
    ("mxfp8", "e4m3"): E4M3,
    ("mxfp8", "e5m2"): E5M2,
    ("mxfp6", "e3m2"): E3M2,
    ("mxfp6", "e2m3"): E2M3,
    ("mxfp4", ""): E2M1,
    ("mxint8", ""): MXINT8,
}
"""Elements of blocks that share a power of two, by fake quantizer and its option ``element``."""

FORMATS = frozenset((*FLOAT8, *HALF, "fp4", "nvfp4", *(name for name, _ in BLOCKS)))
"""Fake quantizers whose codes are no integers, and are kept as they are."""


class Coded(NamedTuple):
    """A weight as codes.

    Attributes:
      format: ``"int4"``, ``"uint8"``, ``"float8_e4m3fn"``, ``"table"``, ``"float16"``, ``"bfloat16"``.
      bits: width of a code.
      codes: unpacked, in the layout of the weight; of 16-bit floats the values themselves.
      tensors: the rest, by what it is: ``scale``, ``zero_point``, ``table``, ``exponent``, ``block_scale``.
    """

    format: str
    bits: int
    codes: Tensor
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Placed:
    """What is to be coded: a weight's values before and after its fake quantizer, as that saw them.

    Attributes:
      seen, grid: before and after, arranged (see :func:`sophq_func.model.weight_quantizer.arranged`).
      qparams: scale and zero point in force.
    """

    site: Site
    config: QuantizerConfig
    seen: Tensor
    grid: Tensor
    qparams: QParams

    @property
    def scheme(self) -> QScheme:
        """For the weight as it is arranged."""
        return arranged_scheme(self.config.scheme, self.site)


def encoded(fake: FakeQuantize, placed: Placed) -> Coded | None:
    """The codes of a weight; ``None`` where its fake quantizer makes values that have none."""
    own = in_force(fake, placed.seen, placed.qparams, placed.scheme)
    for encode in (_integers, _table, _float8, _half, _blocks, _nvfp4):
        found = encode(placed, own)
        if found is not None:
            return found._replace(codes=arranged(found.codes, placed.site))
    return None


def whole_bounds(qparams: QParams, scheme: QScheme) -> tuple[Tensor, Tensor] | None:
    """Smallest and largest code, int32; ``None`` where they are no whole numbers."""
    low, high = (torch.as_tensor(b, dtype=torch.float64, device=qparams.scale.device) for b in bounds(qparams, scheme))
    if not bool((low == low.round()).all() & (high == high.round()).all()):
        return None
    return low.to(torch.int32), high.to(torch.int32)


def levels_of(y: Tensor, qparams: QParams, scheme: QScheme) -> Tensor | None:
    """``y / s`` as integers, int32, where each is one to within rounding and inside the bounds; else ``None``."""
    limits = whole_bounds(qparams, scheme)
    zero = zero_of(qparams, scheme)
    if limits is None or zero is None or not bool(y.isfinite().all()):
        return None
    ratio = y.double() / expand(positive(qparams.scale), y, scheme.granularity).double()
    level = ratio.round()
    near = (ratio - level).abs() <= 1e-3 + 2.0**-21 * level.abs()
    low, high = (expand(limit - zero, y, scheme.granularity) for limit in limits)
    return level.to(torch.int32) if bool((near & (level >= low) & (level <= high)).all()) else None


def zero_of(qparams: QParams, scheme: QScheme) -> Tensor | None:
    """The zero point as a code, int32, shaped like the scale: rounded and inside the bounds; ``None`` beyond them all."""
    limits = whole_bounds(qparams, scheme)
    if limits is None:
        return None
    if scheme.symmetric:
        return torch.zeros_like(qparams.zero_point, dtype=torch.int32)
    zero = qparams.zero_point.double().round()
    return torch.minimum(torch.maximum(zero, limits[0].double()), limits[1].double()).to(torch.int32)


def width_of(low: int, high: int) -> tuple[int, bool]:
    """Bits that codes from ``low`` to ``high`` take, and whether they are signed.

    Example:
      >>> width_of(-8, 7), width_of(0, 255)
      ((4, True), (8, False))
    """
    if low < 0:
        return max((-low - 1).bit_length(), high.bit_length()) + 1, True
    return max(high.bit_length(), 1), False


def storage(bits: int, signed: bool) -> torch.dtype:
    """The dtype of unpacked codes."""
    if bits <= 8:
        return torch.int8 if signed else torch.uint8
    return torch.int16 if bits <= 15 + signed else torch.int32


def _integers(placed: Placed, own: QParams) -> Coded | None:
    if placed.config.fake_quantize.name in FORMATS:
        return None
    level = levels_of(placed.grid, own, placed.scheme)
    limits, zero = whole_bounds(own, placed.scheme), zero_of(own, placed.scheme)
    if level is None or limits is None or zero is None:
        return None
    bits, signed = width_of(int(limits[0].min()), int(limits[1].max()))
    codes = (level + expand(zero, placed.grid, placed.scheme.granularity)).to(storage(bits, signed))
    kept = {"scale": positive(own.scale), "zero_point": zero}
    return Coded(f"{'int' if signed else 'uint'}{bits}", bits, codes, kept)


def _table(placed: Placed, own: QParams) -> Coded | None:
    if placed.config.fake_quantize.name != "fp4":
        return None
    table = CODEBOOKS[dict(placed.config.fake_quantize.options)["data_type"]]
    scale = own.scale.abs().clamp(min=EPS**2)
    unit = placed.grid / expand(scale, placed.grid, placed.scheme.granularity)
    return _indexed(table.values(), unit, {"scale": scale})


def _float8(placed: Placed, own: QParams) -> Coded | None:
    dtype = FLOAT8.get(placed.config.fake_quantize.name)
    if dtype is None:
        return None
    scale = own.scale.abs().clamp(min=EPS**2)
    codes = (placed.grid / expand(scale, placed.grid, placed.scheme.granularity)).to(dtype).view(torch.uint8)
    return Coded(str(dtype).removeprefix("torch."), 8, codes, {"scale": scale})


def _half(placed: Placed, own: QParams) -> Coded | None:
    dtype = HALF.get(placed.config.fake_quantize.name)
    return None if dtype is None else Coded(str(dtype).removeprefix("torch."), 16, placed.grid.to(dtype), {})


def _blocks(placed: Placed, own: QParams) -> Coded | None:
    options = dict(placed.config.fake_quantize.options)
    form = BLOCKS.get((placed.config.fake_quantize.name, options.get("element", "")))
    if form is None:
        return None
    blocks = to_blocks(placed.seen, options["block_size"])
    exponent = shared_exponent(block_amax(blocks), form)
    unit = from_blocks(to_blocks(placed.grid, options["block_size"]) / torch.exp2(exponent.float()), placed.grid)
    power = arranged((exponent.squeeze(-1) + 127).to(torch.uint8), placed.site)
    return _indexed(form.values(), unit, {"exponent": power})


def _nvfp4(placed: Placed, own: QParams) -> Coded | None:
    if placed.config.fake_quantize.name != "nvfp4":
        return None
    size = dict(placed.config.fake_quantize.options)["block_size"]
    scale = own.scale.abs().clamp(min=EPS**2)
    wide = expand(scale, placed.seen, placed.scheme.granularity)
    shared = E4M3.round(block_amax(to_blocks(placed.seen / wide, size)) / E2M1.largest)
    unit = from_blocks(to_blocks(placed.grid / wide, size) / torch.where(shared == 0, 1, shared), placed.grid)
    kept = {
        "scale": scale,
        "block_scale": arranged(shared.squeeze(-1), placed.site).to(torch.float8_e4m3fn).view(torch.uint8),
    }
    return _indexed(E2M1.values(), unit, kept)


def _indexed(values: Tensor, unit: Tensor, kept: dict[str, Tensor]) -> Coded:
    """Each element of ``unit`` as the index of the nearest of ``values``."""
    table = values.float().to(unit.device)
    codes = torch.bucketize(unit.contiguous(), (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return Coded("table", max((len(table) - 1).bit_length(), 1), codes, {**kept, "table": table})


def stored(coded: Coded) -> Tensor:
    """The codes as they are kept: two or more to a byte where a code has at most 4 bits."""
    return pack(coded.codes, coded.bits) if coded.bits <= 4 else coded.codes


def unstored(kept: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """The codes, unpacked."""
    signed = entry["format"].startswith("int")
    return unpack(kept, entry["bits"], entry["shape"], signed) if entry["bits"] <= 4 else kept


def is_integer(entry: Mapping[str, Any]) -> bool:
    """Whether a weight's codes are integers."""
    return str(entry["format"]).startswith(("int", "uint"))


def spread(value: Tensor, entry: Mapping[str, Any], site: Site, config: QuantizerConfig) -> Tensor:
    """What belongs to scales, such as a zero point, in a shape that broadcasts against the weight in its own layout."""
    granularity = arranged_scheme(config.scheme, site).granularity
    shape = arranged(torch.empty(entry["shape"], device="meta"), site)
    wide = expand(value, shape, granularity)
    return wide if wide.ndim == 0 else arranged(wide.expand(shape.shape), site)


def decoded(
    codes: Tensor, entry: Mapping[str, Any], part: Callable[[str], Tensor], site: Site, config: QuantizerConfig
) -> Tensor:
    """The weight, folded, float32, in its own layout."""
    if entry["format"] in ("float16", "bfloat16"):
        return codes.float()
    if is_integer(entry):
        level = codes.to(torch.int32) - spread(part("zero_point"), entry, site, config)
        return (level * spread(part("scale"), entry, site, config)).float()
    if entry["format"].startswith("float8"):
        unit = codes.view(getattr(torch, entry["format"])).float()
        return unit * spread(part("scale"), entry, site, config)
    unit, size = part("table")[codes.long()], dict(config.fake_quantize.options).get("block_size")
    if "exponent" in entry["parts"]:
        return _by_blocks(unit, torch.exp2(part("exponent").float() - 127), size)
    if "block_scale" in entry["parts"]:
        unit = _by_blocks(unit, part("block_scale").view(torch.float8_e4m3fn).float(), size)
    return unit * spread(part("scale"), entry, site, config)


def _by_blocks(unit: Tensor, scale: Tensor, size: int | None) -> Tensor:
    return from_blocks(to_blocks(unit, size or 1) * scale.unsqueeze(-1), unit)
