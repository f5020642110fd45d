"""The tables for tpu-mlir: words, ranges, weights, names and commands, without the compiler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.export import Tables, tables
from tests.export.test_tables_onnx import bert
from tests.helpers import Ready, ready
from tests.runtime import computed, onnx

pytestmark = pytest.mark.slow


class Small(nn.Module):
    """A folded BatchNorm, a residual sum, a chain of moves and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.side, self.fc = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(1, 2, 1), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.relu(self.bn(self.conv(x))) + self.side(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


X = torch.linspace(-1, 1, 8).reshape(2, 1, 2, 2)


def small(*rules: sq.Rule, chip: str | None = "BM1684X", **activation: Any) -> Ready:
    """The network with scales that are powers of two, so that text is the same on every machine."""
    config = sq.QuantConfig(chip=chip, strategy="CNN", activation=sq.override(**activation), rules=rules)
    q, params, qparams = ready(Small().eval(), X, config=config)
    even = {
        name: own._replace(scale=torch.full_like(own.scale, 2.0 ** -(i + 3)))
        for i, (name, own) in enumerate(qparams.items())
    }
    return Ready(q, params, even)


def lines(path: Path) -> dict[str, list[str]]:
    """The words of each line behind the first, by that."""
    found = [line.split() for line in path.read_text().splitlines() if line and line[0] != "#"]
    return {name: words for name, *words in found}


def written(made: Ready, folder: Path, example: Any = X, **options: Any) -> Tables:
    return tables(*made, folder, name="net", example_args=example, **options)


def words(found: Tables) -> dict[str, str]:
    return {name: word for name, (word,) in lines(found.q_table).items()}


def test_all_operations_have_the_type_of_the_plan_and_a_range(tmp_path: Path) -> None:
    made = small()
    found = written(made, tmp_path)
    names = [
        "relu_Relu",
        "side_Conv",
        "relu_1_Relu",
        "adaptive_avg_pool2d_GlobalAveragePool",
        "flatten_Reshape",
        "output_Gemm",
    ]
    assert words(found) == dict.fromkeys(names, "INT8")
    ranged = lines(found.calibration)
    step = float(made.qparams["x.post_act_fake_quantizer"].scale)
    assert [float(word) for word in ranged["x"]] == [127 * step, -128 * step, 127 * step]
    assert ranged["flatten_Reshape"] == ranged["adaptive_avg_pool2d_GlobalAveragePool"]
    weights = {f"{name}_weight" for name in ("relu_Relu", "side_Conv", "output_Gemm")}
    assert ranged.keys() == {"x", *names, *weights}
    assert len(ranged["output_Gemm_weight"]) == 2 + 2 * 3


def test_a_weight_with_one_step_has_it_for_each_channel(tmp_path: Path) -> None:
    rule = sq.Rule(name="*.weight_fake_quant", weight=sq.override(granularity=sq.PerTensor()))
    made = small(rule)
    found = written(made, tmp_path)
    step = float(made.qparams["conv.weight_fake_quant"].scale)
    count, first, second, *_ = lines(found.calibration)["relu_Relu_weight"]
    assert (int(count), float(first), float(second)) == (2, step, step)
    assert "--matmul_perchannel" not in found.readme.read_text()  # type: ignore[union-attr]


AFFINE = {"BM1684X": True, "CV183X": False}


@pytest.mark.parametrize("chip", AFFINE)
@pytest.mark.filterwarnings("ignore:export.tables. on this chip linear layers")
def test_affine_values_have_their_ends_and_a_switch(chip: str, tmp_path: Path) -> None:
    made = small(chip=chip, symmetric=False)
    name = "x.post_act_fake_quantizer"
    own = made.qparams[name]._replace(zero_point=torch.tensor(100, dtype=torch.int32))
    found = written(made._replace(qparams={**made.qparams, name: own}), tmp_path)
    step = float(own.scale)
    assert [float(word) for word in lines(found.calibration)["x"]] == [155 * step, -100 * step, 155 * step]
    assert ("--asymmetric" in found.readme.read_text()) == AFFINE[chip]  # type: ignore[union-attr]


def test_one_step_of_a_linear_layer_is_said(tmp_path: Path) -> None:
    made = small(chip="BM1690")
    name = "fc.weight_fake_quant"
    own = made.qparams[name]._replace(scale=torch.tensor([0.25, 1.0, 0.5]))
    with pytest.warns(UserWarning, match=r"rounded to their largest one: output_Gemm.*PerTensor"):
        found = written(made._replace(qparams={**made.qparams, name: own}), tmp_path)
    assert lines(found.calibration)["output_Gemm_weight"][:4] == ["3", "1", "1", "1"]
    assert "one step for a linear layer" in found.readme.read_text()  # type: ignore[union-attr]


def test_types_follow_what_is_multiplied(tmp_path: Path) -> None:
    bf16 = sq.override(fake_quantize=sq.fake_quantize.bf16())
    found = words(written(small(sq.Rule(name="side", weight=bf16, activation=bf16)), tmp_path))
    assert found["side_Conv"] == "BF16", "an 8-bit input and a 16-bit weight"
    assert found["relu_1_Relu"] == "BF16" and found["output_Gemm"] == "INT8"
    plain = sq.Rule(name="side", weight=None, activation=None, requests=False)
    found = words(written(small(plain), tmp_path))
    assert (found["side_Conv"], found["relu_1_Relu"], found["output_Gemm"]) == ("F32", "F32", "INT8")


def test_weights_in_the_file_are_on_their_grids(tmp_path: Path) -> None:
    made = small()
    found = written(made, tmp_path)
    off = sq.enabled(made.qparams, {"*post_act*": False})
    expected = made.q.apply(made.params, off, X).detach()
    torch.testing.assert_close(computed(found.model, {"x": X})[0], expected, rtol=1e-5, atol=1e-6)
    proto = onnx.load(found.model)
    assert (proto.ir_version, proto.opset_import[0].version) == (8, 17)
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    codes = torch.from_numpy(held["side.weight"].copy()) / made.qparams["side.weight_fake_quant"].scale[:, None, None, None]
    assert torch.equal(codes, codes.round())


class Attends(nn.Module):
    """Attention, of which every input may be quantized, behind a bias of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).reshape(2, 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
        query, key, value = parts[0], parts[1], parts[2]
        made = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(made.transpose(1, 2).reshape(2, 4, 8))


def test_attention_is_two_products_where_its_inputs_are_quantized(tmp_path: Path) -> None:
    x = torch.randn(2, 4, 8)
    config = sq.QuantConfig(chip="BM1684X", strategy="CNN")
    made = ready(Attends().eval(), x, config=config)
    found = written(made, tmp_path, x)
    types, ranged = words(found), lines(found.calibration)
    name = "scaled_dot_product_attention"
    assert types[f"{name}.scores_MatMul"] == types[f"{name}_MatMul"] == "INT8"
    assert types[f"{name}.probabilities_Softmax"] == "F32"
    assert ranged[f"{name}.probabilities_Softmax"] == ["1", "0", "1"]
    assert "output_MatMul" in types, "the sum with zeros is gone"
    assert "--high_precision" in found.readme.read_text()  # type: ignore[union-attr]
    off = sq.enabled(made.qparams, {"*post_act*": False})
    expected = made.q.apply(made.params, off, x).detach()
    torch.testing.assert_close(computed(found.model, {"x": x})[0], expected, rtol=1e-4, atol=1e-5)


def test_a_value_without_a_grid_has_the_range_of_the_example_and_batches(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)).eval(), torch.randn(2, 4)
    made = ready(model, x, config=sq.QuantConfig(chip="BM1684X", strategy="Transformer"))
    one = lines(written(made, tmp_path, x).calibration)["0_Gemm"]
    two = lines(written(made, tmp_path, x, batches=[3 * x]).calibration)["0_Gemm"]
    weight = made.q.weights_seen(made.params)["0.weight_fake_quant"][0]
    largest = float(F.linear(x, weight, made.params["0.bias"]).abs().max())
    assert float(one[0]) == pytest.approx(largest, rel=0.05)
    assert float(two[0]) > float(one[0])


def test_a_model_with_masks_and_indices_has_words_for_its_floats(tmp_path: Path) -> None:
    model, example = bert()
    made = ready(model, config=sq.QuantConfig(chip="BM1684X", strategy="Transformer"), **example)
    found = written(made, tmp_path, example)
    types = words(found)
    layers = [name for name in types if ".dense_" in name or name.rpartition(".")[2].startswith(("query", "key", "value"))]
    assert len(layers) == 12 and {types[name] for name in layers} == {"INT8"}
    assert "[[3,12],[3,12]]" in found.readme.read_text()  # type: ignore[union-attr]


def test_the_data_say_where_lines_come_from(tmp_path: Path) -> None:
    data = json.loads(written(small(), tmp_path).clip_ranges.read_text())["tpu-mlir"]
    assert data["operations"]["relu_Relu"]["quantizers"] == ["conv.post_act_fake_quantizer"]
    assert data["operations"]["relu_Relu"]["weight"] == "conv.weight_fake_quant"
    assert data["weights"].keys() == {f"{name}.weight_fake_quant" for name in ("conv", "side", "fc")}


FOUR = sq.override(bits=4)
E4M3 = sq.override(fake_quantize=sq.fake_quantize.e4m3())

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "4 bits": ({"bits": 4, "chip": "BM1688"}, {}, "got '4 bits'.*INT4 convolutions"),
    "6 bits": ({"bits": 6, "chip": None}, {}, "no such type for this activation: got '6 bits'"),
    "fp8": ({"fake_quantize": sq.fake_quantize.e4m3()}, {}, "no FP8 for this chip.*BM1690"),
    "fp4": ({"fake_quantize": sq.fake_quantize.fp4(), "chip": None}, {}, "got 'fp4'"),
    "dynamic": ({"dynamic": True}, {}, "the tables cannot hold a dynamic range"),
    "names": ({}, {"names": {"fc.weight_fake_quant": "y"}}, "take no names"),
    "no example": ({}, {"example_args": None}, "need an example"),
    "work mode": ({}, {"work_mode": "int4_and_int8_mix"}, "tpu-mlir has no work mode"),
    "batches of the other compiler": ({}, {"batches": [X], "compiler": "sophgo-mq"}, "chip= and batches= are for tpu-mlir"),
    "compiler": ({}, {"compiler": "tpu_mlir"}, "did you mean 'tpu-mlir'"),
    "chip": ({}, {"chip": "BM1684"}, "did you mean 'BM1684X'"),
    "no chip of this compiler": ({}, {"chip": "Academic"}, "does not know this chip"),
}


@pytest.mark.parametrize(("made", "options", "text"), REFUSED.values(), ids=REFUSED)
def test_what_the_compiler_cannot_do_is_refused(
    made: dict[str, Any], options: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with pytest.raises(sq.ConfigError, match=text):
        tables(*small(**made), tmp_path, **{"example_args": X, **options})
    assert list(tmp_path.iterdir()) == []


def test_affine_weights_and_products_of_affine_values_are_refused(tmp_path: Path) -> None:
    made = small(sq.Rule(name="fc.weight_fake_quant", weight=sq.override(symmetric=False)))
    name = "fc.weight_fake_quant"
    own = made.qparams[name]._replace(zero_point=torch.full((3,), 5, dtype=torch.int32))
    with pytest.raises(sq.ConfigError, match=r"no affine weights.*symmetric=True"):
        written(made._replace(qparams={**made.qparams, name: own}), tmp_path)
    x = torch.randn(2, 4, 8)
    affine = sq.QuantConfig(chip="BM1684X", strategy="CNN", activation=sq.override(symmetric=False))
    with pytest.raises(sq.ConfigError, match=r"cannot compute this product in integers.*symmetric=True"):
        written(ready(Attends().eval(), x, config=affine), tmp_path, x)
    assert list(tmp_path.iterdir()) == []


def test_weights_alone_may_have_four_bits(tmp_path: Path) -> None:
    found = written(small(sq.Rule(name="*.weight_fake_quant", weight=FOUR), chip=None), tmp_path)
    assert set(words(found).values()) == {"INT8"}
