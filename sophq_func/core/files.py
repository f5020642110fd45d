"""Files, written atomically: a reader sees the old file or the complete new one. And which files are read and written."""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from sophq_func.core.errors import FileError, FolderNotFoundError, NotAFileError, explain

try:
    import fcntl
except ImportError:  # Windows, which does not delete a file that is open: there a file needs no lock
    fcntl = None  # type: ignore[assignment]

LONGEST_NAME = 255
"""Bytes in the name of a file, on all file systems in use."""

LONGEST_STEM = 32
"""Characters of a file's name in that of its temporary file: all of it and the rest must fit in 255 bytes."""

TOKEN_BYTES = 8
"""Random bytes in the name of a temporary file: two files in one folder never have the same."""

PERMISSIONS = 0o777
"""What a new file takes over from the old one: who may read, write and run it."""

ENDING = ".sophq-tmp"
"""What the name of a temporary file ends with. Another program has hardly files like that."""

LEFT = re.compile(rf"\.(?P<stem>.+)\.[0-9a-f]{{{2 * TOKEN_BYTES}}}{re.escape(ENDING)}", re.DOTALL)
"""The names of temporary files."""


@contextmanager
def replacing(where: str, path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces ``path`` when the block ends, and is deleted when the block raises.

    A symbolic link is followed: the file that it points to is replaced, and the link stays. The new file has the permissions
    of the old one. Temporary files of the same name that killed processes have left behind are deleted first.

    Args:
      where: the function that errors name.
      path: of the file to replace or create; its folder must exist.

    Yields:
      The temporary file, open for writing bytes.

    Raises:
      FileError: the folder does not exist, or a folder, device, pipe or socket is at ``path``.
    """
    target = Path(os.path.realpath(path))
    mode = check_place(where, path)
    _collect(target)
    temporary, opened = _temporary(target)
    try:
        with opened as file:
            if mode is not None:  # before the contents: nobody may read them who must not read the old ones
                temporary.chmod(mode)
            yield file
            # contents first: a crash after the rename must not leave an empty file under the final name
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:  # Windows renames no file that is open; elsewhere it stays locked until it is renamed
                file.close()
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    _flush_folder(target.parent)


def check_place(where: str, path: str | os.PathLike[str]) -> int | None:
    """Check that a file can be written at a path, and return the permissions of the one that is there, if there is one.

    Raises:
      FileError: the folder does not exist, or a folder, device, pipe or socket is at ``path``.
    """
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        sentence, fix = "the folder of this file does not exist", f"pathlib.Path({str(folder)!r}).mkdir(parents=True)"
        raise FolderNotFoundError(explain(where, sentence, got=str(folder), fix=fix))
    try:
        # of the path as it is given: what /dev/stdout leads to has no name of its own
        found = Path(path).stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        sentence, allowed = "a folder cannot be overwritten by a file", "the path of a file"
        raise NotAFileError(explain(where, sentence, got=str(path), allowed=allowed))
    if not stat.S_ISREG(found.st_mode):
        sentence, allowed = "a device, pipe or socket cannot be replaced by a file", "the path of a regular file"
        raise FileError(explain(where, sentence, got=str(path), allowed=allowed))
    return stat.S_IMODE(found.st_mode) & PERMISSIONS


def _temporary(target: Path) -> tuple[Path, BinaryIO]:
    """A new file beside ``target``, which is open, and locked while it is.

    The system gives up the lock when the process dies, so that who gets the lock of a temporary file may delete it. Process
    numbers would not tell: other machines, and other containers, have the same ones.
    """
    while True:
        # in the same folder, since a rename is atomic within one file system only
        name = f".{target.name[:LONGEST_STEM]}.{secrets.token_hex(TOKEN_BYTES)}{ENDING}"
        temporary = target.parent / name
        opened: BinaryIO = temporary.open("xb")
        if fcntl is None or _is_locked(opened):
            return temporary, opened
        opened.close()  # it was deleted as a leftover between its creation and its lock


def _is_locked(file: BinaryIO) -> bool:
    """Whether a new file is this process's own; it waits for who looks whether the file is a leftover."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
    except OSError:  # a file system without locks, on which no leftover is collected, either
        return True
    return os.fstat(file.fileno()).st_nlink > 0


def _collect(target: Path) -> None:
    """Delete the temporary files for ``target`` whose processes were killed."""
    if fcntl is None:
        return
    try:
        with os.scandir(target.parent) as entries:
            names = [entry.name for entry in entries if entry.name.endswith(ENDING)]
    except PermissionError:  # a folder in which files may be made, and not be listed
        return
    for name in names:
        found = LEFT.fullmatch(name)
        if found and found["stem"] == target.name[:LONGEST_STEM]:
            _delete_left(target.parent / name)


def _delete_left(path: Path) -> None:
    """Delete a temporary file, unless a process writes it."""
    # what the system refuses is no leftover of ours: it is gone, it is locked by its writer, or it belongs to another user
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        finally:
            os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    """Wait until a rename in a folder is on the disk."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open folders
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # it may be written, and not be listed; the system flushes it later
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def as_path(where: str, path: object) -> Path:
    """What a user gives as the path of a file.

    Raises:
      FileError: it is none, or no file system has such names.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise FileError(explain(where, "this is no path", got=path, allowed="a str or pathlib.Path", fix='"name.html"'))
    name = Path(path).name
    if "\0" in name or len(name.encode(errors="surrogatepass")) > LONGEST_NAME:
        allowed = f"up to {LONGEST_NAME} bytes, and none of them 0"
        raise FileError(explain(where, "no file can have this name", got=name, allowed=allowed, fix="a shorter one"))
    return Path(path)


def write_bytes(where: str, path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file atomically; see :func:`replacing`.

    Returns:
      The path.
    """
    target = as_path(where, path)
    with replacing(where, target) as file:
        file.write(data)
    return target


def write_text(where: str, path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 text atomically; see :func:`replacing`.

    Args:
      where: the function or key that errors name.
      path: of the file; its folder must exist.
      text: written unchanged, line endings included.

    Returns:
      The path.

    Raises:
      FileError: the folder does not exist, or ``path`` is a folder, a device or the like.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_text("example", f"{folder}/a.txt", "one").read_text()
      'one'
    """
    return write_bytes(where, path, text.encode())


def check_regular(where: str, path: Path) -> None:
    """Raise a :class:`FileError` where something else than a file is at a path that is to be read.

    A pipe would be waited for, and a device may never end.

    Raises:
      OSError: from the operating system: there is nothing, or no permission.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        sentence, allowed = "a directory, device, pipe or socket cannot be read as a file", "the path of a regular file"
        raise FileError(explain(where, sentence, got=str(path), allowed=allowed))
