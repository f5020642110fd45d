"""EfficientNet-Lite0 by other libraries and by this one: the same weights, pictures and metric, in one run.

    pip install brevitas nncf onnxruntime
    python benchmarks/algorithms_peers.py --images images.pt --json algorithms_peers.json

``images.pt`` is that of ``benchmarks/algorithms.py``. Each library runs in a process of its own, since some replace
functions of torch. One that is not installed is left out, and named. Seconds are those of the processor, on one thread:
those of rounding are what the ranges take, those of other methods come on top, unless a library does both in one call.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import os
import subprocess
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
from torch.nn.utils.fusion import fuse_conv_bn_eval

import sophq_func as sq


class Grid(NamedTuple):
    """How weights are quantized; values have 8 bits, affine, one scale a tensor.

    Attributes:
      name: for people.
      bits: of the weights.
      granularity: of the weights: ``"per_channel"`` or ``"per_tensor"``.
      is_folded: whether the weights that are rounded have the BatchNorms in them. With one scale for a tensor it decides:
        a real BatchNorm behind the rounded weight is a scale for each channel.
    """

    name: str
    bits: int
    granularity: str
    is_folded: bool


GRIDS = (
    Grid("W8A8, per tensor, BatchNorms folded", 8, "per_tensor", is_folded=True),
    Grid("W8A8, per tensor, BatchNorms apart", 8, "per_tensor", is_folded=False),
    Grid("W4A8, per channel", 4, "per_channel", is_folded=True),
)

LARGEST_DEVIATION = 1e-4
"""Of the logits of a rewritten float network, relative to the largest one."""

Found = Iterator[tuple[str, Callable[[Tensor], Tensor], float]]
"""Methods: name, the quantized network, seconds."""


class Affine(nn.Module):
    """What a BatchNorm computes in evaluation mode, as a layer that nothing is folded into.

    Args:
      norm: the BatchNorm.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        self.scale = nn.Parameter(scale.reshape(-1, 1, 1))
        self.shift = nn.Parameter((norm.bias - norm.running_mean * scale).reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def _into(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[nn.Module, nn.Module]:
    """A convolution with its BatchNorm folded into it, and nothing."""
    return fuse_conv_bn_eval(conv, norm), nn.Identity()


def _beside(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[nn.Module, nn.Module]:
    """A convolution, with a bias that can be corrected, and its BatchNorm as a layer of its own."""
    conv.bias = nn.Parameter(torch.zeros(conv.out_channels))
    return conv, Affine(norm)


def rewritten(network: Lite0, change: Callable[[nn.Conv2d, nn.BatchNorm2d], tuple[nn.Module, nn.Module]]) -> nn.Module:
    """A copy of the float network with other layers for each convolution and its BatchNorm, and the same outputs."""
    model = copy.deepcopy(network.model)
    units = [module for module in model.modules() if isinstance(module, nn.Sequential)]
    for unit in units:
        for i, (conv, norm) in enumerate(itertools.pairwise(list(unit))):
            if isinstance(norm, nn.BatchNorm2d):
                unit[i], unit[i + 1] = change(conv, norm)
    model.eval().requires_grad_(False)
    x = network.evaluation[0]
    wanted = network.model(x)
    deviation = float((model(x) - wanted).abs().max() / wanted.abs().max())
    if deviation > LARGEST_DEVIATION:
        raise ValueError(f"the rewritten float network deviates by {deviation:.1e}")
    return model


def float_network(network: Lite0, grid: Grid) -> nn.Module:
    """What a peer is given, which folds no BatchNorm by itself."""
    return rewritten(network, _into) if grid.is_folded else copy.deepcopy(network.model)


def ours(network: Lite0, grid: Grid) -> Found:
    """Rounding, corrections, reconstruction. The strategy folds BatchNorms, unless they are layers of another class."""
    if not grid.is_folded:
        network = copy.copy(network)
        network.model = rewritten(network, _beside)
        network.params = sq.params_of(network.model)
    observer = "mse" if grid.bits == 4 else "minmax"
    q, params = network.planned(grid.bits, grid.granularity, observer, observer), network.params
    qparams, seconds = timed(lambda: q.calibrate(params, network.calibration, progress=False))
    frozen, baked = q.freeze(params, qparams)
    yield "rounding", partial(frozen.apply, baked, qparams), seconds
    data = network.calibration[:2]
    correct = partial(sq.algorithms.correct_biases, q, progress=False)
    move = partial(sq.algorithms.reestimate_norms, q, params, qparams, progress=False)
    methods: dict[str, Callable[[], Any]] = {
        "`correct_biases`": lambda: correct(params, qparams, data),
    }
    if grid.bits == 8:
        every = partial(correct, params, qparams, network.calibration, order="sequential")
        methods["`correct_biases`, sequential, 128 images"] = every
    if grid.is_folded:
        methods["`reestimate_norms`"] = lambda: move(data)
        methods["`reestimate_norms`, `correct_biases`"] = lambda: correct(*move(data), data, reference=params)
    if grid.bits == 4:
        methods["`brecq`"] = lambda: sq.algorithms.brecq(q, params, qparams, data, progress=False, **FEW_STEPS)
    for name, method in methods.items():
        setting, seconds = timed(method)
        frozen, baked = q.freeze(*setting)
        yield name, partial(frozen.apply, baked, setting[1]), seconds


def brevitas(network: Lite0, grid: Grid) -> Found:
    """Rounding, bias correction, and statistics of BatchNorms, in the order of its own example of such networks."""
    from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas_examples.imagenet_classification.ptq.ptq_common import create_quant_maps

    data = network.calibration[:2]

    def quantized(model: nn.Module) -> nn.Module:
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
        return run_in(calibration_mode, layerwise_quantize(model, compute_layer_map=maps[1]).eval(), network.calibration)

    def run_in(mode: Callable[[nn.Module], Any], model: nn.Module, batches: list[Tensor]) -> nn.Module:
        with torch.no_grad(), mode(model):
            for batch in batches:
                model(batch)
        return model.eval()

    rounded, seconds = timed(lambda: quantized(float_network(network, grid)))
    yield "rounding", rounded, seconds
    model = copy.deepcopy(rounded)
    _, seconds = timed(lambda: run_in(bias_correction_mode, model, data))
    yield "bias correction", model, seconds


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
            float_network(network, grid), library.Dataset(images), subset_size=len(images), advanced_parameters=advanced
        )
    )
    yield "rounding, fast bias correction", model, seconds


def onnxruntime(network: Lite0, grid: Grid) -> Found:
    """Static quantization, with the BatchNorms folded as its own preparation does."""
    if not grid.is_folded:
        return
    import onnxruntime as runtime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
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
            network.model,
            (network.calibration[0],),
            exact,
            input_names=["x"],
            dynamic_shapes=dynamic,
            opset_version=21,  # the first one with integers of 4 bits
            verbose=False,
        )
        quant_pre_process(exact, prepared)
        write = partial(
            quantize_static,
            prepared,
            rounded,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=grid.granularity == "per_channel",
            weight_type=QuantType.QInt4 if grid.bits == 4 else QuantType.QInt8,
        )
        _, seconds = timed(write)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        session = runtime.InferenceSession(rounded, options, providers=["CPUExecutionProvider"])
    yield "rounding", lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), seconds


