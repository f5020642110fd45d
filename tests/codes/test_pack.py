"""Codes of few bits, packed and unpacked: every width, signed and unsigned, in the order that is written down."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sophq_func as sq
from sophq_func.integers import per_byte

SHAPES = st.lists(st.integers(0, 5), min_size=0, max_size=3).map(tuple)


@settings(max_examples=150, deadline=None)
@given(bits=st.integers(1, 8), signed=st.booleans(), shape=SHAPES, seed=st.integers(0, 2**31))
def test_what_is_packed_comes_back(bits: int, signed: bool, shape: tuple[int, ...], seed: int) -> None:
    low, high = (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)
    codes = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))
    packed = sq.pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-codes.numel() // per_byte(bits)),)
    back = sq.unpack(packed, bits, shape, signed)
    assert back.dtype == (torch.int8 if signed else torch.uint8)
    assert torch.equal(back.long(), codes)


@pytest.mark.parametrize(
    ("bits", "codes"), [(4, [3, -2, 7, -8, 1]), (3, [1, -4, 3]), (2, [0, 1, -2, -1, 1]), (1, [1, 0, 1])]
)
def test_the_first_code_is_in_the_lowest_bits(bits: int, codes: list[int]) -> None:
    count = 8 // bits
    expected = []
    for k in range(0, len(codes), count):
        expected.append(sum((code % 2**bits) << bits * i for i, code in enumerate(codes[k : k + count])))
    assert sq.pack(torch.tensor(codes), bits).tolist() == expected


@pytest.mark.parametrize("bits", [0, 9, 4.0, True])
def test_a_width_that_is_none_is_refused(bits: object) -> None:
    with pytest.raises(sq.ConfigError, match=r"pack: codes of this width cannot be packed: got .*, allowed 1\.\.8"):
        sq.pack(torch.tensor([1]), bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("codes", [[8, -1], [16], [-9]])
def test_codes_that_do_not_fit_are_refused(codes: list[int]) -> None:
    with pytest.raises(sq.StateError, match="pack: the codes do not fit in 4 bits: got 'codes from"):
        sq.pack(torch.tensor(codes), 4)


def test_what_is_no_integer_is_refused() -> None:
    with pytest.raises(sq.StateError, match="codes must be integers"):
        sq.pack(torch.tensor([1.0]), 4)


def test_bytes_of_another_shape_are_refused() -> None:
    with pytest.raises(sq.StateError, match=r"these bytes do not hold 4-bit codes of shape \(3, 3\): .*allowed .*\(5,\)"):
        sq.unpack(torch.zeros(4, dtype=torch.uint8), 4, (3, 3), signed=True)
