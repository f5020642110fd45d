"""Ranges by second moments: never worse for any scale, on every grid; and for formats that are no integers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.algorithms._measure import layer_errors
from sophq_func.algorithms._scales import form_of
from sophq_func.numerics.affine import fake_quantize
from tests.algorithms.problems import GRANULARITIES, errors, observed, second_moments

clip_solve = sq.algorithms.clip_solve
over_granularities = pytest.mark.parametrize("kind", GRANULARITIES)


@over_granularities
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_scale_is_worse_than_it_was(kind: str, symmetric: bool, bits: int) -> None:
    granularity, shape, n, parts = GRANULARITIES[kind]
    scheme = sq.QScheme(bits=bits, symmetric=symmetric, granularity=granularity)
    weight, second = torch.randn(shape), second_moments(n, parts)
    start = observed(weight, scheme)
    found = clip_solve(weight, second, scheme, start)
    assert found.scale.shape == start.scale.shape
    assert found.zero_point.dtype == start.zero_point.dtype
    assert bool((found.scale > 0).all())
    form = form_of(weight, second, scheme)
    before, after = (fake_quantize(weight, qp, scheme, "kernel") - weight for qp in (start, found))
    assert bool((form(after, after) <= form(before, before)).all())
    if bits == 2:
        assert float(form(after, after).sum()) < 0.8 * float(form(before, before).sum())


@over_granularities
def test_the_form_is_the_error_where_elements_of_other_scales_do_not_count(kind: str) -> None:
    granularity, shape, n, parts = GRANULARITIES[kind]
    scheme = sq.QScheme(granularity=granularity)
    change, second = torch.randn(shape), second_moments(n, parts)
    size = getattr(granularity, "size", getattr(granularity, "columns", n))
    apart = second * torch.block_diag(*[torch.ones(size, size)] * (n // size))
    total = form_of(change, second, scheme)(change, change).sum()
    torch.testing.assert_close(total, errors(change, apart, scheme).sum(), rtol=1e-4, atol=0)


def test_scales_that_are_powers_of_two_stay_so() -> None:
    scheme = sq.QScheme(bits=3, pot_scale=True, granularity=sq.PerChannel(0))
    weight = torch.randn(6, 16)
    found = clip_solve(weight, second_moments(16), scheme, observed(weight, scheme))
    assert torch.equal(found.scale.log2(), found.scale.log2().round())


def test_a_map_over_moments_is_the_loop() -> None:
    scheme = sq.QScheme(bits=3, symmetric=False, granularity=sq.PerGroup(8, axis=0))
    weight, several = torch.randn(6, 16), torch.stack([second_moments(16) for _ in range(3)])
    start = observed(weight, scheme)
    mapped = torch.vmap(lambda second: clip_solve(weight, second, scheme, start).scale)(several)
    for one, second in zip(mapped, several, strict=True):
        torch.testing.assert_close(one, clip_solve(weight, second, scheme, start).scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["fixed", "learnable", "e4m3", "fp4"])
def test_weights_of_a_model_get_better_ranges(kind: str) -> None:
    model, x = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(40, 12)
    weight = sq.override(bits=3, granularity="per_channel", fake_quantize=kind)
    q = sq.quantize(model, sq.QuantConfig(chip=None, weight=weight, activation=None), example_args=(x,))
    params = sq.params_of(model)
    start = q.calibrate(params, [x], progress=False)
    same, found = sq.algorithms.clip(q, params, start, [x], progress=False)
    assert all(same[name] is tensor or torch.equal(same[name], tensor) for name, tensor in params.items())
    assert {name: list(entry.extras) for name, entry in found.items()} == {
        name: list(entry.extras) for name, entry in start.items()
    }
    before, after = (layer_errors(q, params, params, qp, [x]) for qp in (start, found))
    assert float(after) <= float(before)


@pytest.mark.parametrize("kind, why", [("mxfp4", "no scale to choose"), ("adaround", "its alpha belong")])
def test_a_quantizer_whose_scale_is_no_free_field_is_refused(kind: str, why: str) -> None:
    model, x = nn.Linear(8, 4), torch.randn(4, 8)
    weight = sq.override(fake_quantize=kind)
    q = sq.quantize(model, sq.QuantConfig(chip=None, weight=weight, activation=None), example_args=(x,))
    params = sq.params_of(model)
    with pytest.raises(sq.ConfigError, match=why):
        sq.algorithms.clip(q, params, q.calibrate(params, [x], progress=False), [x])


@pytest.mark.parametrize("second", [torch.eye(3), torch.ones(4), torch.full((4, 4), torch.nan)])
def test_moments_that_do_not_fit_the_weight_are_refused(second: Tensor) -> None:
    with pytest.raises(sq.StateError, match="second moments"):
        clip_solve(torch.randn(2, 4), second, sq.QScheme(), sq.QParams(torch.tensor(0.1), torch.tensor(0), {}))
