"""Number formats against their standards, rounded in NumPy on float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from sophq_func.formats import round_to_dtype, round_to_float8


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
