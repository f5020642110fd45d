"""What ``vmap`` costs on a large weight: eight members in one map against a loop over them.

Interleaved medians, with one thread and with two: ``learnable`` per channel on a weight of 1024 x 1024, forward and gradient
to weight and scale, with stacked weights and scales, with one weight under stacked scales, and under stacked bounds of the
codes. The gradient to the bit widths themselves, which the composition computes, in both, is the last row.
``--json FILE`` writes the figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from measure import medians, write
from torch import Tensor

import sophq_func as sq

SIZE = 1024
MEMBERS = 8

Call = Callable[[], object]
Case = tuple[Call, Call]
"""The map, and the loop that it replaces."""


def cases() -> Mapping[str, Case]:
    """What is measured, by name."""
    scheme = sq.QScheme(bits=4, granularity=sq.PerChannel(0))
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    observer, fq = sq.observer("minmax"), sq.fake_quantizer("learnable")
    state = observer.update(observer.init(weight, scheme), weight, scheme)
    qparams = fq.init(observer.qparams(state, scheme), weight, scheme)
    weights = torch.stack([weight + 0.01 * i for i in range(MEMBERS)])
    scales = torch.stack([qparams.scale * (1 + 0.01 * i) for i in range(MEMBERS)])
    widths = torch.arange(1.0, MEMBERS + 1)

    def rounded(weight: Tensor, scale: Tensor) -> Tensor:
        return fq.apply(weight, qparams._replace(scale=scale), scheme)

    def resized(weight: Tensor, scale: Tensor, bits: Tensor) -> Tensor:
        half = torch.exp2(bits - 1)
        bounds = {"qmax": half - 1, "qmin": -half}
        return fq.apply(weight, qparams._replace(scale=scale, extras=bounds), scheme)

    def summed(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: f(*args).square().sum()

    of_weight_and_scale = torch.func.grad(summed(rounded), argnums=(0, 1))
    of_resized = torch.func.grad(summed(resized), argnums=(0, 1))
    of_widths = torch.func.grad(summed(resized), argnums=2)
    scale = qparams.scale
    return {
        "forward, weights and scales": both(rounded, weights, scales, mapped=(0, 0)),
        "forward, scales": both(rounded, weight, scales, mapped=(None, 0)),
        "forward, bounds": both(resized, weight, scale, widths, mapped=(None, None, 0)),
        "gradient, weights and scales": both(of_weight_and_scale, weights, scales, mapped=(0, 0)),
        "gradient, scales": both(of_weight_and_scale, weight, scales, mapped=(None, 0)),
        "gradient, bounds": both(of_resized, weight, scale, widths, mapped=(None, None, 0)),
        "gradient to the widths": both(of_widths, weight, scale, widths, mapped=(None, None, 0)),
    }


def both(f: Callable[..., object], *args: Tensor, mapped: tuple[int | None, ...]) -> Case:
    """A map of a function, and a loop."""

    def loop() -> list[object]:
        members = [[t if axis is None else t[i] for t, axis in zip(args, mapped, strict=True)] for i in range(MEMBERS)]
        return [f(*own) for own in members]

    return lambda: torch.vmap(f, mapped)(*args), loop


def main() -> None:
    """Print seconds and ratios, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    rows: dict[str, float] = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name, (mapped, loop) in cases().items():
            found = medians({"map": mapped, "loop": loop}, options.rounds)
            ratio = found["map"] / found["loop"]
            print(
                f"{threads} threads: {name:<30} {1000 * found['map']:7.1f} ms, loop {1000 * found['loop']:7.1f}"
                f" ms, ratio {ratio:5.2f}"
            )
            rows |= {f"{name}, {threads} threads, {way}": seconds for way, seconds in found.items()}
            rows[f"{name}, {threads} threads, ratio"] = ratio
    if options.json:
        write(options.json, rows)


if __name__ == "__main__":
    main()
