"""Text files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from sophq_func.errors import StateError, explain


def write_text(where: str, path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 text under a temporary name in the same folder, and rename it.

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
        raise StateError(explain(where, "this folder", got=str(target.parent), fix="make it first"))
    if target.is_dir():
        raise StateError(explain(where, "this path", got=str(target), allowed="the path of a file"))
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target
