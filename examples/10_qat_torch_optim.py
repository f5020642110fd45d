"""Training with ``torch.optim``, complete: warmup and cosine, BatchNorm, scales at a rate of their own, stop and go on.

Weights and scales are leaf tensors that the optimizer changes; nothing is hidden in a module. A run that is saved after
some steps and loaded again, here or in another process, ends with the bits of one that was not interrupted.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import sophq_func as sq

STEPS, WARMUP = 84, 8
"""Length of a run, and how many of its steps the learning rate takes to rise."""

RATE, SCALE_RATE = 4e-3, 1e-3
"""Highest learning rates of weights, and of scales: a scale moves every code of its tensor at once."""

BATCH = 64


def share(step: int) -> float:
    """What a learning rate is at a step, as a share of its highest: a line up, then a cosine down to 0."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


@dataclass
class Run:
    """All that changes while training, and ``rest``, what of the qparams does not."""

    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    scales: dict[str, Tensor]
    rest: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    generator: torch.Generator
    step: int = 0

    @property
    def params(self) -> dict[str, Tensor]:
        """What a run of the model takes: weights and buffers."""
        return {**self.weights, **self.buffers}

    @property
    def qparams(self) -> dict[str, sq.QParams]:
        """What it takes beside."""
        return sq.merge(self.scales, self.rest)


def start(q: sq.Quantized, params: Mapping[str, Tensor], qparams: Mapping[str, sq.QParams], trained: set[str]) -> Run:
    """A run before its first step; ``trained`` are the names of the parameters that the optimizer changes."""
    scales, rest = q.split(qparams)
    # clones, as the optimizer writes into what it is given
    weights = {name: params[name].clone().requires_grad_() for name in sorted(trained)}
    scales = {name: scale.clone().requires_grad_() for name, scale in scales.items()}
    buffers = {name: tensor for name, tensor in params.items() if name not in trained}
    groups = [{"params": [*weights.values()], "lr": RATE}, {"params": [*scales.values()], "lr": SCALE_RATE}]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    return Run(weights, buffers, scales, rest, optimizer, schedule, torch.Generator().manual_seed(0))


def advance(run: Run, q: sq.Quantized, x: Tensor, y: Tensor, steps: int) -> None:
    """Some steps, each on a batch that the run's own generator draws."""
    for _ in range(steps):
        batch = torch.randint(len(x), (BATCH,), generator=run.generator)
        run.optimizer.zero_grad()
        logits, after = q.apply_and_update(run.params, run.qparams, x[batch])
        F.cross_entropy(logits, y[batch]).backward()
        run.optimizer.step()
        run.schedule.step()
        # new statistics of BatchNorm; detached, as a buffer of your own may have the graph of this step
        run.buffers = {name: after[name].detach() for name in run.buffers}
        run.step += 1


def save(run: Run, q: sq.Quantized, path: Path) -> None:
    """Everything that the run needs to go on, in one file."""
    extra = {
        "step": run.step,
        "trained": sorted(run.weights),
        "optimizer": run.optimizer.state_dict(),
        "schedule": run.schedule.state_dict(),
        "generator": run.generator.get_state(),
    }
    sq.save(path, plan=q.plan, params=run.params, qparams=run.qparams, extra=extra)


def resume(q: sq.Quantized, path: Path) -> Run:
    """The run as it was saved; an error says what does not fit ``q``."""
    found = sq.load(path).check(q)
    assert found.params is not None and found.qparams is not None, "a run saves both"
    extra = found.extra
    run = start(q, found.params, found.qparams, set(extra["trained"]))
    # the schedule first: making it has set the learning rates of the optimizer to those of step 0
    run.schedule.load_state_dict(extra["schedule"])
    run.optimizer.load_state_dict(extra["optimizer"])
    run.generator.set_state(extra["generator"])
    run.step = extra["step"]
    return run


def main() -> None:
    """Two bits for weights and four for activations, on handwritten digits."""
    from digits import accuracy, load, trained

    model = trained(epochs=6)
    x, y, test_x, test_y = load()
    before = accuracy(model, test_x, test_y)

    config = sq.QuantConfig(strategy="CNN", weight=sq.override(bits=2), activation=sq.override(bits=4, symmetric=False))
    q = sq.quantize(model, config, example_args=(x[:2],))
    params = sq.params_of(model)
    qparams = q.calibrate(params, x[: 4 * BATCH].split(BATCH), progress=False)
    weights, _ = sq.split_params(model)

    run = start(q, params, qparams, set(weights))
    advance(run, q.train(), x, y, STEPS // 2)
    with tempfile.TemporaryDirectory() as folder:
        save(run, q, Path(folder) / "run.safetensors")
        run = resume(q, Path(folder) / "run.safetensors")
    advance(run, q.train(), x, y, STEPS - run.step)

    print(f"float           {before:.2f} %, and after {accuracy(model, test_x, test_y):.2f} %")
    print(f"W2A4, untrained {accuracy(lambda images: q.apply(params, qparams, images), test_x, test_y):.2f} %")
    print(f"W2A4, trained   {accuracy(lambda images: q.apply(run.params, run.qparams, images), test_x, test_y):.2f} %")


if __name__ == "__main__":
    main()
