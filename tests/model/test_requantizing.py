"""What a chip computes between two grids, against what its compiler's interpreter computed (``tests/chip/record.py``)."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.model.requantizing import half_away, half_up, in_two_shifts, long_multiplier, multiplier
from tests.chip.network import CHIPS, Operations, planned
from tests.chip.record import RECORDED, compared


@cache
def recorded() -> dict[str, np.ndarray]:
    return dict(np.load(RECORDED))


def split(joined: np.ndarray, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """One array as tensors shaped like others."""
    parts = torch.from_numpy(joined).split([max(t.numel(), 1) for t in like.values()])
    return {name: part.reshape(t.shape).to(t.dtype) for (name, t), part in zip(like.items(), parts, strict=True)}


def loaded(name: str) -> tuple[sq.Quantized, dict[str, Tensor], dict[str, sq.QParams], Tensor]:
    """A recorded model: its plan, parameters, qparams and input."""
    data, x = recorded(), torch.from_numpy(recorded()["x"])
    model = Operations().eval()
    params = split(data["params"], dict(sorted(sq.params_of(model).items())))
    q = planned(name, model, x)
    qparams = q.calibrate(params, [x], progress=False)
    scales = split(data[f"{name}/scales"], {key: qparams[key].scale for key in q.plan})
    zeros = split(data[f"{name}/zero_points"], {key: qparams[key].zero_point for key in q.plan})
    return q, params, {key: sq.QParams(scales[key], zeros[key], {}) for key in q.plan}, x


@pytest.mark.parametrize("name", CHIPS)
def test_every_code_is_that_of_the_chip(name: str) -> None:
    q, params, qparams, x = loaded(name)
    captured = q.capture(params, qparams, x)
    assert len(compared(q)) == 18
    codes = split(recorded()[f"{name}/codes"], {key: captured[key][1] for key in compared(q)})
    for key, code in codes.items():
        here = (captured[key][1].double() / qparams[key].scale.double()).round()
        assert torch.equal(here, code.double()), f"{key}: {int((here != code).sum())} of {code.numel()} codes differ"


SUM = "relu.post_act_fake_quantizer"


@pytest.mark.parametrize("name", CHIPS)
def test_without_the_multipliers_codes_differ(name: str) -> None:
    q, params, qparams, x = loaded(name)
    seen = q.capture(params, qparams, x)
    _, after = seen[SUM]
    terms = [seen[term][0] for term in q.plan if q.plan.site(term).is_term and term.startswith("add.")]
    plain = q.quantize_value(SUM, sum(terms, torch.zeros(())).relu(), qparams[SUM])
    assert not torch.equal(plain, after)
    torch.testing.assert_close(plain, after, rtol=0, atol=2.01 * float(qparams[SUM].scale))


def test_multipliers_have_seven_bits() -> None:
    for ratio in torch.linspace(0.003, 60, 97):
        near, power = multiplier(ratio, truncates=False)
        below, _ = multiplier(ratio, truncates=True)
        assert near < 127 and below < 127
        assert abs(near / power - ratio) <= 0.5 / power * (1 + 1e-9)
        assert below / power <= ratio < (below + 1) / power
        if ratio < 1:  # the largest shift that fits
            assert near >= 63 and below >= 63


@pytest.mark.parametrize(
    ("ratio", "truncates", "expected"),
    # as in files that tpu-mlir lowered: sums of BM1684X and CV183X, pooling of CV183X, and equal steps
    [
        (0.0514113434 / 0.0275372374, False, 119 / 64),
        (0.0244646110 / 0.0275372374, False, 57 / 64),
        (0.0514113434 / 0.0552913036, True, 119 / 128),
        (0.0878183409 / (0.0522598507 * 16), True, 107 / 1024),
        (1.0, False, 1.0),
        (1.0, True, 1.0),
    ],
)
def test_multipliers_are_those_of_the_compiler(ratio: float, truncates: bool, expected: float) -> None:
    factor, power = multiplier(torch.tensor(ratio), truncates)
    assert float(factor / power) == expected


def test_terms_of_one_sum_share_a_shift() -> None:
    factor, power = multiplier(torch.tensor(0.44247), truncates=True, shift_of=torch.tensor(0.92982))
    assert (float(factor), float(power)) == (56, 128)


def test_long_multipliers_have_a_shift_of_thirty() -> None:
    assert float(long_multiplier(torch.tensor(3 * 2.0**-30 + 2.0**-32))) == 3 * 2.0**-30
    assert float(long_multiplier(torch.tensor(0.5))) == 0.5


def test_two_shifts_round_twice() -> None:
    # 2.4988 is 2.5 in steps of 1 / 256, and then 3; rounded once it is 2
    sums, ratio = torch.tensor([640.0, -640.0], dtype=torch.float64), torch.tensor(0.9995 * 2.0**-8)
    assert in_two_shifts(sums, ratio).tolist() == [3, -3]
    assert half_up(sums * ratio).tolist() == [2, -2]


def test_ties_go_up_or_away_from_zero() -> None:
    ties = torch.tensor([-2.5, -0.5, 0.5, 2.5])
    assert half_up(ties).tolist() == [-2, 0, 1, 3]
    assert half_away(ties).tolist() == [-3, -1, 1, 3]


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return (self.b(x) + x).relu()


def prepared(**config: object) -> tuple[sq.Quantized, dict[str, Tensor], dict[str, sq.QParams], Tensor]:
    model, x = Sum().eval(), torch.randn(4, 1, 6, 6)
    q = sq.quantize(model, sq.QuantConfig(**{"chip": "BM1688", "strategy": "Chip", **config}), example_args=(x,))  # type: ignore[arg-type]
    params = sq.params_of(model)
    return q, params, q.calibrate(params, [x], progress=False), x


TERMS = ("add.input_act_fake_quantizer", "add.input_act_fake_quantizer_1")
RESULT = "relu_1.post_act_fake_quantizer"


def test_terms_have_the_step_of_the_result() -> None:
    q, params, qparams, x = prepared()
    assert all(qparams[term].scale == qparams[RESULT].scale for term in TERMS)
    wider = {**qparams, RESULT: qparams[RESULT]._replace(scale=2 * qparams[RESULT].scale)}
    terms = q.capture(params, wider, x)
    for term in TERMS:  # learned steps move, and those of the terms follow
        code = terms[term][1] / wider[RESULT].scale
        torch.testing.assert_close(code, code.round(), rtol=0, atol=1e-5)
    assert not any(name.startswith(TERMS) for name in q.split(qparams)[0])


def test_a_zero_point_cannot_be_learned_where_codes_are_unsigned() -> None:
    q, params, qparams, x = prepared()
    assert q.plan.site(RESULT).unsigned and not q.plan[RESULT].scheme.symmetric
    moved = {**qparams, RESULT: qparams[RESULT]._replace(zero_point=torch.tensor(9.0))}
    assert torch.equal(q.apply(params, moved, x), q.apply(params, qparams, x))
    learned, rest = q.split(qparams)
    grads = torch.func.grad(lambda leaves: q.apply(params, sq.merge(leaves, rest), 3 * x).square().sum())(learned)
    assert grads[f"{RESULT}.zero_point"] == 0
    assert grads[f"{RESULT}.scale"] != 0 and grads["a.post_act_fake_quantizer.scale"] != 0
    assert all(grad.isfinite().all() for grad in grads.values())


def test_gradients_pass_straight_through() -> None:
    q, params, qparams, x = prepared()
    model = Sum().eval()
    exact = torch.func.grad(lambda p: q.apply(p, qparams, x).square().sum())(params)
    near = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(params)
    for name, grad in near.items():
        assert torch.nn.functional.cosine_similarity(grad.flatten(), exact[name].flatten(), 0) > 0.98


def test_training_learns_steps() -> None:
    q, params, qparams, x = prepared()
    learned, rest = q.split(qparams)
    learned = {name: scale * 1.5 if name.endswith(".scale") else scale for name, scale in learned.items()}
    target = Sum().eval()(x).detach()

    def loss(leaves: dict[str, Tensor]) -> Tensor:
        return (q.apply(params, sq.merge(leaves, rest), x) - target).square().mean()

    before = loss(learned)
    for _ in range(20):
        grads = torch.func.grad(loss)(learned)
        learned = {name: leaf - 0.05 * leaf.abs() * grads[name].sign() for name, leaf in learned.items()}
    assert loss(learned) < before


def test_a_switched_off_source_leaves_the_quotient() -> None:
    q, params, qparams, x = prepared()
    off = sq.enabled(qparams, False)
    torch.testing.assert_close(q.apply(params, off, x), Sum.forward(bound(params), x))


def bound(params: dict[str, Tensor]) -> Sum:
    model = Sum().eval()
    model.load_state_dict(params)
    return model


def test_transforms_compute_the_same_codes() -> None:
    q, params, qparams, x = prepared()
    expected = q.apply(params, qparams, x)
    assert torch.equal(torch.vmap(lambda one: q.apply(params, qparams, one[None])[0])(x), expected)
    assert all(torch.equal(y, expected) for y in q.sweep(params, [qparams, qparams], x))
    assert torch.equal(q.bind(params, qparams)(x), expected)
    frozen, baked = q.freeze(params, qparams)
    assert torch.equal(frozen.apply(baked, qparams, x), expected)


def test_a_part_takes_the_steps_of_quantizers_outside() -> None:
    q, params, qparams, x = prepared()
    part = q.part("b")
    seen = q.capture(params, qparams, x)
    given, result = seen["a.post_act_fake_quantizer"][1], seen["b.post_act_fake_quantizer"][1]
    assert torch.equal(part.apply(params, qparams, given), result)


@pytest.mark.slow
def test_a_compiler_computes_the_same_codes(fresh_dynamo: None) -> None:
    q, params, qparams, x = prepared()
    # the graph is what matters here; another backend takes a minute
    compiled = torch.compile(lambda params, qparams, x: q.apply(params, qparams, x), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(params, qparams, x), q.apply(params, qparams, x))


def test_forms_of_scales_alone_refuse_a_plan_with_multipliers(tmp_path: object) -> None:
    q, params, qparams, x = prepared()
    for write in (
        lambda: sq.convert(q, params, qparams),
        lambda: sq.export.torch(q, params, qparams, x),
        lambda: sq.export.onnx(q, params, qparams, x, f"{tmp_path}/net.onnx"),
    ):
        with pytest.raises(sq.ConfigError, match=r'a plan of strategy "Chip" cannot be written so .* Fix: .*"CNN"'):
            write()
