"""The file of a long algorithm: what is done so far, so that a run that was killed goes on to the same bits."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sophq_func.algorithms._steps import append, read
from sophq_func.core.errors import StateError, explain
from sophq_func.core.files import check_place
from sophq_func.core.pytree import named_leaves
from sophq_func.core.types import Tree

StrPath = str | os.PathLike[str]
"""Path of a file."""


class Resumed:
    """Where a run of an algorithm stands, kept in a file; without a path it is kept nowhere.

    The file belongs to one call: to the same algorithm with the same options, plan, params, qparams and batches. Each step
    appends what it has made, so that a kill at any moment leaves the steps before. Tensors that are in the file take no
    memory until they are read.

    Attributes:
      step: how many steps are done.
      tensors: what they have made, by name; the last one's where several have made the same.

    Args:
      where: the algorithm, for errors.
      path: of the file; ``None``: nothing is kept.
      call: all that the result depends on: trees of tensors, numbers and strings.

    Raises:
      StateError: a folder that does not exist; a folder or a device in the place of the file; a file of another call, or of
        something else.
    """

    def __init__(self, where: str, path: StrPath | None, call: Tree) -> None:
        self.step = 0
        self.tensors: dict[str, Tensor] = {}
        self._path = None if path is None else Path(path)
        self._end = 0
        if self._path is None:
            return
        check_place(where, self._path)
        self._call = fingerprint(call)
        if self._path.exists():
            self._read(where, self._path)

    def _read(self, where: str, path: Path) -> None:
        fix = f"delete {str(path)!r}, or name another file"
        try:
            steps = read(path)
        except (ValueError, OSError) as error:
            raise StateError(explain(where, "the checkpoint cannot be read", got=str(error), fix=fix)) from error
        if any(step.call != self._call for step in steps):
            because = "its options, plan, params, qparams or batches are others"
            raise StateError(explain(where, "the checkpoint is that of another call", because=because, fix=fix))
        for step in steps:
            self._go_on(step.tensors, step.end)

    def keep(self, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Note that one more step is done.

        Args:
          made: what it has made, by name.

        Returns:
          The same, read from the file where there is one: who goes on with these frees the memory of those given.
        """
        if self._path is None:
            return self._go_on(dict(made), 0)
        step = append(self._path, self._end, self._call, made)
        return self._go_on(step.tensors, step.end)

    def _go_on(self, tensors: dict[str, Tensor], end: int) -> dict[str, Tensor]:
        self.step += 1
        self.tensors.update(tensors)
        self._end = end
        return tensors


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
