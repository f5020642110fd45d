"""EfficientNet-Lite0 by other libraries and by this one: the same weights, pictures and metric, in one run.

    pip install brevitas nncf onnxruntime
    python benchmarks/algorithms_peers.py --images images.pt --json algorithms_peers.json

``images.pt`` is that of ``benchmarks/algorithms.py``. A peer that is not installed is left out. Seconds are those of the
processor, on one thread, without the calibration of ranges where the library separates it: with NNCF and ONNX Runtime they
include it.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from algorithms import FEW_STEPS, Lite0, Row, timed
from torch import Tensor, nn

import sophq_func as sq


class Grid(NamedTuple):
    """How weights are quantized; values have 8 bits, affine, one scale a tensor.

    Attributes:
      name: for people.
      bits: of the weights.
      granularity: of the weights: ``"per_channel"`` or ``"per_tensor"``.
    """

    name: str
    bits: int
    granularity: str


GRIDS = (Grid("W4A8, per channel", 4, "per_channel"), Grid("W8A8, per tensor", 8, "per_tensor"))

Found = Iterator[tuple[str, Callable[[Tensor], Tensor], float]]
"""Methods: name, the quantized network, seconds."""


def ours(network: Lite0, grid: Grid) -> Found:
    """Rounding, corrections, reconstruction."""
    observer = "mse" if grid.bits == 4 else "minmax"
    q, params = network.planned(grid.bits, grid.granularity, observer, observer), network.params
    qparams = q.calibrate(params, network.calibration, progress=False)
    data = network.calibration[:2]
    methods: dict[str, Callable[[], Any]] = {
        "rounding": lambda: (params, qparams),
        "correct_biases": lambda: sq.algorithms.correct_biases(q, params, qparams, data, progress=False),
        "reestimate_norms": lambda: sq.algorithms.reestimate_norms(q, params, qparams, data, progress=False),
    }
    if grid.bits == 4:
        methods["brecq"] = lambda: sq.algorithms.brecq(q, params, qparams, data, progress=False, **FEW_STEPS)
    for name, method in methods.items():
        setting, seconds = timed(method)
        frozen, baked = q.freeze(*setting)
        yield name, partial(frozen.apply, baked, setting[1]), seconds


def brevitas(network: Lite0, grid: Grid) -> Found:
    """Rounding, and bias correction."""
    from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas_examples.imagenet_classification.ptq.ptq_common import create_quant_maps

    def quantized() -> nn.Module:
        maps = create_quant_maps(
            dtype=torch.float32,
            bias_bit_width=None,
            weight_bit_width=grid.bits,
            weight_param_method="mse" if grid.bits == 4 else "stats",
            weight_scale_type="float_scale",
            weight_quant_type="sym",
            weight_quant_granularity=grid.granularity,
            weight_narrow_range=False,
            weight_quant_format="int",
            act_quant_format="int",
            act_bit_width=8,
            act_scale_type="float_scale",
            act_scale_computation_type="static",
            act_param_method="stats",
            act_quant_type="asym",
            act_quant_granularity="per_tensor",
            act_quant_percentile=99.999,
        )
        return layerwise_quantize(copy.deepcopy(network.model), compute_layer_map=maps[1]).eval()

    def run_in(mode: Callable[[nn.Module], Any], model: nn.Module, batches: list[Tensor]) -> nn.Module:
        with torch.no_grad(), mode(model):
            for batch in batches:
                model(batch)
        return model.eval()

    rounded = run_in(calibration_mode, quantized(), network.calibration)
    yield "rounding", rounded, 0.0
    model = quantized()
    model.load_state_dict(rounded.state_dict())
    corrected, seconds = timed(lambda: run_in(bias_correction_mode, model, network.calibration[:2]))
    yield "bias correction", corrected, seconds


def nncf(network: Lite0, grid: Grid) -> Found:
    """Rounding with its fast bias correction; it refuses weights of 4 bits."""
    if grid.bits != 8:
        return
    import nncf as library
    from nncf.common.quantization.structs import QuantizationScheme
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters

    is_per_channel = grid.granularity == "per_channel"
    weights = QuantizationParameters(num_bits=grid.bits, per_channel=is_per_channel, mode=QuantizationScheme.SYMMETRIC)
    values = QuantizationParameters(num_bits=8, per_channel=False, mode=QuantizationScheme.ASYMMETRIC)
    advanced = AdvancedQuantizationParameters(weights_quantization_params=weights, activations_quantization_params=values)
    images = [image.unsqueeze(0) for batch in network.calibration for image in batch]
    model, seconds = timed(
        lambda: library.quantize(
            copy.deepcopy(network.model), library.Dataset(images), subset_size=len(images), advanced_parameters=advanced
        )
    )
    yield "rounding, fast bias correction", model, seconds


def onnxruntime(network: Lite0, grid: Grid) -> Found:
    """Static quantization; its weights have 8 bits."""
    if grid.bits != 8:
        return
    import onnxruntime as runtime
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """The pictures of the calibration."""

        def __init__(self) -> None:
            self._batches = iter(network.calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"x": batch.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        exact, prepared, rounded = (str(Path(folder) / f"{name}.onnx") for name in ("exact", "prepared", "rounded"))
        dynamic = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(
            network.model, (network.calibration[0],), exact, input_names=["x"], dynamic_shapes=dynamic, verbose=False
        )
        quant_pre_process(exact, prepared)
        write = partial(quantize_static, prepared, rounded, Reader(), per_channel=False, weight_type=QuantType.QInt8)
        _, seconds = timed(write)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        session = runtime.InferenceSession(rounded, options, providers=["CPUExecutionProvider"])
    yield "static", lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), seconds


LIBRARIES: dict[str, Callable[[Lite0, Grid], Found]] = {
    "sophq_func": ours,
    "brevitas": brevitas,
    "nncf": nncf,
    "onnxruntime": onnxruntime,
}


def measured(network: Lite0, library: str) -> Iterator[Row]:
    """The rows of one library."""
    title = library if library == "sophq_func" else f"{library} {version(library)}"
    for grid in GRIDS:
        for name, run, seconds in LIBRARIES[library](network, grid):
            same = network.choices(run) == network.wanted
            yield Row(title, grid.name, name, float(same.float().mean()) * 100, seconds)


def main() -> None:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="file of the images")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--only", choices=sorted(LIBRARIES), help="one library alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    network, rows = Lite0(options.images), []
    for library in LIBRARIES:
        if options.only not in (None, library) or importlib.util.find_spec(library) is None:
            continue
        for row in measured(network, library):
            rows.append(row)
            sys.stdout.write(f"{row.network:20} {row.grid:20} {row.method:34} {row.percent:6.1f} % {row.seconds:7.1f} s\n")
            sys.stdout.flush()
    if options.json is not None:
        options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
