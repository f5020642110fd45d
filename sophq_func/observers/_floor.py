"""Power-of-two scales chosen by squared error, as the tool chains of DPUs do."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.numerics.contracts import OBSERVERS, Observer, QParams
from sophq_func.numerics.layout import rows
from sophq_func.numerics.ranges import min_max, no_range
from sophq_func.numerics.scheme import QScheme
from sophq_func.observers._moments import LAST_ONLY, exponent, latest, power
from sophq_func.observers._options import check, unmergeable

QUANT_TYPES = (None, "input", "param", "tensor")
"""What a tensor is to its layer, which decides how many scales are tried and how they round; ``None`` is ``"tensor"``."""

FINEST = 12
"""The largest exponent ``e``: no scale is smaller than ``2 ** -12``, as sophgo-mq has it."""

SLOTS = 20
"""How many exponents are voted for, -7 to 12, as sophgo-mq counts them; a smaller one counts as -7."""

COARSEST = FINEST - SLOTS + 1
"""The exponent of the first slot, -7."""

SMALLEST_SCALE = 2**-15
"""Where the first scale would be smaller than this, the search starts at the scale 1, as sophgo-mq has it."""

TRIED = 5
"""How many exponents are tried, from the first one up, as sophgo-mq has it; each halves the scale."""


class FloorState(NamedTuple):
    """Extremes of the last tensor, float32, and the exponent ``e`` of its scale ``2 ** -e``, int64; scale-shaped."""

    lo: Tensor
    hi: Tensor
    exponent: Tensor


class VoteState(NamedTuple):
    """Extremes of all tensors and how often each exponent won.

    Attributes:
      lo, hi: float32, scale-shaped.
      votes: int64, ``(*scale shape, 20)``, for the exponents -7 to 12.
    """

    lo: Tensor
    hi: Tensor
    votes: Tensor


@OBSERVERS.register("minmax_floor", "MinMaxFloorObserver")
def minmax_floor(quant_type: str | None = None) -> Observer:
    """The power-of-two scale of least squared error on the last tensor, among a few; see :func:`best_exponent`.

    The zero point is 0, and ``pot_scale`` changes nothing. Not mergeable: only the last tensor counts. Keeps, on an affine
    grid, nothing below 0.

    Args:
      quant_type: ``"input"``, ``"param"`` (a weight) or ``"tensor"``; ``None`` is ``"tensor"``.

    Differs from sophgo-mq: the type is an option and has a default, there it must be set and nothing sets it; each
    channel has a scale of its own; an affine grid looks at the largest value only instead of dividing by 0.

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
        return pot_qparams(state.exponent, state)

    return Observer(init, update, unmergeable("minmax_floor", LAST_ONLY), qparams)


@OBSERVERS.register("pot_mode", "PoTModeObserver")
def pot_mode(quant_type: str | None = None) -> Observer:
    """The power-of-two scale that most tensors choose, each as ``minmax_floor`` does.

    Of exponents with equally many votes the smallest wins, which has the largest scale. The zero point is 0, and
    ``pot_scale`` changes nothing. Mergeable: votes add. Keeps, on an affine grid, nothing below 0.

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
        slot = (best_exponent(x, lo, hi, scheme, quant_type) - COARSEST).clamp(min=0)
        vote = (slots(x) == slot.unsqueeze(-1)).to(torch.int64)
        return merge(state, VoteState(lo, hi, vote))

    def merge(a: VoteState, b: VoteState) -> VoteState:
        return VoteState(torch.minimum(a.lo, b.lo), torch.maximum(a.hi, b.hi), a.votes + b.votes)

    def qparams(state: VoteState, scheme: QScheme) -> QParams:
        # argmax does not say which of equal entries it gives; a smaller bonus for later slots leaves none equal
        bonus = SLOTS - 1 - slots(state.votes)
        slot = (state.votes * SLOTS + bonus).argmax(-1)
        return pot_qparams(slot + COARSEST, state)

    return Observer(init, update, merge, qparams)


def best_exponent(x: Tensor, lo: Tensor, hi: Tensor, scheme: QScheme, quant_type: str | None) -> Tensor:
    """``e`` in ``-127 .. 12`` whose scale ``2 ** -e`` has the least squared error on ``x``, of a few that are tried.

    The first of equally good ones wins. ``e`` starts at ``e0 = floor(log2(1 / s0))``, ``s0 = max(lo / qmin, hi / qmax)``,
    or at 0 if ``s0 < 2 ** -15``; an ``"input"`` tries ``e0`` only, others ``e0 .. e0 + 4``. A ``"param"`` is rounded half to
    even, others by :func:`round_dpu`.
    """
    scale = hi / scheme.qmax
    if scheme.qmin:
        scale = torch.maximum(scale, lo / scheme.qmin)
    # floor(log2(1 / s)) from the bits of s: the negative exponent of a power of two, one less of any other number
    floor_log2 = exponent(scale)
    first = torch.where(scale == power(floor_log2), -floor_log2, -floor_log2 - 1)
    first = torch.where(scale < SMALLEST_SCALE, 0, first).clamp(min=-127)
    if quant_type == "input":
        return first.clamp(max=FINEST).to(torch.int64)
    flat = rows(x.detach(), scheme.granularity).float()
    round_code = torch.round if quant_type == "param" else round_dpu
    errors = []
    for more in range(TRIED):
        tried = power(-(first + more)).unsqueeze(-1)
        code = round_code((flat / tried).clamp(scheme.qmin, scheme.qmax))
        errors.append((code * tried - flat).square().sum(-1))
    best = torch.stack(errors).min(dim=0).indices
    return (first + best).clamp(max=FINEST).to(torch.int64)


def round_dpu(x: Tensor) -> Tensor:
    """Round to the nearest integer; negative halves go up, others to even.

    Example:
      >>> round_dpu(torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])).tolist()
      [-1.0, 0.0, 0.0, 2.0, 2.0]
    """
    return torch.where(x < 0, (x + 0.5).floor(), x.round())


def pot_qparams(exponents: Tensor, state: FloorState | VoteState) -> QParams:
    """The scale ``2 ** -e`` and the zero point 0; a scale of NaN where an extreme is not finite."""
    finite = torch.isfinite(state.lo) & torch.isfinite(state.hi)
    scale = torch.where(finite, power(-exponents), torch.nan)
    return QParams(scale, torch.zeros_like(scale, dtype=torch.int32), {})
