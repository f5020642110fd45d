"""What surrounds a call: checkpoints, autocast, inference mode, devices, threads and copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import grad
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

import sophq_func as sq
from tests.composition.registry import each, row, same, some
from tests.composition.subjects import Subject


def results(s: Subject) -> Any:
    """The output, the gradient to every learned scale and parameter, and observer states."""
    states = s.q.observe(s.params, s.q.init(s.params), **s.batch)[1]
    return s.out(s.params, s.qparams, s.batch), grad(s.loss, argnums=(0, 1))(s.scales, s.weights, s.batch), states


@row("checkpoint around apply", "0")
def check_checkpoint(s: Subject) -> None:
    """`backward` without it, for every parameter and learned scale."""

    def pulled(run: Callable[..., Tensor]) -> Any:
        at = _pytree.tree_map(lambda leaf: leaf.clone().requires_grad_(), (s.scales, s.weights))
        flat = _pytree.tree_leaves(at)
        return torch.autograd.grad(run(*at, s.batch), flat, allow_unused=True, materialize_grads=True)

    expected = pulled(s.loss)
    some(expected)
    same(pulled(lambda *at: checkpoint(s.loss, *at, use_reentrant=False)), expected, 0)


def under_autocast(s: Subject, dtype: torch.dtype, tolerance: float) -> None:
    """Output and gradient within ``tolerance`` of their norms in float32, and not the same."""

    def both() -> Any:
        return s.out(s.params, s.qparams, s.batch), grad(s.loss, argnums=(0, 1))(s.scales, s.weights, s.batch)

    full = both()
    with torch.autocast("cpu", dtype):
        low = both()
    assert not torch.equal(low[0].float(), full[0])
    for part, whole in zip(_parts(low), _parts(full), strict=True):
        assert (part - whole).norm() <= tolerance * whole.norm(), (part - whole).norm() / whole.norm()


def _parts(tree: Any) -> list[Tensor]:
    """The output, all gradients to scales, and all to parameters, each as one vector."""
    output, (scales, weights) = tree
    return [torch.cat([leaf.float().flatten() for leaf in _pytree.tree_leaves(t)]) for t in (output, scales, weights)]


@row("autocast bfloat16", "10 % of the norm")
def check_bfloat16(s: Subject) -> None:
    """float32: output and gradient; a code may differ by one."""
    under_autocast(s, torch.bfloat16, 0.1)


@row("autocast float16", "5 % of the norm")
def check_float16(s: Subject) -> None:
    """float32: output and gradient; a code may differ by one."""
    under_autocast(s, torch.float16, 0.05)


@row("inference_mode", "0")
def check_inference_mode(s: Subject) -> None:
    """outside of it."""
    with torch.inference_mode():
        found = s.out(s.params, s.qparams, s.batch)
        qparams = s.q.calibrate(s.params, [s.batch], progress=False)
    assert found.is_inference()
    same(found, s.out(s.params, s.qparams, s.batch), 0)
    same(qparams, s.q.calibrate(s.params, [s.batch], progress=False), 0)


@row("another default device", "0")
def check_default_device(s: Subject) -> None:
    """without it: output, gradient and observer states of tensors on the CPU while the default is the CPU, and `meta`."""
    expected = results(s)
    for device in ("cpu", "meta"):
        with torch.device(device):
            same(results(s), expected, 0)


@row("CUDA", "1e-5", needs_cuda=True)
def check_cuda(s: Subject) -> None:
    """the CPU, in float64: output and gradient, also where `cuda` is the default device."""
    s = s.wide
    expected = results(s)
    move = lambda tree: _pytree.tree_map(lambda leaf: leaf.cuda(), tree)  # noqa: E731
    there = replace(s, params=move(s.params), qparams=move(s.qparams), batch=move(s.batch))
    found = [results(there)]
    with torch.device("cuda"):
        found.append(results(there))
    for result in found:
        assert result[0].is_cuda
        same(_pytree.tree_map(lambda leaf: leaf.cpu(), result), expected, 1e-5)


def in_threads(s: Subject, models: list[sq.Quantized]) -> None:
    """Eight calls at a time, each with its own examples, some of them gradients, against the same one by one."""

    def call(job: tuple[int, sq.Quantized]) -> Any:
        i, q = job
        return results(replace(s, q=q, batch=each(s.batch, torch.tensor([i % 4, i // 4 % 4]))))

    jobs = list(enumerate(models))
    expected = [call((i, s.q)) for i, _ in jobs]
    with ThreadPoolExecutor(8) as pool:
        same(list(pool.map(call, jobs)), expected, 0)


@row("threads, each with its own", "0")
def check_threads_apart(s: Subject) -> None:
    """one call after the other: outputs, gradients and observer states."""
    in_threads(s, [copy.deepcopy(s.q) for _ in range(16)])


@row("threads, sharing one", "0")
def check_threads_together(s: Subject) -> None:
    """one call after the other: outputs, gradients and observer states."""
    in_threads(s, [s.q] * 16)


def copies_agree(s: Subject, duplicate: Callable[[Any], Any]) -> None:
    """A copy of the quantized model, and one built from a copy of the plan, give the same bits."""
    expected = results(s)
    some(expected[1])
    for q in (duplicate(s.q), sq.build(s.model, duplicate(s.q.plan))):
        assert q is not s.q
        assert q.plan == s.q.plan
        same(results(replace(s, q=q)), expected, 0)


@row("pickle", "0")
def check_pickle(s: Subject) -> None:
    """the original: output, gradient and observer states, of a Quantized, and of one built from a plan."""
    copies_agree(s, lambda value: pickle.loads(pickle.dumps(value)))


@row("copy.deepcopy", "0")
def check_deepcopy(s: Subject) -> None:
    """the original: output, gradient and observer states, of a Quantized, and of one built from a plan."""
    copies_agree(s, copy.deepcopy)
