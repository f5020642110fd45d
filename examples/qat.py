"""Stateless quantization-aware training: a fold of pure steps over batches. Shared by the examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from digits import Params, adam_init, adam_step, batches
from torch import Tensor

import sophq_func as sq


def finetune(
    q: sq.Quantized,
    params: Params,
    qparams: Mapping[str, sq.QParams],
    x: Tensor,
    y: Tensor,
    *,
    epochs: int = 7,
    rate: float = 2e-3,
    seed: int = 0,
    tick: Callable[[], object] = lambda: None,
) -> tuple[Params, dict[str, sq.QParams]]:
    """Train weights, scales and zero points together; returns new ones, the arguments stay as they are.

    Args:
      q: a quantized model; its training mode is chosen here.
      params, qparams: where to start.
      x, y: images and labels.
      epochs, rate: length of training and its first learning rate, which falls along a cosine.
      seed: order of the batches.
      tick: called after each epoch.
    """
    q = q.train()
    scales, fixed = q.split(qparams)
    trained = {name: p for name, p in params.items() if "running" not in name and "num_batches" not in name}
    buffers = {name: p for name, p in params.items() if name not in trained}
    split = len(trained)
    leaves = {**trained, **scales}
    names = list(leaves)

    def loss(leaves: Params, buffers: Params, images: Tensor, labels: Tensor) -> Any:
        weights = {name: leaves[name] for name in names[:split]}
        learned = {name: leaves[name] for name in names[split:]}
        logits, after = q.apply_and_update({**weights, **buffers}, sq.merge(learned, fixed), images)
        return F.cross_entropy(logits, labels), {name: after[name] for name in buffers}

    step = torch.func.grad_and_value(loss, has_aux=True)
    state = adam_init(leaves)
    for epoch in range(epochs):
        now = rate * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        for images, labels in batches(x, y, 1000 * seed + epoch):
            grads, (_, buffers) = step(leaves, buffers, images, labels)
            leaves, state = adam_step(leaves, grads, state, dict.fromkeys(names, now))
        tick()
    weights = {name: leaves[name] for name in names[:split]}
    return {**weights, **buffers}, sq.merge({name: leaves[name] for name in names[split:]}, fixed)
