"""How fast ``sq.export.torch`` is under inductor, against the compiled float model, and beside torchao's own PT2E.

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
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torchao.quantization.pt2e.inductor_passes import x86
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import sophq_func as sq

CONFIGS = {"affine": sq.QuantConfig(activation=sq.override(symmetric=False)), "symmetric": sq.QuantConfig()}


def by_pt2e(model: nn.Module, x: Tensor) -> nn.Module:
    """What torchao makes of the model, with its own quantizer."""
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (x,), strict=True).module(), quantizer)
    prepared(x)
    return convert_pt2e(prepared)


def measured(rounds: int) -> dict[str, dict[str, float]]:
    """For each way: time as a ratio to float, cosine to what it simulates, and how many convolutions were found."""
    subject = resnet18()
    model, (x,) = subject.make(), subject.args
    params = sq.params_of(model)
    ways: dict[str, tuple[nn.Module, Tensor]] = {}
    for name, config in CONFIGS.items():
        q = sq.quantize(model, config, example_args=(x,))
        qparams = q.calibrate(params, [x], progress=False)
        ways[name] = sq.export.torch(q, params, qparams, x).module(), q.apply(params, qparams, x)
    theirs = by_pt2e(subject.make(), x)
    ways["torchao PT2E"] = theirs, theirs(x)
    calls, rows = {"float": torch.compile(subject.make())}, {}
    for name, (module, expected) in ways.items():
        counters.clear()
        calls[name] = torch.compile(module)
        cosine = float(torch.cosine_similarity(calls[name](x).flatten(), expected.flatten(), dim=0))
        rows[name] = {"cosine": cosine, "integer convolutions": counters["inductor"]["qconv_weight_prepack_matcher_count"]}
    seconds = medians({name: lambda f=f: f(x) for name, f in calls.items()}, rounds)
    for name, row in rows.items():
        row |= {"seconds": seconds[name], "ratio": seconds[name] / seconds["float"]}
        print(f"{name:<14}{row['ratio']:6.2f} of float, cosine {row['cosine']:.5f}, {row['integer convolutions']} integer")
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
