"""Writing files atomically: a reader sees the old file or the complete new one, never a part."""

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
    """Open a temporary file that replaces ``path`` when the block ends, and is deleted when the block raises.

    A symbolic link is followed: the file that it points to is replaced, and the link stays.

    Args:
      path: of the file to replace or create; its folder must exist.

    Yields:
      The temporary file, open for writing bytes.
    """
    target = Path(os.path.realpath(path))
    # in the same folder, since a rename is atomic within one file system only; the name is cut to fit the limit of 255 bytes
    temporary = target.parent / f".{target.name[:32]}.{secrets.token_hex(8)}.tmp"
    opened = temporary.open("xb")
    try:
        with opened as file:
            yield file
            # contents first: a crash after the rename must not leave an empty file under the final name
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    # the rename itself survives a crash only when the folder is flushed, too; Windows cannot open folders
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically; see :func:`replacing`."""
    with replacing(path) as file:
        file.write(data)


def write_text(where: str, path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 text atomically; see :func:`replacing`.

    Args:
      where: the function or key that errors name.
      path: of the file; its folder must exist.
      text: written unchanged, line endings included.

    Returns:
      The path.

    Raises:
      StateError: the folder does not exist, or ``path`` is a folder.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_text("example", f"{folder}/a.txt", "one").read_text()
      'one'
    """
    target = Path(path)
    if not target.parent.is_dir():
        fix = f"pathlib.Path({str(target.parent)!r}).mkdir(parents=True)"
        raise StateError(explain(where, "the folder of this file does not exist", got=str(target.parent), fix=fix))
    if target.is_dir():
        raise StateError(
            explain(where, "a folder cannot be overwritten by a file", got=str(target), allowed="the path of a file")
        )
    write_bytes(target, text.encode())
    return target
