"""One quantized network three ways: ``q.apply`` simulates, the executor and ONNX Runtime compute in integers."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from tests.helpers import Ready, ready
from tests.runtime import computed, onnx

pytestmark = pytest.mark.slow

CHIPS = {"CNN": "BM1690", "Dataflow": None}
TOLERANCE = 1e-3
"""Of a step: float32 rounding of ``code * scale``."""


@pytest.fixture(scope="module")
def digits() -> Iterator[tuple[nn.Module, Tensor, Tensor, Tensor]]:
    """The trained network of the examples, images to calibrate on, test images, and their labels."""
    pytest.importorskip("sklearn")
    folder = str(Path(__file__).parents[2] / "examples")
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module("digits")
        torch.set_num_threads(1)
        train, _, test, labels = module.load(0)
        yield module.trained(0, epochs=4), train[:128], test, labels
    finally:
        sys.path.remove(folder)


def three_ways(made: Ready, example: Tensor, x: Tensor, path: Path) -> dict[str, Tensor]:
    """What each of them makes of a batch."""
    sq.export.onnx(made.q, made.params, made.qparams, example, path)
    return {
        "apply": made(x).detach(),
        "executor": sq.convert(made.q, made.params, made.qparams).run(x),
        "ONNX Runtime": computed(path, {"x": x})[0],
    }


def last_step(made: Ready) -> Tensor:
    """The step of the last quantizer of the plan: with ``CNN`` on the output, with ``Dataflow`` before the last layer."""
    names = [name for name in made.q.plan if made.q.plan.site(name).role == "activation"]
    return made.qparams[names[-1]].scale


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
    outputs, step = three_ways(made, example, test, path), last_step(made)
    assert are_four_bits(made, path) == (bits == 4)
    for pair in itertools.combinations(outputs, 2):
        steps = (outputs[pair[0]] - outputs[pair[1]]).abs() / step
        beyond = int((steps > 1 + TOLERANCE).sum())
        if strategy == "CNN":  # the output is on the grid: another code is one whole step away
            assert beyond == 0, pair
        assert beyond <= 0.001 * steps.numel(), pair
        assert int((steps > 0.5).sum()) <= 0.005 * steps.numel(), pair
    right = [int((output.argmax(1) == labels).sum()) for output in outputs.values()]
    assert max(right) - min(right) <= 1 and min(right) > 0.9 * len(labels)
