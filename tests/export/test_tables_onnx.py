"""The tables for chips beside the float ONNX file: every name in them is that of a tensor there, and of the right one."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func import export
from sophq_func.export import Tables
from tests.golden.models import DeconvNet
from tests.helpers import Ready, ready, unchanged
from tests.runtime import LEVELS, computed, onnx

tables = partial(export.tables, compiler="sophgo-mq")

pytestmark = pytest.mark.slow

CHIP = sq.QuantConfig(chip="BM1690", strategy="CNN")


def chip(**weight: Any) -> sq.QuantConfig:
    return sq.QuantConfig(chip="BM1690", strategy="CNN", weight=sq.override(**weight))


def digits() -> tuple[nn.Module, Any]:
    """The network of the examples, with BatchNorms that do something."""
    pytest.importorskip("sklearn")
    folder = str(Path(__file__).parents[2] / "examples")
    sys.path.insert(0, folder)
    try:
        model = importlib.import_module("digits").Digits()
    finally:
        sys.path.remove(folder)
    x = torch.randn(16, 1, 8, 8)
    for norm in [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        norm.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr, operator]
    return model.eval(), x


def bert() -> tuple[nn.Module, Any]:
    """A small BERT, and a batch of which one sentence is padded."""
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}
    model = transformers.BertModel(transformers.BertConfig(**shape), add_pooling_layer=False).eval()
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[0, 7:] = 0
    return model, {"attention_mask": mask, "input_ids": torch.randint(0, 99, (3, 12))}


def deconv() -> tuple[nn.Module, Any]:
    return DeconvNet().eval(), torch.randn(2, 3, 8, 8)


CASES = {
    "digits": (digits, CHIP),
    "digits, 4 bits": (digits, chip(bits=4)),
    "digits, per tensor": (digits, chip(granularity=sq.PerTensor())),
    "deconvolutions": (deconv, CHIP),
    "bert": (bert, CHIP),
    "bert, without a chip": (bert, sq.QuantConfig()),
}


def called(example: Any) -> dict[str, Tensor]:
    return example if isinstance(example, dict) else {"x": example}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Ready, Any, Tables]]:
    """A calibrated model, its example, and what was written."""
    make, config = CASES[request.param]
    model, example = make()
    args, kwargs = ((), example) if isinstance(example, dict) else ((example,), {})
    made = ready(model, *args, config=config, **kwargs)
    with unchanged(model, made.params, dict(made.qparams)):
        written = tables(*made, tmp_path, name="net", example_args=example)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in filter(None, written))
    yield made, example, written


def tensors_by_name(proto: Any) -> dict[str, str]:
    """What tables may call a tensor: ``<tensor>_<op type>``, or an input by its name; with the tensor."""
    found = {value.name: value.name for value in proto.graph.input}
    return found | {f"{name}_{node.op_type}": name for node in proto.graph.node for name in node.output}


def entries(written: Tables) -> dict[str, Any]:
    return dict(json.loads(written.clip_ranges.read_text())["sophgo_tpu"])


def test_every_name_is_that_of_a_tensor_in_the_file(case: tuple[Ready, Any, Tables]) -> None:
    made, _, written = case
    proto = onnx.load(written.model)
    known = tensors_by_name(proto)
    listed = written.q_table.read_text().splitlines()[2:] + written.calibration.read_text().splitlines()[2:]
    names = {line.split()[0].removesuffix("_weight") for line in listed if not line.startswith("#")}
    names |= {name.removesuffix("_8").removesuffix("_4").removesuffix("_weight") for name in entries(written)}
    assert len(names) > len(made.q.plan) // 2
    assert not names - set(known)
    lines = [line for line in listed if "_weight " in line and line.endswith(("INT8", "INT4"))]
    assert len(lines) == sum(made.q.plan.site(name).role == "weight" for name in made.q.plan)


def test_a_tensor_has_the_range_that_the_tables_give_it(case: tuple[Ready, Any, Tables]) -> None:
    made, example, written = case
    proto = onnx.load(written.model)
    known, found = tensors_by_name(proto), entries(written)
    ranged = {known[name[:-2]]: entry for name, entry in found.items() if not name.endswith("_weight")}
    own = {value.name for value in (*proto.graph.output, *proto.graph.input)}
    infos = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in ranged if n not in own]
    proto.graph.output.extend(infos)
    onnx.save(proto, written.model)
    inputs = called(example)
    outputs = [value.name for value in proto.graph.output]
    slack = 0.1 if any(entry["bit"] == 4 for entry in found.values()) else 0.01  # weights are clipped by up to 1/15, 1/255
    values = inputs | dict(zip(outputs, computed(written.model, inputs, LEVELS.ORT_DISABLE_ALL), strict=True))
    for name, entry in ranged.items():
        largest = float(values[name].abs().max())
        assert largest == pytest.approx(entry["threshold"] * 127.5 / 128, rel=slack), name
    assert len(ranged) >= sum(made.q.plan.site(n).role == "activation" for n in made.q.plan)


def clipped(made: Ready) -> dict[str, Tensor]:
    """Parameters whose weights, with BatchNorms folded in, lie in ``[qmin * s, qmax * s]``."""
    new = dict(made.params)
    for name, (weight, scheme) in made.q.weights_seen(made.params).items():
        axis = getattr(scheme.granularity, "axis", None)
        shape = [1] * weight.ndim if axis is None else [-1 if i == axis else 1 for i in range(weight.ndim)]
        step = made.qparams[name].scale.reshape(shape)
        inside = weight.clamp(scheme.qmin * step, scheme.qmax * step)
        parameter = made.q.plan.site(name).parameter
        new[parameter] = made.params[parameter] * torch.where(weight == 0, 1, inside / weight)
    return new


def test_the_file_computes_the_float_model_with_weights_inside_their_range(case: tuple[Ready, Any, Tables]) -> None:
    made, example, written = case
    proto = onnx.load(written.model)
    assert proto.opset_import[0].version == 18
    assert not {node.op_type for node in proto.graph.node} & {"BatchNormalization", "QuantizeLinear", "Named"}
    args, kwargs = ((), example) if isinstance(example, dict) else ((example,), {})
    expected = made.q.apply(clipped(made), sq.enabled(made.qparams, 0.0), *args, **kwargs)
    expected = getattr(expected, "last_hidden_state", expected)
    torch.testing.assert_close(computed(written.model, called(example))[0], expected.detach(), rtol=1e-4, atol=1e-5)


def test_weights_are_clipped_to_what_their_codes_reach(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()).eval(), torch.randn(2, 1, 6, 6)
    q, params, qparams = ready(model, x, config=CHIP)
    name = "0.weight_fake_quant"
    halved = {**qparams, name: qparams[name]._replace(scale=qparams[name].scale / 2)}
    written = tables(q, params, halved, tmp_path, example_args=x)
    found = {tensor.name: tensor for tensor in onnx.load(written.model).graph.initializer}
    actual = torch.from_numpy(onnx.numpy_helper.to_array(found["0.weight"]).copy())
    step = halved[name].scale[:, None, None, None]
    torch.testing.assert_close(actual, torch.clamp(params["0.weight"], -128 * step, 127 * step), rtol=0, atol=0)
    assert not torch.equal(actual, params["0.weight"]), "some weights lie beyond"


def test_given_names_go_before_those_of_the_file(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(2, 4)
    made = ready(model, x, config=CHIP)
    written = tables(*made, tmp_path, example_args=x, names={"0.weight_fake_quant": "mine_Gemm"})
    assert "mine_Gemm_weight INT8" in written.q_table.read_text()


def test_nothing_is_written_where_the_file_cannot_be(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(2, 4)
    made = ready(model, x, config=CHIP)
    with pytest.raises(sq.StateError, match=r"export\.tables: a model in training mode cannot be exported"):
        tables(made.q.train(), made.params, made.qparams, tmp_path, example_args=x)
    assert not list(tmp_path.iterdir())


class Twice(nn.Module):
    """Two calls that make one tensor, each with a quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y.relu()) + nn.functional.relu(y)


