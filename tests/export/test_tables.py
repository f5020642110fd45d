"""The tables for chips, against text that is written out, and what they hold for every kind of quantizer."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func import export
from sophq_func.core.operations import is_operation
from sophq_func.export._names import OP_TYPES
from tests.golden.models import DeconvNet, PoolClassifier
from tests.helpers import Ready, ready, unchanged

tables = partial(export.tables, compiler="sophgo-mq")

HEAD = (
    "# work_mode:QAT_all_int8 #Automatically generated, do not modify, work_mode choice:"
    "[QAT_all_int8, int4_and_int8_mix, int4_and_int8_mix_no_fc]\n"
    "# op_name    threshold    min    max\n"
)


class Small(nn.Module):
    """Every kind of entry: two inputs of a ReLU, a deconvolution, a chain of moves, 4 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.bn = nn.BatchNorm2d(2)
        self.relu = nn.ReLU()
        self.up = nn.ConvTranspose2d(2, 2, 2, bias=False)
        self.fc = nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.relu(self.bn(self.conv(x))))
        return self.fc(x.flatten(1))


def small(*rules: sq.Rule, chip: str | None = None, **activation: Any) -> Ready:
    """The model with scales that are powers of two, so that text is the same on every machine."""
    config = sq.QuantConfig(chip=chip, strategy="CNN", activation=sq.override(**activation), rules=rules)
    q, params, qparams = ready(Small().eval(), torch.randn(1, 1, 2, 2), config=config)
    even = {}
    for i, (name, own) in enumerate(qparams.items()):
        factors = 1 + torch.arange(own.scale.numel()).reshape_as(own.scale)
        scale = 2.0 ** -(i + 3) * factors
        even[name] = own._replace(scale=scale)
    return Ready(q, params, even)


def written(made: Ready, folder: Path, **options: Any) -> tuple[str, str, dict[str, Any]]:
    found = tables(*made, folder, **options)
    return found.calibration.read_text(), found.q_table.read_text(), json.loads(found.clip_ranges.read_text())


def test_the_calibration_table_is_this_text(tmp_path: Path) -> None:
    made = small(sq.Rule(name="fc.post_act_fake_quantizer", activation=sq.override(bits=4)))
    assert list(made.qparams) == [
        "conv.post_act_fake_quantizer",
        "conv.weight_fake_quant",
        "fc.post_act_fake_quantizer",
        "fc.weight_fake_quant",
        "flatten.post_act_fake_quantizer",
        "up.weight_fake_quant",
        "x.post_act_fake_quantizer",
    ]
    assert written(made, tmp_path)[0] == HEAD + (
        "x 0.2500000 -0.2500000 0.2480469\n"
        "relu_Relu 16.0000000 -16.0000000 15.8750000\n"
        "flatten_Flatten 1.0000000 -1.0000000 0.9921875\n"
        "up_ConvTranspose 1.0000000 -1.0000000 0.9921875\n"
        "#int4_th\n"
        "fc_Gemm 0.2500000 -0.2500000 0.2187500\n"
        "#weight_scale\n"
        "relu_Relu_weight 2 0.0625000 0.1250000 2 0 0\n"
        "up_ConvTranspose_weight 2 0.0039062 0.0078125 2 0 0\n"
        "fc_Gemm_weight 3 0.0156250 0.0312500 0.0468750 3 0 0 0\n"
    )


def test_the_q_table_is_this_text(tmp_path: Path) -> None:
    rules = (
        sq.Rule(name="fc", activation=sq.override(bits=4), weight=sq.override(bits=4)),
        sq.Rule(name="conv.post_act_fake_quantizer", activation=sq.override(symmetric=False)),
        sq.Rule(name="up.weight_fake_quant", observe_only=True),
    )
    made = small(*rules)
    assert written(made, tmp_path)[1] == (
        "# qtable from sophgo_mq\n"
        "# op_name  quantize_mode\n"
        "x INT8\n"
        "relu_Relu_weight INT8\n"
        "relu_Relu UINT8\n"
        "up_ConvTranspose_weight F32\n"
        "flatten_Flatten INT8\n"
        "fc_Gemm_weight INT4\n"
        "flatten_Flatten INT4\n"
        "fc_Gemm INT4\n"
        "up_ConvTranspose INT8\n"
    )


