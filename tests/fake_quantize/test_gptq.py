"""GPTQ: against a plain loop over rows and columns, and as a function of weight and Hessian."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sophq_func as sq
from sophq_func.fake_quantize import hessian_update
from sophq_func.numerics.codebooks import CODEBOOKS
from tests.contracts import assert_same, compiled, observed, sample, unchanged

SCHEME = sq.QScheme(bits=4)
OPTIONS: list[dict[str, Any]] = [
    {"group_size": -1},
    {"group_size": -2},
    {"group_size": 0},
    {"group_size": 4, "block_size": 4},
    {"group_size": 4, "block_size": 5, "data_type": "nf4"},
    {"group_size": -1, "block_size": 3, "data_type": "fp4_e2m1", "percdamp": 0.1},
]
over_options = pytest.mark.parametrize("options", OPTIONS, ids=str)


def problem(seed: int, rows: int = 5, columns: int = 12, tokens: int = 40) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of inputs that are correlated, so that there is something to make up for."""
    mix = sample(seed, columns, columns) * 0.5 + torch.eye(columns)
    hessian, _ = hessian_update(torch.zeros(columns, columns), 0, sample(seed + 1, tokens, columns) @ mix)
    return sample(seed + 2, rows, columns) - 0.4, hessian


def with_hessian(weight: Tensor, hessian: Tensor, scheme: sq.QScheme = SCHEME) -> sq.QParams:
    return observed(weight, scheme)._replace(extras={"hessian": hessian})


def loop(weight: Any, hessian: Any, qparams: sq.QParams, **options: Any) -> Any:
    """Algorithm 1 of the paper, element by element, in float64."""
    group, block = options.get("group_size", 128), options.get("block_size", 128)
    table = np.array(CODEBOOKS[options.get("data_type", "int4")].entries, dtype=np.float32).astype(np.float64)
    weight, hessian, n = weight.copy(), hessian.copy(), weight.shape[1]
    for j in range(n):
        if hessian[j, j] == 0:
            hessian[j, j], weight[:, j] = 1, 0
    hessian += options.get("percdamp", 0.01) * np.mean(np.diag(hessian)) * np.eye(n)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    done, start_of_block, scales = np.zeros_like(weight), weight.copy(), [1.0] * len(weight)
    for j in range(n):
        if j % block == 0:
            start_of_block[:, j:] = weight[:, j:]
        for i in range(len(weight)):
            if group == 0:
                s, w = float(qparams.scale), weight[i, j]
                done[i, j] = np.clip(np.rint(w / s), -8, 7) * s
                continue
            if group == -2:
                scales[i] = np.abs(weight[:, j]).max() / table[-1]
            elif group == -1 and j % block == 0:
                scales[i] = np.abs(start_of_block[i]).max() / table[-1]
            elif group > 0 and j % group == 0:
                scales[i] = np.abs(start_of_block[i, j : j + group]).max() / table[-1]
            done[i, j] = table[np.abs(table - weight[i, j] / scales[i]).argmin()] * scales[i]
        error = (weight[:, j] - done[:, j]) / upper[j, j]
        for k in range(j + 1, n):
            weight[:, k] -= error * upper[j, k]
    return done


@over_options
def test_gptq_is_the_algorithm_of_the_paper(options: dict[str, Any]) -> None:
    """Later blocks read a weight that lags behind only where a scale is taken."""
    for seed in range(4):
        weight, hessian = (t.double() for t in problem(seed))
        qparams = with_hessian(weight, hessian)
        found = sq.fake_quantizer("gptq", **options).apply(weight, qparams, SCHEME)
        np.testing.assert_allclose(found.numpy(), loop(weight.numpy(), hessian.numpy(), qparams, **options), rtol=1e-6)


def loss(weight: Tensor, quantized: Tensor, hessian: Tensor) -> Tensor:
    off = (weight - quantized).reshape(weight.shape[0], -1)
    return (off @ hessian * off).sum()


