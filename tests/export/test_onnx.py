"""ONNX files: what is in them, and that ONNX Runtime computes with them what ``q.apply`` computes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import relu

import sophq_func as sq
from tests.helpers import Ready, ready, unchanged
from tests.runtime import LEVELS, agree, computed, kernels, onnx, within_sums

pytestmark = pytest.mark.slow

TensorProto, numpy_helper = onnx.TensorProto, onnx.numpy_helper
AFFINE = sq.override(symmetric=False)
INT8 = sq.override(bits=within_sums(8))
FQ = sq.fake_quantize


class Net(nn.Module):
    """A residual block with BatchNorms that do something, pooling, a deconvolution, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.head = nn.Linear(6, 5)
        for norm in (self.bn1, self.bn2):
            nn.init.uniform_(norm.weight, -1.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.bn1(self.conv1(x)))
        y = relu(self.bn2(self.conv2(y)) + y)
        return self.head(self.up(self.pool(y)).mean((2, 3)))


def image(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 8, 8)


def exported(made: Ready, example: Any, path: Path, **options: Any) -> Any:
    """The file that the library writes."""
    sq.export.onnx(made.q, made.params, made.qparams, example, path, **options)
    return onnx.load(path)


def stored(proto: Any) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in proto.graph.initializer}


CONFIGS = {
    "symmetric": sq.QuantConfig(weight=INT8),
    "affine": sq.QuantConfig(weight=INT8, activation=AFFINE),
    "cnn": sq.QuantConfig(chip="BM1690", strategy="CNN", weight=INT8),
    "layers": sq.QuantConfig(strategy="Layers", weight=INT8, activation=AFFINE),
    "255-levels": sq.QuantConfig(
        weight=sq.override(bits=within_sums(8), symmetric_range=True),
        activation=sq.override(symmetric_range=True, fake_quantize=FQ.fixed()),
    ),
    "per-tensor": sq.QuantConfig(weight=sq.override(bits=within_sums(8), granularity=sq.PerTensor()), activation=AFFINE),
    "affine-weights": sq.QuantConfig(weight=AFFINE, activation=AFFINE),
    "w4": sq.QuantConfig(weight=sq.override(bits=4), activation=AFFINE),
    "w3a5": sq.QuantConfig(weight=sq.override(bits=3), activation=sq.override(symmetric=False, bits=5)),
    "a12": sq.QuantConfig(activation=sq.override(bits=12)),
    "weights": sq.QuantConfig(activation=None),
    "fp8": sq.QuantConfig(weight=sq.override(fake_quantize=FQ.e4m3()), activation=sq.override(fake_quantize=FQ.e5m2("max"))),
    "fp4": sq.QuantConfig(weight=sq.override(fake_quantize=FQ.fp4()), activation=None),
    "fp6": sq.QuantConfig(weight=sq.override(fake_quantize=FQ.fp4("fp6_e3m2")), activation=None),
    "pact-tqt": sq.QuantConfig(
        weight=sq.override(bits=within_sums(8), fake_quantize=FQ.tqt()), activation=sq.override(fake_quantize=FQ.pact())
    ),
    "channels": sq.QuantConfig(weight=INT8, activation=sq.override(granularity=sq.PerChannel(1))),
    "adaround": sq.QuantConfig(
        weight=sq.override(bits=within_sums(8), fake_quantize=FQ.adaround("hard")), activation=AFFINE
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_onnx_runtime_computes_what_apply_computes(name: str, tmp_path: Path) -> None:
    made, path = ready(Net().eval(), image(), config=CONFIGS[name]), tmp_path / "net.onnx"
    exported(made, image(), path)
    x = 1.5 * image(256)  # beyond what was calibrated, so that codes clip
    for level in (LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_ALL):
        agree(computed(path, {"x": x}, level)[0], made(x).detach())


@pytest.mark.parametrize("config", ["symmetric", "affine", "cnn"])
def test_everything_runs_in_integers(config: str, tmp_path: Path) -> None:
    made, path = ready(Net().eval(), image(), config=CONFIGS[config]), tmp_path / "net.onnx"
    exported(made, image(), path)
    found = kernels(path, tmp_path)
    assert found["QLinearConv"] == 2 and found["QGemm"] == 1 and found["QLinearAdd"] == 1
    assert not found["Conv"] and not found["FusedConv"] and not found["Relu"] and not found["Gemm"]


def test_weights_are_codes_with_the_batch_norm_folded_in_and_biases_int32(tmp_path: Path) -> None:
    made = ready(Net().eval(), image(), config=CONFIGS["affine"])
    proto = exported(made, image(), tmp_path / "net.onnx")
    found, params, norm = stored(proto), made.params, "bn1"
    assert not any(node.op_type == "BatchNormalization" for node in proto.graph.node)
    assert not any(name.startswith(("bn1", "bn2")) for name in found)
    codes = torch.from_numpy(numpy_helper.to_array(found["conv1.weight_quantized"]).copy())
    assert codes.dtype == torch.int8
    factor = params[f"{norm}.weight"] / (params[f"{norm}.running_var"] + made.q.engine.skeleton.module.bn1.eps).sqrt()
    scale, scheme = made.qparams["conv1.weight_fake_quant"].scale, made.q.plan["conv1.weight_fake_quant"].scheme
    exact = params["conv1.weight"].double() * factor.double()[:, None, None, None] / scale.double()[:, None, None, None]
    # to half a step, and the rounding of float32 in a product and a quotient of up to 128 steps
    assert float((codes - exact.clamp(scheme.qmin, scheme.qmax)).abs().max()) <= 0.5 + 2 * 2.0**-17
    assert found["conv1.bias_quantized"].data_type == TensorProto.INT32
    bias = params[f"{norm}.bias"] - params[f"{norm}.running_mean"] * factor
    step = scale * made.qparams["x.post_act_fake_quantizer"].scale
    # codes beyond 2 ** 24 have the rounding of float32, and all that of half a step and of a tie
    torch.testing.assert_close(
        torch.from_numpy(numpy_helper.to_array(found["conv1.bias_quantized"]).copy()).double(),
        (bias.double() / step.double()).round(),
        rtol=1e-6,
        atol=1,
    )


@pytest.mark.parametrize(
    ("name", "weight", "kind"),
    [
        ("w4", "conv1.weight_quantized", TensorProto.INT4),
        ("w3a5", "head.weight_quantized", TensorProto.INT4),
        ("affine-weights", "conv1.weight_quantized", TensorProto.UINT8),
        ("fp8", "conv1.weight_quantized", TensorProto.FLOAT8E4M3FN),
        ("fp8", "x_zero_point", TensorProto.FLOAT8E5M2),
        ("symmetric", "x_zero_point", TensorProto.UINT8),
        ("a12", "x_zero_point", TensorProto.INT16),
    ],
)
def test_codes_have_their_type(name: str, weight: str, kind: int, tmp_path: Path) -> None:
    made = ready(Net().eval(), image(), config=CONFIGS[name])
    assert stored(exported(made, image(), tmp_path / "net.onnx"))[weight].data_type == kind


def test_signed_codes_on_request_stand_for_the_same_values(tmp_path: Path) -> None:
    made, path = ready(Net().eval(), image(), config=CONFIGS["symmetric"]), tmp_path / "net.onnx"
    proto = exported(made, image(), path, signed=True)
    assert stored(proto)["x_zero_point"].data_type == TensorProto.INT8
    assert any(node.op_type == "Relu" for node in proto.graph.node)
    x = image(256)
    agree(computed(path, {"x": x})[0], made(x).detach())


def test_four_bits_a_byte_each_run_in_integers(tmp_path: Path) -> None:
    made, path = ready(Net().eval(), image(), config=CONFIGS["w4"]), tmp_path / "net.onnx"
    proto = exported(made, image(), path, pack=False)
    assert stored(proto)["conv1.weight_quantized"].data_type == TensorProto.INT8
    assert kernels(path, tmp_path)["QLinearConv"] == 2
    x = image(256)
    agree(computed(path, {"x": x})[0], made(x).detach())


@pytest.mark.parametrize("batch", [1, 4])
def test_batches_of_any_size(batch: int, tmp_path: Path) -> None:
    made, path = ready(Net().eval(), image(), config=CONFIGS["affine"]), tmp_path / "net.onnx"
    exported(made, image(batch), path)
    parts = [image(size) for size in (1, 3, 7, 53)]
    agree(torch.cat([computed(path, {"x": x})[0] for x in parts]), torch.cat([made(x).detach() for x in parts]))


def test_the_batch_of_the_example_alone(tmp_path: Path) -> None:
    made = ready(Net().eval(), image(), config=CONFIGS["affine"])
    proto = exported(made, image(2), tmp_path / "net.onnx", dynamic_batch=False)
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2


class Fixed(nn.Module):
    """A model that knows its batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).reshape(2, 2, 4)


def test_a_model_without_dynamic_batch_says_so(tmp_path: Path) -> None:
    made = ready(Fixed().eval(), torch.randn(4, 4))
    with pytest.raises(sq.ConfigError, match=r"cannot be exported for batches of any size.*dynamic_batch=False"):
        exported(made, torch.randn(4, 4), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
    exported(made, torch.randn(4, 4), tmp_path / "net.onnx", dynamic_batch=False)


COMPUTED = {
    "nf4": (FQ.fp4("nf4"), sq.PerChannel()),
    "mxfp4": (FQ.mxfp4(), sq.PerTensor()),
    "mxint8": (FQ.mxint8(), sq.PerTensor()),
    "nvfp4": (FQ.nvfp4(), sq.PerTensor()),
    "bf16": (FQ.bf16(), sq.PerTensor()),
    "blocks": (FQ.fixed(), sq.PerBlock(2, 4)),
    "groups": (FQ.fixed(), sq.PerGroup(size=4)),
}
"""Weights whose codes no operator reads: tables, blocks, 16-bit floats, groups of other than matrices."""


@pytest.mark.parametrize("name", COMPUTED)
def test_what_no_operator_reads_is_computed(name: str, tmp_path: Path) -> None:
    fake, grain = COMPUTED[name]
    config = sq.QuantConfig(weight=sq.override(fake_quantize=fake, granularity=grain), activation=None)
    model = nn.Sequential(nn.Conv2d(4, 8, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2)).eval()
    x, path = torch.randn(3, 4, 6, 6), tmp_path / "net.onnx"
    made = ready(model, x, config=config)
    proto = exported(made, x, path)
    assert not {"0.weight", "3.weight"} & stored(proto).keys()
    for level in (LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_ALL):
        torch.testing.assert_close(computed(path, {"input": x}, level)[0], made(x).detach(), rtol=1e-4, atol=1e-5)


def test_blocks_of_a_matrix_are_read_by_the_operator(tmp_path: Path) -> None:
    config = sq.QuantConfig(weight=sq.override(granularity=sq.PerBlock(16, 32)), activation=None)
    model, x = nn.Linear(64, 32).eval(), torch.randn(4, 64)
    made, path = ready(model, x, config=config), tmp_path / "net.onnx"
    proto = exported(made, x, path)
    nodes = [node for node in proto.graph.node if node.op_type == "DequantizeLinear"]
    assert [a.i for node in nodes for a in node.attribute if a.name == "block_size"] == [32]
    torch.testing.assert_close(computed(path, {"input": x})[0], made(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cnn", "w4"])
def test_frozen_models_have_the_same_file(name: str, tmp_path: Path) -> None:
    made = ready(Net().eval(), image(), config=CONFIGS[name])
    frozen, params = made.q.freeze(made.params, made.qparams)
    one = stored(exported(made, image(), tmp_path / "one.onnx"))
    two = stored(exported(Ready(frozen, params, made.qparams), image(), tmp_path / "two.onnx"))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        if "bias" not in key:  # the sums that fold a BatchNorm into a bias round otherwise
            assert tensor.SerializeToString() == two[key].SerializeToString()
    x = image(64)
    agree(computed(tmp_path / "two.onnx", {"x": x})[0], made(x).detach())


REFUSED = {
    "dynamic": (
        sq.QuantConfig(activation=sq.override(granularity=sq.PerToken(), dynamic=True, fake_quantize=FQ.fixed())),
        "from the tensor at hand",
    ),
    "logarithms": (sq.QuantConfig(weight=sq.override(fake_quantize=FQ.nnie())), "its codes stand for logarithms"),
    "offset": (
        sq.QuantConfig(activation=sq.override(symmetric=False, fake_quantize=FQ.lsq_plus())),
        "its zero point is not a code",
    ),
    "dorefa": (sq.QuantConfig(weight=sq.override(fake_quantize=FQ.dorefa())), "0 lies between two of its codes"),
    "soft": (sq.QuantConfig(weight=sq.override(fake_quantize=FQ.adaround("soft"))), "its rounding is soft"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_operator_is_refused_or_simulated(name: str, tmp_path: Path) -> None:
    config, why = REFUSED[name]
    made, path = ready(Net().eval(), image(), config=config), tmp_path / "net.onnx"
    if name == "offset":
        moved = {n: qp._replace(zero_point=qp.zero_point + 0.25) for n, qp in made.qparams.items() if "post_act" in n}
        made = made._replace(qparams={**made.qparams, **moved})
    with pytest.raises(sq.ConfigError, match="problems") as error:
        exported(made, image(), path)
    assert why in str(error.value) and "simulate=True" in str(error.value)
    assert not list(tmp_path.iterdir())
    exported(made, image(), path, simulate=True)
    x = image(256)
    agree(computed(path, {"x": x}, LEVELS.ORT_DISABLE_ALL)[0], made(x).detach())


def test_masks_switch_quantizers_off_and_half_masks_are_refused(tmp_path: Path) -> None:
    made, path = ready(Net().eval(), image(), config=CONFIGS["affine"]), tmp_path / "net.onnx"
    off = made._replace(qparams=sq.enabled(made.qparams, {"head*": False, "conv1*": False}))
    names = stored(exported(off, image(), path))
    assert "head.weight" in names and "conv2.weight_quantized" in names and "conv1.weight_quantized" not in names
    x = image(256)
    agree(computed(path, {"x": x})[0], off(x).detach())
    mixed = made._replace(qparams=sq.enabled(made.qparams, {"head.weight_fake_quant": 0.5}))
    with pytest.raises(sq.ConfigError, match=r"head.weight_fake_quant.*its mask is neither 0 nor 1"):
        exported(mixed, image(), path)


def test_groups_of_a_linear_layer(tmp_path: Path) -> None:
    config = sq.QuantConfig(weight=sq.override(bits=4, granularity=sq.PerGroup(0, 16)), activation=None)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    x = torch.randn(4, 3, 64)
    made, path = ready(model, x, config=config), tmp_path / "net.onnx"
    proto = exported(made, x, path)
    nodes = [node for node in proto.graph.node if node.op_type == "DequantizeLinear"]
    assert {a.i for node in nodes for a in node.attribute if a.name == "block_size"} == {16}
    torch.testing.assert_close(computed(path, {"input": x})[0], made(x).detach(), rtol=1e-4, atol=1e-5)
    assert kernels(path, tmp_path)["MatMulNBits"] == 2


@pytest.mark.parametrize("granularity", [sq.PerTensor(), sq.PerChannel(0), sq.PerChannel(1), sq.PerGroup(0, 8)], ids=repr)
def test_rows_of_a_table_are_looked_up_among_the_codes(granularity: Any, tmp_path: Path) -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.linear = nn.Embedding(50, 16), nn.Linear(16, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.linear(self.table(ids))

    ids = torch.randint(0, 50, (4, 6))
    weight = sq.override(granularity=granularity)
    config = sq.QuantConfig(weight=INT8, activation=AFFINE, rules=(sq.Rule(type=nn.Embedding, weight=weight),))
    made, path = ready(Embedded().eval(), ids, config=config), tmp_path / "net.onnx"
    proto = exported(made, ids, path)
    gathered = [node.input[0] for node in proto.graph.node if node.op_type == "Gather"]
    assert "table.weight_quantized" in gathered and not any("dequantized" in name for name in gathered)
    agree(computed(path, {"ids": ids})[0], made(ids).detach())


def test_nothing_changes_and_no_state_is_left(tmp_path: Path) -> None:
    model, x = Net().eval(), image()
    made = ready(model, x, config=CONFIGS["affine"])
    before = made(x)
    with unchanged(model, made.params, dict(made.qparams), {"x": x}):
        exported(made, x, tmp_path / "net.onnx")
    torch.testing.assert_close(made(x), before, rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_the_file_is_the_same_twice_and_tells_nothing_of_the_machine(tmp_path: Path) -> None:
    made = ready(Net().eval(), image(), config=CONFIGS["affine"])
    one, two = (exported(made, image(), tmp_path / f"{n}.onnx") for n in "ab")
    assert one.SerializeToString(deterministic=True) == two.SerializeToString(deterministic=True)
    assert b"/" not in (tmp_path / "a.onnx").read_bytes().replace(b"://", b"") or str(Path.cwd()) not in str(one)
    assert str(tmp_path) not in str(one) and ".py" not in str(one)


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, path = ready(Net().eval(), image()), tmp_path / "net.onnx"
    path.write_bytes(b"old")

    def fail(handle: int) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk is full"):
        exported(made, image(), path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_wrong_models_and_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, path = ready(Net().eval(), image()), tmp_path / "net.onnx"
    with pytest.raises(sq.StateError, match="a model in training mode cannot be exported"):
        exported(made._replace(q=made.q.train()), image(), path)
    with pytest.raises(sq.StateError, match="params lack"):
        exported(made._replace(params={}), image(), path)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(sq.ConfigError, match=r"onnxscript.*pip install \"sophq-func\[onnx\]\""):
        exported(made, image(), path)


@pytest.fixture(scope="module")
def digits() -> Iterator[Any]:
    """The example's module."""
    pytest.importorskip("sklearn")
    folder = str(Path(__file__).parents[2] / "examples")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("digits")
    finally:
        sys.path.remove(folder)


@pytest.mark.parametrize("config", ["cnn", "affine"])
def test_digits_agree_on_the_whole_test_set(config: str, digits: Any, tmp_path: Path) -> None:
    model = digits.trained(epochs=2)
    train, _, x, labels = digits.load()
    q = sq.quantize(model, CONFIGS[config], example_args=(train[:64],))
    params = sq.params_of(model)
    qparams = q.calibrate(params, train[:256].split(64), progress=False)
    path = tmp_path / "digits.onnx"
    exported(Ready(q, params, qparams), train[:64], path)
    expected = q.apply(params, qparams, x).detach()
    actual = computed(path, {"x": x})[0]
    agree(actual, expected)
    right = [(out.argmax(1) == labels).sum() for out in (actual, expected)]
    assert abs(int(right[0] - right[1])) <= 1
    assert path.stat().st_size < 0.6 * sum(p.numel() * p.element_size() for p in params.values())


def test_resnet_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 10}
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**shape)).eval()
    x = torch.randn(4, 3, 32, 32)
    made, path = ready(model, x, config=CONFIGS["affine"]), tmp_path / "resnet.onnx"
    proto = exported(made, {"pixel_values": x}, path)
    assert [value.name for value in (*proto.graph.input, *proto.graph.output)] == ["pixel_values", "logits"]
    agree(computed(path, {"pixel_values": x})[0], made(x).logits.detach())
    found = kernels(path, tmp_path)
    assert found["QLinearConv"] == 6 and not found["Conv"] and not found["FusedConv"]


