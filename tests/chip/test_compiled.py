"""What the chips' compiler makes of plans: each operation in its type, and the outputs of ``apply``."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.export import Tables
from tests.export.test_tables_onnx import bert
from tests.golden.models import DeconvNet
from tests.helpers import Digits
from tools.chip import compiled
from tools.lowered import Lowered, lowered

pytestmark = pytest.mark.chip

TYPES = {
    "INT8": {"i8", "u8"},
    "F8E4M3": {"f8E4M3FN"},
    "F8E5M2": {"f8E5M2"},
    "BF16": {"bf16"},
    "F16": {"f16"},
    "F32": {"f32"},
}
"""Types in the lowered network, by word."""

PRODUCTS = ("Conv2D", "MatMul", "Deconv")

E4M3, E5M2, BF16, FP16 = (getattr(sq.fake_quantize, name)() for name in ("e4m3", "e5m2", "bf16", "fp16"))


class Made(NamedTuple):
    """What became of a plan.

    Attributes:
      words: of the q_table.
      ranged: names in the calibration table.
      operations: of the lowered network.
      named: operations of the compiler's float network.
      expected, actual: outputs of ``apply`` and of the chip.
      readme: the commands.
      planned: how many products multiply a weight and a value that both have integer grids.
    """

    words: dict[str, str]
    ranged: set[str]
    operations: dict[str, Lowered]
    named: set[str]
    expected: Tensor
    actual: Tensor
    readme: str
    planned: int = 0

    @property
    def cosine(self) -> float:
        return float(torch.cosine_similarity(self.expected.flatten().double(), self.actual.flatten().double(), 0))


def listed(path: Path) -> dict[str, str]:
    """The second word of each line, by the first."""
    lines = [line.split() for line in path.read_text().splitlines() if line and line[0] != "#"]
    return {line[0]: line[1] for line in lines}


def made(model: nn.Module, example: Any, config: sq.QuantConfig, folder: Path, batches: list[Any] | None = None) -> Made:
    """A plan, calibrated, exported with its commands, compiled and run."""
    args, kwargs = ((), example) if isinstance(example, dict) else ((example,), {})
    q = sq.quantize(model, config, example_args=args, example_kwargs=kwargs)
    params = sq.params_of(model)
    qparams = q.calibrate(params, batches or [example], progress=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "export.tables: on this chip linear layers")
        written = sq.export.tables(q, params, qparams, folder, example_args=example, name="net")
    expected = first(q.apply(params, qparams, *args, **kwargs)).detach()
    return ran(written, example, expected, folder)._replace(planned=planned_products(q.plan))


def planned_products(plan: sq.Plan) -> int:
    """How many convolutions and linear layers have a quantized weight, and read a quantized value."""
    sites = [plan.site(name) for name in plan if plan.site(name).role == "weight"]
    return sum(site.input.quantizer != "" and site.operation in ("linear", "conv2d") for site in sites)


def ran(written: Tables, example: Any, expected: Tensor, folder: Path) -> Made:
    """The files compiled by their own commands, and run."""
    assert written.readme is not None
    readme = written.readme.read_text()
    inputs = example if isinstance(example, dict) else {"x": example}
    onnx = pytest.importorskip("onnx")
    names = [value.name for value in onnx.load(written.model).graph.input]
    arrays: Mapping[str, np.ndarray] = {
        name: x.numpy() if x.is_floating_point() else x.numpy().astype(np.int32)
        for name, x in (inputs.items() if isinstance(example, dict) else zip(names, [example], strict=True))
    }
    values = dict(np.load(compiled(folder, written.readme, arrays)))
    (path,) = folder.glob("*_tpu.mlir")
    operations = {operation.name: operation for operation in lowered(path)}
    named = {operation.name for operation in lowered(folder / "net.mlir")}
    output = onnx.load(written.model).graph.output[0].name
    (key,) = [name for name in values if name.rpartition("_")[0] == output] or [list(values)[-1]]
    actual = torch.from_numpy(values[key].copy())
    ranged = {name for name in listed(written.calibration) if not name.endswith("_weight")}
    return Made(listed(written.q_table), ranged, operations, named, expected, actual.reshape(expected.shape), readme)


def first(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return next(iter(output.values())) if hasattr(output, "values") else output[0]


def check_words(found: Made) -> None:
    """Each operation has a word, and computes in that type; each line of a table has an operation."""
    of_integers = {name for name in found.named - found.words.keys() if name not in found.ranged}
    assert found.words.keys() <= found.named
    assert found.ranged <= found.named
    kinds = {operation.name: operation.kind for operation in found.operations.values()}
    assert {kinds.get(name, "Input") for name in found.named - found.words.keys()} <= {"Input"}, of_integers
    for name, word in found.words.items():
        operation = found.operations.get(name)
        if operation is None:  # the compiler has split it; its parts have its type
            continue
        kind = operation.multiplies_in if operation.kind in PRODUCTS else operation.result
        assert kind in TYPES[word] or kind not in set().union(*TYPES.values()), (name, word, operation)


def products(found: Made) -> list[Lowered]:
    return [operation for operation in found.operations.values() if operation.kind in PRODUCTS]


CHIPS = ("BM1684X", "BM1688", "BM1690", "CV183X")


@pytest.mark.parametrize("granularity", [sq.PerChannel(), sq.PerTensor()], ids=["channels", "one step"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
@pytest.mark.parametrize("chip", CHIPS)
def test_digits_are_told_as_by_apply(chip: str, symmetric: bool, granularity: Any, digits: Digits, tmp_path: Path) -> None:
    model, x, test, labels = digits
    weight, activation = sq.override(granularity=granularity), sq.override(symmetric=symmetric)
    config = sq.QuantConfig(chip=chip, strategy="CNN", weight=weight, activation=activation)
    found = made(model, test, config, tmp_path, [x[i : i + 100] for i in range(0, 1200, 100)])
    check_words(found)
    assert {operation.multiplies_in for operation in products(found)} <= TYPES["INT8"]
    assert len(products(found)) == 8
    same = (found.actual.argmax(1) == found.expected.argmax(1)).double().mean()
    right = (found.actual.argmax(1) == labels).double().mean()
    float_right = (model(test).argmax(1) == labels).double().mean()
    assert same >= 0.995
    assert right >= float_right - 0.005
    assert ("--asymmetric" in found.readme) == (not symmetric and chip != "CV183X")


def encoder() -> tuple[nn.Module, Any]:
    return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu").eval(), torch.randn(2, 8, 32)


def vit() -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=10, **sizes)
    return transformers.ViTForImageClassification(config).eval(), torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("chip", ["BM1684X", "BM1690"])
@pytest.mark.parametrize("make", [encoder, vit, bert])
def test_transformers_multiply_in_int8_where_planned(make: Any, chip: str, tmp_path: Path) -> None:
    model, example = make()
    found = made(model, example, sq.QuantConfig(chip=chip, strategy="Transformer"), tmp_path)
    check_words(found)
    assert found.cosine >= 0.999
    assert found.planned >= 2
    assert sum(operation.multiplies_in in TYPES["INT8"] for operation in products(found)) >= found.planned


LAYER1: dict[str, tuple[str, Any, Any, set[str]]] = {
    "bf16 in int8, BM1684X": ("BM1684X", None, BF16, {"INT8", "BF16"}),
    "f16 in int8, BM1684X": ("BM1684X", None, FP16, {"INT8", "F16"}),
    "bf16 in int8, CV183X": ("CV183X", None, BF16, {"INT8", "BF16"}),
    "e4m3": ("BM1690", E4M3, E4M3, {"F8E4M3"}),
    "e5m2": ("BM1690", E5M2, E5M2, {"F8E5M2"}),
    "e4m3 in int8": ("BM1690", None, E4M3, {"INT8", "F8E4M3", "F32"}),
    "bf16 in e4m3": ("BM1690", E4M3, BF16, {"F8E4M3", "BF16", "F32"}),
    "bf16": ("BM1690", BF16, BF16, {"BF16"}),
}
"""Chip, type of the network and of one block of it, and the words that follow."""


@pytest.mark.parametrize(("chip", "whole", "block", "words"), LAYER1.values(), ids=LAYER1)
def test_types_go_layer_by_layer(chip: str, whole: Any, block: Any, words: set[str], digits: Digits, tmp_path: Path) -> None:
    model, x, test, _ = digits
    everywhere = sq.override() if whole is None else sq.override(fake_quantize=whole)
    own = sq.override(fake_quantize=block)
    rules = (sq.Rule(name="layer1.*", weight=own, activation=own),)
    config = sq.QuantConfig(chip=chip, strategy="CNN", weight=everywhere, activation=everywhere, rules=rules)
    found = made(model, test[:199], config, tmp_path, [x[:400]])
    check_words(found)
    assert set(found.words.values()) == words
    assert found.cosine >= 0.999


def test_deconvolutions_have_their_channels(tmp_path: Path) -> None:
    found = made(DeconvNet().eval(), torch.randn(2, 3, 8, 8), sq.QuantConfig(chip="BM1684X", strategy="CNN"), tmp_path)
    assert found.cosine >= 0.9999


@pytest.mark.parametrize(("strategy", "least"), [("CNN", 0.999), ("Chip", 0.9998)])
@pytest.mark.parametrize("chip", ["BM1684X", "BM1690"])
@pytest.mark.filterwarnings("ignore:export.tables. on this chip linear layers")
def test_resnet_computes_as_apply(chip: str, strategy: str, least: float, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}  # a ResNet-18
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)).eval()
    batches = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    found = made(model, torch.randn(1, 3, 32, 32), sq.QuantConfig(chip=chip, strategy=strategy), tmp_path, batches)
    check_words(found)
    assert found.cosine >= least


SWITCHES = {
    "--matmul_perchannel": {},
    "--asymmetric": {"activation": sq.override(symmetric=False)},
    "--calibration_table net_cali_table": {},
    "--quantize_table net_q_table": {"rules": (sq.Rule(name="layer1.*", weight=None, activation=None, requests=False),)},
}
"""Switches of the commands, and a config with which each is there."""


@pytest.mark.parametrize(("switch", "change"), SWITCHES.items(), ids=SWITCHES)
def test_each_switch_has_an_effect(switch: str, change: dict[str, Any], digits: Digits, tmp_path: Path) -> None:
    """Without it the compiler fails, or computes other numbers."""
    model, x, test, _ = digits
    config = sq.QuantConfig(chip="BM1684X", strategy="CNN", **change)
    (tmp_path / "with").mkdir()
    found = made(model, test[:50], config, tmp_path / "with", [x[:400]])
    assert switch in found.readme
    names = ("net_cali_table", "net_q_table", "net_clip_ranges.json", "net.onnx", "net_README.txt")
    for name in names:
        shutil.copy(tmp_path / "with" / name, tmp_path)
    (tmp_path / "net_README.txt").write_text(found.readme.replace(f" {switch}", ""))
    try:
        other = ran(Tables(*(tmp_path / name for name in names)), test[:50], found.expected, tmp_path)
    except RuntimeError:
        return
    assert not torch.equal(other.actual, found.actual)


def test_high_precision_keeps_attention_in_parts(tmp_path: Path) -> None:
    model, example = encoder()
    found = made(model, example, sq.QuantConfig(chip="BM1684X", strategy="Transformer"), tmp_path)
    other = without(" --high_precision", found, example, tmp_path)
    assert "Softmax" in {operation.kind for operation in found.operations.values()}
    assert "Softmax" not in {operation.kind for operation in other.operations.values()}


def test_quantize_is_the_type_of_what_has_no_word(digits: Digits, tmp_path: Path) -> None:
    model, x, test, _ = digits
    config = sq.QuantConfig(chip="BM1684X", strategy="CNN")
    found = made(model, test[:50], config, tmp_path, [x[:400]])
    changes = {"--quantize INT8": "--quantize F16"}
    other = without(" --quantize_table net_q_table", found, test[:50], tmp_path, changes)
    assert {operation.multiplies_in for operation in products(found)} <= TYPES["INT8"]
    assert {operation.multiplies_in for operation in products(other)} == TYPES["F16"]


def test_processor_is_the_chip_whose_grids_are_taken(digits: Digits, tmp_path: Path) -> None:
    model, x, test, _ = digits
    found = made(model, test[:50], sq.QuantConfig(chip="BM1684X", strategy="CNN"), tmp_path, [x[:400]])
    other = without("", found, test[:50], tmp_path, {"bm1684x": "cv183x", ".bmodel": ".cvimodel"})
    assert "u8" in {operation.result for operation in found.operations.values()}
    assert "u8" not in {operation.result for operation in other.operations.values()}


def without(switch: str, found: Made, example: Any, folder: Path, changes: Mapping[str, str] | None = None) -> Made:
    """The same files compiled by commands that lack a switch, or have other words."""
    names = ("net_cali_table", "net_q_table", "net_clip_ranges.json", "net.onnx", "net_README.txt")
    other = folder / "other"
    other.mkdir()
    for name in names:
        shutil.copy(folder / name, other)
    readme = found.readme.replace(switch, "") if switch else found.readme
    for old, new in (changes or {}).items():
        assert old in readme
        readme = readme.replace(old, new)
    (other / "net_README.txt").write_text(readme)
    return ran(Tables(*(other / name for name in names)), example, found.expected, other)
