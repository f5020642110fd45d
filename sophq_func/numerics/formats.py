"""Number formats: which values they can represent, and rounding to the nearest of these.

A :class:`Format` has a largest value, a list of all values, and ``round``, which has no gradient. :func:`int_`,
:func:`float_` and :func:`codebook` make one; those of the OCP standards are constants at the end of this file.

Source: OCP 8-bit Floating Point Specification (OFP8), revision 1.0; OCP Microscaling Formats (MX), version 1.0; IEEE 754
binary16; bfloat16. Rounding is half to even, except in codebooks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sophq_func.core.constants import table
from sophq_func.core.errors import ConfigError, check_flags, explain
from sophq_func.core.public import public
from sophq_func.core.registry import Registry

__all__ = [
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "E5M2",
    "FORMATS",
    "MXINT8",
    "Format",
    "code_bits",
    "codebook",
    "float_",
    "indices",
    "int_",
    "value_table",
]


def __dir__() -> list[str]:
    return __all__


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

        With ``noise``, uniform in [0, 1) and shaped like ``x``, rounding is stochastic: to one of the two neighbours of
        ``x``, with probabilities that make ``x`` the expectation (arXiv:1502.02551).
        """


@dataclass(frozen=True, kw_only=True)
class Integer:
    """Integers of ``bits`` bits times ``step``; made by :func:`int_`."""

    bits: int
    signed: bool
    narrow: bool
    step: float

    @property
    def largest(self) -> float:
        """``step`` times the largest integer."""
        value_bits = self.bits - 1 if self.signed else self.bits
        return self.step * ((1 << value_bits) - 1)

    @property
    def smallest(self) -> float:
        """``step`` times the most negative integer, or 0."""
        if not self.signed:
            return 0.0
        lowest = -(1 << self.bits - 1)
        return self.step * (lowest + 1 if self.narrow else lowest)

    def values(self) -> Tensor:
        """Every value once, ascending, float64."""
        first, last = self.smallest / self.step, self.largest / self.step
        return torch.arange(first, last + 1, dtype=torch.float64) * self.step

    def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Round half to even, and saturate; see :class:`Format`."""
        code = whole(_wide(x) / self.step, noise)
        return (code * self.step).clamp(self.smallest, self.largest).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class Float:
    """Binary floating point with subnormals; made by :func:`float_`, which describes the fields."""

    exponent_bits: int
    mantissa_bits: int
    finite_only: bool
    nan: bool
    saturate: bool

    @property
    def bias(self) -> int:
        """What is added to an exponent to store it as an unsigned field."""
        return (1 << self.exponent_bits - 1) - 1

    @property
    def smallest_exponent(self) -> int:
        """The exponent of the smallest normal number, and of all subnormal ones."""
        return 1 - self.bias

    @property
    def largest(self) -> float:
        """The largest finite value: that of the uppermost code which is not infinity or NaN."""
        field = (1 << self.exponent_bits) - 1
        if not self.finite_only:
            field -= 1  # all ones are infinity and NaN, as in IEEE 754
        mantissa = (2 << self.mantissa_bits) - 1  # all ones, behind the leading one
        if self.finite_only and self.nan:
            mantissa -= 1  # the uppermost code alone is NaN, as in E4M3
        return math.ldexp(mantissa, field - self.bias - self.mantissa_bits)

    def values(self) -> Tensor:
        """Every finite value once, ascending, float64; one zero."""
        codes = torch.arange(1 << self.exponent_bits + self.mantissa_bits)
        field, stored = codes >> self.mantissa_bits, codes & (1 << self.mantissa_bits) - 1
        # normal numbers have a leading one; subnormal ones, of field 0, have none, and the exponent of field 1
        mantissa = torch.where(field > 0, stored + (1 << self.mantissa_bits), stored).double()
        exponent = field.clamp(min=1) - self.bias - self.mantissa_bits
        magnitudes = mantissa * torch.exp2(exponent.double())
        magnitudes = magnitudes[magnitudes <= self.largest]
        negative = -magnitudes.flip(0)[:-1]  # without -0.0
        return torch.cat([negative, magnitudes])

    def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Round half to even; see :class:`Format`.

        Beyond the largest value it saturates, or gives infinity, or NaN in formats without infinity.
        """
        # a format of 8 exponent bits scales by up to 2 ** 136, which overflows float32
        work = _wide(x) if self.exponent_bits < 6 else x.detach().double()
        magnitude = torch.where(work.isfinite(), work, 0).abs()
        exponent = (torch.frexp(magnitude).exponent - 1).clamp(min=self.smallest_exponent)
        # rounding happens at the last bit of the mantissa, which is scaled to 1
        last_bit = exponent - self.mantissa_bits
        rounded = torch.ldexp(whole(torch.ldexp(work, -last_bit), noise), last_bit)
        if self.saturate:
            return rounded.clamp(-self.largest, self.largest).to(x.dtype)
        if self.finite_only:
            beyond = torch.full_like(rounded, torch.nan)
        else:
            beyond = torch.copysign(torch.full_like(rounded, torch.inf), rounded)
        return torch.where(rounded.abs() > self.largest, beyond, rounded).to(x.dtype)


