"""What planning costs: a model of 1,000 leaf modules with 50 rules, in seconds, in memory, and in copied weights.

``python benchmarks/planning.py [--leaves 1000] [--rules 50] [--rounds 5] [--json FILE]``. Each figure is also given as a
ratio to one forward of the model, measured in the same run.

``--growth 1000 2000 5000`` measures models of these sizes instead, in seconds of the processor, and gives the exponent
between the first and the last: 1 is linear.
"""

from __future__ import annotations

import argparse
import math
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from measure import medians, write
from torch import Tensor, nn

import sophq_func as sq

T = TypeVar("T")


class Block(nn.Module):
    """Four leaf modules and an addition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn, self.relu = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.relu(self.bn(self.conv1(x))))


def weights_copied(model: nn.Module, config: sq.QuantConfig, x: Tensor) -> int:
    """How many bytes of the model's own tensors a built plan holds a second time."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}
    params = sq.params_of(model)
    shared = {tensor.untyped_storage().data_ptr() for tensor in params.values()}
    q = sq.quantize(model, config, example_args=(x,))
    inside = (tensor for tensor in q.engine.skeleton.module.state_dict(keep_vars=True).values())
    return sum(t.nbytes for t in inside if t.device.type != "meta") + sum(t.nbytes for t in params.values()) * (
        shared != own
    )


def peak_memory(model: nn.Module, config: sq.QuantConfig, x: Tensor) -> int:
    """Largest number of bytes that Python held while tracing, planning and building."""
    tracemalloc.start()
    sq.quantize(model, config, example_args=(x,))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def seconds_of(leaves: int) -> dict[str, float]:
    """Seconds of the processor that each step takes for a network of so many leaf modules."""
    model, x = nn.Sequential(*(Block(4) for _ in range(leaves // 4))).eval(), torch.randn(1, 4, 4, 4)
    config, found = sq.QuantConfig(chip="BM1688"), {}

    def timed(name: str, step: Callable[[], T]) -> T:
        start = time.process_time()
        result = step()
        found[name] = time.process_time() - start
        return result

    graph = timed("trace", lambda: sq.trace(model, (x,)))
    plan = timed("plan", lambda: sq.plan(graph, config))
    q = timed("build", lambda: sq.build(model, plan))
    timed("train", q.train)
    return found


def growth(sizes: Sequence[int], rounds: int) -> dict[str, dict[str, float]]:
    """For each step, the least seconds for each size, and the exponent from the first size to the last."""
    runs = {size: [seconds_of(size) for _ in range(rounds)] for size in sizes}
    rows: dict[str, dict[str, float]] = {}
    for step in runs[sizes[0]][0]:
        least = {size: min(run[step] for run in runs[size]) for size in sizes}
        exponent = math.log(least[sizes[-1]] / least[sizes[0]]) / math.log(sizes[-1] / sizes[0])
        rows[step] = {**{str(size): seconds for size, seconds in least.items()}, "exponent": exponent}
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--leaves", type=int, default=1000)
    parser.add_argument("--rules", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--growth", type=int, nargs="+", metavar="LEAVES")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.growth:
        grown = growth(options.growth, options.rounds)
        for step, row in grown.items():
            print(f"{step:<8}" + "".join(f"{size:>10}: {value:6.2f}" for size, value in row.items()))
        if options.json:
            write(options.json, grown)
        return
    model, x = nn.Sequential(*(Block(64) for _ in range(options.leaves // 4))).eval(), torch.randn(1, 64, 8, 8)
    rules = tuple(
        sq.Rule(name=f"{i}.conv1", weight=sq.override(bits=4)) for i in range(min(options.rules, options.leaves // 4))
    )
    config = sq.QuantConfig(chip="BM1688", rules=rules)
    graph = sq.trace(model, (x,))
    plan = sq.plan(graph, config)
    with torch.no_grad():
        found = medians(
            {
                "forward of the model": lambda: model(x),
                "trace": lambda: sq.trace(model, (x,)),
                "plan": lambda: sq.plan(graph, config),
                "build": lambda: sq.build(model, plan),
                "quantize: all three": lambda: sq.quantize(model, config, example_args=(x,)),
            },
            options.rounds,
        )
    base = found["forward of the model"]
    rows = {name: {"seconds": seconds, "ratio": seconds / base} for name, seconds in found.items()}
    for name, row in rows.items():
        print(f"{name:<24} {row['seconds']:7.3f} s  {row['ratio']:7.1f} forwards")
    memory = {"peak_bytes": peak_memory(model, config, x), "copied_bytes": weights_copied(model, config, x)}
    weights = sum(t.nbytes for t in sq.params_of(model).values())
    print(f"{options.leaves} leaf modules, {len(plan)} quantizers, {len(rules)} rules, {weights / 2**20:.1f} MiB of weights")
    print(
        f"peak memory beyond the model {memory['peak_bytes'] / 2**20:.1f} MiB, weights copied {memory['copied_bytes']} bytes"
    )
    if options.json:
        write(options.json, {**rows, "memory": memory})


if __name__ == "__main__":
    main()
