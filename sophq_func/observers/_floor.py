"""Power-of-two steps chosen by squared error, as DPU tool chains do (semantics.md 3.7)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.numerics.contracts import OBSERVERS, Observer, QParams
from sophq_func.numerics.layout import rows
from sophq_func.numerics.ranges import min_max, no_range
from sophq_func.numerics.scheme import QScheme
from sophq_func.observers._moments import LAST, exponent, latest, power
from sophq_func.observers._options import check, unmergeable

QUANT_TYPES = (None, "input", "param", "tensor")
FINEST = 12
"""No step is smaller than ``2 ** -12``."""

SLOTS = 20
"""Votes are counted for steps ``2 ** 7`` to ``2 ** -12``."""


class FloorState(NamedTuple):
    """Extremes of the last tensor, float32, and the exponent ``e`` of its step ``2 ** -e``, int64; scale-shaped."""

    lo: Tensor
    hi: Tensor
    exponent: Tensor


class VoteState(NamedTuple):
    """Extremes of all tensors, float32, scale-shaped, and how often each exponent won, int64, ``(*scale shape, 20)``."""

    lo: Tensor
    hi: Tensor
    votes: Tensor


def round_dpu(x: Tensor) -> Tensor:
    """Round to the nearest integer; negative halves go up, others to even.

    Example:
      >>> round_dpu(torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])).tolist()
      [-1.0, 0.0, 0.0, 2.0, 2.0]
    """
    return torch.where(x < 0, (x + 0.5).floor(), x.round())


def best_exponent(x: Tensor, lo: Tensor, hi: Tensor, scheme: QScheme, quant_type: str | None) -> Tensor:
    """``e`` in ``-127 .. 12`` whose step ``2 ** -e`` has the least squared error on ``x``, among a few, the first of equals.

    ``e`` starts at ``e0 = floor(log2(1 / s0))``, ``s0 = max(lo / qmin, hi / qmax)``, or at 0 if ``s0 < 2 ** -15``; an
    ``"input"`` tries ``e0`` only, others ``e0 .. e0 + 4``. A ``"param"`` is rounded half to even, others by
    :func:`round_dpu`.
    """
    step = hi / scheme.qmax
    if scheme.qmin:
        step = torch.maximum(step, lo / scheme.qmin)
    exact = exponent(step)
    first = torch.where(step == power(exact), -exact, -exact - 1)
    first = torch.where(step < 2**-15, 0, first).clamp(min=-127)
    if quant_type == "input":
        return first.clamp(max=FINEST).to(torch.int64)
    flat, scores = rows(x.detach(), scheme.granularity).float(), []
    rounded = torch.round if quant_type == "param" else round_dpu
    for more in range(5):
        unit = power(-(first + more)).unsqueeze(-1)
        code = rounded((flat / unit).clamp(scheme.qmin, scheme.qmax))
        scores.append((code * unit - flat).square().sum(-1))
    _, best = torch.stack(scores).min(dim=0)
    return (first + best).clamp(max=FINEST).to(torch.int64)


def grid(exponents: Tensor, state: FloorState | VoteState) -> QParams:
    """The step ``2 ** -e`` and the zero point 0."""
    finite = torch.isfinite(state.lo) & torch.isfinite(state.hi)
    scale = torch.where(finite, power(-exponents), torch.nan)
    return QParams(scale, torch.zeros_like(scale, dtype=torch.int32), {})


@OBSERVERS.register("minmax_floor", "MinMaxFloorObserver")
def minmax_floor(quant_type: str | None = None) -> Observer:
    """The power-of-two step of least squared error near the extremes of the last tensor; see :func:`best_exponent`.

    The zero point is 0, so that an affine grid holds nothing below 0, and ``pot_scale`` changes nothing. Not mergeable:
    only the last tensor counts.

    Args:
      quant_type: ``"input"``, ``"param"`` (a weight) or ``"tensor"``; ``None`` is ``"tensor"``.

    Differs from sophgo-mq: the type is an option and has a default, there it must be set and nothing sets it; each
    channel has a step of its own; an affine grid looks at the largest value only instead of dividing by 0.

    Example:
      >>> import sophq_func as sq
      >>> obs, scheme = sq.observer("minmax_floor", quant_type="input"), sq.QScheme()
      >>> x = torch.tensor([-1.0, 3.0])
      >>> obs.qparams(obs.update(obs.init(x, scheme), x, scheme), scheme).scale
      tensor(0.0312)
    """
    check("minmax_floor", "quant_type", quant_type, "'input', 'param', 'tensor' or None", ok=quant_type in QUANT_TYPES)

    def init(x: Tensor, scheme: QScheme) -> FloorState:
        lo, hi = no_range(x, scheme.granularity)
        return FloorState(lo, hi, torch.zeros_like(lo, dtype=torch.int64))

    def update(state: FloorState, x: Tensor, scheme: QScheme) -> FloorState:
        if x.numel() == 0:
            return state
        lo, hi = min_max(x, scheme.granularity)
        best = best_exponent(x, lo, hi, scheme, quant_type)
        return FloorState(latest(state.lo, lo), latest(state.hi, hi), best)

    def qparams(state: FloorState, scheme: QScheme) -> QParams:
        return grid(state.exponent, state)

    return Observer(init, update, unmergeable("minmax_floor", LAST), qparams)


@OBSERVERS.register("pot_mode", "PoTModeObserver")
def pot_mode(quant_type: str | None = None) -> Observer:
    """The power-of-two step that won most often among all tensors; each votes as ``minmax_floor`` chooses.

    The smaller exponent wins among equals. The zero point is 0, so that an affine grid holds nothing below 0, and
    ``pot_scale`` changes nothing. Mergeable: votes add.

    Args:
      quant_type: ``"input"``, ``"param"`` (a weight) or ``"tensor"``; ``None`` is ``"tensor"``.

    Differs from sophgo-mq: as ``minmax_floor``; and a tensor votes when it is observed, not when qparams are read.

    Example:
      >>> import sophq_func as sq
      >>> obs, scheme = sq.observer("pot_mode", quant_type="input"), sq.QScheme()
      >>> state = obs.init(torch.zeros(1), scheme)
      >>> for size in (3.0, 3.5, 100.0):
      ...     state = obs.update(state, torch.tensor([size]), scheme)
      >>> obs.qparams(state, scheme).scale
      tensor(0.0312)
    """
    check("pot_mode", "quant_type", quant_type, "'input', 'param', 'tensor' or None", ok=quant_type in QUANT_TYPES)

    def slots(like: Tensor) -> Tensor:
        return torch.arange(SLOTS, device=like.device)

    def init(x: Tensor, scheme: QScheme) -> VoteState:
        lo, hi = no_range(x, scheme.granularity)
        return VoteState(lo, hi, torch.zeros((*lo.shape, SLOTS), dtype=torch.int64, device=lo.device))

    def update(state: VoteState, x: Tensor, scheme: QScheme) -> VoteState:
        if x.numel() == 0:
            return state
        lo, hi = min_max(x, scheme.granularity)
        slot = (best_exponent(x, lo, hi, scheme, quant_type) + SLOTS - 1 - FINEST).clamp(min=0)
        vote = (slots(x) == slot.unsqueeze(-1)).to(torch.int64)
        return merge(state, VoteState(lo, hi, vote))

    def merge(a: VoteState, b: VoteState) -> VoteState:
        return VoteState(torch.minimum(a.lo, b.lo), torch.maximum(a.hi, b.hi), a.votes + b.votes)

    def qparams(state: VoteState, scheme: QScheme) -> QParams:
        index = slots(state.votes)
        winner = (state.votes * SLOTS + (SLOTS - 1 - index)).argmax(-1)
        return grid(winner - (SLOTS - 1 - FINEST), state)

    return Observer(init, update, merge, qparams)
