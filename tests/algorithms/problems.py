"""Weights, and rows that they multiply, whose channels correlate and differ in size as those of real layers do."""

from __future__ import annotations

import torch
from torch import Tensor

import sophq_func as sq
from sophq_func.algorithms._matrix import output_axis
from sophq_func.numerics.layout import rows
from sophq_func.numerics.moments import output_error

GRANULARITIES: dict[str, tuple[sq.numerics.scheme.Granularity, tuple[int, ...], int, int]] = {
    "tensor": (sq.PerTensor(), (12, 48), 48, 1),
    "channel": (sq.PerChannel(0), (12, 48), 48, 1),
    "channel, inputs first": (sq.PerChannel(1), (48, 12), 48, 1),
    "group": (sq.PerGroup(16, axis=0), (12, 48), 48, 1),
    "block": (sq.PerBlock(4, 16), (12, 48), 48, 1),
    "convolution": (sq.PerChannel(0), (12, 4, 3, 3), 36, 3),
    "depthwise": (sq.PerChannel(0), (6, 1, 3, 3), 9, 6),
    "experts": (sq.PerChannel((0, 2)), (3, 48, 12), 48, 3),
    "groups of experts": (sq.PerGroup(16, axis=(0, 2)), (3, 48, 12), 48, 3),
}
"""By name: granularity, shape of the weight, how many numbers an output channel reads, parts that read rows of their own."""


def second_moments(n: int, parts: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(parts, 200, n, dtype=dtype) @ torch.randn(n, n, dtype=dtype) * torch.exp(torch.randn(n, dtype=dtype))
    second = x.mT @ x / 200
    return second if parts > 1 else second[0]


def observed(weight: Tensor, scheme: sq.QScheme) -> sq.QParams:
    observer = sq.observer("minmax")
    return observer.qparams(observer.update(observer.init(weight, scheme), weight, scheme), scheme)


def errors(change: Tensor, second: Tensor, scheme: sq.QScheme) -> Tensor:
    """The error of each output channel."""
    flat = rows(change, sq.PerChannel(output_axis(scheme, 0)))
    return output_error(flat.reshape(-1, flat.shape[-1]), second)