class Attention(nn.Module):
    """One head that looks only where a mask lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = (layer(x)[:, None] for layer in (self.query, self.key, self.value))
        return nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask[:, None])[:, 0]


def test_a_boolean_mask_needs_no_guard_against_nan(tmp_path: Path) -> None:
    x, mask, path = torch.randn(2, 6, 8), torch.rand(2, 6, 6) < 0.5, tmp_path / "attention.onnx"
    mask[..., 0], mask[0, 1] = True, False
    made = ready(Attention().eval(), x, mask, config=CONFIGS["affine"])
    proto = exported(made, (x, mask), path)
    assert not {node.op_type for node in proto.graph.node} & {"IsNaN"}
    found, expected = computed(path, {"x": x, "mask": mask})[0], made(x, mask).detach()
    seen = mask.any(-1)
    agree(found[seen], expected[seen])
    assert torch.isfinite(found).all(), "where everything is masked torch has 0, and the file a mean"


class Guarded(nn.Module):
    """Attention written out, with a guard of its own against rows that are masked whole."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        causal = torch.full((6, 6), -torch.inf).triu()  # the first row sees nothing
        scores = x @ x.transpose(1, 2) + causal + torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        share = scores.softmax(-1)
        return torch.where(torch.isnan(share), 0.0, share) @ x


def test_a_guard_of_the_model_stays(tmp_path: Path) -> None:
    x, mask, path = torch.randn(2, 6, 8), torch.rand(2, 6, 6) < 0.9, tmp_path / "guarded.onnx"
    made = ready(Guarded().eval(), x, mask, config=sq.QuantConfig(weight=None, activation=None))
    exported(made, (x, mask), path)
    agree(computed(path, {"x": x, "mask": mask})[0], made(x, mask).detach())


@pytest.mark.parametrize("config", ["layers", "weights"])
def test_bert_of_transformers(config: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}
    model = transformers.BertModel(transformers.BertConfig(**shape), add_pooling_layer=False).eval()
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[0, 7:] = 0
    batch = {"attention_mask": mask, "input_ids": torch.randint(0, 99, (3, 12))}
    made, path = ready(model, config=CONFIGS[config], **batch), tmp_path / "bert.onnx"
    proto = exported(made, batch, path)
    assert {value.name for value in proto.graph.input} == set(batch)
    agree(computed(path, batch)[0], made(**batch).last_hidden_state.detach())
