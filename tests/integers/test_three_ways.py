"""One quantized network three ways: ``q.apply`` simulates, the executor and ONNX Runtime compute in integers.

Images are compared whose values all lie further from a tie than float32 rounds: there is no choice between codes, on no CPU.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from torch import Tensor

import sophq_func as sq
from tests.helpers import Digits, Ready, accuracy, ready
from tests.runtime import computed, onnx, within_sums
from tests.ties import OUTPUT, Reference, are_decided, last_step, reference, shown

pytestmark = pytest.mark.slow

CHIPS = {"CNN": "BM1690", "Dataflow": None}


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


ON_OTHER_CPUS = {("CNN", 8, False), ("Dataflow", 4, True)}


@pytest.mark.parametrize(
    ("strategy", "bits", "symmetric"),
    [
        pytest.param(*setting, marks=[pytest.mark.isa] if setting in ON_OTHER_CPUS else [])
        for setting in itertools.product(CHIPS, (8, 4), (True, False))
    ],
)
def test_all_pairs_agree_on_the_whole_test_set(
    strategy: str, bits: int, symmetric: bool, digits: Digits, tmp_path: Path
) -> None:
    weight, activation = sq.override(bits=within_sums(bits)), sq.override(symmetric=symmetric)
    config = sq.QuantConfig(chip=CHIPS[strategy], strategy=strategy, weight=weight, activation=activation)
    example = digits.train[:128]
    made, path = ready(digits.model, example, config=config), tmp_path / "digits.onnx"
    test = shown(made, digits.test)
    expected = reference(made, test)
    outputs, step, decided = three_ways(made, expected, example, test, path), last_step(made), are_decided(made, expected)
    assert are_four_bits(made, path) == (bits == 4)
    assert int(decided.sum()) >= 0.1 * len(test)
    for way, output in outputs.items():
        steps = (output - outputs["apply"]).abs() / step
        assert float(steps[decided].max()) <= OUTPUT, way
        assert accuracy(output, digits) > 0.9, way
