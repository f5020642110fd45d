"""The right behaviour where recorded cases of the fake quantizers show a defect, or where the reference failed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sophq_func as sq
from sophq_func.numerics.formats import E2M1, E4M3
from tests.golden.cases import Case, assert_on_grid
from tests.golden.test_fake_quantizers import ALL, dynamic

ZERO = torch.tensor(0, dtype=torch.int32)
WHOLE, ROWS = sq.QScheme(dynamic=True), sq.QScheme(dynamic=True, granularity=sq.PerChannel(0))


def scaled(scale: float, **extras: Tensor) -> sq.QParams:
    return sq.QParams(torch.tensor(scale), ZERO, extras)


def recorded(*classes: str) -> list[Case]:
    return [case for case in ALL if case.cls.removesuffix("FakeQuantize") in classes]


def test_defect_20_e2m1_has_the_value_one_half() -> None:
    fq = sq.fake_quantizer("FP4FakeQuantize", data_type="fp4_e2m1")
    x = torch.linspace(-6, 6, 1001)
    assert fq.apply(x, scaled(1.0), sq.QScheme()).unique().tolist() == E2M1.values().tolist()


def test_defect_21_the_default_of_fp4_is_fp4_and_groups_have_options() -> None:
    assert dict(sq.fake_quantize.fp4().options)["data_type"] == "fp4_e2m1"
    assert (
        sq.fake_quantizer("FP4FakeQuantize").apply(torch.linspace(-6, 6, 1001), scaled(1.0), sq.QScheme()).unique().numel()
        == 15
    )
    assert dict(sq.fake_quantize.fpxgroup(group_size=32, data_type="nf4").options)["group_size"] == 32


@pytest.mark.parametrize("case", [c for c in recorded("FP4") if c.name.endswith("_default")], ids=lambda c: c.name)
def test_defect_21_the_recorded_default_is_fp6(case: Case) -> None:
    x = case.get("test_input")
    fq, (scheme, qparams) = sq.fake_quantizer("FP4FakeQuantize", data_type="fp6_e2m3"), dynamic(sq.PerTensor())
    assert_on_grid(fq.apply(x, qparams, scheme), case.get("output"), 0.0)


@pytest.mark.parametrize("name", ["FP4FakeQuantize", "FPXGROUPFakeQuantize"])
def test_defect_22_tables_pass_the_gradient_of_every_element(name: str) -> None:
    for case in recorded(name.removesuffix("FakeQuantize"))[:8]:
        x = case.get("test_input").requires_grad_()
        sq.fake_quantizer(name).apply(x, scaled(1.0), WHOLE).backward(case.get("upstream_grad"))
        assert torch.equal(x.grad, case.get("upstream_grad"))


def test_defect_23_small_values_lie_on_the_grid_of_e4m3() -> None:
    x = torch.linspace(-0.02, 0.02, 4001)
    y = sq.fake_quantizer("E4M3FakeQuantize", scaling="none").apply(x, scaled(1.0), sq.QScheme())
    assert torch.isin(y.double(), E4M3.values()).all()
    assert bool(((y - x).abs() <= 2.0**-10).all())
    assert y[x.abs() <= 2.0**-6].unique().numel() == 17
    assert sq.fake_quantizer("e4m3").apply(torch.tensor(torch.nan), scaled(1.0), sq.QScheme()).isnan()


def test_defect_23_what_the_comparison_leaves_out_is_off_the_grid_in_the_recording_and_close_here() -> None:
    """Elements below the smallest normal of E4M3."""
    left_out = off_grid = 0
    for case in recorded("E4M3"):
        consistent = case.config["fp8_emulator"] == "consistent" and not case.config["per_channel"]
        if not (consistent and case.has("output")) or "tiny" in case.name:
            continue
        x, unit = case.get("test_input"), 1 / case.get("scale")
        fq = sq.fake_quantizer("E4M3FakeQuantize", scaling_method=case.config["attributes"]["scaling_method"])
        small = ((x / unit).abs() < 2.0**-6) & (x != 0)
        y = fq.apply(x, scaled(1.0), WHOLE)
        assert bool(((y - x).abs() <= unit * 2.0**-10 * 1.0001)[small].all())
        codes = (case.get("output") / unit * 512)[small]
        left_out, off_grid = left_out + codes.numel(), off_grid + int(((codes - codes.round()).abs() > 1e-3).sum())
    assert (left_out, off_grid) == (4326, 969)


@pytest.mark.parametrize("name", ["E4M3FakeQuantize", "E5M2FakeQuantize"])
def test_defect_24_every_element_is_rounded_the_same_way_wherever_it_stands(name: str) -> None:
    x, fq = torch.randn(100) * 50, sq.fake_quantizer(name, scaling="none")
    alone = torch.stack([fq.apply(v, scaled(1.0), sq.QScheme()) for v in x])
    assert torch.equal(fq.apply(x, scaled(1.0), sq.QScheme()), alone)


@pytest.mark.parametrize("name", ["E4M3FakeQuantize", "E5M2FakeQuantize"])
def test_defect_24_each_channel_has_its_own_scale(name: str) -> None:
    x, fq = torch.randn(4, 30) * torch.tensor([[1e-3], [1.0], [30.0], [1e4]]), sq.fake_quantizer(name, scaling="max")
    alone = torch.stack([fq.apply(row, scaled(1.0), WHOLE) for row in x])
    nothing = torch.zeros(4)
    found = fq.apply(x, sq.QParams(nothing, nothing.int(), {}), ROWS)
    torch.testing.assert_close(found, alone, rtol=1e-6, atol=0)
    assert bool(((found - x).abs() <= x.abs() * 2.0**-3 + x.abs().amax(1, keepdim=True) * 2.0**-15).all())


@pytest.mark.parametrize("name", ["E4M3FakeQuantize", "E5M2FakeQuantize"])
def test_defect_25_float8_passes_the_gradient(name: str) -> None:
    x, upstream = torch.randn(50, requires_grad=True), torch.randn(50)
    sq.fake_quantizer(name).apply(x, scaled(1.0), WHOLE).backward(upstream)
    assert torch.equal(x.grad, upstream)


def test_defect_27_the_scale_of_float8_follows_the_range_continuously() -> None:
    fq = sq.fake_quantizer("E4M3FakeQuantize")
    for size in (1.0, 1e-2, 0.0137, 0.0136, 1e-3):
        x = torch.linspace(-1, 1, 101) * size
        y = fq.apply(x, scaled(1.0), WHOLE)
        assert bool(((y - x).abs() <= x.abs() * 2.0**-4 + size * 2.0**-18).all())


def test_defect_28_ranges_are_calibrated_unless_the_scheme_is_dynamic() -> None:
    for name in ("E4M3FakeQuantize", "FP4FakeQuantize"):
        fq = sq.fake_quantizer(name)
        qparams = fq.init(scaled(2.0), torch.zeros(3), sq.QScheme())
        x = torch.tensor([0.3, 1e4, -2.0])
        assert fq.apply(x, qparams, sq.QScheme())[1] < 300
        torch.testing.assert_close(fq.apply(x, qparams, WHOLE)[1], torch.tensor(1e4))


def test_defect_29_pact_clips_without_an_observer_and_both_sides_reach_alpha() -> None:
    fq, scheme = sq.fake_quantizer("PACTFakeQuantize", alpha=1.0), sq.QScheme()
    qparams = fq.init(scaled(9.0), torch.zeros(4), scheme)
    x = torch.tensor([-3.0, -0.4, 0.4, 3.0, 5.0])

    def f(x: Tensor, alpha: Tensor) -> Tensor:
        return fq.apply(x, qparams._replace(extras={"alpha": alpha}), scheme)

    assert f(x, torch.tensor(1.0)).abs().max() <= 128 / 127.5
    dx, dalpha = torch.func.jacrev(f, argnums=(0, 1))(x, torch.tensor(1.0))
    assert torch.equal(dx, torch.diag(torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0])))
    assert dalpha.tolist() == [-1.0, 0.0, 0.0, 1.0, 1.0]
    assert f(x, torch.tensor(2.0)).abs().max() > 1.9


def test_defect_30_tqt_runs_from_any_observer_and_learns_its_threshold() -> None:
    fq, scheme, x = sq.fake_quantizer("TqtFakeQuantize"), sq.QScheme(bits=4), torch.tensor([0.11, 0.3, -5.0, 5.0])
    qparams = fq.init(scaled(0.1), x, scheme)
    assert qparams.scale == 0.125

    def f(log2_t: Tensor) -> Tensor:
        return fq.apply(x, qparams._replace(extras={"log2_t": log2_t}), scheme)

    slope = torch.func.jacrev(f)(qparams.extras["log2_t"])
    step = 0.125 * torch.tensor(2.0).log()
    expected = step * torch.tensor([1 - 0.11 / 0.125, 2 - 0.3 / 0.125, -8, 7])
    torch.testing.assert_close(slope, expected)


def test_defect_30_dsq_is_calibrated_like_all_others() -> None:
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).eval(), torch.randn(8, 4)
    config = sq.QuantConfig(weight=None, activation=sq.override(fake_quantize=sq.fake_quantize.dsq()))
    q = sq.quantize(model, config, example_args=(x,))
    qparams = q.calibrate(sq.params_of(model), [x], progress=False)
    assert all(own.scale != 1.0 for own in qparams.values())
    torch.testing.assert_close(q.apply(sq.params_of(model), qparams, x), model(x), atol=0.05, rtol=0.05)


def test_defect_31_fp16_per_channel_passes_the_gradient() -> None:
    scheme = sq.QScheme(granularity=sq.PerChannel(0))
    x = torch.randn(3, 4, requires_grad=True)
    qparams = sq.QParams(torch.ones(3), torch.zeros(3, dtype=torch.int32), {})
    sq.fake_quantizer("fp16").apply(x, qparams, scheme).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 4))


@pytest.mark.parametrize("granularity", [sq.PerTensor(), sq.PerChannel(1)], ids=str)
def test_defect_31_observe_only_passes_values_and_gradients_whatever_the_granularity(granularity: sq.PerChannel) -> None:
    model, x = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(4, 2)), torch.randn(3, 4)
    activation = sq.override(granularity=granularity, observe_only=True)
    q = sq.quantize(model, sq.QuantConfig(weight=None, activation=activation), example_args=(x,))
    assert list(q.plan) == ["0.post_act_fake_quantizer"]
    params = sq.params_of(model)
    qparams = q.calibrate(params, [x])
    gradient = torch.func.grad(lambda x: q.apply(params, qparams, x).sum())(x)
    assert torch.equal(q.apply(params, qparams, x), model(x))
    assert torch.equal(gradient, torch.func.grad(lambda x: model(x).sum())(x))
    assert bool((qparams["0.post_act_fake_quantizer"].scale > 0).all())


@pytest.mark.parametrize("name", ["adaround", "qdrop", "tqt", "dsq", "pact"])
def test_defect_32_no_scale_is_below_its_floor(name: str) -> None:
    fq, x = sq.fake_quantizer(name), torch.tensor([0.0, 1.0, -1.0])
    y = fq.apply(x, fq.init(scaled(0.0), x, sq.QScheme()), sq.QScheme())
    assert y.isfinite().all()


GPTQFP4 = [case for case in recorded("GPTQFP4") if case.config["compensate"] and case.has("output")]


@pytest.mark.parametrize("case", GPTQFP4, ids=lambda c: c.name)
def test_defect_33_the_recording_is_plain_rounding_and_compensation_is_better(case: Case) -> None:
    """With a diagonal Hessian no column makes up for another: that is what the reference computes. E2M1: defect 20."""
    weight, hessian = case.get("weight"), case.get("hessian")
    data_type = case.config["data_type"]
    fq = sq.fake_quantizer("GPTQFP4FakeQuantize", data_type=data_type)
    plain = fq.apply(weight, scaled(1.0, hessian=hessian.diagonal().diag()), sq.QScheme())
    if data_type != "fp4_e2m1":
        assert_on_grid(plain, case.get("output"), 0.0)

    def loss(quantized: Tensor) -> Tensor:
        off = weight * (hessian.diagonal() != 0) - quantized
        return (off @ hessian * off).sum()

    solved = fq.apply(weight, scaled(1.0, hessian=hessian), sq.QScheme())
    assert loss(solved) < 0.6 * loss(plain)


@pytest.mark.parametrize("name", ["NNIE", "DSQ", "PACT", "QDrop", "E4M3", "E5M2", "FP4", "Tqt", "AdaRound"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_where_the_reference_fails_each_channel_is_quantized_as_if_alone(name: str, symmetric: bool) -> None:
    """Per channel, on tensors of four axes, and affine."""
    fq, x = (
        sq.fake_quantizer(f"{name}FakeQuantize"),
        torch.randn(4, 3, 5, 5) * torch.tensor([0.1, 1, 3, 20]).reshape(4, 1, 1, 1),
    )
    observer = sq.observer("minmax")

    def quantized(x: Tensor, scheme: sq.QScheme) -> Tensor:
        found = observer.qparams(observer.update(observer.init(x, scheme), x, scheme), scheme)
        return fq.apply(x, fq.init(found, x, scheme), scheme)

    whole = quantized(x, sq.QScheme(symmetric=symmetric, granularity=sq.PerChannel(0)))
    alone = torch.stack([quantized(row, sq.QScheme(symmetric=symmetric)) for row in x])
    torch.testing.assert_close(whole, alone, rtol=1e-6, atol=1e-7)


def test_where_the_reference_fails_groups_need_not_divide_the_tensor() -> None:
    x, fq = torch.randn(7, 9), sq.fake_quantizer("FPXGROUPFakeQuantize", group_size=32, data_type="nf4")
    found = fq.apply(x, scaled(1.0), sq.QScheme())
    flat = x.reshape(-1)
    parts = [fq.apply(part, scaled(1.0), sq.QScheme()) for part in (flat[:32], flat[32:])]
    assert torch.equal(found, torch.cat(parts).reshape(7, 9))


@pytest.mark.parametrize("name", ["E4M3FakeQuantize", "E5M2FakeQuantize"])
def test_where_the_reference_fails_the_mean_of_nothing_gives_a_scale_of_one(name: str) -> None:
    fq = sq.fake_quantizer(name, scaling_method="mean")
    assert fq.init(scaled(1.0), torch.zeros(5), sq.QScheme()).scale == 1.0
    assert not fq.apply(torch.zeros(5), scaled(1.0), WHOLE).any()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("FP4FakeQuantize", {"data_type": "fp5"}, "fp4: data_type 'fp5' is not known"),
        ("FPXGROUPFakeQuantize", {"data_type": "fp5"}, "fpxgroup: data_type 'fp5' is not known"),
        ("GPTQFP4FakeQuantize", {"data_type": "nf8"}, "gptqfp4: data_type 'nf8' is not known"),
        ("AdaRoundFakeQuantize", {"rounding": "cubic"}, "adaround: this rounding is not known"),
    ],
)
def test_where_the_reference_fails_an_unknown_option_is_named(name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(sq.ConfigError, match=message):
        sq.fake_quantizer(name, **options)