def test_the_clip_ranges_are_these_records(tmp_path: Path) -> None:
    rule = sq.Rule(name="up.weight_fake_quant", weight=sq.override(granularity=sq.PerTensor(), symmetric_range=True))
    made = small(rule)
    zero = made.qparams["x.post_act_fake_quantizer"].zero_point
    found = written(made, tmp_path)[2]
    ids = {"step": "null", "zero_point": "null"}
    assert int(zero) == 0
    assert list(found) == ["sophgo_tpu", "w_qscheme", "a_qscheme"]
    entries = found["sophgo_tpu"]
    assert entries["x_8"] == {
        "threshold": 0.25,
        "min": -0.25,
        "max": 127 / 512,
        "bit": 8,
        "type": "int",
        "ori_name": "none",
        "quant_type": "INT8",
        "param_id": ids,
    }
    assert entries["relu_Relu_weight"] == {
        "step": [2**-4, 2**-3],
        "zero_point": [0, 0],
        "min": [-8.0, -16.0],
        "max": [127 / 16, 127 / 8],
        "bit": 8,
        "type": "int",
        "quant_type": "INT8",
        "param_id": ids,
    }
    assert entries["up_ConvTranspose_weight"] == {
        "step": [2**-8],
        "zero_point": [0],
        "min": [-127 / 256],
        "max": [127 / 256],
        "bit": 8,
        "type": "int",
        "ori_name": "none",
        "quant_type": "INT8",
        "param_id": ids,
    }
    assert entries["up_ConvTranspose_8"] == entries["flatten_Flatten_8"]
    assert [key for key in entries if key.startswith("fc")] == ["fc_Gemm_weight", "fc_Gemm_8"]


def test_affine_activations_have_the_range_of_their_zero_point(tmp_path: Path) -> None:
    q, params, qparams = small(symmetric=False)
    shifted = qparams["x.post_act_fake_quantizer"]._replace(zero_point=torch.tensor(100, dtype=torch.int32))
    text, _, data = written(Ready(q, params, {**qparams, "x.post_act_fake_quantizer": shifted}), tmp_path)
    assert f"x {255 / 512:.7f} {-100 / 512:.7f} {155 / 512:.7f}\n" in text
    assert data["sophgo_tpu"]["x_8"]["type"] == "uint"


def test_weights_of_255_levels_and_deconvolutions_are_in_every_table(tmp_path: Path) -> None:
    x = torch.randn(1, 3, 8, 8)
    config = sq.QuantConfig(chip="MARS3", strategy="CNN")
    made = ready(DeconvNet().eval(), x, config=config)
    weights = [name for name in made.q.plan if made.q.plan.site(name).role == "weight"]
    assert all(made.q.plan[name].scheme.symmetric_range for name in weights)
    text, types, data = written(made, tmp_path)
    for op in ("relu1_Relu", "relu2_Relu", "relu3_Relu", "head_Conv"):
        assert f"{op}_weight INT8\n" in types
        assert f"\n{op}_weight " in text
        assert data["sophgo_tpu"][f"{op}_weight"]["bit"] == 8
    learned = made.qparams["up1.weight_fake_quant"].scale
    assert data["sophgo_tpu"]["relu2_Relu_weight"]["max"] == pytest.approx((127 * learned).tolist())


