"""What an artifact holds: codes that stand for the weights of ``apply``, biases, grids; and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.model.weight_quantizer import quantize_weights
from sophq_func.numerics.contracts import FAKE_QUANTIZERS
from tests.golden.models import INPUT_SHAPES, build
from tests.helpers import Ready, ready, same, unchanged
from tests.notebook import Piece
from tests.ties import check_both

STEP = 1e-2
"""A code on the other side of a tie moves one of dozens of terms by a step, an eightieth of values up to 3."""

NO_CODES = ("gptq", "gptqfp4", "adaround", "dorefa", "fpxgroup", "nnie")
"""Scales of columns that are not kept, soft rounding, half codes, groups that are found anew, logarithms."""


def tpu(**changes: Any) -> sq.QuantConfig:
    return sq.QuantConfig(chip="BM1690", strategy="CNN", **changes)


def folded_weight(r: Ready, name: str) -> Tensor:
    """The weight that ``apply`` gives the layer, times the factor of the BatchNorm behind it."""
    weight = next(w for w in r.q.engine.weights if w.site.parameter == name)
    quantized = quantize_weights([weight], r.params, r.q.engine.effective(r.qparams))[name]
    if weight.norm is None:
        return quantized
    factor = weight.norm.factor(r.params)
    shape = [1] * quantized.ndim
    groups = weight.site.groups if weight.site.axis == 1 else 1
    shape[weight.site.axis] = -1
    if groups == 1:
        return quantized * factor.reshape(shape)
    parts = [part * f.reshape(shape) for part, f in zip(quantized.chunk(groups), factor.chunk(groups), strict=True)]
    return torch.cat(parts)


class Grouped(nn.Module):
    """A grouped transposed convolution with a BatchNorm, one channel of which is dead."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.head = nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.Conv2d(6, 3, 1)
        self.norm.weight.data.uniform_(-2, 2)
        self.norm.weight.data[1] = 0
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.up(x)).relu())


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    found = {name: (build(name, 0).eval(), torch.randn(2, *shape[1:])) for name, shape in INPUT_SHAPES.items()}
    return {**found, "Grouped": (Grouped().eval(), torch.randn(2, 4, 5, 5))}


