"""Pack codes of up to 4 bits, two or more to a byte."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from sophq_func.core.arguments import check_reals, is_count
from sophq_func.core.errors import ConfigError, StateError, check_flags, explain
from sophq_func.core.public import public

AT_ONCE = 2**16
"""Bytes that are packed or unpacked at once: meanwhile each of their codes takes 8 bytes, so that this bounds the memory."""


def per_byte(bits: int) -> int:
    """How many codes of ``bits`` bits share a byte: 8, 4, 2, 2 for 1 to 4 bits, and 1 for 5 to 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ConfigError(explain("pack", "codes of this width cannot be packed", got=bits, allowed="1..8 bits"))
    return 8 // bits


@public
def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes, the first code of each byte in its lowest bits.

    With ``n = 8 // bits`` codes to a byte, byte ``k`` is ``sum over i < n of (codes[k n + i] mod 2 ** bits) << (bits i)``,
    with the codes in the order of the flattened tensor. Signed codes are stored in two's complement. Unused bits are 0: the
    rest of the last byte, and, with 3 bits, the two highest bits of every byte.

    Args:
      codes: integers of any shape, all from 0 to ``2 ** bits - 1``, or from ``-2 ** (bits - 1)`` to ``2 ** (bits - 1) - 1``.
      bits: width of a code, 1 to 8.

    Returns:
      uint8, shape ``(ceil(codes.numel() / n),)``.

    Raises:
      ConfigError: ``bits`` is not 1 to 8.
      StateError: a code does not fit in ``bits`` bits, or ``codes`` has no integer dtype.

    Example:
      >>> pack(torch.tensor([1, -1, 7]), 4)
      tensor([241,   7], dtype=torch.uint8)
    """
    count = per_byte(bits)
    check_reals("pack", {"codes": codes})
    if codes.is_meta:
        raise StateError(explain("pack", "codes on the meta device have no numbers", fix="pack the codes of a real tensor"))
    if codes.is_floating_point() or codes.is_complex():
        raise StateError(explain("pack", "codes must be integers", got=codes.dtype, allowed="an integer dtype"))
    flat = codes.detach().reshape(-1)
    if flat.numel():
        low, high = int(flat.min()), int(flat.max())
        fits_unsigned = low >= 0 and high < 1 << bits
        fits_signed = low >= -(1 << bits - 1) and high < 1 << bits - 1
        if not fits_unsigned and not fits_signed:
            raise StateError(
                explain(
                    "pack",
                    f"the codes do not fit in {bits} bits",
                    got=f"codes from {low} to {high}",
                    fix="pack with more bits",
                )
            )
    packed = torch.empty(-(-flat.numel() // count), dtype=torch.uint8, device=flat.device)
    shifts = bits * torch.arange(count, device=flat.device)
    for part, into in zip(torch.split(flat, AT_ONCE * count), torch.split(packed, AT_ONCE), strict=True):
        padded = torch.constant_pad_nd(part.to(torch.int64), (0, -part.numel() % count))
        patterns = padded.reshape(-1, count) & (1 << bits) - 1
        into.copy_((patterns << shifts).sum(1))
    return packed


@public
def unpack(packed: Tensor, bits: int, shape: Sequence[int], signed: bool) -> Tensor:
    """Unpack codes from bytes; the inverse of :func:`pack`.

    Args:
      packed: uint8, from :func:`pack`.
      bits: width of a code, 1 to 8.
      shape: of the codes.
      signed: whether codes are in two's complement.

    Returns:
      The codes, int8 if ``signed``, else uint8.

    Raises:
      ConfigError: ``bits`` is not 1 to 8.
      StateError: ``packed`` is not uint8, or has another number of bytes than codes of this shape need.

    Example:
      >>> unpack(torch.tensor([241, 7], dtype=torch.uint8), 4, (3,), signed=True)
      tensor([ 1, -1,  7], dtype=torch.int8)
    """
    check_flags("unpack", {"signed": signed})
    check_reals("unpack", {"packed": packed})
    if not isinstance(shape, Sequence) or not all(is_count(size, least=0, most=sys.maxsize) for size in shape):
        raise ConfigError(explain("unpack", "this is no shape", got=shape, allowed="a tuple of ints", fix="codes.shape"))
    count, size = per_byte(bits), math.prod(shape)
    expected = (-(-size // count),)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != expected:
        got, allowed = f"{packed.dtype} of shape {tuple(packed.shape)}", f"torch.uint8 of shape {expected}"
        raise StateError(
            explain("unpack", f"these bytes do not hold {bits}-bit codes of shape {tuple(shape)}", got=got, allowed=allowed)
        )
    shifts = bits * torch.arange(count, device=packed.device)
    codes = torch.empty(size, dtype=torch.int8 if signed else torch.uint8, device=packed.device)
    for part, into in zip(torch.split(packed, AT_ONCE), torch.split(codes, AT_ONCE * count), strict=True):
        patterns = part.to(torch.int64)[:, None] >> shifts & (1 << bits) - 1
        values = patterns.reshape(-1)[: into.numel()]  # without the unused codes of the last byte
        if signed:
            values = torch.where(values >= 1 << bits - 1, values - (1 << bits), values)
        into.copy_(values)
    return codes.reshape(tuple(shape))