def test_a_relu_behind_a_layer_that_is_not_fused_names_its_weight_per_channel(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()).eval(), torch.randn(1, 1, 2, 2)
    plain = sq.QuantConfig(strategy="CNN", patterns=())
    whole = sq.QuantConfig(strategy="CNN", patterns=(), weight=sq.override(granularity=sq.PerTensor()))
    assert "\n1_Relu_weight INT8\n" in written(ready(model, x, config=plain), tmp_path)[1]
    assert "\n0_Conv_weight INT8\n" in written(ready(model, x, config=whole), tmp_path)[1]


def test_learned_thresholds_decide_the_range(tmp_path: Path) -> None:
    made = small(fake_quantize=sq.fake_quantize.tqt())
    name = "x.post_act_fake_quantizer"
    moved = made.qparams[name]._replace(extras={**made.qparams[name].extras, "log2_t": torch.tensor(3.0)})
    data = written(made._replace(qparams={**made.qparams, name: moved}), tmp_path)[2]
    assert data["sophgo_tpu"]["x_8"]["min"] == -8.0


FORMATS = {
    "e4m3": (sq.fake_quantize.e4m3(), "FP8", 448.0),
    "e5m2": (sq.fake_quantize.e5m2(), "FP8", 57344.0),
    "bf16": (sq.fake_quantize.bf16(), "BF16", None),
    "fp4": (sq.fake_quantize.fp4(), "FP4", None),
    "mxfp4": (sq.fake_quantize.mxfp4(), "FP4", None),
    "nnie": (sq.fake_quantize.nnie(), None, None),
}


@pytest.mark.parametrize(("fake", "word", "largest"), FORMATS.values(), ids=FORMATS)
def test_formats_have_the_type_that_tables_know(
    fake: sq.Spec, word: str | None, largest: float | None, tmp_path: Path
) -> None:
    made = small(sq.Rule(name="x", activation=sq.override(fake_quantize=fake)))
    text, types, data = written(made, tmp_path)
    assert (f"\nx {word}\n" in types) == (word is not None)
    assert ("\nx " in types) == (word is not None)
    assert ("\nx " in text) == ("x_8" in data["sophgo_tpu"]) == (largest is not None)
    if largest is not None:
        assert data["sophgo_tpu"]["x_8"]["max"] == largest * float(made.qparams["x.post_act_fake_quantizer"].scale)


def test_other_widths_have_a_range_but_no_type(tmp_path: Path) -> None:
    made = small(sq.Rule(name="fc.weight_fake_quant", weight=sq.override(bits=6)))
    text, types, data = written(made, tmp_path)
    assert "fc_Gemm_weight" in text
    assert "fc_Gemm_weight" not in types
    assert data["sophgo_tpu"]["fc_Gemm_weight"]["bit"] == 6


def test_entries_are_copied_over_moves_from_before_else_from_behind(tmp_path: Path) -> None:
    made = ready(PoolClassifier().eval(), torch.randn(2, 1, 12, 12), config=sq.QuantConfig(chip="BM1690", strategy="CNN"))
    entries = written(made, tmp_path)[2]["sophgo_tpu"]
    assert entries["pool2_MaxPool_8"] == entries["flatten_Flatten_8"]

    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.fc1(x).reshape(2, 4).transpose(0, 1).transpose(0, 1))

    kept = sq.QuantConfig(
        strategy="CNN", rules=(sq.Rule(name="transpose", activation=None), sq.Rule(name="reshape", activation=None))
    )
    q, params, qparams = ready(Moves().eval(), torch.randn(2, 4), config=kept)
    entries = written(Ready(q, params, qparams), tmp_path)[2]["sophgo_tpu"]
    for op in ("reshape_Reshape_8", "transpose_Transpose_8"):
        assert entries[op] == entries["fc1_Gemm_8"]


def test_names_come_from_the_onnx_file_where_they_are_given(tmp_path: Path) -> None:
    made = small()
    names = {"x.post_act_fake_quantizer": "image", "fc.weight_fake_quant": "/fc/Gemm_output_0_Gemm"}
    text, types, data = written(made, tmp_path, names=names)
    assert text.splitlines()[2].startswith("image ")
    assert "/fc/Gemm_output_0_Gemm_weight INT8" in types
    assert "image_8" in data["sophgo_tpu"]


