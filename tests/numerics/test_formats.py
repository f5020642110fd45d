"""Number formats against their standards, rounded in NumPy on float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from sophq_func.core.errors import ConfigError
from sophq_func.numerics.codebooks import CODEBOOKS
from sophq_func.numerics.formats import (
    MXINT8,
    Codebook,
    Format,
    codebook,
    float_,
    int_,
    round_to_dtype,
    round_to_float8,
    shared_exponent,
)


class Float8(NamedTuple):
    """OFP8 rev. 1.0: mantissa bits, exponent of the smallest normal, largest finite value."""

    dtype: torch.dtype
    mantissa: int
    smallest: int
    largest: float


E4M3 = Float8(torch.float8_e4m3fn, 3, -6, 448.0)
E5M2 = Float8(torch.float8_e5m2, 2, -14, 57344.0)
over_formats = pytest.mark.parametrize("format8", [E4M3, E5M2], ids=["e4m3", "e5m2"])


def nearest(x: Any, format8: Float8) -> Any:
    """Half to even on the grid of the exponent, whose last step reaches down through the subnormals; saturating."""
    x = np.clip(np.asarray(x, dtype=np.float64), -format8.largest, format8.largest)
    exponent = np.maximum(np.frexp(x)[1] - 1, format8.smallest)
    quantum = np.ldexp(1.0, exponent - format8.mantissa)
    return np.clip(np.rint(x / quantum) * quantum, -format8.largest, format8.largest)


def every_bfloat16() -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@over_formats
def test_rounding_agrees_bit_for_bit_with_the_standard_on_all_bfloat16_values(format8: Float8) -> None:
    x = every_bfloat16()
    expected = torch.from_numpy(nearest(x.double().numpy(), format8))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        found = round_to_float8(x.to(dtype), format8.dtype)
        assert found.dtype == dtype
        assert torch.equal(found.isnan(), x.isnan())
        assert torch.equal(found[~x.isnan()].double(), expected[~x.isnan()])
        assert torch.equal(found[~x.isnan()].signbit(), x[~x.isnan()].signbit())


@over_formats
def test_rounding_agrees_with_the_standard_around_every_tie(format8: Float8) -> None:
    grid = np.unique(nearest(every_bfloat16()[every_bfloat16().isfinite()].double().numpy(), format8))
    ties = torch.from_numpy((grid[1:] + grid[:-1]) / 2).float()
    up = torch.full_like(ties, torch.inf)
    for x in (ties, torch.nextafter(ties, up), torch.nextafter(ties, -up)):
        assert torch.equal(round_to_float8(x, format8.dtype).double(), torch.from_numpy(nearest(x.numpy(), format8)))


@over_formats
def test_rounding_reaches_every_value_of_the_format_and_nothing_else(format8: Float8) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(format8.dtype).float()
    values = codes[codes.isfinite()].unique()
    found = round_to_float8(every_bfloat16().float(), format8.dtype)
    assert torch.equal(found[~found.isnan()].unique(), values)
    assert torch.equal(round_to_float8(values, format8.dtype), values)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (0.001, 0.001953125),
        (0.0029, 0.001953125),
        (0.0049, 0.005859375),
        (0.0146484375, 0.015625),
        (1.0625, 1.0),
        (1.1, 1.125),
        (1.1875, 1.25),
        (19.0, 20.0),
        (440.0, 448.0),
        (480.0, 448.0),
        (1000.0, 448.0),
        (61440.0, 448.0),
        (70000.0, 448.0),
        (float("inf"), 448.0),
    ],
)
def test_anchors_of_e4m3(x: float, expected: float) -> None:
    assert round_to_float8(torch.tensor([x, -x]), E4M3.dtype).tolist() == [expected, -expected]


def test_no_gradient_comes_out_of_float8_rounding() -> None:
    x = torch.tensor([1.1, 500.0], requires_grad=True)
    assert not round_to_float8(x, E4M3.dtype).requires_grad


def truncated_to_bfloat16(x: Any) -> Any:
    """Half to even on the upper 16 bits of a finite float32."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def test_casts_agree_with_numpy_on_random_bits() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 20000, dtype=np.uint32)
    x = bits.view(np.float32)
    x = x[np.isfinite(x)]
    with np.errstate(over="ignore"):
        half = x.astype(np.float16).astype(np.float32)
    assert np.array_equal(round_to_dtype(torch.from_numpy(x), torch.float16).numpy(), half)
    assert np.array_equal(round_to_dtype(torch.from_numpy(x), torch.bfloat16).numpy(), truncated_to_bfloat16(x))


def test_casts_round_their_gradient_as_well() -> None:
    x = torch.tensor(1.0, requires_grad=True)
    (round_to_dtype(x, torch.bfloat16) * (1 + 2**-10)).backward()
    assert x.grad == 1.0


# Formats as values

