"""MX and NVFP4 against the text of the standards, written once more in NumPy, and what they promise about blocks.

OCP Microscaling Formats v1.0: 5.3 (element formats), 5.4.1 (E8M0), 6.3 (conversion: the largest power of two not above
the largest magnitude, divided by the largest power of two of the element format; elements half to even, saturating).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import sophq_func as sq
from tests.contracts import compiled

ONE = sq.QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), {})
SCHEME = sq.QScheme()


class Element(NamedTuple):
    """Exponent bias, mantissa bits, largest value; the smallest exponent is ``1 - bias``."""

    bias: int
    mantissa: int
    largest: float


ELEMENTS = {
    ("mxfp8", "e4m3"): Element(7, 3, 448.0),
    ("mxfp8", "e5m2"): Element(15, 2, 57344.0),
    ("mxfp6", "e3m2"): Element(3, 2, 28.0),
    ("mxfp6", "e2m3"): Element(1, 3, 7.5),
    ("mxfp4", None): Element(1, 1, 6.0),
}
KINDS = [*ELEMENTS, ("mxint8", None)]
over_kinds = pytest.mark.parametrize(("name", "element"), KINDS, ids=lambda v: str(v))


def made(name: str, element: str | None, **options: Any) -> sq.FakeQuantize:
    return sq.fake_quantizer(name, **options, **({"element": element} if element else {}))


def half_to_even(value: float) -> int:
    low = math.floor(value)
    rest = value - low
    return low + (rest > 0.5 or (rest == 0.5 and low % 2 == 1))


def to_element(value: float, form: Element) -> float:
    """A float64 to the nearest element, by the definition: sign, exponent, mantissa."""
    size = min(abs(value), 2.0**200)
    exponent = max(math.frexp(size)[1] - 1, 1 - form.bias) if size else 1 - form.bias
    found = math.ldexp(half_to_even(math.ldexp(size, form.mantissa - exponent)), exponent - form.mantissa)
    return math.copysign(min(found, form.largest), value)


def mx_block(block: list[float], name: str, element: str | None) -> list[float]:
    amax = max(map(abs, block))
    if amax == 0:
        return [0.0] * len(block)
    largest = 1.984375 if name == "mxint8" else ELEMENTS[name, element].largest
    shared = math.floor(math.log2(amax)) if amax >= 2.0**-1022 else 0
    shared = min(max(shared - math.floor(math.log2(largest)), -127), 127)
    if name == "mxint8":
        codes = [max(-127, min(127, math.copysign(half_to_even(abs(v) * 2.0 ** (6 - shared)), v))) for v in block]
        return [code * 2.0 ** (shared - 6) for code in codes]
    return [to_element(v * 2.0**-shared, ELEMENTS[name, element]) * 2.0**shared for v in block]


def by_blocks(x: Any, size: int, f: Any) -> Any:
    rows = x.reshape(-1, x.shape[-1]).tolist()
    done = [[y for i in range(0, len(row), size) for y in f(row[i : i + size])] for row in rows]
    return np.array(done).reshape(x.shape)


def numbers(seed: int, *shape: int) -> Tensor:
    """Of many sizes, with exact powers of two, ties and zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-30, 30, (*shape[:-1], 1), generator=generator))
    kind = torch.randint(0, 12, shape, generator=generator)
    x = torch.where(kind == 0, torch.exp2(torch.log2(x.abs()).round()), x)
    x = torch.where(kind == 1, (x * 8).round() / 8 + 1 / 16, x)
    return torch.where(kind == 2, 0, x)


@over_kinds
@pytest.mark.parametrize("shape", [(40, 64), (30, 45), (7, 3, 32), (5,)])
def test_mx_follows_the_standard(name: str, element: str | None, shape: tuple[int, ...]) -> None:
    for seed in range(3):
        x = numbers(seed, *shape)
        expected = by_blocks(x.double().numpy(), 32, lambda block: mx_block(block, name, element))
        assert np.array_equal(made(name, element).apply(x, ONE, SCHEME).double().numpy(), expected)
        expected = by_blocks(x.double().numpy(), 8, lambda block: mx_block(block, name, element))
        assert np.array_equal(made(name, element, block_size=8).apply(x, ONE, SCHEME).double().numpy(), expected)


@over_kinds
def test_every_element_code_at_every_offset_survives_beside_the_largest(name: str, element: str | None) -> None:
    """A block that holds the largest element has the scale that it was made with."""
    form = {"e4m3": (8, 4), "e5m2": (15, 3), "e3m2": (4, 3), "e2m3": (2, 4)}.get(element or "", (2, 2))
    largest = 1.984375 if name == "mxint8" else ELEMENTS[name, element].largest
    steps = np.arange(-127, 128) / 64 if name == "mxint8" else np.array(sorted(every(ELEMENTS[name, element])))
    for shared in (-100, -3, 0, 5, 100):
        values = torch.from_numpy(steps * 2.0**shared).float()
        pairs = torch.stack([values, torch.full_like(values, largest * 2.0**shared)], -1)
        assert torch.equal(made(name, element).apply(pairs, ONE, SCHEME), pairs)
    assert form[0] == math.floor(math.log2(largest)) or name == "mxint8"


def every(form: Element) -> set[float]:
    exponents = range(1 - form.bias, math.floor(math.log2(form.largest)) + 1)
    normal = {math.ldexp(d, e - form.mantissa) for e in exponents for d in range(1 << form.mantissa, 2 << form.mantissa)}
    subnormal = {math.ldexp(d, 1 - form.bias - form.mantissa) for d in range(1 << form.mantissa)}
    return {sign * v for v in normal | subnormal if v <= form.largest for sign in (1, -1)}


