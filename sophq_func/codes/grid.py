"""What the codes of one tensor stand for, as a value; reading them back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sophq_func.numerics.blocks import from_blocks, to_blocks
from sophq_func.numerics.formats import E8M0_BIAS
from sophq_func.numerics.layout import expand
from sophq_func.numerics.scheme import Granularity


@dataclass(frozen=True, eq=False, kw_only=True)
class Grid:
    """The codes of one tensor: their type, and what turns them into real numbers.

    Integers are ``real = (code - zero_point) * scale``; float8 ``code * scale``; float16 and bfloat16 the code itself; of
    tables ``table[code]``, times what each block of the last axis shares, times the scale.

    Attributes:
      format: ``"int4"``, ``"uint8"``, ``"float8_e4m3fn"``, ``"table"``, ``"float16"``, ``"bfloat16"``, ...
      bits: width of a code.
      granularity: which elements share a scale, in the tensor as its quantizer sees it.
      parts: by sorted name, those there are of ``scale`` (float32), ``zero_point`` (int32), ``table`` (float32, ascending),
        ``exponent`` (uint8, biased) and ``block_scale`` (float8).
      low, high: of integers, the smallest and largest code that comes out, int32, ``()`` or shaped like the scale.
      block_size: of blocks.
      dynamic: scale and zero point are those of each tensor, and no parts.
    """

    format: str
    bits: int
    granularity: Granularity
    parts: Mapping[str, Tensor]
    low: Tensor | None = None
    high: Tensor | None = None
    block_size: int = 0
    dynamic: bool = False

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers on a uniform grid."""
        return is_integer(self.format)

    @property
    def is_signed(self) -> bool:
        """Whether there are codes below 0."""
        return self.format.startswith("int")

    @property
    def dtype(self) -> torch.dtype:
        """In which unpacked codes are held."""
        if self.is_integer:
            return storage(self.bits, self.is_signed)
        dtype: torch.dtype = torch.uint8 if self.format == "table" else getattr(torch, self.format)
        return dtype

    def read(self, codes: Tensor, parts: Mapping[str, Tensor] | None = None) -> Tensor:
        """What codes stand for, float32; made of operations that ``torch.export`` can record.

        Args:
          codes: in the layout that the quantizer sees; float8 may come as bit patterns, uint8.
          parts: the same tensors as those of the grid, where they are held elsewhere.
        """
        parts = self.parts if parts is None else parts
        unit = self._unit(codes, parts)
        if "exponent" in parts:
            unit = _by_blocks(unit, torch.exp2(parts["exponent"].float() - E8M0_BIAS), self.block_size)
        if "block_scale" in parts:
            shared = _as_float8(parts["block_scale"], torch.float8_e4m3fn)
            unit = _by_blocks(unit, shared.float(), self.block_size)
        return unit * expand(parts["scale"], unit, self.granularity) if "scale" in parts else unit

    def _unit(self, codes: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """The numbers that codes stand for before they are scaled."""
        if self.is_integer:
            level = codes.float()
            return level - expand(parts["zero_point"].float(), level, self.granularity)
        if self.format == "table":
            return parts["table"][codes.long()]
        return _as_float8(codes, self.dtype).float() if self.bits == 8 else codes.float()

    def ends(self) -> tuple[Tensor, Tensor]:
        """What the outermost codes of an integer grid stand for, shaped like the scale."""
        assert self.low is not None and self.high is not None
        zero, scale = self.parts["zero_point"], self.parts["scale"]
        return (self.low - zero) * scale, (self.high - zero) * scale


def is_integer(form: str) -> bool:
    """Whether the codes of a format are integers."""
    return form.startswith(("int", "uint"))


def integer_format(low: int, high: int) -> tuple[str, int]:
    """The format of codes from ``low`` to ``high``, and its bits.

    Example:
      >>> integer_format(-8, 7), integer_format(0, 255)
      (('int4', 4), ('uint8', 8))
    """
    if low < 0:
        bits = max((-low - 1).bit_length(), high.bit_length()) + 1
        return f"int{bits}", bits
    bits = max(high.bit_length(), 1)
    return f"uint{bits}", bits


def storage(bits: int, signed: bool) -> torch.dtype:
    """The dtype of unpacked codes."""
    if bits <= 8:
        return torch.int8 if signed else torch.uint8
    return torch.int16 if bits <= 15 + signed else torch.int32


def _as_float8(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.view(dtype) if codes.dtype == torch.uint8 else codes


def _by_blocks(unit: Tensor, shared: Tensor, size: int) -> Tensor:
    """``unit`` times what each block of its last axis shares, ``(..., blocks)``."""
    return from_blocks(to_blocks(unit, size) * shared.unsqueeze(-1), unit)
