"""What ``sq.stage`` makes of a small network: CPU time of its derivatives, as ratios to those of the float network.

    python benchmarks/staged.py
    python benchmarks/staged.py --inductor --json staged.json

The network *tiny* (twenty convolutions with BatchNorm and ReLU at 4x8x8x8), W8A8 with learned scales, one thread. Float,
quantized and staged take turns; figures are medians, and the staged outputs are compared with the others bit by bit.
Freed memory is kept by the process, see ``speed.py``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import medians, write
from speed import KEEP
from subjects import tiny
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils import _pytree as pytree

import sophq_func as sq

Loss = Callable[[Any, Tensor], Tensor]
"""A loss of what is learned, and a batch."""

EXAMPLES = 32
"""How many examples ``vmap(grad)`` maps over."""


class Case(NamedTuple):
    """A function of a loss, and the arguments that it takes behind what is learned."""

    name: str
    of: Callable[[Loss], Callable[..., Any]]
    takes: str


CASES = (
    Case("grad", grad, "batch"),
    Case("vmap(grad)", lambda loss: vmap(grad(lambda one, x: loss(one, x[None])), (None, 0)), "examples"),
    Case("jvp", lambda loss: lambda one, way, x: jvp(lambda one: loss(one, x), (one,), (way,)), "tangents"),
    Case("HVP", lambda loss: lambda one, way, x: jvp(grad(lambda one: loss(one, x)), (one,), (way,)), "tangents"),
)


class Network:
    """The network and its quantized form."""

    def __init__(self) -> None:
        subject = tiny()
        self.model, (self.batch,) = subject.make(), subject.args
        kind = {"observer": sq.observers.minmax(), "fake_quantize": sq.fake_quantize.learnable()}
        config = sq.QuantConfig(
            strategy="Layers",
            weight=sq.QuantizerConfig(scheme=sq.QScheme(bits=8, granularity=sq.PerChannel()), **kind),
            activation=sq.QuantizerConfig(scheme=sq.QScheme(bits=8), **kind),
        )
        self.q = sq.quantize(self.model, config, example_args=(self.batch,))
        self.params = sq.params_of(self.model)
        self.qparams = self.q.calibrate(self.params, [self.batch], progress=False)
        self.scales, self.rest = self.q.split(self.qparams)
        self.weights = {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}
        self.buffers = {name: tensor for name, tensor in self.params.items() if name not in self.weights}
        self.examples = self.batch.repeat(EXAMPLES // len(self.batch), 1, 1, 1)

    def float_loss(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        """Of the weights."""
        return functional_call(self.model, {**weights, **self.buffers}, (x,)).square().mean()

    def loss(self, learned: tuple[dict[str, Tensor], dict[str, Tensor]], x: Tensor) -> Tensor:
        """Of weights and scales."""
        weights, scales = learned
        return self.q.apply({**weights, **self.buffers}, sq.merge(scales, self.rest), x).square().mean()

    def arguments(self, case: Case, one: Any) -> tuple[Any, ...]:
        """Of a case, for what is learned."""
        others = {"batch": (self.batch,), "examples": (self.examples,)}
        tangents = (pytree.tree_map(torch.ones_like, one), self.batch)
        return (one, *others.get(case.takes, tangents))


def bound(f: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """A call that is timed."""
    return lambda: f(*args)


def same_bits(one: Any, other: Any) -> bool:
    """Whether two trees hold the same numbers."""
    return all(map(torch.equal, pytree.tree_leaves(one), pytree.tree_leaves(other)))


def derivatives(network: Network, rounds: int) -> dict[str, dict[str, Any]]:
    """Figures of each case."""
    rows: dict[str, dict[str, Any]] = {}
    for case in CASES:
        both = (network.weights, network.scales)
        args, float_args = network.arguments(case, both), network.arguments(case, network.weights)
        plain, staged = case.of(network.loss), sq.stage(case.of(network.loss))
        start = time.perf_counter()
        found = staged(*args)
        seconds = time.perf_counter() - start
        calls = {
            "float": bound(case.of(network.float_loss), *float_args),
            "quantized": bound(plain, *args),
            "staged": bound(staged, *args),
        }
        is_same = same_bits(found, plain(*args))
        rows[case.name] = told(case.name, medians(calls, rounds, time.process_time), seconds, is_same)
    return rows


@torch.no_grad()
def forward(network: Network, rounds: int, inductor: bool) -> dict[str, dict[str, Any]]:
    """Figures of the forward; with inductor, as ratios to the compiled float network, too."""
    args = (network.params, network.qparams, network.batch)
    staged = sq.stage(network.q.apply)
    start = time.perf_counter()
    is_same = same_bits(staged(*args), network.q.apply(*args))
    seconds = time.perf_counter() - start
    calls = {
        "float": bound(network.model, network.batch),
        "quantized": bound(network.q.apply, *args),
        "staged": bound(staged, *args),
    }
    rows = {"forward": told("forward", medians(calls, rounds, time.process_time), seconds, is_same)}
    if inductor:
        compiled: nn.Module = torch.compile(network.model)  # type: ignore[assignment]
        fast = sq.stage(network.q.apply, backend="inductor")
        start = time.perf_counter()
        found = fast(*args)
        seconds = time.perf_counter() - start
        calls = {
            "float": bound(compiled, network.batch),
            "quantized": bound(torch.compile(network.q.apply, fullgraph=True), *args),
            "staged": bound(fast, *args),
        }
        is_same = same_bits(found, network.q.apply(*args))
        name = "forward, compiled"
        rows[name] = told(name, medians(calls, rounds, time.process_time), seconds, is_same)
    return rows


def told(name: str, found: dict[str, float], seconds: float, is_same: bool) -> dict[str, Any]:
    """Print a row, and return it."""
    ratios = {key: found[key] / found["float"] for key in ("quantized", "staged")}
    print(
        f"{name:<18} float {1e3 * found['float']:7.2f} ms  quantized {ratios['quantized']:5.2f}  "
        f"staged {ratios['staged']:5.2f}  recorded in {seconds:5.1f} s  same bits {is_same}",
        flush=True,
    )
    return {**found, **{f"{key} ratio": ratio for key, ratio in ratios.items()}, "seconds": seconds, "same": is_same}


def main() -> None:
    """Measure, print, and write what ``--json`` asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--inductor", action="store_true", help="the forward under inductor, too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    network = Network()
    rows = {**forward(network, options.rounds, options.inductor), **derivatives(network, options.rounds)}
    if options.json:
        write(options.json, rows)


if __name__ == "__main__":
    if not KEEP.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    main()
