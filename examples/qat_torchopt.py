"""Training with torchopt, complete: a pure step of weights, scales, buffers and optimizer's states; stop and go on.

Nothing is written to: a run is a named tuple of trees, a step makes a new one of it, and every earlier one is still there.
``10_qat_torch_optim.py`` trains the same with ``torch.optim``.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import sophq_func as sq

try:
    import torchopt
except ImportError as error:
    raise SystemExit("This example needs a package of functional optimizers. Fix: pip install torchopt.") from error

STEPS, WARMUP = 84, 8
"""Length of a run, and how many of its steps the learning rate takes to rise."""

RATE, SCALE_RATE = 4e-3, 1e-3
"""Highest learning rates of weights, and of scales: a scale moves every code of its tensor at once."""

BATCH = 64


def at_most(rate: float) -> Any:
    """A schedule: from a step, a tensor, to the learning rate there. A line up to ``rate``, then a cosine down to 0."""

    def schedule(step: Tensor) -> Tensor:
        up = (step + 1) / WARMUP
        down = 0.5 * (1 + torch.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))
        return rate * torch.where(step < WARMUP, up, down)

    return schedule


FOR_WEIGHTS, FOR_SCALES = torchopt.adam(at_most(RATE)), torchopt.adam(at_most(SCALE_RATE))


class Run(NamedTuple):
    """All that changes while training, and ``rest``, what of the qparams does not."""

    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    scales: dict[str, Tensor]
    rest: dict[str, Tensor]
    moments: tuple[Any, Any]
    step: int

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
    weights = {name: params[name] for name in sorted(trained)}
    buffers = {name: tensor for name, tensor in params.items() if name not in trained}
    return Run(weights, buffers, scales, rest, (FOR_WEIGHTS.init(weights), FOR_SCALES.init(scales)), 0)


def stepped(run: Run, q: sq.Quantized, images: Tensor, labels: Tensor) -> Run:
    """The run after one step on a batch."""

    def loss(weights: dict[str, Tensor], scales: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logits, after = q.apply_and_update({**weights, **run.buffers}, sq.merge(scales, run.rest), images)
        return F.cross_entropy(logits, labels), {name: after[name] for name in run.buffers}

    gradients, buffers = torch.func.grad(loss, argnums=(0, 1), has_aux=True)(run.weights, run.scales)
    changes, moments = FOR_WEIGHTS.update(gradients[0], run.moments[0], inplace=False)
    weights = torchopt.apply_updates(run.weights, changes, inplace=False)
    scale_changes, scale_moments = FOR_SCALES.update(gradients[1], run.moments[1], inplace=False)
    scales = torchopt.apply_updates(run.scales, scale_changes, inplace=False)
    return Run(weights, buffers, scales, run.rest, (moments, scale_moments), run.step + 1)


def advance(run: Run, q: sq.Quantized, x: Tensor, y: Tensor, steps: int) -> Run:
    """The run after some steps; the number of a step says which batch it takes."""
    for _ in range(steps):
        batch = torch.randint(len(x), (BATCH,), generator=torch.Generator().manual_seed(run.step))
        run = stepped(run, q, x[batch], y[batch])
    return run


def save(run: Run, q: sq.Quantized, path: Path) -> None:
    """Everything that the run needs to go on, in one file."""
    extra = {"step": run.step, "trained": sorted(run.weights), "moments": run.moments}
    sq.save(path, plan=q.plan, params=run.params, qparams=run.qparams, extra=extra)


def resume(q: sq.Quantized, path: Path) -> Run:
    """The run as it was saved; an error says what does not fit ``q``."""
    found = sq.load(path).check(q)
    assert found.params is not None and found.qparams is not None, "a run saves both"
    extra = found.extra
    run = start(q, found.params, found.qparams, set(extra["trained"]))
    return run._replace(moments=extra["moments"], step=extra["step"])


def main() -> None:
    """Two bits for weights and four for activations, on handwritten digits."""
    from digits import accuracy, load, trained

    model = trained(epochs=6)
    x, y, test_x, test_y = load()

    config = sq.QuantConfig(strategy="CNN", weight=sq.override(bits=2), activation=sq.override(bits=4, symmetric=False))
    q = sq.quantize(model, config, example_args=(x[:2],))
    params = sq.params_of(model)
    qparams = q.calibrate(params, x[: 4 * BATCH].split(BATCH), progress=False)
    weights, _ = sq.split_params(model)

    run = advance(start(q, params, qparams, set(weights)), q.train(), x, y, STEPS // 2)
    with tempfile.TemporaryDirectory() as folder:
        save(run, q, Path(folder) / "run.safetensors")
        run = resume(q, Path(folder) / "run.safetensors")
    run = advance(run, q.train(), x, y, STEPS - run.step)

    print(f"float           {accuracy(model, test_x, test_y):.2f} %")
    print(f"W2A4, untrained {accuracy(lambda images: q.apply(params, qparams, images), test_x, test_y):.2f} %")
    print(f"W2A4, trained   {accuracy(lambda images: q.apply(run.params, run.qparams, images), test_x, test_y):.2f} %")


if __name__ == "__main__":
    main()