FLOATS = {
    "e4m3": float_(4, 3, finite_only=True),
    "e5m2": float_(5, 2),
    "e3m2": float_(3, 2, finite_only=True, nan=False),
    "e2m3": float_(2, 3, finite_only=True, nan=False),
    "e2m1": float_(2, 1, finite_only=True, nan=False),
    "e3m4": float_(3, 4),
    "fp16": float_(5, 10),
    "bf16": float_(8, 7),
}
OTHERS: dict[str, Format] = {
    "int4": int_(4),
    "uint3": int_(3, signed=False),
    "mxint8": int_(8, narrow=True, step=2.0**-6),
    "lopsided": codebook([-3.0, -1.0, 0.0, 0.1, 0.25, 7.0]),
    "nf4": CODEBOOKS["nf4"],
    "nf8": CODEBOOKS["nf8"],
}
over_floats = pytest.mark.parametrize("name", FLOATS)
over_all = pytest.mark.parametrize("name", [*FLOATS, *OTHERS])


def decoded(name: str) -> Any:
    """Every finite value of a float format, from its bits: sign, exponent field, mantissa field."""
    form = FLOATS[name]
    e, m = form.exponent_bits, form.mantissa_bits
    found = []
    for code in range(1 << e + m):
        field, digits = divmod(code, 1 << m)
        top = field == (1 << e) - 1
        if top and (not form.finite_only or (form.nan and digits == (1 << m) - 1)):
            continue
        found.append(math.ldexp(digits + (1 << m) * (field > 0), max(field, 1) - form.bias - m))
    return np.array(sorted({*found, *(-v for v in found)}))


@over_floats
def test_values_are_those_of_every_code(name: str) -> None:
    assert np.array_equal(FLOATS[name].values().numpy(), decoded(name))
    assert FLOATS[name].largest == decoded(name)[-1]


@pytest.mark.parametrize(
    ("name", "largest", "smallest_normal", "smallest"),
    [
        ("e4m3", 448.0, 2.0**-6, 2.0**-9),
        ("e5m2", 57344.0, 2.0**-14, 2.0**-16),
        ("e3m2", 28.0, 0.25, 0.0625),
        ("e2m3", 7.5, 1.0, 0.125),
        ("e2m1", 6.0, 1.0, 0.5),
    ],
)
def test_extremes_are_those_of_the_standards(name: str, largest: float, smallest_normal: float, smallest: float) -> None:
    form = FLOATS[name]
    assert form.largest == largest
    assert 2.0**form.smallest_exponent == smallest_normal
    assert form.values()[form.values() > 0].min() == smallest


