"""ONNX Runtime for tests: files and what it computes with them; a module that needs it is skipped where it is missing."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

LEVELS = onnxruntime.GraphOptimizationLevel


def session(path: Path | bytes, level: Any = LEVELS.ORT_ENABLE_ALL, optimized: Path | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.intra_op_num_threads, options.log_severity_level = level, 1, 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # weights only means weights only
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def computed(path: Path, inputs: dict[str, Tensor], level: Any = LEVELS.ORT_ENABLE_ALL) -> list[Tensor]:
    found = session(path, level).run(None, {name: x.numpy() for name, x in inputs.items()})
    return [torch.from_numpy(x) for x in found]


def kernels(path: Path, folder: Path) -> Counter[str]:
    """The operators of the graph that ONNX Runtime makes of the file."""
    session(path, optimized=folder / "optimized.onnx")
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


@functools.cache
def adds_in_16_bits() -> bool:
    """Whether ONNX Runtime adds two products of uint8 and int8 in 16 bits, where they saturate, as without VNNI on x86."""
    rows = torch.full((4, 64), 255, dtype=torch.uint8)
    weight = onnx.numpy_helper.from_array(torch.full((64, 16), 127, dtype=torch.int8).numpy(), "weight")
    node = onnx.helper.make_node("MatMulInteger", ["x", "weight"], ["y"])
    info = onnx.helper.make_tensor_value_info
    given, made = info("x", onnx.TensorProto.UINT8, rows.shape), info("y", onnx.TensorProto.INT32, (4, 16))
    opsets = [onnx.helper.make_opsetid("", 21)]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "sums", [given], [made], [weight]), opset_imports=opsets)
    model.ir_version = 10
    (found,) = session(model.SerializeToString()).run(None, {"x": rows.numpy()})
    return bool((found != 64 * 255 * 127).any())


def within_sums(bits: int) -> int:
    """``bits`` of weights, or the most whose sums are exact on this CPU: ``2 * 255 * 63`` is less than ``2 ** 15``."""
    return min(bits, 7) if adds_in_16_bits() else bits


def agree(actual: Tensor, expected: Tensor, share: float = 0.01) -> None:
    """Cosine 0.9999, and at most a share of values that differ by more than a step, one in 255 of the range.

    Two runtimes add up float32 in their own orders, and take different codes where a sum lies within that rounding of a tie:
    on grids of 256 codes, 16 roundings of the largest value are 2 ** -12 of a step, so one code in 2,000 may differ. Few of
    those are worth a step of the output, as what reads them averages, or adds up, dozens. For outputs of hundreds of values.
    """
    step = (expected.amax() - expected.amin()) / 255
    assert torch.cosine_similarity(actual.flatten().double(), expected.flatten().double(), dim=0) >= 0.9999
    assert ((actual - expected).abs() > step).float().mean() <= share
