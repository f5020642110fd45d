"""What observers and fake quantizers cost, in copies of the tensor: medians of interleaved rounds on one thread."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from measure import medians
from torch import Tensor

import sophq_func as sq
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, OBSERVERS

ACTIVATION, WEIGHT, MATRIX = (64, 256, 14, 14), (512, 512, 3, 3), (256, 256)
ROUNDS, SLOW_ROUNDS = 15, 3
SLOW = 1.0
"""What takes more seconds is called in the smaller number of rounds."""

GPTQ = ("gptq", "gptqfp4")

KEPT = 2**25 - 2**20
"""Bytes: once a block of this size was freed, glibc keeps what is freed, as in a process that has run for a while; before
that, much of what is measured is the kernel that hands out fresh pages."""

Calls = dict[str, Callable[[], object]]


def in_copies(calls: Calls, x: Tensor) -> dict[str, float]:
    """What each call takes, divided by what a copy of ``x`` takes."""
    torch.empty(KEPT, dtype=torch.uint8)
    slow: Calls = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        if time.perf_counter() - start > SLOW:
            slow[name] = call
    found: dict[str, float] = {}
    for part, rounds in ((calls.keys() - slow.keys(), ROUNDS), (slow.keys(), SLOW_ROUNDS)):
        times = medians({"copy": x.clone, **{name: calls[name] for name in calls if name in part}}, rounds)
        copy = times.pop("copy")
        found |= {name: seconds / copy for name, seconds in times.items()}
    return found


def observer_costs() -> dict[str, dict[str, float]]:
    """``update`` and ``qparams`` of each observer, per tensor and per channel."""
    rows: dict[str, dict[str, float]] = {name: {} for name in OBSERVERS}
    for where, size, granularity in (("tensor", ACTIVATION, sq.PerTensor()), ("channel", WEIGHT, sq.PerChannel(0))):
        x, scheme, calls = torch.randn(size), sq.QScheme(granularity=granularity), {}
        for name in OBSERVERS:
            calls |= _observer_calls(name, x, scheme)
        for key, ratio in in_copies(calls, x).items():
            name, _, step = key.partition(" ")
            rows[name][f"{step} per {where}"] = ratio
    return rows


def _observer_calls(name: str, x: Tensor, scheme: sq.QScheme) -> Calls:
    observer = sq.observer(name)
    state = observer.update(observer.init(x, scheme), x, scheme)
    return {
        f"{name} update": lambda: observer.update(state, x, scheme),
        f"{name} qparams": lambda: observer.qparams(state, scheme),
    }


def quantizer_costs() -> dict[str, dict[str, float]]:
    """Forward, and forward with backward, of each fake quantizer per tensor; GPTQ on a smaller matrix."""
    rows: dict[str, dict[str, float]] = {name: {} for name in FAKE_QUANTIZERS}
    for names, size in (([n for n in FAKE_QUANTIZERS if n not in GPTQ], ACTIVATION), (GPTQ, MATRIX)):
        x, calls = torch.randn(size), {}
        for name in names:
            calls |= _quantizer_calls(name, x)
        for key, ratio in in_copies(calls, x).items():
            name, _, step = key.partition(" ")
            rows[name][step] = ratio
    return rows


def _quantizer_calls(name: str, x: Tensor) -> Calls:
    fq, scheme, observer, g = sq.fake_quantizer(name), sq.QScheme(), sq.observer("minmax"), torch.ones_like(x)
    qparams = fq.init(observer.qparams(observer.update(observer.init(x, scheme), x, scheme), scheme), x, scheme)
    if name in GPTQ:
        hessian, _ = sq.fake_quantize.hessian_update(torch.zeros(x.shape[1], x.shape[1]), 0, torch.randn(1024, x.shape[1]))
        qparams = qparams._replace(extras={"hessian": hessian})
    learned = {"scale": qparams.scale, "zero_point": qparams.zero_point, **qparams.extras}

    def step() -> object:
        leaves = {key: learned[key].detach().requires_grad_() for key in fq.learnable if key in _floating(learned)}
        extras = {key: leaves.get(key, value) for key, value in qparams.extras.items()}
        inner = x.detach().requires_grad_()
        out = fq.apply(inner, sq.QParams(leaves.get("scale", qparams.scale), qparams.zero_point, extras), scheme)
        return torch.autograd.grad(out, [inner, *leaves.values()], g, allow_unused=True)

    return {f"{name} forward": lambda: fq.apply(x, qparams, scheme), f"{name} both": step}


def _floating(tensors: dict[str, Tensor]) -> set[str]:
    return {name for name, value in tensors.items() if value.is_floating_point()}
