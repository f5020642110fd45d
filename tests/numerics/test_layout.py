"""Scales along several axes: which elements share one."""

from __future__ import annotations

import pytest
import torch

import sophq_func as sq
from sophq_func.numerics.layout import expand, rows

X = torch.arange(24.0).reshape(2, 3, 4)


def test_a_scale_for_each_combination_of_indices() -> None:
    per_channel = rows(X, sq.PerChannel((0, 2)))
    assert per_channel.shape == (2, 4, 3)
    assert torch.equal(per_channel[1, 2], X[1, :, 2])
    scale = per_channel.amax(-1)
    assert torch.equal(expand(scale, X, sq.PerChannel((0, 2))), X.amax(1, keepdim=True))
    everything = expand(X, X, sq.PerChannel((0, 1, 2)))
    assert torch.equal(everything, X)


def test_groups_lie_along_the_other_axes() -> None:
    x = torch.arange(48.0).reshape(2, 6, 4)
    groups = rows(x, sq.PerGroup((0, 2), 3))
    assert groups.shape == (2, 4, 2, 3)
    assert torch.equal(groups[1, 2, 1], x[1, 3:, 2])
    spread = expand(groups.amax(-1), x, sq.PerGroup((0, 2), 3))
    assert torch.equal(spread, x.reshape(2, 2, 3, 4).amax(2, keepdim=True).expand(2, 2, 3, 4).reshape(x.shape))
    assert torch.equal(rows(x, sq.PerGroup((), 8)), x.reshape(6, 8))


def test_one_axis_in_a_tuple_is_that_axis() -> None:
    for axis in range(3):
        assert torch.equal(rows(X, sq.PerChannel((axis,))), rows(X, sq.PerChannel(axis)))


@pytest.mark.parametrize("axis", [(1, 0), (0, 0), (-1,), (0.0,), (True,), "0"], ids=str)
@pytest.mark.parametrize("granularity", [sq.PerChannel, sq.PerGroup])
def test_what_names_no_axes_is_refused(granularity: type, axis: object) -> None:
    with pytest.raises(sq.ConfigError, match="this is no axis"):
        granularity(axis)


def test_axes_that_a_tensor_does_not_have_are_refused() -> None:
    with pytest.raises(sq.StateError, match="it does not have the channel axis"):
        rows(X, sq.PerChannel((0, 3)))
