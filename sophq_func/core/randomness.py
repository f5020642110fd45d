"""Runs that leave torch's default generators as they are."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def kept_generators(tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
    """A context behind which the generators of the CPU, and of the GPUs that some tensors lie on, are where they were.

    Without a list of GPUs, torch would ask all of them for their state.

    Example:
      >>> before = torch.get_rng_state()
      >>> with kept_generators([torch.ones(1)]):
      ...     _ = torch.rand(3)
      >>> torch.equal(torch.get_rng_state(), before)
      True
    """
    devices = {tensor.get_device() for tensor in tensors if tensor.is_cuda}
    return torch.random.fork_rng(devices=sorted(devices))