@dataclass(frozen=True)
class Codebook:
    """A table of values, ascending; made by :func:`codebook`."""

    entries: tuple[float, ...]

    @property
    def largest(self) -> float:
        """The last entry."""
        return self.entries[-1]

    def values(self) -> Tensor:
        """The entries, float64."""
        return torch.tensor(self.entries, dtype=torch.float64)

    def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Round to the nearest entry, of two equally near ones to the lower, and saturate; see :class:`Format`.

        Entries and the midpoints between them are float32, as in sophgo-mq.
        """
        work = _wide(x).contiguous()  # ``bucketize`` warns of strided tensors
        entries = table(self.entries, torch.float32, x.device)
        rounded = self._nearest(work, entries) if noise is None else self._stochastic(work, entries.to(work.dtype), noise)
        # ``bucketize`` puts NaN behind the last entry
        return torch.where(work.isnan(), work, rounded).to(x.dtype)

    def _nearest(self, work: Tensor, table: Tensor) -> Tensor:
        midpoints = ((table[1:] + table[:-1]) / 2).to(work.dtype)
        return table[torch.bucketize(work, midpoints)].to(work.dtype)

    def _stochastic(self, work: Tensor, table: Tensor, noise: Tensor) -> Tensor:
        # without the outermost entries, so that what lies beyond them is between the last two
        index = torch.bucketize(work, table[1:-1], right=True)
        lower, upper = table[index], table[index + 1]
        return torch.where((work - lower) / (upper - lower) > noise, upper, lower)


@public
def int_(bits: int, *, signed: bool = True, narrow: bool = False, step: float = 1.0) -> Integer:
    """The format of integers of ``bits`` bits times ``step``; saturating.

    Args:
      bits: width, 1 to 24: float32 holds integers up to ``2 ** 24`` exactly.
      signed: two's complement; otherwise from 0.
      narrow: without the most negative code.
      step: distance of two neighbouring values; MXINT8 has ``2 ** -6``.

    Raises:
      ConfigError: ``bits`` is out of range.

    Example:
      >>> int_(4).round(torch.tensor([2.5, 9.0, -9.0]))
      tensor([ 2.,  7., -8.])
    """
    _check("int_", "bits", bits, range(1, 25))
    check_flags("int_", {"signed": signed, "narrow": narrow})
    if isinstance(step, bool) or not isinstance(step, int | float) or not 0 < step < math.inf:
        raise ConfigError(explain("int_", "step must be positive", got=step, allowed="a finite number > 0", fix="step=1.0"))
    return Integer(bits=bits, signed=signed, narrow=narrow, step=step)


@public
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

    Raises:
      ConfigError: a number of bits is out of range, or numbers that are too large can become neither infinity nor NaN.

    Example:
      >>> float_(2, 1, finite_only=True, nan=False).values()[7:].tolist()
      [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
      >>> float_(5, 2, saturate=False).round(torch.tensor([1.1, 61440.0]))
      tensor([1., inf])
    """
    _check("float_", "exponent_bits", exponent_bits, range(2, 9))
    _check("float_", "mantissa_bits", mantissa_bits, range(1, 11))
    check_flags("float_", {"finite_only": finite_only, "nan": nan, "saturate": saturate})
    if not saturate and finite_only and not nan:
        because = "with finite_only=True and nan=False it has neither infinity nor NaN"
        raise ConfigError(explain("float_", "the format must saturate", because=because, fix="saturate=True"))
    return Float(
        exponent_bits=exponent_bits, mantissa_bits=mantissa_bits, finite_only=finite_only, nan=nan, saturate=saturate
    )


@public
def codebook(values: list[float] | tuple[float, ...]) -> Codebook:
    """The format of a table of values. Rounds to the nearest, of two equally near ones to the lower; saturating.

    Args:
      values: two or more distinct finite numbers, in any order.

    Raises:
      ConfigError: fewer than two numbers, or some that are equal or not finite.

    Example:
      >>> codebook([-1.0, 0.0, 0.5, 4.0]).round(torch.tensor([0.25, 2.3, -9.0]))
      tensor([ 0.,  4., -1.])
    """
    entries = tuple(sorted(map(float, values)))
    distinct = len(set(entries)) == len(entries)
    if len(entries) < 2 or not distinct or not all(map(math.isfinite, entries)):
        allowed = "two or more distinct finite numbers"
        raise ConfigError(explain("codebook", "values cannot be a table", got=list(values), allowed=allowed))
    return Codebook(entries)