def test_quantizers_of_one_tensor_share_an_entry_where_they_agree(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    made = ready(Twice().eval(), x, config=CHIP)
    assert {"relu.post_act_fake_quantizer", "relu_1.post_act_fake_quantizer"} <= made.q.plan.keys()
    found = tables(made.q, made.params, made.qparams, tmp_path, example_args=x)
    entries = [line.split()[0] for line in found.q_table.read_text().splitlines() if line and line[0] != "#"]
    assert len(entries) == len(set(entries)) and "relu_Relu" in entries
    other = made.qparams["relu.post_act_fake_quantizer"]
    differing = {**made.qparams, "relu.post_act_fake_quantizer": other._replace(scale=2 * other.scale)}
    with pytest.raises(sq.ConfigError, match="has it, with other values"):
        tables(made.q, made.params, differing, tmp_path, example_args=x)


def test_the_file_of_a_frozen_model_has_weights_on_their_grids(tmp_path: Path) -> None:
    model, x = deconv()
    made = ready(model, x, config=chip())
    frozen, params = made.q.freeze(made.params, made.qparams)
    for name, case in {"one": made, "two": Ready(frozen, params, made.qparams)}.items():
        (tmp_path / name).mkdir()
        tables(*case, tmp_path / name, example_args=x)
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    for first, second in zip(one, two, strict=True):
        if first.suffix != ".onnx":
            assert first.read_bytes() == second.read_bytes()
    off = sq.enabled(made.qparams, {"*post_act*": False})
    expected = made.q.apply(made.params, off, x).detach()
    torch.testing.assert_close(computed(two[0], {"x": x})[0], expected, rtol=1e-4, atol=1e-4)
