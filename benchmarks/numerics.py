"""What the searches of observers cost, against the plain loops that define them.

Interleaved medians on one thread: ``mse`` per tensor against 95 passes over (64, 256, 14, 14), per channel against 80
passes over (512, 512, 3, 3), ``ema_quantile`` against a loop over 2048 bins. ``--json FILE`` writes the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import sophq_func as sq
from sophq_func.affine import range_to_qparams

PER_CHANNEL = sq.PerChannel(0)


def plain_mse(x: Tensor, scheme: sq.QScheme, candidates: int) -> Tensor:
    """The best range among the candidates, each tried on the whole tensor."""
    axes = tuple(range(x.ndim)) if scheme.granularity == sq.PerTensor() else tuple(range(1, x.ndim))
    lo, hi = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
    least, best = torch.full_like(lo, 1e10), hi
    for i in range(candidates):
        shrink = 1.0 - 0.01 * i
        scale, zero, _ = range_to_qparams(lo * shrink, hi * shrink, scheme)
        rounded = (torch.clamp(torch.round(x * (1 / scale)) + zero, scheme.qmin, scheme.qmax) - zero) * scale
        error = (rounded - x).square().mean(axes, keepdim=True)
        best = torch.where(error < least, hi * shrink, best)
        least = torch.minimum(error, least)
    return best.flatten()


def plain_quantile(x: Tensor, threshold: float, bins: int) -> Tensor:
    """The middle of the first bin up to which ``threshold`` of all sizes lie."""
    sizes = x.abs()
    reach = sizes.max()
    counts = torch.histc(sizes, bins, min=0, max=float(reach))
    total = torch.zeros(())
    for i in range(bins):
        total = total + counts[i]
        if total >= threshold * x.numel():
            return (i + 0.5) * reach / bins
    return reach


def upper(observer: sq.Observer, x: Tensor, scheme: sq.QScheme) -> Tensor:
    """The upper bound after one tensor."""
    return observer.update(observer.init(x, scheme), x, scheme).hi.flatten()


def medians(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate, called in turn, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    for _ in range(rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, weight = torch.randn(64, 256, 14, 14), torch.randn(512, 512, 3, 3) * torch.rand(512, 1, 1, 1)
    mse, quantile = sq.observer("mse"), sq.observer("ema_quantile")
    tensor, channel = sq.QScheme(), sq.QScheme(granularity=PER_CHANNEL)
    affine = sq.QScheme(symmetric=False)
    pairs: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "mse per tensor": (lambda: plain_mse(x, tensor, 95), lambda: upper(mse, x, tensor)),
        "mse per tensor, affine": (lambda: plain_mse(x, affine, 95), lambda: upper(mse, x, affine)),
        "mse per channel": (lambda: plain_mse(weight, channel, 80), lambda: upper(mse, weight, channel)),
        "ema_quantile": (lambda: plain_quantile(x, 0.99999, 2048), lambda: upper(quantile, x, tensor)),
    }
    rows = {}
    for name, (plain, ours) in pairs.items():
        found = medians({"plain": plain, "ours": ours}, options.rounds)
        same = float((plain() == ours()).float().mean())
        ratio = found["plain"] / found["ours"]
        rows[name] = {**found, "ratio": ratio, "same": same}
        times = f"{1000 * found['plain']:8.1f} ms plain  {1000 * found['ours']:8.1f} ms"
        print(f"{name:<24} {times}  {ratio:6.1f} times faster  {100 * same:.0f} % the same")
    if options.json:
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__, "threads": 1}
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
