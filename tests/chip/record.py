"""Records what chips compute of a small network: ``CHIP_HOME=... python -m tests.chip.record``, with tpu-mlir 1.30.2.

The file holds parameters, input and scales, too, so that a test needs no random numbers and no calibration.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import sophq_func as sq
from sophq_func.reports._chip import tensor_of
from tests.chip.network import CHIPS, Operations, planned
from tools.chip import compiled

RECORDED = Path(__file__).parents[1] / "data" / "chip.npz"


def record() -> dict[str, np.ndarray]:
    """``params`` and ``x``; and for each chip ``<chip>/scales``, ``/zero_points`` and ``/codes``.

    Each is one array, in the order of the plan, as an entry of the file for each tensor would take more than its numbers.
    """
    torch.manual_seed(0)
    model, x = Operations().eval(), torch.randn(1, 2, 8, 8)
    params = {name: (2 * p if p.ndim > 1 else p).detach() for name, p in sq.params_of(model).items()}
    params["stem.1.running_var"] = torch.rand(4) + 0.5
    found = {"params": joined([params[name].numpy() for name in sorted(params)]), "x": x.numpy()}
    for name in CHIPS:
        found |= {f"{name}/{key}": value for key, value in of_chip(name, params, x).items()}
    return found


def of_chip(name: str, params: dict[str, Tensor], x: Tensor) -> dict[str, np.ndarray]:
    """What is recorded of one chip."""
    q = planned(name, Operations().eval(), x)
    qparams = q.calibrate(params, [x], progress=False)
    with tempfile.TemporaryDirectory() as folder:
        tables = sq.export.tables(q, params, qparams, folder, example_args=x, name="net")
        assert tables.readme is not None
        values = dict(np.load(compiled(Path(folder), tables.readme, {"x": x.numpy()})))
    tensors = {quantizer: tensor_of(q.plan, quantizer, values.keys()) for quantizer in compared(q)}
    codes = [np.round(values[tensor] / float(qparams[quantizer].scale)) for quantizer, tensor in tensors.items()]
    return {
        "scales": joined([qparams[quantizer].scale.detach().numpy() for quantizer in q.plan]),
        "zero_points": joined([qparams[quantizer].zero_point.detach().numpy() for quantizer in q.plan]),
        "codes": joined(codes).astype(np.int16),
    }


def compared(q: sq.Quantized) -> list[str]:
    """The quantizers whose values are recorded: all but those of weights and of terms of sums."""
    return [name for name in q.plan if q.plan.site(name).role != "weight" and not q.plan.site(name).is_term]


def joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([array.reshape(-1) for array in arrays])


if __name__ == "__main__":
    np.savez_compressed(RECORDED, **record())