@over_kinds
@pytest.mark.parametrize("size", [2.0**-149, 2.0**-140, 2.0**-127, 2.0**120, 3.4e38])
def test_mx_is_exact_at_both_ends_of_e8m0(name: str, element: str | None, size: float) -> None:
    x = (torch.tensor([1.0, 0.5, -0.75, 0.0]).double() * size).float()
    expected = by_blocks(x.double().numpy(), 32, lambda block: mx_block(block, name, element))
    found = made(name, element).apply(x, ONE, SCHEME)
    assert found.isfinite().all()
    assert np.array_equal(found.double().numpy(), expected.astype(np.float32))


# NVFP4


def nv_block(block: list[float], scale: float) -> list[float]:
    """In float32 where the format has float32: the quotient by the tensor's scale, and a sixth of the largest."""
    unit = [float(np.float32(v) / np.float32(scale)) for v in block]
    shared = to_element(float(np.float32(max(map(abs, unit))) / np.float32(6)), Element(7, 3, 448.0))
    codes = [to_element(float(np.float32(v) / np.float32(shared)), Element(1, 1, 6.0)) if shared else 0.0 for v in unit]
    return [float(np.float32(code * shared) * np.float32(scale)) for code in codes]


@pytest.mark.parametrize("shape", [(40, 64), (30, 45), (7, 3, 16), (5,)])
def test_nvfp4_follows_its_description(shape: tuple[int, ...]) -> None:
    fq = sq.fake_quantizer("nvfp4")
    for seed in range(3):
        x = numbers(seed, *shape[:-1], shape[-1]).clamp(-1e3, 1e3)
        scale = float(x.abs().max() / (6 * 448))
        qparams = ONE._replace(scale=torch.tensor(scale))
        expected = by_blocks(x.numpy(), 16, lambda block, s=scale: nv_block(block, np.float32(s)))
        assert np.array_equal(fq.apply(x, qparams, SCHEME).double().numpy(), expected)


def test_the_largest_value_that_nvfp4_was_calibrated_on_comes_back() -> None:
    x, observer = torch.randn(8, 64), sq.observer("minmax")
    fq = sq.fake_quantizer("nvfp4")
    qparams = fq.init(observer.qparams(observer.update(observer.init(x, SCHEME), x, SCHEME), SCHEME), x, SCHEME)
    torch.testing.assert_close(qparams.scale, x.abs().max() / 2688)
    y = fq.apply(x, qparams, SCHEME)
    torch.testing.assert_close(y.abs().max(), x.abs().max(), rtol=1e-6, atol=0)
    # half a step of E2M1 at the top is a sixth of the value's block maximum; an E4M3 scale is off by a sixteenth at most
    blocks = x.reshape(8, 4, 16)
    assert bool(((y.reshape(8, 4, 16) - blocks).abs() <= blocks.abs().amax(-1, keepdim=True) * (1 / 6 + 1 / 16)).all())


# Blocks


@pytest.mark.parametrize("name", ["mxfp8", "mxfp6", "mxfp4", "mxint8", "nvfp4"])
def test_a_short_last_block_is_as_if_padded_with_zeros(name: str) -> None:
    fq, x = sq.fake_quantizer(name), numbers(0, 6, 45)
    padded = torch.nn.functional.pad(x, (0, 64 - 45))
    assert torch.equal(fq.apply(x, ONE, SCHEME), fq.apply(padded, ONE, SCHEME)[:, :45])
    assert fq.apply(torch.tensor(6.0), ONE, SCHEME) == 6.0
    assert fq.apply(torch.empty(3, 0), ONE, SCHEME).shape == (3, 0)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp6", "mxfp4", "mxint8", "nvfp4", "fpxgroup"])
def test_nan_and_infinity_change_nothing_but_themselves_and_saturate(name: str) -> None:
    fq, x = sq.fake_quantizer(name), torch.linspace(-0.9, 0.9, 64).reshape(2, 32)
    spoiled = x.clone()
    spoiled[0, 3], spoiled[0, 4], spoiled[1, 5] = torch.nan, torch.inf, -torch.inf
    y, z = fq.apply(x, ONE, SCHEME), fq.apply(spoiled, ONE, SCHEME)
    assert z[0, 3].isnan()
    assert y[0, :16].abs().max() <= z[0, 4] < 2.0
    assert -2.0 < z[1, 5] <= -y[1, :16].abs().max()
    assert torch.equal(z[spoiled.isfinite()], y[spoiled.isfinite()])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "fpxgroup"])
def test_blocks_compile_and_map_over_examples(name: str) -> None:
    fq, x = sq.fake_quantizer(name), numbers(0, 4, 3, 40)
    expected = torch.stack([fq.apply(row, ONE, SCHEME) for row in x])
    assert torch.equal(torch.vmap(lambda row: fq.apply(row, ONE, SCHEME))(x), expected)
    gradient = torch.func.grad(lambda x: fq.apply(x, ONE, SCHEME).square().sum())
    torch.testing.assert_close(compiled(gradient)(x), gradient(x))


@pytest.mark.parametrize("name", ["mxfp8", "mxfp6", "mxfp4", "mxint8", "nvfp4"])
@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_impossible_block_sizes_are_refused(name: str, size: object) -> None:
    with pytest.raises(sq.ConfigError, match=f"{name}: block_size must be a positive int: got {size}, allowed an int >= 1"):
        sq.fake_quantizer(name, block_size=size)


def test_unknown_elements_are_refused() -> None:
    with pytest.raises(
        sq.ConfigError, match="mxfp6: this element format is not offered: got 'e4m3', allowed 'e3m2' or 'e2m3'"
    ):
        sq.fake_quantizer("mxfp6", element="e4m3")
