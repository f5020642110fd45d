"""GPTQ for one weight, beside an independent one in NumPy; and what it promises on every grid."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import sophq_func as sq
from sophq_func.algorithms import _solve
from sophq_func.numerics.affine import fake_quantize
from tests.algorithms.problems import GRANULARITIES, errors, observed, second_moments

gptq_solve = sq.algorithms.gptq_solve
over_granularities = pytest.mark.parametrize("kind", GRANULARITIES)
over_grids = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
Matrix = npt.NDArray[np.float64]


def oracle(w: Matrix, h: Matrix, scale: Matrix, zero: Matrix, codes: int, order: str, damping: float) -> Matrix:
    """GPTQ as its paper has it: one column at a time, on the inverse of the damped matrix."""
    w, h, n = w.copy(), h.copy(), len(h)
    h[np.diag_indices(n)] += damping * np.diag(h).mean()
    places = np.argsort(-np.diag(h), kind="stable") if order == "activation" else np.arange(n)
    h, w, scale, zero = h[places][:, places], w[:, places], scale[:, places], zero[:, places]
    factor = np.linalg.cholesky(np.linalg.inv(h)).T
    found = np.zeros_like(w)
    for j in range(n):
        code = np.clip(np.round(w[:, j] / scale[:, j]) + zero[:, j], 0, codes - 1)
        found[:, j] = (code - zero[:, j]) * scale[:, j]
        w[:, j:] -= np.outer((w[:, j] - found[:, j]) / factor[j, j], factor[j, j:])
    result = np.empty_like(found)
    result[:, places] = found
    return result


@pytest.mark.parametrize("order", ["activation", "storage"])
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_it_is_the_gptq_of_the_paper(order: str, damping: float) -> None:
    torch.manual_seed(1)
    # 80 columns: more than two blocks of them; float64, so that no tie is decided by rounding
    w, second = torch.randn(12, 80, dtype=torch.float64), second_moments(80, dtype=torch.float64)
    scheme = sq.QScheme(bits=3, symmetric=False, granularity=sq.PerGroup(16, axis=0))
    qp = observed(w, scheme)
    scale, zero = (x.repeat_interleave(16, 1).double().numpy() for x in (qp.scale, qp.zero_point))
    expected = oracle(w.numpy(), second.numpy(), scale, zero, 8, order, damping)
    found, _ = gptq_solve(w, second, scheme, qp, order=order, damping=damping)
    # a channel that is better rounded is rounded
    nearest = fake_quantize(w, qp, scheme, "quotient")
    is_rounded = (found == nearest).all(1)
    assert int(is_rounded.sum()) <= 1
    np.testing.assert_allclose(found.numpy()[~is_rounded], expected[~is_rounded.numpy()], rtol=1e-12)


@over_granularities
@over_grids
@pytest.mark.parametrize("sweeps", [0, 2])
def test_weights_lie_on_their_grid_and_no_channel_is_worse_than_rounded(kind: str, symmetric: bool, sweeps: int) -> None:
    granularity, shape, n, parts = GRANULARITIES[kind]
    scheme = sq.QScheme(bits=3, symmetric=symmetric, granularity=granularity)
    weight, second = torch.randn(shape), second_moments(n, parts)
    qp = observed(weight, scheme)
    found, same_qp = gptq_solve(weight, second, scheme, qp, sweeps=sweeps)
    assert same_qp is qp
    assert found.shape == weight.shape
    assert torch.equal(fake_quantize(found, qp, scheme, "kernel"), found)
    rounded = fake_quantize(weight, qp, scheme, "kernel")
    before, after = errors(rounded - weight, second, scheme), errors(found - weight, second, scheme)
    # sums of float32 in another order
    assert bool((after <= before * (1 + 1e-4)).all())
    # random problems: on average half the error and less
    assert float(after.sum()) < 0.8 * float(before.sum())


@over_granularities
def test_a_sweep_never_makes_an_error_larger(kind: str) -> None:
    granularity, shape, n, parts = GRANULARITIES[kind]
    scheme = sq.QScheme(bits=2, symmetric=False, granularity=granularity)
    weight, second = torch.randn(shape), second_moments(n, parts)
    qp = observed(weight, scheme)
    results = [gptq_solve(weight, second, scheme, qp, sweeps=sweeps)[0] for sweeps in range(3)]
    first, second_, third = (errors(found - weight, second, scheme) for found in results)
    assert bool((second_ <= first * (1 + 1e-4)).all())
    assert bool((third <= second_ * (1 + 1e-4)).all())


def test_bounds_of_the_qparams_are_those_of_the_codes() -> None:
    scheme, weight = sq.QScheme(granularity=sq.PerChannel(0)), torch.randn(4, 16)
    narrow = sq.QScheme(bits=3, granularity=sq.PerChannel(0))
    qp = observed(weight, narrow)
    wide = qp._replace(extras={"qmax": torch.tensor(3.0), "qmin": torch.tensor(-4.0)})
    second = second_moments(16)
    assert torch.equal(gptq_solve(weight, second, scheme, wide)[0], gptq_solve(weight, second, narrow, qp)[0])


def test_inputs_that_are_always_zero_leave_their_columns_rounded() -> None:
    scheme, weight = sq.QScheme(bits=3, granularity=sq.PerChannel(0)), torch.randn(4, 16)
    second = second_moments(16)
    second[3], second[:, 3] = 0, 0
    qp = observed(weight, scheme)
    found, _ = gptq_solve(weight, second, scheme, qp)
    assert torch.equal(found[:, 3], fake_quantize(weight, qp, scheme, "kernel")[:, 3])
    assert torch.equal(gptq_solve(weight, torch.zeros(16, 16), scheme, qp)[0], fake_quantize(weight, qp, scheme, "quotient"))


def test_fewer_rows_than_columns_are_damped_until_there_is_a_factor() -> None:
    scheme, weight, x = sq.QScheme(bits=3, granularity=sq.PerChannel(0)), torch.randn(4, 40), torch.randn(3, 40)
    qp = observed(weight, scheme)
    found, _ = gptq_solve(weight, x.T @ x / 3, scheme, qp, damping=0.0)
    rounded = fake_quantize(weight, qp, scheme, "kernel")
    assert float((found @ x.T - weight @ x.T).square().sum()) < 0.5 * float((rounded @ x.T - weight @ x.T).square().sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_come_back_as_halves_on_their_grid(dtype: torch.dtype) -> None:
    scheme, weight = sq.QScheme(bits=4, granularity=sq.PerChannel(0)), torch.randn(4, 16).to(dtype)
    qp = observed(weight, scheme)
    found, _ = gptq_solve(weight, second_moments(16), scheme, qp)
    assert found.dtype == dtype
    assert torch.equal(fake_quantize(found, qp, scheme, "kernel"), found)


def test_a_map_over_damping_is_the_loop() -> None:
    scheme = sq.QScheme(bits=3, symmetric=False, granularity=sq.PerGroup(8, axis=0))
    weight, second = torch.randn(6, 40, dtype=torch.float64), second_moments(40, dtype=torch.float64)
    qp = observed(weight, scheme)

    def solve(damping: Any) -> torch.Tensor:
        return gptq_solve(weight, second, scheme, qp, damping=damping, sweeps=1)[0]

    dampings = torch.tensor([0.01, 0.1, 1.0])
    mapped = torch.vmap(solve)(dampings)
    for one, damping in zip(mapped, dampings.tolist(), strict=True):
        torch.testing.assert_close(one, solve(damping), rtol=1e-12, atol=1e-12)


def test_the_size_of_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = sq.QScheme(bits=3, granularity=sq.PerChannel(0))
    weight, second = torch.randn(6, 40, dtype=torch.float64), second_moments(40, dtype=torch.float64)
    qp = observed(weight, scheme)
    expected, _ = gptq_solve(weight, second, scheme, qp, sweeps=1)
    for size in (1, 7, 40):
        monkeypatch.setattr(_solve, "AT_ONCE", size)
        torch.testing.assert_close(gptq_solve(weight, second, scheme, qp, sweeps=1)[0], expected, rtol=1e-12, atol=1e-12)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an order": ({"order": "size"}, "order 'size'"),
    "a damping": ({"damping": -1.0}, "damping must not be negative"),
    "a number of sweeps": ({"sweeps": -1}, "sweeps must be an int: got -1, allowed an int from 0"),
    "moments of another weight": ({"second": torch.eye(3)}, "second moments of this shape"),
    "moments of other parts": ({"second": torch.eye(16).expand(3, 16, 16)}, "has not so many parts"),
    "moments that are not finite": ({"second": torch.full((16, 16), torch.nan)}, "not finite"),
    "a dynamic scheme": ({"scheme": sq.QScheme(dynamic=True)}, "dynamic"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_means_nothing_is_refused(kind: str) -> None:
    changed, message = REFUSED[kind]
    weight, scheme = torch.randn(4, 16), sq.QScheme(bits=4)
    given = {"weight": weight, "second": torch.eye(16), "scheme": scheme, "qparams": observed(weight, scheme), **changed}
    with pytest.raises((sq.ConfigError, sq.StateError), match=message):
        gptq_solve(**given)
