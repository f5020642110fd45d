"""The file of a long algorithm: what is done so far, so that a run that was killed goes on to the same bits."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sophq_func.core.errors import StateError, explain
from sophq_func.core.files import write_bytes
from sophq_func.core.pytree import named_leaves
from sophq_func.core.types import Tree

StrPath = str | os.PathLike[str]
"""Path of a file."""


class Resumed:
    """Where a run of an algorithm stands, kept in a file; without a path it is kept nowhere.

    The file belongs to one call: to the same algorithm with the same options, plan, params, qparams and batches. After each
    step it is replaced as a whole, so that a kill at any moment leaves the step before.

    Attributes:
      step: how many steps were done when the run began.
      tensors: what the steps so far have made, by name.

    Args:
      where: the algorithm, for errors.
      path: of the file; ``None``: nothing is kept.
      call: all that the result depends on: trees of tensors, numbers and strings.

    Raises:
      StateError: a folder that does not exist; a file of another call, or of something else.
    """

    def __init__(self, where: str, path: StrPath | None, call: Tree) -> None:
        self.step = 0
        self.tensors: dict[str, Tensor] = {}
        self._path = None if path is None else Path(path)
        if self._path is None:
            return
        if not self._path.parent.is_dir():
            got, fix = str(self._path.parent), f"pathlib.Path({str(self._path.parent)!r}).mkdir(parents=True)"
            raise StateError(explain(where, "the folder of the checkpoint does not exist", got=got, fix=fix))
        self._call = fingerprint(call)
        if self._path.exists():
            self._read(where, self._path)

    def _read(self, where: str, path: Path) -> None:
        fix = f"delete {str(path)!r}, or name another file"
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        except (SafetensorError, OSError) as error:
            raise StateError(explain(where, "the checkpoint cannot be read", got=str(error), fix=fix)) from error
        if metadata.get("call") != self._call:
            because = "its options, plan, params, qparams or batches are others"
            raise StateError(explain(where, "the checkpoint is that of another call", because=because, fix=fix))
        self.step, self.tensors = json.loads(metadata["step"]), tensors

    def keep(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Note that a number of steps are done, and what all of them have made."""
        self.step, self.tensors = step, dict(tensors)
        if self._path is None:
            return
        # contiguous and apart: the format stores each tensor as one piece of memory
        pieces = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        write_bytes(self._path, save(pieces, {"call": self._call, "step": json.dumps(step)}))


def fingerprint(tree: Tree) -> str:
    """SHA-256 of a tree: of the numbers, shapes and dtypes of its tensors, and the text of its other leaves.

    Example:
      >>> fingerprint({"a": torch.ones(2), "b": 3}) == fingerprint({"a": torch.ones(2), "b": 3})
      True
      >>> fingerprint(torch.ones(2)) == fingerprint(torch.ones(1, 2))
      False
    """
    digest = hashlib.sha256()
    for path, leaf in named_leaves(tree):
        digest.update(path.encode())
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()