@over_options
@pytest.mark.parametrize("act_order", [False, True])
def test_the_output_changes_less_than_by_rounding_alone(options: dict[str, Any], act_order: bool) -> None:
    fq, losses = sq.fake_quantizer("gptq", act_order=act_order, **options), torch.zeros(2)
    for seed in range(8):
        weight, hessian = problem(seed)
        plain = fq.apply(weight, with_hessian(weight, hessian.diagonal().diag()), SCHEME)
        solved = fq.apply(weight, with_hessian(weight, hessian), SCHEME)
        losses += torch.stack([loss(weight, solved, hessian), loss(weight, plain, hessian)])
    assert losses[0] < 0.9 * losses[1]


def test_act_order_is_the_solution_of_the_sorted_problem() -> None:
    weight, hessian = problem(0)
    order = torch.argsort(hessian.diagonal(), descending=True)
    fq, sorting = (sq.fake_quantizer("gptq", group_size=-1, act_order=a) for a in (False, True))
    expected = torch.empty_like(weight)
    expected[:, order] = fq.apply(weight[:, order], with_hessian(weight, hessian[order][:, order]), SCHEME)
    assert_same(sorting.apply(weight, with_hessian(weight, hessian), SCHEME), expected)


@pytest.mark.parametrize("name", ["gptq", "gptqfp4"])
def test_dead_inputs_get_no_weight_and_disturb_nothing(name: str) -> None:
    weight, hessian = problem(0)
    alive = torch.ones(12)
    alive[3] = 0
    found = sq.fake_quantizer(name).apply(weight, with_hessian(weight, hessian * alive * alive[:, None]), SCHEME)
    assert found.isfinite().all()
    assert not found[:, 3].any()
    assert found[:, 4:].any()


@pytest.mark.parametrize("name", ["gptq", "gptqfp4"])
def test_alone_and_without_a_hessian_it_is_fixed(name: str) -> None:
    for granularity in (sq.PerTensor(), sq.PerChannel(0)):
        scheme, weight = sq.QScheme(bits=4, granularity=granularity), sample(0, 5, 12)
        qparams = observed(weight, scheme)
        expected = sq.fake_quantizer("fixed").apply(weight, qparams, scheme)
        assert_same(sq.fake_quantizer(name).apply(weight, qparams, scheme), expected)


@pytest.mark.parametrize(
    "granularity", [sq.PerGroup(0, 4), sq.PerBlock(5, 4), sq.PerChannel(1), sq.PerGroup(1, 5)], ids=repr
)
def test_scales_of_the_scheme_that_no_column_has_are_refused(granularity: Any) -> None:
    weight, hessian = problem(0)
    scheme = sq.QScheme(bits=4, granularity=granularity)
    fq = sq.fake_quantizer("gptq", group_size=0)
    with pytest.raises(sq.StateError, match="group_size=0 takes the scales of the scheme"):
        fq.apply(weight, with_hessian(weight, hessian, scheme), scheme)
    for other in (sq.PerTensor(), sq.PerChannel(), sq.PerChannel(0)):
        scheme = sq.QScheme(bits=4, granularity=other)
        assert fq.apply(weight, with_hessian(weight, hessian, scheme), scheme).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq", "gptqfp4"])