@pytest.mark.parametrize("bits", [8, 4, 3, 12])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("grain", [sq.PerChannel(), sq.PerTensor()], ids=["channel", "tensor"])
@pytest.mark.parametrize("name", [*INPUT_SHAPES, "Grouped"])
def test_codes_stand_for_the_weights_of_the_simulation(name: str, grain: Any, symmetric: bool, bits: int) -> None:
    model, x = networks()[name]
    r = ready(model, x, config=sq.QuantConfig(weight=sq.override(bits=bits, symmetric=symmetric, granularity=grain)))
    artifact = sq.convert(r.q, r.params, r.qparams)
    for parameter, entry in artifact.metadata["weights"].items():
        expected, found = folded_weight(r, parameter), artifact.weight(parameter)
        if entry["norm"]:  # a channel whose factor is 0 keeps its weight in the simulation, and BatchNorm makes it 0
            expected = torch.where(found == 0, torch.where(expected.abs() < 1e-6, expected, 0), expected)
        torch.testing.assert_close(found, expected, rtol=3e-6, atol=1e-7)
        codes, scheme = artifact.codes(parameter), r.q.plan[entry["quantizer"]].scheme
        assert not codes.is_floating_point()
        assert scheme.qmin <= int(codes.min()) <= int(codes.max()) <= scheme.qmax
        stored = artifact.tensors[f"{parameter}.codes"]
        assert stored.numel() == (-(-codes.numel() // (8 // bits)) if bits <= 4 else codes.numel())
        assert entry["format"] == f"{'int' if symmetric else 'uint'}{bits}"


@pytest.mark.parametrize("name", ["ResidualConvNet", "DepthwiseNet", "PoolClassifier", "TransformerBlock", "Grouped"])
def test_biases_are_integers_with_the_scale_of_weight_times_input(name: str) -> None:
    model, x = networks()[name]
    r = ready(model, x, config=tpu())
    artifact = sq.convert(r.q, r.params, r.qparams)
    rounded = {key: entry["source"] for key, entry in artifact.metadata["biases"].items() if entry["source"]}
    assert len(rounded) == sum(bool(site.source) for site in map(r.q.plan.site, r.q.plan)) > 0
    for weight in r.q.engine.weights:
        site = weight.site
        if not site.source:
            continue
        key = f"{site.path}.bias" if weight.norm else site.bias
        step = r.qparams[site.quantizer].scale * r.qparams[site.source].scale
        code, scale = artifact.tensors[f"{key}.codes"], artifact.tensors[f"{key}.scale"]
        assert code.dtype == torch.int32
        same(scale, step)
        same(code, (weight.folded_bias(r.params) / step).round().to(torch.int32))
        assert key not in artifact.tensors


def test_batch_norms_are_gone() -> None:
    model, x = networks()["ResidualConvNet"]
    r = ready(model, x)
    artifact = sq.convert(r.q, r.params, r.qparams)
    assert not any(name.startswith("bn") for name in artifact.tensors)
    assert {name for name in r.params if name.startswith("bn")} == set(artifact.metadata["folded"])
    assert {
        "conv1.bias.codes",
        "conv1.weight.codes",
        "conv1.weight.scale",
        "conv1.weight.zero_point",
    } <= artifact.tensors.keys()


def test_a_batch_norm_that_is_called_elsewhere_too_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.norm.running_mean.fill_(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.norm(self.conv(x)) + x)

    x = torch.randn(2, 3, 4, 4)
    r = ready(Twice().eval(), x)
    artifact = sq.convert(r.q, r.params, r.qparams)
    assert artifact.metadata["weights"]["conv.weight"]["norm"] == "norm"
    assert "norm.running_mean" in artifact.tensors
    check_both(r, x)


def test_a_second_batch_norm_is_computed() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).eval(), torch.randn(2, 3, 6, 6)
    for norm in model[1:]:
        norm.weight.data.uniform_(0.5, 2)
        norm.bias.data.normal_()
    for config in (sq.QuantConfig(), tpu()):
        r = ready(model, x, config=config)
        artifact = sq.convert(r.q, r.params, r.qparams)
        assert artifact.metadata["folded"] and "2.weight" in artifact.tensors
        check_both(r, x)


def test_a_bias_behind_weights_that_are_all_zero_keeps_its_value() -> None:
    model, x = nn.Linear(4, 2).eval(), 1e-4 * torch.randn(8, 4)
    model.weight.data[0] = 0
    model.bias.data.fill_(3.0)
    r = ready(model, x, config=tpu(activation=sq.override(observer=sq.observers.minmax())))
    artifact = sq.convert(r.q, r.params, r.qparams)
    found = artifact.tensors["bias.codes"] * artifact.tensors["bias.scale"]
    torch.testing.assert_close(found, torch.full((2,), 3.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(artifact.run(x), r(x), rtol=1e-2, atol=0)


def test_a_bias_beyond_int32_is_refused() -> None:
    model, x = nn.Linear(4, 2).eval(), 1e-4 * torch.randn(8, 4)
    model.weight.data.mul_(1e-3)
    model.bias.data.fill_(300.0)
    r = ready(model, x, config=tpu())
    with pytest.raises(sq.StateError, match="convert: bias: the bias does not fit in int32"):
        sq.convert(r.q, r.params, r.qparams)


class Net(nn.Module):
    """A convolution with a BatchNorm, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.norm.weight.data.uniform_(0.5, 1.5)
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", FAKE_QUANTIZERS.names())
def test_every_fake_quantizer_keeps_its_codes_or_is_refused(name: str, symmetric: bool) -> None:
    spec, x = FAKE_QUANTIZERS.spec(name), torch.randn(6, 3, 8, 8)
    weight = sq.override(fake_quantize=spec, symmetric=symmetric)
    r = ready(Net().eval(), x, config=sq.QuantConfig(weight=weight))
    if name in NO_CODES or (name == "lsq_plus" and not symmetric):
        if name == "lsq_plus":
            moved = {n: own._replace(zero_point=own.zero_point + 0.4) for n, own in r.qparams.items()}
            r = r._replace(qparams=moved)
        with pytest.raises(sq.StateError, match="3 problems:") as caught:
            sq.convert(r.q, r.params, r.qparams)
        assert all(
            f"convert: {layer}.weight_fake_quant: the values of {name}" in str(caught.value) for layer in ("conv", "first")
        )
        return
    artifact = sq.convert(r.q, r.params, r.qparams)
    for parameter in artifact.metadata["weights"]:
        torch.testing.assert_close(artifact.weight(parameter), folded_weight(r, parameter), rtol=1e-5, atol=1e-7)
        assert artifact.codes(parameter).shape == r.params[parameter].shape
    torch.testing.assert_close(artifact.run(x), r(x), rtol=STEP, atol=STEP)


@pytest.mark.parametrize("name", ["pact", "tqt", "qdrop", "dsq", "lsq_plus", "e4m3", "fp16", "mxfp8", "nvfp4", "fixed"])
def test_activations_of_every_kind(name: str) -> None:
    spec, x = FAKE_QUANTIZERS.spec(name, **({"alpha": 2.0} if name == "pact" else {})), torch.randn(6, 3, 8, 8)
    r = ready(Net().eval(), x, config=sq.QuantConfig(activation=sq.override(fake_quantize=spec)))
    artifact = sq.convert(r.q, r.params, r.qparams)
    torch.testing.assert_close(artifact.run(x), r(x), rtol=STEP, atol=STEP)
    assert ("conv2d" in artifact.computed(x)) == (name not in ("e4m3", "fp16", "mxfp8", "nvfp4"))


def test_activations_without_codes_are_all_listed() -> None:
    x = torch.randn(6, 3, 8, 8)
    r = ready(Net().eval(), x, config=sq.QuantConfig(activation=sq.override(fake_quantize=sq.fake_quantize.nnie())))
    with pytest.raises(sq.StateError, match=r"problems:\n  1\. convert: x\.post_act_fake_quantizer: the values of nnie"):
        sq.convert(r.q, r.params, r.qparams)
    random = ready(Net().eval(), x)
    spec = sq.fake_quantize.qdrop(prob=0.5)
    dropped = sq.build(Net().eval(), random.q.plan.override(sq.Rule(name="x", activation=sq.override(fake_quantize=spec))))
    with pytest.raises(sq.StateError, match="qdrop"):
        sq.convert(dropped, random.params, random.qparams)


def test_quantizers_that_are_off_are_left_out() -> None:
    x = torch.randn(6, 3, 8, 8)
    rules = (sq.Rule(name="first.weight_fake_quant", observe_only=True),)
    r = ready(Net().eval(), x, config=sq.QuantConfig(rules=rules))
    off = sq.enabled(r.qparams, {"conv.weight_fake_quant": False, "*post_act_fake_quantizer": 0.0})
    artifact = sq.convert(r.q, r.params, off)
    assert list(artifact.metadata["weights"]) == ["second.weight"]
    assert "norm.weight" in artifact.tensors
    torch.testing.assert_close(artifact.run(x), r.q.apply(r.params, off, x))
    with pytest.raises(sq.StateError, match=r"second\.weight_fake_quant: a mask must be 0 or 1 \(because it is 0.5"):
        sq.convert(r.q, r.params, sq.enabled(r.qparams, {"second.weight_fake_quant": 0.5}))


def test_other_widths_as_data() -> None:
    x = torch.randn(6, 3, 8, 8)
    r = ready(Net().eval(), x)
    artifact = sq.convert(r.q, r.params, sq.with_bits(r.qparams, r.q.plan, {"*weight_fake_quant": 3}))
    assert {entry["format"] for entry in artifact.metadata["weights"].values()} == {"int3"}


def test_frozen_weights_and_training_mode_give_the_same() -> None:
    x = torch.randn(6, 3, 8, 8)
    r = ready(Net().eval(), x, config=tpu())
    first = sq.convert(r.q, r.params, r.qparams)
    frozen, weights = r.q.freeze(r.params, r.qparams)
    second = sq.convert(frozen, weights, r.qparams)
    for name in first.metadata["weights"]:
        same(first.codes(name), second.codes(name))
    assert sq.convert(r.q.train(), r.params, r.qparams) == first


def test_half_models_run_in_float32() -> None:
    model, x = Net().eval().half(), torch.randn(6, 3, 8, 8).half()
    r = ready(model, x)
    out = sq.convert(r.q, r.params, r.qparams).run(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, r(x).float(), rtol=3e-2, atol=3e-2)


def test_nothing_is_changed_and_nothing_is_shared() -> None:
    x = torch.randn(6, 3, 8, 8)
    model = Net().eval()
    r = ready(model, x)
    with unchanged(model, r.params, r.qparams, x):
        artifact = sq.convert(r.q, r.params, r.qparams)
        before = copy.deepcopy(artifact)
        first, second = artifact.run(x), artifact.run(x)
    same(first, second)
    assert artifact == before
    given = {leaf.data_ptr() for leaf in (*r.params.values(), *(own.scale for own in r.qparams.values()))}
    assert not given & {leaf.data_ptr() for leaf in artifact.tensors.values()}
    artifact.tensors.clear()
    artifact.metadata["weights"].clear()
    assert artifact == before


def test_an_artifact_is_a_value() -> None:
    x = torch.randn(6, 3, 8, 8)
    r = ready(Net().eval(), x)
    artifact, other = (sq.convert(r.q, r.params, r.qparams) for _ in range(2))
    assert artifact == other
    assert len({artifact, other}) == 1
    moved = {**r.params, "second.weight": -r.params["second.weight"]}
    assert artifact != sq.convert(r.q, moved, r.qparams)
    assert artifact != 3
    assert pickle.loads(pickle.dumps(artifact)) == artifact
    same(pickle.loads(pickle.dumps(artifact)).run(x), artifact.run(x))
    assert json.loads(json.dumps(artifact.metadata)) == artifact.metadata
    assert artifact.metadata["digest"] == r.q.plan.digest()
    with pytest.raises(AttributeError):
        artifact.plan = None  # type: ignore[misc, assignment]


def test_its_sizes() -> None:
    model, x = nn.Linear(64, 32, bias=False).eval(), torch.randn(4, 64)
    r = ready(model, x, config=sq.QuantConfig(weight=sq.override(bits=4)))
    artifact = sq.convert(r.q, r.params, r.qparams)
    weight, scales = 64 * 32 // 2, 32 * 4
    assert artifact.size_bytes == weight + scales + 32 * 4 + 4 * 4, "zero points, and four numbers of the input's grid"
    assert repr(artifact).startswith(
        f"Artifact(1 weights (int4) in {weight} bytes, 1 grids of values, {artifact.size_bytes} bytes"
    )


def test_what_was_not_converted_has_no_codes() -> None:
    model, x = nn.Linear(4, 2).eval(), torch.randn(4, 4)
    r = ready(model, x)
    with pytest.raises(sq.StateError, match=r"there are no codes of 'weigth' .*did you mean 'weight'"):
        sq.convert(r.q, r.params, r.qparams).codes("weigth")


def test_bad_input_is_told() -> None:
    model, x = nn.Linear(4, 2).eval(), torch.randn(4, 4)
    r = ready(model, x)
    with pytest.raises(sq.StateError, match=r"convert: the model is not quantized: got 'Linear', allowed a sq\.Quantized"):
        sq.convert(model, r.params, r.qparams)  # type: ignore[arg-type]
    with pytest.raises(sq.StateError, match="convert: params lack 'bias'"):
        sq.convert(r.q, {"weight": r.params["weight"]}, r.qparams)
    with pytest.raises(sq.StateError, match="not calibrated"):
        sq.convert(r.q, r.params, {})
    with pytest.raises(sq.StateError, match="inside a transform"):
        torch.vmap(lambda w: sq.convert(r.q, {**r.params, "weight": w}, r.qparams).weight("weight"))(torch.randn(3, 2, 4))
    with pytest.raises(sq.StateError, match="cannot run inside a transform"):
        torch.vmap(sq.convert(r.q, r.params, r.qparams).run)(torch.randn(3, 2, 4))
    bad = {**r.qparams, "weight_fake_quant": r.qparams["weight_fake_quant"]._replace(scale=torch.full((2,), torch.nan))}
    with pytest.raises(sq.StateError, match="weight_fake_quant: the scale is not finite"):
        sq.convert(r.q, r.params, bad)


def test_a_notebook_shows_weights_and_grids() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval(), torch.randn(5, 4)
    artifact = sq.convert(*ready(model, x))
    rows = Piece(artifact._repr_html_()).rows
    assert rows[:3] == [
        ["name", "role", "format", "shape", "bytes"],
        ["0.weight", "weight", "int8", "3 x 4", "12"],
        ["2.weight", "weight", "int8", "2 x 3", "6"],
    ]
    assert {row[0] for row in rows[3:]} == {name for name in artifact.plan if artifact.plan.site(name).role == "activation"}
