"""Qparams that are not the plan's are refused by name at each run: shapes that broadcast, dtypes, names without a reader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.core.registry import Spec
from tests.helpers import with_hessians

QParamsDict = dict[str, sq.QParams]

WEIGHT, INPUT = "0.weight_fake_quant", "input.post_act_fake_quantizer"


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()


def x() -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def calibrated(
    weight: sq.Granularity | None = None, spec: Spec | None = None, symmetric: bool = True
) -> tuple[sq.Quantized, dict[str, Tensor], QParamsDict]:
    model = network()
    made = {} if spec is None else {"fake_quantize": spec}
    own = sq.override(granularity=weight or sq.PerTensor(), bits=4, symmetric=symmetric, **made)
    value = sq.override(granularity=sq.PerTensor(), bits=4, symmetric=symmetric, **made)
    q = sq.quantize(model, sq.QuantConfig(weight=own, activation=value), example_args=(x(),))
    params = sq.params_of(model)
    return q, params, q.calibrate(params, [x()], progress=False)


def settings(q: sq.Quantized, qparams: QParamsDict) -> QParamsDict:
    return sq.stack([sq.with_bits(qparams, q.plan, bits) for bits in (2, 3, 4, 8)])


Run = Callable[[sq.Quantized, dict[str, Tensor], QParamsDict], Any]

RUNS: dict[str, Run] = {
    "apply": lambda q, p, qp: q.apply(p, qp, x()),
    "apply_and_update": lambda q, p, qp: q.apply_and_update(p, qp, x()),
    "capture": lambda q, p, qp: q.capture(p, qp, x()),
    "tap": lambda q, p, qp: q.tap("0")(p, qp, x()),
    "observe_quantized": lambda q, p, qp: q.observe_quantized(p, q.init(p), qp, x()),
    "freeze": lambda q, p, qp: q.freeze(p, qp),
    "convert": sq.convert,
    "part": lambda q, p, qp: q.part("0").apply(p, qp, x()),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("granularity", [sq.PerTensor(), sq.PerChannel()], ids=str)
def test_a_batch_of_settings_without_a_map_is_refused(granularity: sq.Granularity, run: Run) -> None:
    """Four settings, and four channels: the batch would broadcast along them."""
    q, params, qparams = calibrated(granularity)
    planned = r"shape \(\)" if granularity == sq.PerTensor() else "one axis"
    with pytest.raises(sq.StateError, match=rf"(?s){WEIGHT}: scale has another number.*got \(4,.*{planned}.*torch\.vmap"):
        run(q, params, settings(q, qparams))


def test_mapped_swept_stored_and_split_it_is_right(tmp_path: Any) -> None:
    q, params, qparams = calibrated(sq.PerChannel())
    batch = settings(q, qparams)
    expected = torch.stack([q.apply(params, setting, x()) for setting in sq.unstack(batch)])
    torch.testing.assert_close(torch.vmap(q.apply, (None, 0, None))(params, batch, x()), expected)
    torch.testing.assert_close(q.sweep(params, batch, x(), progress=False), expected)
    learnable, rest = q.split(batch)
    assert sq.merge(learnable, rest).keys() == batch.keys()
    sq.save(tmp_path / "batch", plan=q.plan, qparams=batch)


def test_other_values_with_one_setting_each_are_right() -> None:
    """Of one quantizer alone, and inside a gradient, a jvp and a compiler."""
    q, params, qparams = calibrated()
    learnable, rest = q.split(qparams)

    def loss(learnable: dict[str, Tensor]) -> Tensor:
        return q.apply(params, sq.merge(learnable, rest), x()).square().sum()

    assert torch.func.grad(loss)(learnable).keys() == learnable.keys()
    assert torch.func.jvp(loss, (learnable,), (learnable,))[1].shape == ()
    double = {name: own._replace(scale=own.scale.double()) for name, own in qparams.items()}
    wide = {name: tensor.double() for name, tensor in params.items()}
    assert q.apply(wide, double, x().double()).dtype == torch.float64


def replaced(name: str, **fields: Any) -> Callable[[QParamsDict], QParamsDict]:
    return lambda qparams: {**qparams, name: qparams[name]._replace(**fields)}


def with_extras(name: str, **extras: Tensor) -> Callable[[QParamsDict], QParamsDict]:
    return lambda qparams: {**qparams, name: qparams[name]._replace(extras={**qparams[name].extras, **extras})}


ONE = torch.tensor(1.0)

BAD: dict[str, tuple[Callable[[QParamsDict], QParamsDict], str]] = {
    "a scale for all channels": (replaced(WEIGHT, scale=ONE), r"got \(\)"),
    "a scale for each token": (replaced(INPUT, scale=torch.ones(8, 1)), r"got \(8, 1\)"),
    "scales for a value without any": (replaced(INPUT, scale=torch.ones(4)), r"got \(4,\)"),
    "whole scales": (replaced(WEIGHT, scale=torch.ones(4, dtype=torch.int32)), "scale has a dtype.*got torch.int32"),
    "complex scales": (replaced(WEIGHT, scale=torch.ones(4, dtype=torch.complex64)), "scale has a dtype"),
    "complex zero points": (
        replaced(WEIGHT, zero_point=torch.zeros(4, dtype=torch.complex64)),
        "zero_point has a dtype.*got torch.complex64.*torch.int32",
    ),
    "boolean zero points": (replaced(WEIGHT, zero_point=torch.zeros(4, dtype=torch.bool)), "zero_point has a dtype"),
    "more zero points": (replaced(WEIGHT, zero_point=torch.zeros(5, dtype=torch.int32)), r"zero_point.*got \(5,\).*\(4,\)"),
    "zero points of a value": (replaced(INPUT, zero_point=torch.zeros(4, dtype=torch.int32)), r"zero_point.*got \(4,\)"),
    "one bound": (with_extras(WEIGHT, qmin=-ONE), "got 'only qmin', allowed qmin and qmax"),
    "the other bound": (with_extras(WEIGHT, qmax=ONE), "got 'only qmax'"),
    "a misspelt bound": (with_extras(WEIGHT, qmim=-ONE, qmax=ONE), "got 'qmim'.*Fix: 'qmin'"),
    "a misspelt switch": (with_extras(INPUT, enable=torch.tensor(False)), "got 'enable'.*Fix: 'enabled'"),
    "bounds for other channels": (with_extras(WEIGHT, qmin=-torch.ones(3), qmax=torch.ones(3)), r"qmin.*got \(3,\)"),
    "a switch for each channel": (with_extras(WEIGHT, enabled=torch.ones(4)), r"enabled.*got \(4,\).*allowed \(\)"),
    "noise for nobody": (with_extras(INPUT, noise=torch.rand(8, 4)), "has no use for it"),
}


@pytest.mark.parametrize("change", [change for change, _ in BAD.values()], ids=BAD)
def test_fields_that_are_not_the_plans_are_refused_by_name(
    change: Callable[[QParamsDict], QParamsDict], request: pytest.FixtureRequest
) -> None:
    _, said = BAD[request.node.callspec.id]
    q, params, qparams = calibrated(sq.PerChannel())
    with pytest.raises(sq.StateError, match=said):
        q.apply(params, change(qparams), x())


def test_all_of_them_are_named_at_once() -> None:
    q, params, qparams = calibrated(sq.PerChannel())
    bad = with_extras(INPUT, qmim=ONE)(replaced(WEIGHT, scale=ONE)(qparams))
    with pytest.raises(sq.StateError, match=rf"(?s)problems.*{WEIGHT}.*{INPUT}|problems.*{INPUT}.*{WEIGHT}"):
        q.apply(params, bad, x())


GOOD: dict[str, Callable[[QParamsDict], QParamsDict]] = {
    "bounds for all": with_extras(WEIGHT, qmin=-4 * ONE, qmax=3 * ONE),
    "bounds for each channel": with_extras(WEIGHT, qmin=-4 * torch.ones(4), qmax=3 * torch.ones(4)),
    "a switch": with_extras(INPUT, enabled=torch.tensor(True)),
    "a mixture": with_extras(INPUT, enabled=torch.tensor(0.5)),
    "an extra of a user's own": with_extras(WEIGHT, remark=torch.zeros(7)),
    "wide zero points": replaced(WEIGHT, zero_point=torch.zeros(4, dtype=torch.int64)),
    "learned zero points": replaced(WEIGHT, zero_point=torch.zeros(4)),
}


@pytest.mark.parametrize("change", GOOD.values(), ids=GOOD)
def test_fields_that_fit_pass(change: Callable[[QParamsDict], QParamsDict]) -> None:
    q, params, qparams = calibrated(sq.PerChannel())
    assert q.apply(params, change(qparams), x()).isfinite().all()


@pytest.mark.parametrize("name", ["pact", "tqt", "adaround", "lsq_plus", "qdrop", "gptq"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
def test_what_quantizers_learn_or_are_given_is_no_misspelling(symmetric: bool, name: str) -> None:
    q, params, qparams = calibrated(spec=getattr(sq.fake_quantize, name)(), symmetric=symmetric)
    qparams = with_hessians(q, params, qparams)
    assert q.apply(params, qparams, x()).isfinite().all()
    off = sq.enabled(qparams, False)
    torch.testing.assert_close(q.apply(params, off, x()), torch.func.functional_call(network(), params, (x(),)))


def test_frozen_weights_need_no_qparams_that_fit() -> None:
    q, params, qparams = calibrated(sq.PerChannel())
    frozen, baked = q.freeze(params, qparams)
    expected = frozen.apply(baked, qparams, x())
    assert torch.equal(frozen.apply(baked, replaced(WEIGHT, scale=ONE)(qparams), x()), expected)


def test_scales_of_each_token_may_have_any_shape() -> None:
    model = network()
    per_token = sq.override(granularity=sq.PerToken(), dynamic=True)
    q = sq.quantize(model, sq.QuantConfig(weight=None, activation=per_token), example_args=(x(),))
    params = sq.params_of(model)
    qparams = q.calibrate(params, [x()], progress=False)
    assert q.apply(params, qparams, x()[:3]).shape == (3, 4)


def test_a_quantizer_alone_does_not_broadcast_its_scales_either() -> None:
    fq, scheme = sq.fake_quantizer("fixed"), sq.QScheme(bits=4)
    with pytest.raises(sq.StateError, match=r"does not fit the tensor: got \(4,\), allowed \(\) for PerTensor"):
        fq.apply(x(), sq.QParams(torch.ones(4), torch.zeros(4, dtype=torch.int32), {}), scheme)
