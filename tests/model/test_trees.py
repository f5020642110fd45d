"""Qparams in another dtype, and averages of trees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from tests.helpers import ready, unchanged

SOFT = sq.override(fake_quantize=sq.fake_quantize.adaround())


def in_float64(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in params.items()}


def test_qparams_in_float64_have_gradients_that_finite_differences_confirm() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    r = ready(model, x, config=sq.QuantConfig(weight=SOFT, activation=None))
    qparams, params = sq.cast(r.qparams, torch.float64), in_float64(r.params)
    learned, rest = r.q.split(qparams)
    alpha = learned["weight_fake_quant.alpha"].requires_grad_()
    assert alpha.dtype == torch.float64

    def output(alpha: Tensor) -> Any:
        return r.q.apply(params, sq.merge({**learned, "weight_fake_quant.alpha": alpha}, rest), x.double())

    # the softened rounding is smooth in alpha, which rounding itself is in nothing
    assert torch.autograd.gradcheck(output, (alpha,))


def test_cast_keeps_integers_and_names_and_goes_back() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(4, 3)
    affine = sq.override(symmetric=False, fake_quantize="lsq_plus")
    r = ready(model, x, config=sq.QuantConfig(activation=affine))
    with unchanged(r.qparams):
        wide = sq.cast(r.qparams, torch.float64)
    assert list(wide) == sorted(r.q.plan)
    for name, entry in wide.items():
        assert entry.scale.dtype == torch.float64
        learned = r.qparams[name].zero_point.is_floating_point()
        assert entry.zero_point.dtype == (torch.float64 if learned else torch.int32)
    back = sq.cast(wide, torch.float32)
    assert torch.equal(r.q.apply(r.params, back, x), r(x))
    assert r.q.apply(r.params, wide, x).dtype == torch.float32
    assert r.q.apply(in_float64(r.params), wide, x.double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int32, "float64"], ids=str)
def test_scales_are_not_narrowed(dtype: Any) -> None:
    with pytest.raises(sq.ConfigError, match=r"cast: qparams cannot have this dtype: got .*float32 or torch.float64"):
        sq.cast({}, dtype)


def test_params_are_no_qparams() -> None:
    with pytest.raises(sq.StateError, match="cast: these are no qparams"):
        sq.cast({"w": torch.ones(2)}, torch.float64)  # type: ignore[dict-item]


def test_a_moving_average_is_the_weighted_sum_of_what_it_has_seen() -> None:
    seen = [{"w": torch.randn(3), "list": [torch.randn(())]} for _ in range(4)]
    average = seen[0]
    for tree in seen[1:]:
        average = sq.lerp(average, tree, 0.25)
    weights = [0.75**3, 0.25 * 0.75**2, 0.25 * 0.75, 0.25]
    expected = sum(w * t["w"] for w, t in zip(weights, seen, strict=True))
    # three roundings of numbers below 4 in float32
    torch.testing.assert_close(average["w"], expected, rtol=0, atol=4 * 3 * 2**-24)


def test_both_ends_are_exact_and_qparams_keep_their_integers() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    r = ready(model, x)
    double = {name: entry._replace(scale=entry.scale * 3) for name, entry in r.qparams.items()}
    with unchanged(r.qparams, double):
        start, end, half = (sq.lerp(r.qparams, double, weight) for weight in (0, 1.0, 0.5))
    for name, entry in r.qparams.items():
        assert isinstance(half[name], sq.QParams)
        assert torch.equal(start[name].scale, entry.scale)
        assert torch.equal(end[name].scale, double[name].scale)
        torch.testing.assert_close(half[name].scale, 2 * entry.scale)
        assert half[name].zero_point is entry.zero_point


def test_it_is_differentiable_and_maps_over_weights() -> None:
    a, b = {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 2.0])}
    mapped = torch.vmap(lambda weight: sq.lerp(a, b, weight))(torch.tensor([0.0, 0.5]))
    torch.testing.assert_close(mapped["w"], torch.tensor([[0.0, 0.0], [0.5, 1.0]]))
    slope = torch.func.grad(lambda weight: sq.lerp(a, b, weight)["w"].sum())(torch.tensor(0.3))
    assert slope == 3.0


def test_half_precision_keeps_its_dtype_and_a_small_weight_its_digits() -> None:
    a, b = {"w": torch.tensor(0.0, dtype=torch.bfloat16)}, {"w": torch.tensor(256.0, dtype=torch.bfloat16)}
    weight = torch.tensor(2.0**-8 + 2.0**-20)  # in bfloat16 this is 2 ** -8
    found = sq.lerp(a, b, 1 - weight)["w"]
    assert found.dtype == torch.bfloat16
    assert found == torch.tensor(255.0, dtype=torch.bfloat16)


def test_integers_that_differ_are_said_with_every_other_problem() -> None:
    a = {"count": torch.tensor(3), "mask": torch.tensor(True), "w": torch.ones(2), "x": torch.ones(1)}
    b = {"count": torch.tensor(4), "mask": torch.tensor(True), "w": torch.ones(3), "y": torch.ones(1)}
    with pytest.raises(sq.StateError) as caught:
        sq.lerp(a, b, 0.5)
    for words in (
        "lerp: count: integers differ",
        "sq.split_params(model)[0]",
        "lerp: w: the tensors differ in dtype or shape",
        "the second tree has no leaf 'x'",
        "the first tree has no leaf 'y'",
    ):
        assert words in str(caught.value)
    assert "mask" not in str(caught.value)


@pytest.mark.parametrize(
    "tree", [{"w": 1.0}, {"w": torch.ones(2, dtype=torch.float8_e4m3fn)}, {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}]
)
def test_what_has_no_average_is_refused(tree: Any) -> None:
    with pytest.raises(sq.StateError, match="lerp"):
        sq.lerp(tree, tree, 0.5)


@pytest.mark.parametrize("weight", [-0.1, 1.5, True, "half", torch.tensor(1), float("nan")], ids=str)
def test_a_weight_is_a_number_from_0_to_1(weight: Any) -> None:
    with pytest.raises(sq.ConfigError, match="lerp: this is no weight"):
        sq.lerp({}, {}, weight)
