"""Number formats as values: what they can represent, and rounding to it.

A :class:`Format` has a largest value, a list of all values, and ``round``, which has no gradient. Made by :func:`int_`,
:func:`float_` and :func:`codebook`; the names of the OCP standards are constants.

Source: OCP 8-bit Floating Point Specification (OFP8), revision 1.0; OCP Microscaling Formats (MX), version 1.0; IEEE 754
binary16; bfloat16. Half to even, except in codebooks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sophq_func.core.errors import ConfigError, explain

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
"""The types of torch whose numbers are codes of 8 bits."""

E8M0_BIAS = 127
"""What is added to the exponent of a block in its code (OCP Microscaling Formats v1.0, 5.4.1)."""


class Format(Protocol):
    """What every number format offers."""

    @property
    def largest(self) -> float:
        """The largest finite value."""

    def values(self) -> Tensor:
        """Every finite value once, ascending, float64."""

    def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """The nearest value, in the dtype of ``x``; NaN stays NaN. No gradient.

        With ``noise``, uniform in [0, 1) and shaped like ``x``, stochastic: of the two neighbours the upper one with a
        probability that makes the expectation ``x`` (arXiv:1502.02551).
        """


@dataclass(frozen=True, kw_only=True)
class Integer:
    """Multiples of ``step`` by integers of some bits; made by :func:`int_`."""

    bits: int
    signed: bool
    narrow: bool
    step: float

    @property
    def largest(self) -> float:
        """``step`` times the largest integer."""
        return self.step * ((1 << self.bits - self.signed) - 1)

    @property
    def smallest(self) -> float:
        """``step`` times the most negative integer, or 0."""
        return self.step * (self.narrow - (1 << self.bits - 1)) if self.signed else 0.0

    def values(self) -> Tensor:
        """Every value once, ascending, float64."""
        return torch.arange(self.smallest / self.step, self.largest / self.step + 1, dtype=torch.float64) * self.step

    def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Half to even and saturating; see :class:`Format`."""
        code = _whole(_wide(x) / self.step, noise)
        return (code * self.step).clamp(self.smallest, self.largest).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class Float:
    """Sign, exponent and mantissa, with subnormals; made by :func:`float_`."""

    exponent_bits: int
    mantissa_bits: int
    finite_only: bool
    nan: bool
    saturate: bool

    @property
    def bias(self) -> int:
        """What is added to the exponent in a code."""
        return (1 << self.exponent_bits - 1) - 1

    @property
    def smallest_exponent(self) -> int:
        """That of the smallest normal number."""
        return 1 - self.bias

    @property
    def largest(self) -> float:
        """The largest finite value: the uppermost code, below those for infinity and NaN."""
        exponent = (1 << self.exponent_bits) - 1 - self.bias - (not self.finite_only)
        reserved = self.finite_only and self.nan
        return math.ldexp((2 << self.mantissa_bits) - 1 - reserved, exponent - self.mantissa_bits)

    def values(self) -> Tensor:
        """Every finite value once, ascending, float64; one zero."""
        codes = torch.arange(1 << self.exponent_bits + self.mantissa_bits)
        field, mantissa = codes >> self.mantissa_bits, codes & (1 << self.mantissa_bits) - 1
        normal = torch.where(field > 0, mantissa + (1 << self.mantissa_bits), mantissa).double()
        exponent = field.clamp(min=1) - self.bias - self.mantissa_bits
        found = normal * torch.exp2(exponent.double())
        found = found[found <= self.largest]
        return torch.cat([-found.flip(0)[:-1], found])

    def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Half to even; beyond the largest value saturating, or infinite, or NaN in formats without infinity."""
        work = _wide(x) if self.exponent_bits < 6 else x.detach().double()
        size = torch.where(work.isfinite(), work, 0).abs()
        exponent = (torch.frexp(size).exponent - 1).clamp(min=self.smallest_exponent)
        digits = exponent - self.mantissa_bits
        found = torch.ldexp(_whole(torch.ldexp(work, -digits), noise), digits)
        if self.saturate:
            return found.clamp(-self.largest, self.largest).to(x.dtype)
        beyond = torch.full_like(found, torch.nan) if self.finite_only else torch.copysign(_infinity(found), found)
        return torch.where(found.abs() > self.largest, beyond, found).to(x.dtype)


@dataclass(frozen=True)
class Codebook:
    """Any values, ascending; made by :func:`codebook`."""

    entries: tuple[float, ...]

    @property
    def largest(self) -> float:
        """The last entry."""
        return self.entries[-1]

    def values(self) -> Tensor:
        """The entries, float64."""
        return torch.tensor(self.entries, dtype=torch.float64)

    def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """The nearest entry, of two equally near ones the lower; saturating; see :class:`Format`.

        Entries and the midpoints between them are float32, as in sophgo-mq.
        """
        work, table = _wide(x).contiguous(), torch.tensor(self.entries, dtype=torch.float32, device=x.device)
        if noise is None:
            middle = ((table[1:] + table[:-1]) / 2).to(work.dtype)
            found = table[torch.bucketize(work, middle)].to(work.dtype)
        else:
            table = table.to(work.dtype)
            below = torch.bucketize(work, table[1:-1], right=True)
            down, up = table[below], table[below + 1]
            found = torch.where((work - down) / (up - down) > noise, up, down)
        return torch.where(work.isnan(), work, found).to(x.dtype)


def int_(bits: int, *, signed: bool = True, narrow: bool = False, step: float = 1.0) -> Integer:
    """Integers of ``bits`` bits times ``step``; saturating.

    Args:
      bits: width.
      signed: two's complement; otherwise from 0.
      narrow: without the most negative code.
      step: distance of two values; MXINT8 has ``2 ** -6``.

    Example:
      >>> int_(4).round(torch.tensor([2.5, 9.0, -9.0]))
      tensor([ 2.,  7., -8.])
    """
    _check("int_", "bits", bits, range(1, 25))
    return Integer(bits=bits, signed=signed, narrow=narrow, step=step)


def float_(
    exponent_bits: int, mantissa_bits: int, *, finite_only: bool = False, nan: bool = True, saturate: bool = True
) -> Float:
    """A small binary floating-point format, bias ``2 ** (exponent_bits - 1) - 1``, with subnormals.

    Args:
      exponent_bits: 2..8; from 6 on, rounding is computed in float64.
      mantissa_bits: 1..10, without the leading one.
      finite_only: no infinities, so that the uppermost exponent holds numbers; otherwise as in IEEE 754.
      nan: with ``finite_only``: the uppermost code is NaN, as in E4M3; otherwise a number, as in E2M1.
      saturate: what is too large becomes the largest value; otherwise infinity or NaN.

    Example:
      >>> float_(2, 1, finite_only=True, nan=False).values()[7:].tolist()
      [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
      >>> float_(5, 2, saturate=False).round(torch.tensor([1.1, 61440.0]))
      tensor([1., inf])
    """
    _check("float_", "exponent_bits", exponent_bits, range(2, 9))
    _check("float_", "mantissa_bits", mantissa_bits, range(1, 11))
    if not saturate and finite_only and not nan:
        fix = "saturate=True"
        raise ConfigError(
            explain("float_", "saturate=False is not possible", because="the format has neither infinity nor NaN", fix=fix)
        )
    return Float(
        exponent_bits=exponent_bits, mantissa_bits=mantissa_bits, finite_only=finite_only, nan=nan, saturate=saturate
    )


def codebook(values: list[float] | tuple[float, ...]) -> Codebook:
    """A format of any values: nearest, of two equally near ones the lower; saturating.

    Args:
      values: two or more distinct finite numbers, in any order.

    Example:
      >>> codebook([-1.0, 0.0, 0.5, 4.0]).round(torch.tensor([0.25, 2.3, -9.0]))
      tensor([ 0.,  4., -1.])
    """
    entries = tuple(sorted(map(float, values)))
    if len(set(entries)) < 2 or len(set(entries)) < len(entries) or not all(map(math.isfinite, entries)):
        raise ConfigError(
            explain(
                "codebook", "this table is not possible", got=list(values), allowed="two or more distinct finite numbers"
            )
        )
    return Codebook(entries)


def code_bits(form: Format) -> int:
    """How many bits tell the values of a format apart.

    Example:
      >>> code_bits(E2M1), code_bits(MXINT8)
      (4, 8)
    """
    return (len(form.values()) - 1).bit_length()


def value_table(form: Format, device: torch.device | str = "cpu") -> Tensor:
    """The values of a format, ascending, float32: what the codes of :func:`indices` point to.

    Example:
      >>> value_table(E2M1)[8:].tolist()
      [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    return form.values().float().to(device)


def indices(form: Format, x: Tensor) -> Tensor:
    """The index, uint8, of the value that each element is rounded to; of formats of at most 256 values.

    Example:
      >>> indices(E2M1, torch.tensor([-9.0, 0.0, 0.6]))
      tensor([0, 7, 8], dtype=torch.uint8)
    """
    table = value_table(form, x.device)
    middle = ((table[1:] + table[:-1]) / 2).to(x.dtype)
    return torch.bucketize(form.round(x).contiguous(), middle).to(torch.uint8)


def shared_exponent(amax: Tensor, element: Format) -> Tensor:
    """The exponent of the E8M0 scale of a block: ``floor(log2 amax)`` less that of the largest element (MX v1.0, 6.3).

    Example:
      >>> shared_exponent(torch.tensor([0.9, 448.0]), E4M3)
      tensor([-9,  0], dtype=torch.int32)
    """
    largest = math.frexp(element.largest)[1] - 1
    return (torch.frexp(amax).exponent - 1 - largest).clamp(-127, 127)


def _wide(x: Tensor) -> Tensor:
    """``x`` without gradient, half types as float32."""
    x = x.detach()
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _whole(code: Tensor, noise: Tensor | None) -> Tensor:
    """Rounded half to even, or stochastically."""
    if noise is None:
        return code.round()
    down = code.floor()
    return down + (code - down > noise).to(code.dtype)


def _infinity(like: Tensor) -> Tensor:
    return torch.full_like(like, torch.inf)


def _check(where: str, name: str, value: object, allowed: range) -> None:
    if value not in allowed or isinstance(value, bool):
        raise ConfigError(
            explain(where, f"{name} is not possible", got=value, allowed=f"{allowed.start}..{allowed.stop - 1}")
        )


def round_to_float8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest value of a float8 type, saturating at its largest finite value; NaN stays NaN. No gradient.

    float64 is rounded to float32 on the way.

    Differs from sophgo-mq: subnormals lie on the grid of the standard and are not flushed, NaN is kept.

    Example:
      >>> round_to_float8(torch.tensor([0.0049, 1.1, 1000.0]), torch.float8_e4m3fn)
      tensor([5.8594e-03, 1.1250e+00, 4.4800e+02])
    """
    largest = torch.finfo(dtype).max
    return x.detach().clamp(-largest, largest).to(dtype).to(x.dtype)


def round_to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest value of ``dtype``; what is beyond its largest value becomes infinite.

    The gradient is 1, rounded to ``dtype`` on its way, as torch's own casts do.

    Example:
      >>> round_to_dtype(torch.tensor([1.001, 70000.0]), torch.float16)
      tensor([1.0010,    inf])
    """
    return x.to(dtype).to(x.dtype)


E4M3 = float_(4, 3, finite_only=True)
E5M2 = float_(5, 2)
E3M2 = float_(3, 2, finite_only=True, nan=False)
E2M3 = float_(2, 3, finite_only=True, nan=False)
E2M1 = float_(2, 1, finite_only=True, nan=False)
MXINT8 = int_(8, narrow=True, step=2.0**-6)
