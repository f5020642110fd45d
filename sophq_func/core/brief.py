"""Tensors in one line, for the ``repr`` of what holds them."""

from __future__ import annotations

import torch
from torch import Tensor

from sophq_func.core.modes import is_plain

MOST_NUMBERS = 4
"""A tensor with more is told by its shape, dtype and range: numbers of every channel of a model fill many screens."""


def brief(value: object) -> str:
    """A tensor, a dict of tensors, or whatever else stands in the place of one, in one line.

    The numbers of a tensor are read only where it has some and Python may see them: not inside a transform or compiler.

    Example:
      >>> brief(torch.tensor(0.5)), brief(torch.arange(64))
      ('tensor(0.5000)', '(64,) int64 0..63')
      >>> brief({"noise": torch.empty(3, 2, device="meta")})
      "{'noise': (3, 2) float32 on meta}"
    """
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {brief(one)}" for key, one in value.items()) + "}"
    if not isinstance(value, Tensor):
        return repr(value)
    readable = is_plain([value])
    if readable and value.numel() <= MOST_NUMBERS:
        return " ".join(repr(value).split())  # of a matrix, torch writes one line a row
    device = "" if value.device.type == "cpu" else f"on {value.device}"
    numbers = _range(value) if readable else ""
    return " ".join(filter(None, [str(tuple(value.shape)), str(value.dtype).removeprefix("torch."), device, numbers]))


def _range(value: Tensor) -> str:
    """The smallest and the largest number; NaN where one is."""
    # float8 and bool have no order of their own in torch; double holds every number that a scale or a code has
    low, high = (float(end) for end in torch.aminmax(value.detach().to(torch.float64)))
    return f"{low:.4g}..{high:.4g}" if low < high else f"{low:.4g}"  # also of NaN
