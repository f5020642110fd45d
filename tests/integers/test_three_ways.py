"""One quantized network three ways: ``q.apply`` simulates, the executor and ONNX Runtime compute in integers.

Images are compared whose values all lie further from a tie than float32 rounds: there is no choice between codes, on no CPU.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import sophq_func as sq
from tests.helpers import Ready, ready
from tests.runtime import computed, onnx
from tests.ties import OUTPUT, Reference, are_decided, last_step, reference, shown

pytestmark = [pytest.mark.isa, pytest.mark.slow]

CHIPS = {"CNN": "BM1690", "Dataflow": None}


@pytest.fixture(scope="module")
def digits() -> Iterator[tuple[nn.Module, Tensor, Tensor, Tensor]]:
    """The trained network of the examples, images to calibrate on, test images, and their labels."""
    pytest.importorskip("sklearn")
    folder = str(Path(__file__).parents[2] / "examples")
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module("digits")
        train, _, test, labels = module.load(0)
        yield module.trained(0, epochs=4), train[:128], test, labels
    finally:
        sys.path.remove(folder)


def three_ways(made: Ready, expected: Reference, example: Tensor, x: Tensor, path: Path) -> dict[str, Tensor]:
    """What each of them makes of a batch; ``apply`` in float64, whose sums are the same in any order."""
    sq.export.onnx(made.q, made.params, made.qparams, example, path)
    return {
        "apply": expected.output.float(),
        "executor": sq.convert(made.q, made.params, made.qparams).run(x),
        "ONNX Runtime": computed(path, {"x": x})[0],
    }


def are_four_bits(made: Ready, path: Path) -> bool:
    """Whether artifact and file hold all weights in half a byte for each code."""
    artifact = sq.convert(made.q, made.params, made.qparams)
    weights = list(artifact.metadata["weights"])
    packed = all(artifact.tensors[f"{name}.codes"].numel() == -(-made.params[name].numel() // 2) for name in weights)
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}
    return packed and all(kinds[f"{name}_quantized"] == onnx.TensorProto.INT4 for name in weights)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("strategy", CHIPS)
def test_all_pairs_agree_on_the_whole_test_set(
    strategy: str, bits: int, symmetric: bool, digits: Any, tmp_path: Path
) -> None:
    model, example, test, labels = digits
    weight, activation = sq.override(bits=bits), sq.override(symmetric=symmetric)
    config = sq.QuantConfig(chip=CHIPS[strategy], strategy=strategy, weight=weight, activation=activation)
    made, path = ready(model, example, config=config), tmp_path / "digits.onnx"
    test = shown(made, test)
    expected = reference(made, test)
    outputs, step, decided = three_ways(made, expected, example, test, path), last_step(made), are_decided(made, expected)
    assert are_four_bits(made, path) == (bits == 4)
    assert int(decided.sum()) >= 0.1 * len(test)
    for way, output in outputs.items():
        steps = (output - outputs["apply"]).abs() / step
        assert float(steps[decided].max()) <= OUTPUT, way
        assert float((output.argmax(1) == labels).float().mean()) > 0.9, way
