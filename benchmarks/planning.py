"""What planning costs: a model of 1,000 leaf modules with 50 rules, in seconds, in memory, and in copied weights.

``python benchmarks/planning.py [--leaves 1000] [--rules 50] [--rounds 5] [--json FILE]``. Each figure is also given as a
ratio to one forward of the model, measured in the same run. ``--layers 1000 2000 5000`` measures how it grows instead: a
plan without rules, its build and ``q.train()`` for each number of leaf modules, and the exponent from the first number to
the last.
"""

from __future__ import annotations

import argparse
import math
import tracemalloc
from pathlib import Path

import torch
from measure import medians, write
from torch import Tensor, nn

import sophq_func as sq


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
    inside = (tensor for tensor in vars(q)["_skeleton"].module.state_dict(keep_vars=True).values())
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


def stack(leaves: int, width: int) -> nn.Sequential:
    """A model of so many leaf modules."""
    return nn.Sequential(*(Block(width) for _ in range(leaves // 4))).eval()


def growth(numbers: list[int], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each step by number of leaf modules, and the exponent with which they grow."""
    x, config = torch.randn(1, 4, 2, 2), sq.QuantConfig()
    found: dict[str, dict[str, float]] = {}
    for leaves in numbers:
        model = stack(leaves, 4)
        graph = sq.trace(model, (x,))
        plan = sq.plan(graph, config)
        q = sq.build(model, plan)
        steps = {
            "trace": lambda model=model: sq.trace(model, (x,)),
            "plan": lambda graph=graph: sq.plan(graph, config),
            "build": lambda model=model, plan=plan: sq.build(model, plan),
            "train": lambda q=q: q.train(),
        }
        for name, seconds in medians(steps, rounds).items():
            found.setdefault(name, {})[str(leaves)] = seconds
    first, last = str(numbers[0]), str(numbers[-1])
    for row in found.values():
        row["exponent"] = math.log(row[last] / row[first]) / math.log(numbers[-1] / numbers[0])
    return found


def print_growth(found: dict[str, dict[str, float]]) -> None:
    """A line for each step."""
    for name, row in found.items():
        seconds = "  ".join(f"{leaves} {value:.3f} s" for leaves, value in row.items() if leaves != "exponent")
        print(f"{name:<8} {seconds}  exponent {row['exponent']:.2f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--leaves", type=int, default=1000)
    parser.add_argument("--rules", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.layers:
        rows = growth(options.layers, options.rounds)
        print_growth(rows)
        if options.json:
            write(options.json, rows)
        return
    model, x = stack(options.leaves, 64), torch.randn(1, 64, 8, 8)
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
