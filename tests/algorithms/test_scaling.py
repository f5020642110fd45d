"""AWQ, SmoothQuant and rotations: what is found in the graph, what is skipped with a reason, and that floats stay."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.algorithms._hadamard import hadamard, rotation
from sophq_func.algorithms._pairs import Fold, found_pairs
from sophq_func.algorithms.contract import begin
from sophq_func.testing.models import Language, RMSNorm
from tests.helpers import same


def planned(
    model: nn.Module, x: Tensor, activation: Any = None, bits: int = 3
) -> tuple[sq.Quantized, dict[str, Tensor], dict[str, sq.QParams]]:
    weight = sq.override(bits=bits, granularity="per_channel", fake_quantize="fixed")
    q = sq.quantize(model, sq.QuantConfig(chip=None, weight=weight, activation=activation), example_args=(x,))
    params = sq.params_of(model)
    return q, params, q.calibrate(params, [x], progress=False)


def floats_stay(model: nn.Module, params: dict[str, Tensor], changed: dict[str, Tensor], x: Tensor) -> None:
    before, after = (torch.func.functional_call(model, p, x).detach() for p in (params, changed))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4 * float(before.abs().max()))


def test_pairs_are_norms_gates_and_attention_with_shared_heads() -> None:
    model, ids = Language(blocks=1).eval(), torch.randint(0, 16, (2, 5))
    q, params, qparams = planned(model, ids)
    pairs, skipped = found_pairs(begin("test", q, params, qparams), ids)
    found = {tuple(reader.weight.split(".")[2] for reader in pair.readers): (pair.folds, pair.shared) for pair in pairs}
    assert found == {
        ("q_proj", "k_proj", "v_proj"): ((Fold("layers.0.before_attention.weight", 0),), 1),
        ("o_proj",): ((Fold("layers.0.v_proj.weight", 0),), 2),
        ("gate_proj", "up_proj"): ((Fold("layers.0.before_mlp.weight", 0),), 1),
        ("down_proj",): ((Fold("layers.0.up_proj.weight", 0),), 1),
    }
    assert [(skip.value, "used elsewhere" in skip.why) for skip in skipped] == [("norm.mul_1", True)]


class Chain(nn.Module):
    """Two layers with something between."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Linear(6, 8), between, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


BETWEEN: dict[str, tuple[nn.Module, bool]] = {
    "nothing": (nn.Identity(), True),
    "relu": (nn.ReLU(), True),
    "leaky": (nn.LeakyReLU(), True),
    "dropout": (nn.Dropout(), True),
    "relu6": (nn.ReLU6(), False),
    "gelu": (nn.GELU(), False),
    "sigmoid": (nn.Sigmoid(), False),
    "norm": (nn.LayerNorm(8), True),
    "norm without weight": (nn.LayerNorm(8, elementwise_affine=False), False),
    "own norm": (RMSNorm(8), True),
}


@pytest.mark.parametrize("kind", BETWEEN)
def test_only_what_is_homogeneous_is_scaled_and_the_rest_is_said(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    between, is_scaled = BETWEEN[kind]
    model, x = Chain(between).eval(), torch.randn(30, 6)
    q, params, qparams = planned(model, x)
    with caplog.at_level(logging.INFO, "sophq_func.algorithms"):
        scaled, _ = sq.algorithms.awq(q, params, qparams, [x], alpha=0.7, progress=False)
    floats_stay(model, params, scaled, x)
    assert torch.equal(scaled["last.weight"], params["last.weight"]) != is_scaled
    assert "x stays as it is: x makes it" in caplog.text


def test_a_search_never_makes_the_layers_worse_and_a_map_over_alpha_is_the_loop() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8)).eval(), torch.randn(200, 16)
    model[0].weight.data[:2] = 20.0
    q, params, qparams = planned(model, x)
    scaled, better = sq.algorithms.awq(q, params, qparams, [x], progress=False)
    y = model(x).detach()
    before, after = (float((q.apply(p, qp, x) - y).square().mean()) for p, qp in ((params, qparams), (scaled, better)))
    assert after < 0.95 * before

    def with_alpha(alpha: Any) -> Tensor:
        p, qp = sq.algorithms.awq(q, params, qparams, [x], alpha=alpha, progress=False)
        return q.apply(p, qp, x)

    alphas = torch.tensor([0.0, 0.3, 0.9])
    for mapped, alpha in zip(torch.vmap(with_alpha)(alphas), alphas.tolist(), strict=True):
        torch.testing.assert_close(mapped, with_alpha(alpha), rtol=1e-4, atol=1e-4)


