"""What the numerics cost: searches of observers against the plain loops that define them, LSQ against torch's own kernel.

Interleaved medians on one thread: ``mse`` per tensor against 95 passes over (64, 256, 14, 14), per channel against 80
passes over (512, 512, 3, 3), ``ema_quantile`` against a loop over 2048 bins; forward and backward of ``learnable`` per
tensor, eager and compiled, against ``torch._fake_quantize_learnable_per_tensor_affine``. ``--json FILE`` writes the
figures, ``--skip-compile`` leaves the compiled row out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from measure import medians, write
from torch import Tensor

import sophq_func as sq
from sophq_func.numerics.ranges import range_to_qparams

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


def lsq(x: Tensor, g: Tensor, compiled: bool = False) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward of ``learnable`` per tensor."""
    fq, scheme, zero = sq.fake_quantizer("learnable"), sq.QScheme(), torch.tensor(0, dtype=torch.int32)

    def apply(x: Tensor, scale: Tensor) -> Tensor:
        return fq.apply(x, sq.QParams(scale, zero, {}), scheme)

    forward = torch.compile(apply, fullgraph=True) if compiled else apply

    def step() -> tuple[Tensor, ...]:
        leaves = x.detach().requires_grad_(), torch.tensor(0.03, requires_grad=True)
        return torch.autograd.grad(forward(*leaves), leaves, g)

    return step


def torch_lsq(x: Tensor, g: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """The same by torch's kernel."""

    def step() -> tuple[Tensor, ...]:
        scale, zero = torch.tensor([0.03], requires_grad=True), torch.tensor([0.0], requires_grad=True)
        leaves = x.detach().requires_grad_(), scale, zero
        factor = (x.numel() * 127) ** -0.5
        out = torch._fake_quantize_learnable_per_tensor_affine(*leaves, -128, 127, factor)
        return torch.autograd.grad(out, leaves, g)

    return step


def report_lsq(x: Tensor, rounds: int, compiled: bool) -> dict[str, float]:
    """Print and return seconds and ratios of the quantizer with learned scale."""
    g = torch.randn_like(x)
    candidates = {"clone": x.clone, "torch": torch_lsq(x, g), "eager": lsq(x, g)}
    candidates |= {"compiled": lsq(x, g, compiled=True)} if compiled else {}
    found = medians(candidates, rounds)
    for name, seconds in found.items():
        ratios = f"{seconds / found['torch']:6.3f} of torch's kernel  {seconds / found['clone']:6.1f} clones"
        print(f"learnable, {name:<13} {1000 * seconds:8.2f} ms  {ratios}")
    return {**found, **{f"{name} ratio": seconds / found["torch"] for name, seconds in found.items()}}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--skip-compile", action="store_true")
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
    rows: dict[str, object] = {}
    for name, (plain, ours) in pairs.items():
        found = medians({"plain": plain, "ours": ours}, options.rounds)
        same = float((plain() == ours()).float().mean())
        ratio = found["plain"] / found["ours"]
        rows[name] = {**found, "ratio": ratio, "same": same}
        times = f"{1000 * found['plain']:8.1f} ms plain  {1000 * found['ours']:8.1f} ms"
        print(f"{name:<24} {times}  {ratio:6.1f} times faster  {100 * same:.0f} % the same")
    rows["learnable"] = report_lsq(x, 3 * options.rounds, not options.skip_compile)
    if options.json:
        write(options.json, rows)


if __name__ == "__main__":
    main()