def even(values: Any) -> Any:
    """Whether the code of each value is even: codes count up from 0, and down below it by sign."""
    return np.abs(np.arange(len(values)) - len(values) // 2) % 2 == 0


@over_all
def test_every_value_stays_and_every_midpoint_goes_where_it_is_stated(name: str) -> None:
    """To the even code; in codebooks to the lower entry. One float next to a midpoint goes to the nearer value."""
    form = FLOATS.get(name) or OTHERS[name]
    values = form.values()
    entries = values.float().double() if isinstance(form, Codebook) else values
    assert torch.equal(form.round(values), entries)
    middle = (entries[1:] + entries[:-1]) / 2
    if isinstance(form, Codebook):
        middle = middle.float().double()
        expected = entries[:-1]
    else:
        whole = torch.from_numpy(even(values.numpy())) if name in FLOATS else (values / form.step).round() % 2 == 0
        expected = torch.where(whole[1:], entries[1:], entries[:-1])
    assert torch.equal(form.round(middle), expected)
    nudge = middle.abs() * 2.0**-50 + 2.0**-200
    assert torch.equal(form.round(middle + nudge), entries[1:])
    assert torch.equal(form.round(middle - nudge), entries[:-1])


@over_all
def test_beyond_the_ends_formats_saturate_and_nan_stays(name: str) -> None:
    form = FLOATS.get(name) or OTHERS[name]
    ends = form.values()[[0, -1]].float()
    far = torch.tensor([-torch.inf, torch.inf])
    for x in (ends * 1.7 + torch.tensor([-1.0, 1.0]), far):
        assert torch.equal(form.round(x.where(form.values()[0] < 0, x.clamp(min=-9))), ends)
    assert form.round(torch.tensor(torch.nan)).isnan()


@over_all
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_formats_keep_the_dtype_and_have_no_gradient(name: str, dtype: torch.dtype) -> None:
    form, x = FLOATS.get(name) or OTHERS[name], torch.linspace(-9, 9, 257).to(dtype).requires_grad_()
    y = form.round(x)
    assert y.dtype == dtype
    assert not y.requires_grad
    assert torch.equal(form.round(x.double()).to(dtype), y)
    assert torch.equal(torch.vmap(form.round)(x.detach().reshape(-1, 1)).reshape(-1), y)


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_unsaturated_float8_is_the_conversion_of_torch_on_all_bfloat16_values(name: str) -> None:
    form, dtype = replace(FLOATS[name], saturate=False), {"e4m3": E4M3.dtype, "e5m2": E5M2.dtype}[name]
    x = every_bfloat16()
    for wide in (x.float(), x.double(), x):
        agree(form.round(wide).float(), converted(wide.float(), dtype))


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """By torch, whose E4M3 is NaN from 464 on in some versions, as the standard has it, and saturates in others."""
    found = x.to(dtype).float()
    return torch.where(x.abs() > 464, torch.nan, found) if dtype == torch.float8_e4m3fn else found


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_float8_is_the_conversion_of_torch_on_ten_million_floats(name: str) -> None:
    """Random bits for every exponent, and normal numbers of sizes that the format is made for."""
    saturating, dtype = FLOATS[name], {"e4m3": E4M3.dtype, "e5m2": E5M2.dtype}[name]
    form, generator = replace(saturating, saturate=False), torch.Generator().manual_seed(0)
    for _ in range(10):
        bits = torch.randint(-(2**31), 2**31 - 1, (500_000,), generator=generator).to(torch.int32).view(torch.float32)
        sizes = torch.randn(500_000, generator=generator) * torch.exp2(torch.rand(500_000, generator=generator) * 40 - 20)
        x = torch.cat([bits, sizes])
        agree(form.round(x), converted(x, dtype))
        agree(saturating.round(x), round_to_float8(x, dtype))


def agree(found: Tensor, expected: Tensor) -> None:
    """The same bits, the sign of zero included; any NaN equals any other."""
    number = ~expected.isnan()
    assert torch.equal(found.isnan(), ~number)
    assert torch.equal(found[number].view(torch.int32), expected[number].view(torch.int32))


def test_formats_of_eight_exponent_bits_are_bfloat16() -> None:
    form = replace(FLOATS["bf16"], saturate=False)
    x = torch.randint(-(2**31), 2**31 - 1, (500_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    agree(form.round(x.view(torch.float32)), x.view(torch.float32).bfloat16().float())
    half = replace(FLOATS["fp16"], saturate=False)
    agree(half.round(x.view(torch.float32)), x.view(torch.float32).half().float())


@over_all
def test_stochastic_rounding_takes_a_neighbour_with_the_right_probability(name: str) -> None:
    form = FLOATS.get(name) or OTHERS[name]
    values = form.values().float()
    inner = len(values) // 2 + 1
    low, high = values[inner].double(), values[inner + 1].double()
    noise = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for share in (0.0, 0.125, 0.5, 0.937):
        x = (low + share * (high - low)).expand(1000)
        y = form.round(x, noise)
        assert torch.isin(y, torch.stack([low, high])).all()
        assert abs(float((y == high).double().mean()) - share) <= 1.01e-3
    assert torch.equal(form.round(values.double(), torch.full(values.shape, 0.99, dtype=torch.float64)), values.double())


def test_stochastic_rounding_of_negative_numbers_is_unbiased_too() -> None:
    noise = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for name in ("e2m1", "int4"):
        form = FLOATS.get(name) or OTHERS[name]
        mean = form.round(torch.full((1000,), -2.3, dtype=torch.float64), noise).mean()
        assert abs(float(mean) + 2.3) < 2e-3


def test_shared_exponents_are_exact_at_powers_of_two() -> None:
    amax = torch.exp2(torch.arange(-126, 128).float())
    for form, largest in ((FLOATS["e4m3"], 8), (FLOATS["e5m2"], 15), (FLOATS["e2m1"], 2), (MXINT8, 0)):
        expected = (torch.arange(-126, 128) - largest).clamp(-127, 127)
        assert torch.equal(shared_exponent(amax, form).long(), expected)
        below = torch.nextafter(amax[1:], torch.zeros(()))
        assert torch.equal(shared_exponent(below, form).long(), (torch.arange(-126, 127) - largest).clamp(-127, 127))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: float_(1, 2), "float_: exponent_bits must be an int in 2..8: got 1, allowed 2..8"),
        (lambda: float_(4, 11), "float_: mantissa_bits must be an int in 1..10: got 11, allowed 1..10"),
        (lambda: float_(2, 1, finite_only=True, nan=False, saturate=False), "neither infinity nor NaN"),
        (lambda: int_(True), "int_: bits must be an int in 1..24: got True"),
        (lambda: codebook([1.0]), "codebook: values cannot be a table"),
        (lambda: codebook([1.0, 1.0, 2.0]), "two or more distinct finite numbers"),
        (lambda: codebook([1.0, math.inf]), "two or more distinct finite numbers"),
    ],
)
def test_impossible_formats_are_refused(make: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text.replace("(", r"\(")):
        make()
