"""What research does with small networks, and how long it takes: every transform, beside float and ten lines by hand.

    pip install -c constraints.txt ".[bench]"
    python benchmarks/research_speed.py --json benchmarks/research_speed.json
    python benchmarks/speed_page.py

An MLP 784-256-256-10 (batch 64), ResNet-20 (32 images of 32 x 32), a GPT of 4 layers and 128 features (8 x 64), *tiny*
(twenty convolutions of 8 channels), ResNet-18 and a BERT: W8A8 with learned scales at the inputs of convolutions and linear
layers. Rows: forward, training step, ``torch.func.grad``, gradients of 32 single examples (``vmap(grad)``), ``jvp``, a
Hessian-vector product, calibration, and 16 settings by ``q.sweep``. Candidates take turns; figures are medians of the
processor's seconds on one thread, as ratios to float; peers run where they can. ``--keep no`` measures with the allocator's
defaults; else freed memory stays with the process, as allocators for servers do it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import medians, write
from peers import CANDIDATES, Candidate, Kernels, config, made, no_grad, rounded, trainable
from subjects import RESEARCH, SUBJECTS, Subject
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._pytree import tree_map

import sophq_func as sq

KEEP = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}
"""What the process is started with, so that the allocator keeps memory."""

MODELS: Mapping[str, Callable[[], Subject]] = {**RESEARCH, **SUBJECTS}
EXAMPLES = 32
SETTINGS = 16
SMALLEST = 0.004
"""Seconds; faster calls are repeated until they take as long, so that the clock can tell them apart."""

Tree = dict[str, dict[str, Tensor]]
Loss = Callable[..., Tensor]


class Functional(NamedTuple):
    """A model as a function ``loss(leaves, *args)`` of what is differentiated, in eval and in training mode."""

    evaluated: Loss
    trained: Loss
    leaves: Tree


def plain(subject: Subject) -> Functional:
    """The float model."""
    return _of_modules(subject, subject.make(), subject.make().train())


def by_hand(subject: Subject) -> Functional:
    """LSQ in ten lines: layers that round their input and their weight. Nothing is folded."""
    models = subject.make(), subject.make().train()
    largest: dict[str, Tensor] = {}
    layers = {name: layer for name, layer in models[0].named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: largest.update({name: args[0].detach()}))
        for name, layer in layers.items()
    ]
    no_grad(lambda: models[0](*subject.args))()
    for handle in handles:
        handle.remove()
    for model in models:
        for name in layers:
            layer = model.get_submodule(name)
            axes = tuple(range(1, layer.weight.ndim))
            layer.weight_scale = nn.Parameter(layer.weight.detach().abs().amax(axes, keepdim=True) / 127.5)
            layer.input_scale = nn.Parameter(largest[name].abs().amax() / 127.5)
            layer.weight_share = (layer.weight[0].numel() * 127) ** -0.5
            layer.input_share = (largest[name].numel() * 127) ** -0.5
            layer.__class__ = _Conv2d if isinstance(layer, nn.Conv2d) else _Linear
    return _of_modules(subject, *models)


def _learned(scale: Tensor, share: float) -> Tensor:
    return scale * share + (scale - scale * share).detach()


class _Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = rounded(self.weight, _learned(self.weight_scale, self.weight_share))
        return self._conv_forward(rounded(x, _learned(self.input_scale, self.input_share)), weight, self.bias)


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight = rounded(self.weight, _learned(self.weight_scale, self.weight_share))
        return nn.functional.linear(rounded(x, _learned(self.input_scale, self.input_share)), weight, self.bias)


def _of_modules(subject: Subject, used: nn.Module, trained: nn.Module) -> Functional:
    buffers = dict(used.named_buffers())

    def loss(model: nn.Module) -> Loss:
        def of(leaves: Tree, *args: Tensor) -> Tensor:
            # a module in training mode writes into its buffers
            given = {**leaves["weights"], **{name: buffer.clone() for name, buffer in buffers.items()}}
            return subject.read(functional_call(model, given, args)).square().mean()

        return of

    return Functional(loss(used), loss(trained), {"weights": trainable(used)})


def ours(subject: Subject, kernels: Kernels = "off") -> Functional:
    """This library."""
    model, args = subject.make(), subject.args
    q, params = sq.quantize(model, config(), example_args=args, kernels=kernels), sq.params_of(model)
    scales, rest = q.split(q.calibrate(params, [args], progress=False))

    def loss(q: sq.Quantized) -> Loss:
        def of(leaves: Tree, *args: Tensor) -> Tensor:
            qparams = sq.merge(leaves["scales"], rest)
            return subject.read(q.apply({**params, **leaves["weights"]}, qparams, *args)).square().mean()

        return of

    return Functional(loss(q), loss(q.train()), {"weights": trainable(model), "scales": scales})


FUNCTIONAL: Mapping[str, Callable[[Subject], Functional]] = {
    "float": plain,
    "sophq_func": ours,
    "sophq_func, kernels": partial(ours, kernels="compiled"),
    "by hand": by_hand,
}


def transforms(made: Functional, subject: Subject) -> dict[str, Callable[[], object]]:
    """The rows that differentiate a function."""
    (x,), leaves = subject.args, made.leaves
    examples = torch.cat([x] * -(-EXAMPLES // len(x)))[:EXAMPLES] if x[0].numel() < 10**5 else x
    tangents = tree_map(torch.ones_like, leaves)
    of_one = vmap(grad(lambda leaves, example: made.evaluated(leaves, example[None])), (None, 0))

    def step() -> object:
        own = tree_map(lambda leaf: leaf.clone().requires_grad_(), leaves)
        flat = [leaf for tree in own.values() for leaf in tree.values()]
        return torch.autograd.grad(made.trained(own, x), flat, allow_unused=True)

    return {
        "autograd.grad": step,
        "func.grad": lambda: grad(made.trained)(leaves, x),
        "vmap(grad)": lambda: of_one(leaves, examples),
        "jvp": lambda: jvp(lambda leaves: made.evaluated(leaves, x), (leaves,), (tangents,)),
        "HVP": lambda: jvp(grad(lambda leaves: made.evaluated(leaves, x)), (leaves,), (tangents,)),
    }


def sweeping(subject: Subject) -> tuple[Callable[[], object], Callable[[], object]]:
    """16 settings by ``q.sweep``; and as many float forwards."""
    model, args = subject.make(), subject.args
    q, params = sq.quantize(model, config(), example_args=args), sq.params_of(model)
    qparams = q.calibrate(params, [args], progress=False)
    weights = [name for name in q.plan if q.plan.site(name).parameter]
    settings = [
        {**qparams, name: qparams[name]._replace(scale=qparams[name].scale * 16)} for name in (weights * SETTINGS)[:SETTINGS]
    ]
    sweep = no_grad(lambda: q.sweep(params, sq.stack(settings), *args))
    return sweep, no_grad(lambda: [model(*args) for _ in range(SETTINGS)])


def rows_of(name: str, subject: Subject, peers: Mapping[str, Candidate]) -> dict[str, dict[str, Callable[[], object]]]:
    """What is measured of a model: by row and candidate, a call."""
    rows: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "step": {}, "calibrate": {}}
    for candidate, peer in peers.items():
        rows["forward"][candidate], rows["step"][candidate] = peer.forward, peer.step
        if peer.calibrate is not None:
            rows["calibrate"][candidate] = peer.calibrate
    for candidate, make in FUNCTIONAL.items():
        for row, call in transforms(make(subject), subject).items():
            rows.setdefault(row, {})[candidate] = call
    if name in RESEARCH:
        ours, floats = sweeping(subject)
        rows[f"sweep of {SETTINGS}"] = {"float": floats, "sophq_func": ours}
    return rows


def repeated(calls: Mapping[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """The same calls, as often as the fastest of them needs to be measured."""
    calls["float"]()
    start = time.process_time()
    calls["float"]()
    count = max(1, int(SMALLEST / max(time.process_time() - start, 1e-9)))
    return {name: lambda call=call: [call() for _ in range(count)] for name, call in calls.items()}


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Ratios to float, by row and candidate; and why a candidate is missing."""
    subject, found = MODELS[name](), {}
    candidates = {peer: made(peer, subject) for peer in CANDIDATES if not options.only or peer in ("float", *options.only)}
    notes = {peer: candidate for peer, candidate in candidates.items() if isinstance(candidate, str)}
    rows = rows_of(name, subject, {peer: one for peer, one in candidates.items() if isinstance(one, Candidate)})
    for row, calls in rows.items():
        if options.rows and row not in options.rows:
            continue
        seconds = medians(repeated(calls), options.rounds, time.process_time)
        found[row] = {candidate: value / seconds["float"] for candidate, value in seconds.items()}
        shown = "  ".join(f"{candidate} {ratio:.2f}" for candidate, ratio in found[row].items() if candidate != "float")
        print(f"{name:<10}{row:<14}{shown}", flush=True)
    return {"ratios": found, "notes": notes}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--only", nargs="*", choices=list(CANDIDATES), help="candidates beside float; all by default")
    parser.add_argument("--rows", nargs="*", help="rows to measure; all by default")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--keep", choices=("yes", "no"), default="yes", help="whether the allocator keeps memory")
    parser.add_argument("--json", type=Path, help="models that this run did not measure stay in the file")
    options = parser.parse_args()
    wanted = {"OMP_NUM_THREADS": "1", **(KEEP if options.keep == "yes" else {})}
    if not wanted.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})
    torch.set_num_threads(1)
    label = "" if options.keep == "yes" else ", memory returned"
    for name in options.models:
        row = {f"{name}{label}": measured(name, options)}
        if options.json:
            earlier = json.loads(options.json.read_text())["rows"] if options.json.exists() else {}
            write(options.json, {**earlier, **row})


if __name__ == "__main__":
    main()
