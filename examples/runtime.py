"""A quantized network in ONNX Runtime: whether it says what ``q.apply`` says, and how fast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import onnxruntime
import torch
from digits import BATCH, Params, accuracy
from torch import Tensor, nn

import sophq_func as sq

ROUNDS = 100
FLOAT = sq.QuantConfig(weight=None, activation=None)
Predict = Callable[[Tensor], Tensor]


class Deployed(NamedTuple):
    """A quantized network beside its ONNX file.

    Attributes:
      same, total: images for which the file and ``q.apply`` predict the same, of how many.
      steps: the largest difference of an output, in steps of the output's grid.
      accuracy: in percent, by candidate.
      milliseconds: of a batch, median, by candidate.
      kib: size of the quantized file, and of the float one.
    """

    same: int
    total: int
    steps: float
    accuracy: dict[str, float]
    milliseconds: dict[str, float]
    kib: tuple[float, float]


def deploy(
    model: nn.Module, q: sq.Quantized, params: Params, qparams: Mapping[str, sq.QParams], x: Tensor, y: Tensor, path: Path
) -> Deployed:
    """Write the float model and the quantized one beside each other, and compare them with ``q.apply`` on labelled images.

    Args:
      model: the float model.
      q, params, qparams: the quantized one, with a grid at its output.
      x, y: images and labels.
      path: of the quantized file; beside it comes ``float.onnx``.
    """
    original = path.with_name("float.onnx")
    plain, weights = sq.quantize(model, FLOAT, example_args=(x[:BATCH],)), sq.params_of(model)
    sq.export.onnx(plain, weights, {}, x[:BATCH], original)
    sq.export.onnx(q, params, qparams, x[:BATCH], path)
    candidates = {
        "float, ONNX Runtime": session(original),
        "W8A8, ONNX Runtime": session(path),
        "W8A8, q.apply": lambda images: q.apply(params, qparams, images),
    }
    with torch.no_grad():
        actual, expected = (candidates[name](x) for name in list(candidates)[1:])
    step = qparams[list(q.plan)[-1]].scale
    return Deployed(
        same=int((actual.argmax(1) == expected.argmax(1)).sum()),
        total=len(x),
        steps=float((actual - expected).abs().max() / step),
        accuracy={name: accuracy(predict, x, y) for name, predict in candidates.items()},
        milliseconds=medians(candidates, x[:BATCH]),
        kib=(path.stat().st_size / 1024, original.stat().st_size / 1024),
    )


def session(path: Path) -> Predict:
    """A function that runs a file, on as many threads as torch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    running = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = running.get_inputs()[0].name
    return lambda images: torch.from_numpy(running.run(None, {name: images.numpy()})[0])


@torch.no_grad()
def medians(candidates: Mapping[str, Predict], images: Tensor) -> dict[str, float]:
    """Median milliseconds of each candidate, called in turn, after a warm-up of each."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(ROUNDS + 1):
        for name, predict in candidates.items():
            start = time.perf_counter()
            predict(images)
            if turn:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}
