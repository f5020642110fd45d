"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sophq_func.core.errors import StateError, explain


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file in the same folder that takes the place of ``path`` when it is complete, or is gone.

    A symbolic link is followed. The order is: write, flush to the disk, rename, flush the folder.
    """
    target = Path(os.path.realpath(path))
    temporary = target.parent / f".{target.name[:32]}.{secrets.token_hex(8)}.tmp"
    opened = temporary.open("xb")
    try:
        with opened as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file; see :func:`replacing`."""
    with replacing(path) as file:
        file.write(data)


def write_text(where: str, path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 text; see :func:`replacing`.

    Args:
      where: what errors begin with.
      path: of the file; its folder must be there.
      text: written as it is, ends of lines included.

    Raises:
      StateError: no such folder, or the path is one.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_text("example", f"{folder}/a.txt", "one").read_text()
      'one'
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise StateError(explain(where, "this folder is not possible", got=str(target.parent), fix="make it first"))
    if target.is_dir():
        raise StateError(explain(where, "this path is not possible", got=str(target), allowed="the path of a file"))
    write_bytes(target, text.encode())
    return target
