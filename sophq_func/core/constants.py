"""Numbers as tensors, without waiting for an accelerator: to copy them there from Python stops the host until it is done."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sophq_func.core.modes import is_plain_eager, makes_numbers, outside_of_everything

Number = bool | int | float


def table(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers that never change, made once for each device; nobody may write into them.

    Example:
      >>> one = table((0.0, 0.5), torch.float32, torch.device("cpu"))
      >>> one, one is table((0.0, 0.5), torch.float32, torch.device("cpu"))
      (tensor([0.0000, 0.5000]), True)
    """
    # a compiler and a recorder keep a constant in their program, and a fake tensor must not be kept
    if not makes_numbers():
        return torch.tensor(values, dtype=dtype, device=device)
    return _made(values, dtype, device)


@lru_cache(maxsize=256)
def _made(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if is_plain_eager() and not torch.is_inference_mode_enabled():
        return torch.tensor(values, dtype=dtype, device=device)
    # a wrapper of a transform, or an inference tensor, would be of no use afterwards
    return outside_of_everything(lambda: torch.tensor(values, dtype=dtype, device=device))


def number(value: Tensor | Number, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A number as a tensor of shape ``()``, filled on its device; a tensor as itself, on that device and of that dtype.

    Example:
      >>> number(3, torch.device("cpu"), torch.float32), number(torch.tensor(True), torch.device("cpu"))
      (tensor(3.), tensor(True))
    """
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype or value.dtype)
    return torch.full((), value, dtype=dtype, device=device)
