"""A number between 0 and 1 that gradient descent can take all the way to either end: AdaRound's share of an element."""

from __future__ import annotations

import torch
from torch import Tensor

from sophq_func.core.arguments import check_reals
from sophq_func.core.public import public

GAMMA, ZETA = -0.1, 1.1
"""The ends to which AdaRound stretches its sigmoid before clamping, as in the paper: 0 and 1 are reached exactly."""


@public
def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """AdaRound's rounding of each element, ``clamp(1.2 sigmoid(alpha) - 0.1, 0, 1)``: 0 down, 1 up.

    Eq. (23) of arXiv:2004.10568. Its regularizer, eq. (24), is ``(1 - (2 h - 1).abs() ** beta).sum()``.

    Example:
      >>> rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0]))
      tensor([0.0000, 0.5000, 1.0000])
    """
    check_reals("rectified_sigmoid", {"alpha": alpha})
    stretched = torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA
    # clamp(0, 1), with a gradient in one pass over memory instead of four
    return torch.nn.functional.hardtanh(stretched, 0, 1)


def inverse_rectified_sigmoid(share: Tensor) -> Tensor:
    """The ``alpha`` in the middle part of :func:`rectified_sigmoid` that it maps to a share in [0, 1].

    Example:
      >>> inverse_rectified_sigmoid(torch.tensor([0.0, 1.0]))
      tensor([-2.3979,  2.3979])
    """
    return -torch.log((ZETA - GAMMA) / (share - GAMMA) - 1)
