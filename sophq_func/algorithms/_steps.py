"""A file to which a long algorithm appends what each step has made; tensors in it are read from the disk when they are used.

A record for each step: a head, a description in JSON, and the tensors. The head is written once more when all else is on the
disk, with the length of the record, which is 0 until then: a record that a kill cuts short has none, and is written over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from struct import Struct
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

MAGIC = b"sqsteps1"
"""What each record begins with."""

HEAD = Struct("<8sQQ")
"""Of a record: the magic, the bytes of the record, those of its description."""

ALIGNED = 64
"""Records and tensors begin at multiples of it, as torch aligns its own memory."""


class Step(NamedTuple):
    """What one step has made.

    Attributes:
      call: the call that the step belongs to.
      tensors: by name. Memory holds of them what has been read, and lets go of it when there is need.
      end: byte of the file at which the next record begins.
    """

    call: str
    tensors: dict[str, Tensor]
    end: int


class _Entry(NamedTuple):
    """A tensor in a record; ``begin`` counts bytes from the end of the description."""

    dtype: str
    device: str
    shape: tuple[int, ...]
    begin: int
    size: int


def read(path: Path) -> list[Step]:
    """The complete steps of a file, in order.

    Raises:
      ValueError: it is another kind of file.
    """
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
    if not MAGIC.startswith(start):
        raise ValueError("it begins otherwise than a checkpoint does")
    steps: list[Step] = []
    while (step := _step(path, steps[-1].end if steps else 0)) is not None:
        steps.append(step)
    return steps


def append(path: Path, begin: int, call: str, made: Mapping[str, Tensor]) -> Step:
    """Write one more step into a file, and read it.

    Args:
      path: of the file; it is made where there is none.
      begin: where the last step ends; what follows there is written over.
      call: that the step belongs to.
      made: tensors by name.
    """
    entries: dict[str, _Entry] = {}
    size = 0
    for name, tensor in made.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries[name] = _Entry(dtype, str(tensor.device), tuple(tensor.shape), size, tensor.numel() * tensor.element_size())
        size = _aligned(size + entries[name].size)
    text = json.dumps({"call": call, "entries": entries}).encode()
    text = text.ljust(_aligned(HEAD.size + len(text)) - HEAD.size)
    with path.open("r+b" if path.exists() else "x+b") as file:
        file.seek(begin)
        file.truncate()
        file.write(HEAD.pack(MAGIC, 0, len(text)) + text)
        for tensor in made.values():
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            file.write(raw.numpy().data)
            file.write(bytes(_aligned(len(raw)) - len(raw)))
        _flush(file)
        file.seek(begin)
        file.write(HEAD.pack(MAGIC, HEAD.size + len(text) + size, len(text)))
        _flush(file)
    step = _step(path, begin)
    assert step is not None, "it has just been written"
    return step


def _step(path: Path, begin: int) -> Step | None:
    """The step that begins at a byte of a file; ``None`` where there is none that is complete."""
    left = path.stat().st_size - begin
    with path.open("rb") as file:
        file.seek(begin)
        head = file.read(HEAD.size)
        if len(head) < HEAD.size:
            return None
        _, size, described = HEAD.unpack(head)
        if not HEAD.size + described <= size <= left:
            return None
        description = json.loads(file.read(described))
    # private to this process: who writes into a tensor does not change the file
    data = np.memmap(path, np.uint8, "c", offset=begin + HEAD.size + described, shape=(size - HEAD.size - described,))
    entries = {name: _Entry(*entry) for name, entry in description["entries"].items()}
    tensors = {name: _tensor(data, entry) for name, entry in entries.items()}
    return Step(description["call"], tensors, begin + size)


def _tensor(data: np.memmap, entry: _Entry) -> Tensor:
    raw = torch.from_numpy(data[entry.begin : entry.begin + entry.size])
    return raw.view(getattr(torch, entry.dtype)).reshape(entry.shape).to(entry.device)


def _aligned(size: int) -> int:
    """The next multiple of :data:`ALIGNED`."""
    return -(-size // ALIGNED) * ALIGNED


def _flush(file: BinaryIO) -> None:
    """Wait until all that was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())