def code_bits(form: Format) -> int:
    """The number of bits of an index into the values of a format.

    Example:
      >>> code_bits(E2M1), code_bits(MXINT8)
      (4, 8)
    """
    return (len(form.values()) - 1).bit_length()


@public
def value_table(form: Format, device: torch.device | str = "cpu") -> Tensor:
    """The values of a format, ascending, float32: the table that :func:`indices` indexes.

    Raises:
      ConfigError: no format; no device of torch.

    Example:
      >>> value_table(E2M1)[8:].tolist()
      [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    if isinstance(form, type | Tensor | Mapping) or not hasattr(form, "values"):
        raise ConfigError(explain("value_table", "this is no format", got=form, allowed="a format", fix="sq.formats.E4M3"))
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        allowed = "a torch.device, or its name"
        text = explain("value_table", "this is no device", got=device, allowed=allowed, fix='device="cpu"')
        raise ConfigError(text) from error
    return form.values().float().to(place)


def indices(form: Format, x: Tensor) -> Tensor:
    """The index into :func:`value_table`, uint8, of the value that each element is rounded to.

    For formats of at most 256 values.

    Example:
      >>> indices(E2M1, torch.tensor([-9.0, 0.0, 0.6]))
      tensor([0, 7, 8], dtype=torch.uint8)
    """
    table = value_table(form, x.device)
    # rounded numbers may differ from the table's by the precision of ``x``: midpoints tell them apart all the same
    midpoints = ((table[1:] + table[:-1]) / 2).to(x.dtype)
    return torch.bucketize(form.round(x).contiguous(), midpoints).to(torch.uint8)


def shared_exponent(amax: Tensor, element: Format) -> Tensor:
    """The exponent of a block's E8M0 scale: ``floor(log2(amax)) - floor(log2(largest element))`` (OCP MX v1.0, 6.3).

    Example:
      >>> shared_exponent(torch.tensor([0.9, 448.0]), E4M3)
      tensor([-9,  0], dtype=torch.int32)
    """
    # ``frexp`` returns a mantissa in [0.5, 1): its exponent is one above that of the leading bit
    of_largest = math.frexp(element.largest)[1] - 1
    return (torch.frexp(amax).exponent - 1 - of_largest).clamp(-127, 127)  # what E8M0 can hold


def _wide(x: Tensor) -> Tensor:
    """``x`` without gradient, float16 and bfloat16 as float32."""
    x = x.detach()
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def whole(code: Tensor, noise: Tensor | None) -> Tensor:
    """Whole numbers: rounded half to even, or with noise stochastically, see :meth:`Format.round`."""
    if noise is None:
        return code.round()
    down = code.floor()
    return down + (code - down > noise).to(code.dtype)


def _check(where: str, name: str, value: object, allowed: range) -> None:
    # a bool is an int, and would pass as 0 or 1
    if not isinstance(value, int) or isinstance(value, bool) or value not in allowed:
        bounds = f"{allowed.start}..{allowed.stop - 1}"
        raise ConfigError(explain(where, f"{name} must be an int in {bounds}", got=value, allowed=bounds))


def round_to_float8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest value of a float8 type, saturating at its largest finite value; NaN stays NaN. No gradient.

    float64 is rounded to float32 first, and then again.

    Differs from sophgo-mq: subnormals are those of the standard, and NaN is kept.

    Example:
      >>> round_to_float8(torch.tensor([0.0049, 1.1, 1000.0]), torch.float8_e4m3fn)
      tensor([5.8594e-03, 1.1250e+00, 4.4800e+02])
    """
    largest = torch.finfo(dtype).max
    return x.detach().clamp(-largest, largest).to(dtype).to(x.dtype)


def round_to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest value of ``dtype``, infinite beyond its largest; the gradient is 1, as of torch's casts.

    The gradient, too, is rounded to ``dtype``.

    Example:
      >>> round_to_dtype(torch.tensor([1.001, 70000.0]), torch.float16)
      tensor([1.0010,    inf])
    """
    return x.to(dtype).to(x.dtype)


# The formats of the OCP standards.

E4M3 = float_(4, 3, finite_only=True)
E5M2 = float_(5, 2)
E3M2 = float_(3, 2, finite_only=True, nan=False)
E2M3 = float_(2, 3, finite_only=True, nan=False)
E2M1 = float_(2, 1, finite_only=True, nan=False)
MXINT8 = int_(8, narrow=True, step=2.0**-6)

FORMATS: Registry[Format] = Registry("format")
"""Formats by name; :func:`sophq_func.register.format` adds to them."""

FORMATS.add("e4m3", E4M3)
FORMATS.add("e5m2", E5M2)
FORMATS.add("e3m2", E3M2)
FORMATS.add("e2m3", E2M3)
FORMATS.add("e2m1", E2M1)
FORMATS.add("mxint8", MXINT8)