def test_files_have_their_names_and_nothing_changes(tmp_path: Path) -> None:
    made = small()
    with unchanged(made.params, made.qparams):
        found = tables(*made, tmp_path, name="digits", work_mode="int4_and_int8_mix")
    assert found.model is None
    assert [path.name for path in found[:3]] == [
        "digits_cali_table_from_sophgo_mq_sophgo_tpu",
        "digits_q_table_from_sophgo_mq_sophgo_tpu",
        "digits_clip_ranges.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in found[:3])
    assert found.calibration.read_text().startswith("# work_mode:int4_and_int8_mix #")


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "dynamic": ({"dynamic": True}, {}, "the tables cannot hold a dynamic range"),
    "channels": ({"granularity": sq.PerChannel(1)}, {}, "the tables cannot hold this granularity"),
    "mode": ({}, {"work_mode": "QAT_all_int4"}, "work mode 'QAT_all_int4' is not known"),
    "folder in name": ({}, {"name": "../out"}, "file names cannot begin with this name"),
    "unknown name": ({}, {"names": {"fc.weight_fake_quan": "y"}}, "did you mean 'fc.weight_fake_quant'"),
    "same name": ({}, {"names": {"x.post_act_fake_quantizer": "fc_Gemm"}}, "the name 'fc_Gemm_8' is taken"),
}


@pytest.mark.parametrize(("scheme", "options", "words"), REFUSED.values(), ids=REFUSED)
def test_what_no_table_can_hold_is_refused(
    scheme: dict[str, Any], options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(sq.ConfigError, match=words):
        tables(*small(**scheme), tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_an_operation_without_an_op_type_needs_a_name(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(-1).cumsum(-1) @ x.transpose(0, 1)

    made = ready(nn.Sequential(Odd(4, 4)).eval(), torch.randn(2, 4), config=sq.QuantConfig(strategy="CNN"))
    lost = [name for name in made.q.plan if "cumsum" in name]
    assert lost
    with pytest.raises(sq.ConfigError, match="cumsum"):
        tables(*made, tmp_path)
    tables(*made, tmp_path, names={name: f"{name}_CumSum" for name in lost})


def test_steps_that_do_not_fit_the_weight_are_refused(tmp_path: Path) -> None:
    q, params, qparams = small()
    name = "fc.weight_fake_quant"
    two = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(sq.StateError, match="their shape does not fit"):
        tables(q, params, {**qparams, name: qparams[name]._replace(scale=torch.ones(2), zero_point=two)}, tmp_path)
    with pytest.raises(sq.StateError, match="not calibrated"):
        tables(q, params, {}, tmp_path)
    with pytest.raises(sq.StateError, match="folder of this file"):
        tables(q, params, qparams, tmp_path / "none")


def test_frozen_models_have_the_same_tables(tmp_path: Path) -> None:
    made = small()
    frozen, params = made.q.freeze(made.params, made.qparams)
    assert written(Ready(frozen, params, made.qparams), tmp_path) == written(made, tmp_path)


def test_steps_of_values_that_are_no_codes_are_refused(tmp_path: Path) -> None:
    """The table would hold a zero point that is rounded, and another function than ``apply``."""
    made = small(symmetric=False, fake_quantize=sq.fake_quantize.lsq_plus())
    written(made, tmp_path)
    name = "x.post_act_fake_quantizer"
    between = made.qparams[name]._replace(zero_point=made.qparams[name].zero_point + 0.25)
    with pytest.raises(
        sq.ConfigError, match=r"the tables cannot hold the steps of lsq_plus.* \(because its zero point is not a code"
    ):
        written(made._replace(qparams={**made.qparams, name: between}), tmp_path)


def test_op_types_are_those_of_operations_that_exist() -> None:
    assert all(is_operation(name) for name in OP_TYPES)
