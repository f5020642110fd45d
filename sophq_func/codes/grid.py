"""The grid of a tensor's codes: their type, and how they are converted to real numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sophq_func.numerics.blocks import from_blocks, to_blocks
from sophq_func.numerics.formats import E8M0_BIAS
from sophq_func.numerics.granularity import Granularity
from sophq_func.numerics.layout import expand


@dataclass(frozen=True, eq=False, kw_only=True)
class Grid:
    """The type of a tensor's codes, and the tensors that convert them to real numbers.

    Integers: ``real = (code - zero_point) * scale``; float8: ``code * scale``; float16 and bfloat16: ``code``; tables:
    ``table[code] * scale``, times the exponent or scale of each block, if there is one.

    Attributes:
      format: ``"int4"``, ``"uint8"``, ``"float8_e4m3fn"``, ``"table"``, ``"float16"``, ``"bfloat16"``, ...
      bits: width of a code.
      granularity: which elements share a scale, in the layout in which the quantizer sees the tensor.
      parts: the tensors, sorted by name, as far as the format has them: ``scale`` (float32), ``zero_point`` (int32),
        ``table`` (float32, ascending), ``exponent`` (uint8, biased) and ``block_scale`` (float8).
      low, high: of integers, the smallest and largest code that the quantizer makes, int32, ``()`` or shape of the scale.
      block_size: elements of a block; 0 without blocks.
      block_axis: the axis along which blocks lie, counted from the end.
      dynamic: scale and zero point are computed from each tensor, so that ``parts`` does not have them.
    """

    format: str
    bits: int
    granularity: Granularity
    parts: Mapping[str, Tensor]
    low: Tensor | None = None
    high: Tensor | None = None
    block_size: int = 0
    block_axis: int = -1
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
        """The dtype of unpacked codes."""
        if self.is_integer:
            return storage(self.bits, self.is_signed)
        dtype: torch.dtype = torch.uint8 if self.format == "table" else getattr(torch, self.format)
        return dtype

    def read(self, codes: Tensor, parts: Mapping[str, Tensor] | None = None) -> Tensor:
        """The real numbers of codes, float32, computed with operations that ``torch.export`` can record.

        Args:
          codes: in the layout in which the quantizer sees the tensor; float8 may also be given as bit patterns, uint8.
          parts: equal tensors to use instead of the grid's own, such as the buffers of a module.
        """
        parts = self.parts if parts is None else parts
        real = self._unscaled(codes, parts)
        if "exponent" in parts:
            block_scale = torch.exp2(parts["exponent"].float() - E8M0_BIAS)
            real = self._times_blocks(real, block_scale)
        if "block_scale" in parts:
            block_scale = _as_float8(parts["block_scale"], torch.float8_e4m3fn).float()
            real = self._times_blocks(real, block_scale)
        return real * expand(parts["scale"], real, self.granularity) if "scale" in parts else real

    def _unscaled(self, codes: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """The numbers that codes mean before any scale is applied."""
        if self.is_integer:
            level = codes.float()
            return level - expand(parts["zero_point"].float(), level, self.granularity)
        if self.format == "table":
            return parts["table"][codes.long()]
        if self.bits == 8:  # of the formats that are left, the float8 ones; the others are float16 and bfloat16
            return _as_float8(codes, self.dtype).float()
        return codes.float()

    def _times_blocks(self, numbers: Tensor, block_scale: Tensor) -> Tensor:
        """``numbers`` times the scale of the block that each is in.

        Args:
          numbers: of the tensor's shape.
          block_scale: the same, with the number of blocks for the size of ``block_axis``.
        """
        along, scale = numbers.movedim(self.block_axis, -1), block_scale.movedim(self.block_axis, -1)
        blocks = to_blocks(along, self.block_size)
        return from_blocks(blocks * scale.unsqueeze(-1), along).movedim(-1, self.block_axis)

    def ends(self) -> tuple[Tensor, Tensor]:
        """The real numbers of the smallest and largest code, in the shape of the scale.

        Only of an integer grid that is not dynamic.
        """
        assert self.low is not None and self.high is not None
        zero, scale = self.parts["zero_point"], self.parts["scale"]
        return (self.low - zero) * scale, (self.high - zero) * scale


def is_integer(format_name: str) -> bool:
    """Whether the codes of a format are integers."""
    return format_name.startswith(("int", "uint"))


def integer_format(low: int, high: int) -> tuple[str, int]:
    """The narrowest integer format with codes from ``low`` to ``high``, and its width in bits.

    Example:
      >>> integer_format(-8, 7), integer_format(0, 255)
      (('int4', 4), ('uint8', 8))
    """
    if low < 0:
        # In two's complement n bits and a sign reach from -(2 ** n) to 2 ** n - 1: one number further below 0 than above.
        bits = max((-low - 1).bit_length(), high.bit_length()) + 1
        return f"int{bits}", bits
    bits = max(high.bit_length(), 1)  # a grid whose only code is 0 takes a bit, too
    return f"uint{bits}", bits


def storage(bits: int, signed: bool) -> torch.dtype:
    """The dtype of unpacked codes of this width."""
    if bits <= 8:
        return torch.int8 if signed else torch.uint8
    # torch computes little with uint16: unsigned codes of 16 bits are held in int32.
    bits_in_int16 = 16 if signed else 15
    return torch.int16 if bits <= bits_in_int16 else torch.int32


def _as_float8(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes in a float8 dtype; bit patterns, uint8, are reinterpreted."""
    return codes.view(dtype) if codes.dtype == torch.uint8 else codes
