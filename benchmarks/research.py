"""What the tools for research cost, in the network of the examples: interleaved medians on one thread.

``python benchmarks/research.py [--rounds 7]`` prints milliseconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import medians
from torch import Tensor
from torch.func import functional_call, grad, vmap

import sophq_func as sq

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from digits import Digits, load

Params = dict[str, Tensor]


def without_gradients(f: Callable[[], object]) -> Callable[[], object]:
    """``f`` under ``torch.no_grad``."""
    return torch.no_grad()(f)


def tools() -> dict[str, Callable[[], object]]:
    """Everything to measure, by name."""
    torch.manual_seed(0)
    model, (x, y, _, _) = Digits().eval(), load()
    x, y = x[:128], y[:128]
    config = sq.QuantConfig(strategy="CNN", weight=sq.override(bits=4), activation=sq.override(bits=4, symmetric=False))
    q, params = sq.quantize(model, config, example_args=(x[:2],)), sq.params_of(model)
    qparams = q.calibrate(params, [x])
    scales, rest = q.split(qparams)
    weights = sorted(q.plan.site(name).parameter for name in q.plan if q.plan.site(name).parameter)
    noise = sq.rademacher(params, weights, 8, torch.Generator().manual_seed(0))
    start, four = {name: signs[0] for name, signs in noise.items()}, sq.stack([qparams] * 4)

    def float_loss(params: Params) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (x,)), y)

    def quantized_loss(params: Params) -> Tensor:
        return F.cross_entropy(q.apply(params, qparams, x), y)

    def loss(scales: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(q.apply(params, sq.merge(scales, rest), x), y)

    def example_loss(scales: Params, x: Tensor, y: Tensor) -> Tensor:
        return loss(scales, x[None], y[None])

    def width_loss(bits: Tensor) -> Tensor:
        return F.cross_entropy(q.apply(params, sq.with_bits(qparams, q.plan, bits), x), y)

    def sensitivity(how: str) -> object:
        return sq.sensitivity(q, params, qparams, x, lambda out: F.cross_entropy(out, y), how=how, progress=False)

    chosen = {name: params[name] for name in weights}
    return {
        "forward, quantized": without_gradients(lambda: q.apply(params, qparams, x)),
        f"sensitivity of {len(q.plan)} quantizers, loop": lambda: sensitivity("loop"),
        f"sensitivity of {len(q.plan)} quantizers, vmap": lambda: sensitivity("vmap"),
        "gradient of weights, float": lambda: grad(lambda w: float_loss({**params, **w}))(chosen),
        "gradient of weights, quantized": lambda: grad(lambda w: quantized_loss({**params, **w}))(chosen),
        "trace, 8 samples, float": lambda: sq.hessian_trace(float_loss, params, noise),
        "trace, 8 samples, quantized": lambda: sq.hessian_trace(quantized_loss, params, noise),
        f"top eigenvalue, 10 steps, {len(weights)} weights": lambda: sq.top_eigenvalue(float_loss, params, start, 10),
        "gradient of scales, whole batch": lambda: grad(loss)(scales, x, y),
        "gradient of scales, 128 examples, vmap": lambda: vmap(grad(example_loss), (None, 0, 0))(scales, x, y),
        "gradient of scales, 128 examples, loop": lambda: [
            grad(example_loss)(scales, *one) for one in zip(x, y, strict=True)
        ],
        "gradient of a bit width": lambda: grad(width_loss)(torch.tensor(4.0)),
        "4 settings, vmap": without_gradients(lambda: vmap(lambda s: q.apply(params, s, x))(four)),
        "4 settings, loop": without_gradients(lambda: [q.apply(params, qparams, x) for _ in range(4)]),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    torch.set_num_threads(1)
    print("| what | ms |\n|---|---|")
    for name, seconds in medians(tools(), parser.parse_args().rounds).items():
        print(f"| {name} | {1e3 * seconds:.0f} |")


if __name__ == "__main__":
    main()
