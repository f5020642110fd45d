"""What one quantizer costs, composed and by the compiled kernel.

``python benchmarks/kernels.py`` prints the table of docs/kernels.md: CPU microseconds of one thread, medians of interleaved
rounds. It compiles the kernel where that is not there.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from measure import medians
from torch import Tensor

import sophq_func as sq
from sophq_func.numerics import kernels, library, pieces

KEEP = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000", "OMP_NUM_THREADS": "1"}
"""What the process is started with: freed memory stays, as with jemalloc or tcmalloc."""

PER_TENSOR, PER_CHANNEL = sq.QScheme(bits=8), sq.QScheme(bits=8, granularity=sq.PerChannel(0))

SHAPES = {
    "activation, 2,048 elements": ((2048,), PER_TENSOR),
    "activation, 131,072": ((131072,), PER_TENSOR),
    "activation, 802,816": ((802816,), PER_TENSOR),
    "weight 16x144 with a BatchNorm": ((16, 144), PER_CHANNEL),
    "weight 128x1152 with a BatchNorm": ((128, 1152), PER_CHANNEL),
    "weight 512x1568 with a BatchNorm": ((512, 1568), PER_CHANNEL),
}
"""Tensors of small and large networks, and how they are quantized."""

SHORTEST = 2e-3
"""Seconds of one measurement at least, by repetition."""


def repeated(call: Callable[[], object]) -> tuple[Callable[[], None], int]:
    """A call made so often that the clock can tell how long it takes, and how often."""
    call()
    start = time.process_time()
    call()
    count = max(1, int(SHORTEST / max(time.process_time() - start, 1e-6)))

    def many() -> None:
        for _ in range(count):
            call()

    return many, count


def calls(fake: sq.FakeQuantize, shape: tuple[int, ...], scheme: sq.QScheme) -> Iterator[tuple[str, Callable[[], object]]]:
    """Forward without gradients, and forward with backward to the tensor, the scale and the factor."""
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    scales = () if scheme is PER_TENSOR else shape[:1]
    scale, zero = torch.full(scales, 0.02), torch.zeros(scales, dtype=torch.int32)
    factor = None if scheme is PER_TENSOR else 0.5 + torch.rand((shape[0], 1), generator=generator)

    def quantized(x: Tensor, scale: Tensor, factor: Tensor | None) -> Tensor:
        qparams = sq.QParams(scale, zero, {})
        if factor is None:
            return fake.apply(x, qparams, scheme)
        assert fake.prepare is not None, "the learned quantizer has it"
        return fake.prepare(x, factor, qparams, scheme)()

    learned = [None if t is None else t.clone().requires_grad_() for t in (x, scale, factor)]
    leaves = [t for t in learned if t is not None]
    forward = torch.no_grad()(quantized)
    yield "forward", lambda: forward(x, scale, factor)
    yield "with backward", lambda: torch.autograd.grad(quantized(*learned), leaves, g)  # type: ignore[arg-type]


def measured(shape: tuple[int, ...], scheme: sq.QScheme, rounds: int) -> dict[str, float]:
    """Microseconds of each call by each way, and of a copy of the tensor."""
    spec, x = sq.fake_quantize.learnable(), torch.randn(shape)
    config = sq.QuantizerConfig(scheme=scheme, observer="minmax", fake_quantize=spec)
    served = partial(kernels.served, config=config, kernels=library.compiled())
    candidates: dict[str, Callable[[], object]] = {"copy": x.clone}
    for way, fake in {"composed": pieces.build(spec), "kernel": pieces.build(spec, served)}.items():
        candidates |= {f"{what}, {way}": call for what, call in calls(fake, shape, scheme)}
    made = {name: repeated(call) for name, call in candidates.items()}
    seconds = medians({name: many for name, (many, _) in made.items()}, rounds, time.process_time)
    return {name: 1e6 * seconds[name] / count for name, (_, count) in made.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    if not KEEP.items() <= os.environ.items():  # glibc reads them when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    torch.set_num_threads(1)
    columns = ("copy", "forward, composed", "forward, kernel", "with backward, composed", "with backward, kernel")
    print(f"| microseconds | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|", sep="\n")
    for name, (shape, scheme) in SHAPES.items():
        found = measured(shape, scheme, options.rounds)
        print(f"| {name} | {' | '.join(f'{found[column]:.0f}' for column in columns)} |", flush=True)


if __name__ == "__main__":
    main()