@pytest.mark.parametrize("act_order", [False, True])
def test_it_maps_over_weights_and_hessians_passes_gradients_and_compiles(name: str, act_order: bool) -> None:
    fq = sq.fake_quantizer(name, act_order=act_order, block_size=5)
    weights, hessians = (torch.stack(ts).double() for ts in zip(*(problem(seed) for seed in range(3)), strict=True))
    qparams = with_hessian(weights[0], hessians[0])

    def f(weight: Tensor, hessian: Tensor) -> Tensor:
        return fq.apply(weight, qparams._replace(extras={"hessian": hessian}), SCHEME)

    with unchanged(weights, hessians):
        expected = torch.stack([f(w, h) for w, h in zip(weights, hessians, strict=True)])
        assert_same(torch.vmap(f)(weights, hessians), expected, rtol=1e-9, atol=1e-9)
        gradient = torch.func.grad(lambda w, h: (f(w, h) * torch.arange(12.0)).sum(), argnums=(0, 1))
        dw, dh = gradient(weights[0], hessians[0])
    assert torch.equal(dw, torch.arange(12.0).expand(5, 12))
    assert not dh.any()
    tangents = (torch.ones(5, 12), torch.ones(12, 12))
    assert torch.equal(torch.func.jvp(f, (weights[0], hessians[0]), tangents)[1], torch.ones(5, 12))
    assert_same(compiled(f)(weights[0], hessians[0]), f(weights[0], hessians[0]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_come_back(dtype: torch.dtype) -> None:
    weight, hessian = problem(0)
    fq, weight = sq.fake_quantizer("gptq"), weight.to(dtype)
    found = fq.apply(weight, with_hessian(weight, hessian), SCHEME)
    assert found.dtype == dtype
    if dtype != torch.float64:
        assert_same(found, fq.apply(weight.float(), with_hessian(weight, hessian), SCHEME).to(dtype))


def test_a_convolution_is_solved_on_its_patches() -> None:
    x, weight = sample(0, 4, 3, 8, 8), sample(1, 6, 3, 3, 3)
    patches = F.unfold(x, 3, padding=1).transpose(1, 2)
    hessian, count = hessian_update(torch.zeros(27, 27), 0, patches)
    assert count == 4
    fq, outputs = sq.fake_quantizer("gptq", group_size=-1), []
    for h in (hessian.diagonal().diag(), hessian):
        quantized = fq.apply(weight, with_hessian(weight, h), SCHEME)
        assert quantized.shape == weight.shape
        outputs.append(F.conv2d(x, quantized, padding=1))
    target = F.conv2d(x, weight, padding=1)
    plain, solved = ((y - target).square().mean() for y in outputs)
    assert solved < 0.95 * plain


def test_a_hessian_of_batches_is_the_mean_over_samples() -> None:
    x = sample(0, 10, 7, 4)
    whole, count = hessian_update(torch.zeros(4, 4), 0, x)
    torch.testing.assert_close(whole, 2 / 10 * torch.einsum("sti,stj->ij", x, x))
    found, total = torch.zeros(4, 4), torch.tensor(0)
    for batch in (x[:3], x[3:4], x[4:]):
        with unchanged(found, total, batch):
            found, total = hessian_update(found, total, batch)
    assert count == total == 10
    torch.testing.assert_close(found, whole)
    alone, one = hessian_update(torch.zeros(4, 4), 0, x[0])
    assert one == 1
    torch.testing.assert_close(alone, 2 * x[0].T @ x[0])
    mapped, _ = torch.vmap(lambda x: hessian_update(torch.zeros(4, 4), torch.tensor(0), x))(x)
    torch.testing.assert_close(mapped[0], alone)


def test_an_empty_batch_leaves_the_hessian_and_a_singular_one_gives_nan() -> None:
    hessian = torch.eye(4)
    assert_same(hessian_update(hessian, 3, torch.empty(0, 7, 4)), (hessian, 3))
    weight, singular = sample(0, 3, 4), torch.ones(4, 4)
    undamped = sq.fake_quantizer("gptq", percdamp=0).apply(weight, with_hessian(weight, -singular), SCHEME)
    assert undamped[:, 1:].isnan().all()
    assert sq.fake_quantizer("gptq").apply(weight, with_hessian(weight, singular), SCHEME).isfinite().all()


def test_shapes_that_do_not_fit_are_named() -> None:
    weight, hessian = problem(0)
    with pytest.raises(sq.StateError, match=r"gptq: a Hessian of this shape .* got \(12, 12\), allowed \(9, 9\)"):
        sq.fake_quantizer("gptq").apply(weight[:, :9], with_hessian(weight, hessian), SCHEME)
    with pytest.raises(sq.StateError, match=r"hessian_update: .* got \(3, 3\), allowed \(4, 4\)"):
        hessian_update(torch.zeros(3, 3), 0, torch.zeros(5, 4))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"group_size": -3}, "gptq: group_size must be an int from -2 up: got -3, allowed an int >= -2"),
        ({"block_size": 0}, "gptq: block_size must be an int from 1 up: got 0, allowed an int >= 1"),
        ({"percdamp": -1}, "gptq: percdamp must not be negative"),
        ({"actorder": 1}, "gptq: act_order must be a bool: got 1, allowed True or False"),
        ({"data_type": "int5"}, "gptq: data_type 'int5' is not known, did you mean 'int4'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(sq.ConfigError, match=text):
        sq.fake_quantizer("gptq", **options)
