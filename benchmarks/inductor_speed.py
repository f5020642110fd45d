"""How fast ``sq.export.torch`` is under inductor, against the compiled float model.

    pip install -c constraints.txt . torchao
    python benchmarks/inductor_speed.py

ResNet-18 at 4x3x224x224, one thread, W8A8, weights frozen in both; they take turns, and figures are medians. The passes
that look for integer kernels on x86 belong to torchao.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch._inductor.config
from measure import medians, write
from subjects import resnet18
from torch._dynamo.utils import counters
from torchao.quantization.pt2e.inductor_passes import x86

import sophq_func as sq

CONFIGS = {"affine": sq.QuantConfig(activation=sq.override(symmetric=False)), "symmetric": sq.QuantConfig()}


def measured(rounds: int) -> dict[str, dict[str, float]]:
    """For each config: time as a ratio to float, cosine to ``q.apply``, and how many convolutions were found."""
    subject = resnet18()
    model, (x,) = subject.make(), subject.args
    params, rows = sq.params_of(model), {}
    compiled = torch.compile(subject.make())
    for name, config in CONFIGS.items():
        q = sq.quantize(model, config, example_args=(x,))
        qparams = q.calibrate(params, [x], progress=False)
        counters.clear()
        quantized = torch.compile(sq.export.torch(q, params, qparams, x).module())
        cosine = torch.cosine_similarity(quantized(x).flatten(), q.apply(params, qparams, x).flatten(), dim=0)
        found = counters["inductor"]["qconv_weight_prepack_matcher_count"]
        times = medians({"float": lambda: compiled(x), "int8": lambda f=quantized: f(x)}, rounds)
        ratio = times["int8"] / times["float"]
        rows[name] = {"time": ratio, "cosine to apply": float(cosine), "integer convolutions": found, **times}
        print(f"{name:<12}{ratio:6.2f} of float, cosine {float(cosine):.5f}, {found} integer convolutions", flush=True)
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch._inductor.config.freezing = True
    x86._register_quantization_weight_pack_pass()
    with torch.no_grad():
        rows = measured(options.rounds)
    if options.json:
        write(options.json, rows)


if __name__ == "__main__":
    main()
