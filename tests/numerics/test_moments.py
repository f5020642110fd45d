"""Moments of rows: mergeable, neutral without rows, and the error that they give is that of the output."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sophq_func as sq
from sophq_func.numerics import moments
from sophq_func.numerics.moments import Moments, in_part, merged, moments_of, no_moments, output_error


def close(a: Moments, b: Moments) -> None:
    # sums of at most some hundred float32 in another order
    torch.testing.assert_close(tuple(a), tuple(b), rtol=1e-4, atol=1e-4)


@given(sizes=st.lists(st.integers(0, 9), min_size=2, max_size=4), parts=st.sampled_from([(), (3,)]))
def test_any_split_of_the_rows_merges_to_the_same(sizes: list[int], parts: tuple[int, ...]) -> None:
    x = torch.randn(*parts, sum(sizes), 5)
    pieces = [moments_of(piece) if parts or len(piece) else no_moments(x) for piece in x.split(sizes, dim=-2)]
    found = pieces[0]
    for piece in pieces[1:]:
        found = merged(found, piece)
    close(found, moments_of(x) if x.shape[-2] else no_moments(x))
    close(merged(pieces[0], merged(pieces[1], pieces[-1])), merged(merged(pieces[0], pieces[1]), pieces[-1]))


def test_they_are_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "ROWS_AT_ONCE", 7)  # several pieces
    x = torch.randn(30, 4, dtype=torch.float64)
    found = moments_of(x)
    assert float(found.count) == 30
    torch.testing.assert_close(found.mean.double(), x.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mean_abs.double(), x.abs().mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.amax.double(), x.abs().amax(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.second.double(), x.T @ x / 30, rtol=1e-5, atol=1e-5)
    assert found.parts == 1


def test_the_error_of_a_change_is_the_mean_square_of_what_it_adds() -> None:
    x, change = torch.randn(2, 40, 6), torch.randn(8, 6)
    expected = torch.cat([(rows @ own.T).square().mean(0) for rows, own in zip(x, change.split(4), strict=True)])
    torch.testing.assert_close(output_error(change, moments_of(x).second), expected, rtol=1e-4, atol=1e-5)


def test_parts_without_rows_have_no_weight() -> None:
    x = torch.randn(5, 3)
    whole = in_part(moments_of(x), 1, 3)
    assert whole.count.tolist() == [0, 5, 0]
    both = merged(whole, in_part(moments_of(2 * x), 0, 3))
    torch.testing.assert_close(both.second[1], moments_of(x).second)
    torch.testing.assert_close(both.second[0], moments_of(2 * x).second)


def test_a_map_over_rows_is_the_loop() -> None:
    several = torch.randn(3, 10, 4)
    mapped = torch.vmap(moments_of)(several)
    for i, rows in enumerate(several):
        close(Moments(*(field[i] for field in mapped)), moments_of(rows))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(sq.StateError, match="no rows"):
        moments_of(torch.ones(3))
    with pytest.raises(sq.StateError, match="different weights"):
        merged(moments_of(torch.ones(2, 3)), moments_of(torch.ones(2, 4)))