def test_ranges_of_values_are_observed_again_at_the_widths_that_they_have() -> None:
    torch.manual_seed(0)
    model, x = Chain(nn.LayerNorm(8)).eval(), torch.randn(60, 6)
    model.between.weight.data[:2] = 100.0
    q, params, qparams = planned(model, x, sq.override(bits=8), bits=8)
    value = "between.post_act_fake_quantizer"
    narrow = sq.with_bits(qparams, q.plan, {value: 6, "last.weight_fake_quant": 7})
    smoothed, new = sq.algorithms.smooth(q, params, narrow, [x], progress=False)
    floats_stay(model, params, smoothed, x)
    assert float(new[value].scale) < 0.5 * float(narrow[value].scale)
    for name in (value, "last.weight_fake_quant"):
        same(new[name].extras, narrow[name].extras)
    same(new["first.weight_fake_quant"], narrow["first.weight_fake_quant"])


def test_what_would_be_worse_is_rolled_back_and_said(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = Chain(nn.LayerNorm(8)).eval(), torch.randn(60, 6)
    model.last.weight.data[:, :2] *= 1000  # alpha=0 moves all of that into the values
    q, params, qparams = planned(model, x, sq.override(bits=3))
    smoothed, new = sq.algorithms.smooth(q, params, qparams, [x], alpha=1.0, progress=False)
    if torch.equal(smoothed["last.weight"], params["last.weight"]):
        assert "nothing is changed" in caplog.text
    distance = sq.algorithms.contract.output_distance
    assert float(distance(q, params, smoothed, new, [x])) <= float(distance(q, params, params, qparams, [x]))
    assert "nothing is changed" in caplog.text


@pytest.mark.parametrize("n", [1, 2, 8, 12, 20, 28, 36, 60, 576, 1536])
def test_hadamard_matrices_have_entries_of_one_size_and_orthogonal_rows(n: int) -> None:
    matrix = hadamard(n)
    assert matrix is not None
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [7, 10, 12])
def test_a_rotation_is_orthogonal_and_follows_its_generator(n: int) -> None:
    one, two, other = (rotation(n, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(rotation(n), rotation(n))
    torch.testing.assert_close(one @ one.T, torch.eye(n, dtype=torch.float64))


class Stream(nn.Module):
    """A residual stream between two layers."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.enter, self.inner, self.leave = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.first, self.last = norm(8), norm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.inner(self.first(x))
        return self.leave(self.last(x))


@pytest.mark.parametrize("norm", [nn.RMSNorm, RMSNorm])
def test_a_residual_stream_is_turned_with_its_norms_folded(norm: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = Stream(norm).eval(), torch.randn(60, 6)
    model.enter.weight.data[:1] *= 50
    model.first.weight.data.uniform_(0.5, 2)
    q, params, qparams = planned(model, x, sq.override(bits=6), bits=8)
    turned, new = sq.algorithms.rotate(q, params, qparams, [x], progress=False)
    floats_stay(model, params, turned, x)
    same(turned["first.weight"], torch.ones(8))
    assert float(turned["enter.weight"].abs().max()) < 0.6 * float(params["enter.weight"].abs().max())
    y = model(x).detach()
    before, after = (float((q.apply(p, qp, x) - y).square().mean()) for p, qp in ((params, qparams), (turned, new)))
    assert after < before


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda: Stream(nn.LayerNorm), "which is no norm by the root mean square"),
        (lambda: Language(blocks=1), "embed.weight is used elsewhere, too"),
    ],
    ids=["LayerNorm", "tied"],
)
def test_what_cannot_be_turned_is_said(make: Any, why: str, caplog: pytest.LogCaptureFixture) -> None:
    model = make().eval()
    x = torch.randint(0, 16, (2, 5)) if isinstance(model, Language) else torch.randn(9, 6)
    q, params, qparams = planned(model, x)
    with caplog.at_level(logging.INFO, "sophq_func.algorithms"):
        turned, _ = sq.algorithms.rotate(q, params, qparams, [x], progress=False)
    floats_stay(model, params, turned, x)
    assert why in caplog.text


@pytest.mark.parametrize("alpha", [-0.1, 1.5, "half", True])
def test_an_exponent_that_means_nothing_is_refused(alpha: Any) -> None:
    model, x = Chain(nn.ReLU()).eval(), torch.randn(3, 6)
    q, params, qparams = planned(model, x)
    for algorithm in (sq.algorithms.awq, sq.algorithms.smooth):
        with pytest.raises(sq.ConfigError, match=r"alpha|exponent"):
            algorithm(q, params, qparams, [x], alpha=alpha)