LIBRARIES: dict[str, Callable[[Lite0, Grid], Found]] = {
    "brevitas": brevitas,
    "nncf": nncf,
    "onnxruntime": onnxruntime,
    "sophq_func": ours,
}
"""By package, in the order of the table."""


def measured(network: Lite0, library: str, grid: Grid) -> Iterator[Row]:
    """The rows of one library on one grid."""
    for name, run, seconds in LIBRARIES[library](network, grid):
        same = network.choices(run) == network.wanted
        yield Row(library, grid.name, name, float(same.float().mean()) * 100, seconds)


def work(images: Path, library: str, out: Path) -> None:
    """One library in this process; writes its rows."""
    network, rows = Lite0(images), []
    for row in (row for grid in GRIDS for row in measured(network, library, grid)):
        rows.append(row)
        sys.stdout.write(f"{row.network:12} {row.grid:36} {row.method:42} {row.percent:6.1f} % {row.seconds:7.1f} s\n")
        sys.stdout.flush()
    out.write_text(json.dumps([row._asdict() for row in rows]))


def table(rows: list[Row], versions: dict[str, str]) -> str:
    """The rows in Markdown, one grid after the other."""
    lines = ["| weights | library | method | agreement, % | CPU s |", "|---|---|---|---|---|"]
    for row in (row for grid in GRIDS for row in rows if row.grid == grid.name):
        library = f"{row.network} {versions[row.network]}" if row.network in versions else f"`{row.network}`"
        lines.append(f"| {row.grid} | {library} | {row.method} | {row.percent:.1f} | {row.seconds:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the libraries, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="file of the images")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--only", choices=LIBRARIES, help="one library alone, in this process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only is not None:
        work(options.images, options.only, options.json or Path(os.devnull))
        return
    rows, versions = [], {"torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        for library in LIBRARIES:
            if importlib.util.find_spec(library) is None:
                sys.stdout.write(f"{library}: not installed\n")
                continue
            out = Path(folder) / f"{library}.json"
            command = [sys.executable, __file__, "--images", str(options.images), "--only", library, "--json", str(out)]
            done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
            if done.returncode:
                sys.stdout.write(f"{library}: it failed\n")
                continue
            rows += json.loads(out.read_text())
            if library != "sophq_func":
                versions[library] = version(library)
    sys.stdout.write(table([Row(**row) for row in rows], versions))
    if options.json is not None:
        options.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
