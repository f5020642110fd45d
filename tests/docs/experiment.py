"""A small experiment, as digests of all that it makes: ``python -m tests.docs.experiment`` prints them as JSON.

Tensors are large enough that torch divides them among threads.
"""

from __future__ import annotations

import hashlib
import json
import sys

import torch
from torch import Tensor, nn
from torch.func import grad

import sophq_func as sq
from sophq_func.core.pytree import leaves
from sophq_func.core.types import Tree
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, OBSERVERS

SCHEMES = {"per_tensor": sq.QScheme(bits=4), "per_channel": sq.QScheme(bits=4, granularity=sq.PerChannel(0))}

ANY_ORDER = frozenset("absmax ema_minmax fixed_range histogram kld minmax percentile".split())
"""Observers of extremes, of sorted values, and of whole numbers, which float64 adds up exactly in any order."""

EXACT, SUMS = "exactly", "with sums"
"""How the names of digests begin: of what does not depend on the number of threads, and of what may, as a sum of floats."""


def digest(tree: Tree) -> str:
    """SHA-256 of every tensor and other leaf of a tree."""
    found = hashlib.sha256()
    for leaf in leaves(tree):
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            found.update(leaf.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()


def pieces() -> dict[str, str]:
    """The grid of each observer, and what each fake quantizer makes of a tensor on a grid of extremes."""
    x = torch.randn(16, 4096, generator=torch.Generator().manual_seed(0))
    found = {}
    for kind, scheme in SCHEMES.items():
        for name in OBSERVERS:
            kept = EXACT if name in ANY_ORDER else SUMS
            found[f"{kept}: {name} {kind}"] = digest(grid(name, x, scheme))
    scheme = SCHEMES["per_channel"]
    for name in FAKE_QUANTIZERS:
        quantizer = sq.fake_quantizer(name)
        if not quantizer.needs and not quantizer.noise:
            start = quantizer.init(grid("minmax", x, scheme), x, scheme)
            found[f"{EXACT}: {name}"] = digest(quantizer.apply(x, start, scheme))
    return found


def grid(name: str, x: Tensor, scheme: sq.QScheme) -> sq.QParams:
    """What an observer makes of one tensor."""
    observer = sq.observer(name)
    return observer.qparams(observer.update(observer.init(x, scheme), x, scheme), scheme)


def model() -> dict[str, str]:
    """A plan, and what is calibrated, computed, differentiated and solved for with it."""
    generator = torch.Generator().manual_seed(0)
    torch.default_generator.manual_seed(0)
    head = (nn.AvgPool2d(7), nn.Flatten(), nn.Linear(64, 8))
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), *head).eval()
    batches = [torch.randn(8, 3, 16, 16, generator=generator) for _ in range(2)]
    config = sq.presets.w4a4_lsq()
    q = sq.quantize(net, config, example_args=(batches[0],), kernels="off")
    trainable, buffers = sq.split_params(net)
    params = {**trainable, **buffers}
    qparams = q.calibrate(params, batches, progress=False)
    scales, rest = q.split(qparams)

    def loss(weights: dict[str, Tensor], scales: dict[str, Tensor]) -> Tensor:
        return q.apply({**weights, **buffers}, sq.merge(scales, rest), batches[0]).square().mean()

    slopes = grad(loss, argnums=(0, 1))(trainable, scales)
    solved = sq.algorithms.gptq(q, params, qparams, batches)
    return {
        f"{EXACT}: plan": digest([q.plan.to_json(), q.plan.digest(), config.digest()]),
        f"{EXACT}: names": digest([list(params), list(qparams), list(scales), list(rest)]),
        f"{SUMS}: qparams": digest(qparams),
        f"{SUMS}: output": digest(q.apply(params, qparams, batches[0])),
        f"{SUMS}: gradients": digest(slopes),
        f"{SUMS}: gptq": digest(solved),
    }


def digests(threads: int) -> dict[str, str]:
    """All of them, computed with a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return {**pieces(), **model()}
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    sys.stdout.write(json.dumps({threads: digests(threads) for threads in (1, 2)}))
