"""Files are whole or not there, keep their permissions, and leave nothing behind; what is no file is refused."""

from __future__ import annotations

import multiprocessing
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import sophq_func as sq
from sophq_func.core.errors import FileError
from sophq_func.core.files import ENDING, LONGEST_STEM, as_path, check_regular, replacing, write_text
from tests.fuzz import kills
from tests.helpers import Ready, ready

X = torch.ones(4, 3)
WRITERS = ("save", "onnx", "draw", "to_html", "to_csv", "write_text")
"""Everything that writes a file at a path that the user gives."""


@pytest.fixture(scope="module")
def made() -> Ready:
    config = sq.QuantConfig(chip="BM1684X", strategy="CNN")
    return ready(nn.Sequential(nn.Linear(3, 2)).eval(), X, config=config)


@pytest.fixture(scope="module")
def write(made: Ready) -> Callable[[str, Path], object]:
    """Writes a file, by the name of what writes it."""
    q, params, qparams = made
    found = sq.report(q, params, qparams, [X], progress=False)
    writers: dict[str, Callable[[Path], object]] = {
        "save": lambda path: sq.save(path, params=params),
        "onnx": lambda path: sq.export.onnx(q, params, qparams, X, path),
        "draw": lambda path: sq.draw(q.plan, path.with_name(f"{path.name}.svg")),
        "to_html": found.to_html,
        "to_csv": found.to_csv,
        "write_text": lambda path: write_text("here", path, "text"),
    }
    return lambda name, path: writers[name](path)


def refused(action: Callable[[], object], *words: str) -> FileError:
    """The error of an action that cannot read or write a file; it has all these words."""
    with pytest.raises(FileError) as caught:
        action()
    assert [word for word in words if word not in str(caught.value)] == []
    assert isinstance(caught.value, sq.StateError) and isinstance(caught.value, OSError)
    return caught.value


@pytest.mark.parametrize("writer", WRITERS)
def test_a_missing_folder_is_one_class_of_error(writer: str, write: Callable[[str, Path], object], tmp_path: Path) -> None:
    error = refused(lambda: write(writer, tmp_path / "none" / "file"), "the folder of this file", "mkdir")
    assert isinstance(error, FileNotFoundError)
    assert list(tmp_path.iterdir()) == []


def test_tables_and_long_algorithms_refuse_a_missing_folder_as_well(made: Ready, tmp_path: Path) -> None:
    refused(lambda: sq.export.tables(*made, tmp_path / "none", example_args=X), "the folder of this")
    refused(lambda: sq.algorithms.gptq(*made, [X], checkpoint=tmp_path / "none" / "a"), "the folder of")


@pytest.mark.parametrize("writer", WRITERS)
def test_only_regular_files_are_replaced(writer: str, write: Callable[[str, Path], object], tmp_path: Path) -> None:
    for path in (tmp_path / "folder", tmp_path / "folder.svg"):
        path.mkdir()
    for path in (tmp_path / "pipe", tmp_path / "pipe.svg"):
        os.mkfifo(path)
    before = sorted(tmp_path.iterdir())
    refused(lambda: write(writer, tmp_path / "folder"), "folder")
    refused(lambda: write(writer, tmp_path / "pipe"), "pipe")
    assert sorted(tmp_path.iterdir()) == before


def test_devices_stay_devices() -> None:
    for path in ("/dev/null", "/dev/zero"):
        refused(lambda path=path: sq.save(path, params={"a": torch.ones(1)}), "device")
        assert stat.S_ISCHR(Path(path).stat().st_mode)


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o755])
def test_the_permissions_of_the_old_file_are_kept(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch()
    path.chmod(mode)
    with replacing("here", path) as file:
        (temporary,) = (entry for entry in tmp_path.iterdir() if entry != path)
        assert stat.S_IMODE(temporary.stat().st_mode) == mode, "nobody reads the new contents who must not read the old"
        file.write(b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode and path.read_bytes() == b"new"


def test_a_link_is_followed_to_its_file_even_if_that_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    write_text("here", tmp_path / "link", "one")
    (tmp_path / "folder" / "file").chmod(0o640)
    write_text("here", tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "file").read_text() == "two"
    assert stat.S_IMODE((tmp_path / "folder" / "file").stat().st_mode) == 0o640
    assert [entry.name for entry in (tmp_path / "folder").iterdir()] == ["file"]


def _leftover(folder: Path, name: str) -> Path:
    """A file as a killed save of ``name`` leaves it."""
    path = folder / f".{name[:LONGEST_STEM]}.{'0' * 16}{ENDING}"
    path.write_bytes(b"half")
    return path


def test_a_save_collects_what_killed_saves_of_that_name_left(tmp_path: Path) -> None:
    long = "n" * 200
    mine = [_leftover(tmp_path, "a"), _leftover(tmp_path, long)]
    others = [_leftover(tmp_path, "ab"), tmp_path / f".a{ENDING}", tmp_path / ".a.0000.tmp"]
    for path in others:
        path.touch()
    write_text("here", tmp_path / "a", "text")
    write_text("here", tmp_path / long, "text")
    assert not any(path.exists() for path in mine) and all(path.exists() for path in others)


def test_a_save_that_goes_on_is_no_leftover(tmp_path: Path) -> None:
    with replacing("here", tmp_path / "a") as file:
        file.write(b"slow")
        write_text("here", tmp_path / "a", "quick")
        assert (tmp_path / "a").read_text() == "quick"
    assert (tmp_path / "a").read_bytes() == b"slow" and len(list(tmp_path.iterdir())) == 1


def test_leftovers_that_are_no_files_are_left_alone(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept")
    _leftover(tmp_path, "a").unlink()
    _leftover(tmp_path, "a").unlink()
    (tmp_path / f".a.{'1' * 16}{ENDING}").symlink_to(victim)
    os.mkfifo(tmp_path / f".a.{'2' * 16}{ENDING}")
    write_text("here", tmp_path / "a", "text")
    assert victim.read_text() == "kept" and len(list(tmp_path.iterdir())) == 4


def _write_often(path: Path, number: int) -> None:
    for _ in range(50):
        write_text("here", path, f"{number}" * 1000)


@pytest.mark.slow
def test_processes_that_write_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_often, args=(tmp_path / "a", number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"] and len(set((tmp_path / "a").read_text())) == 1


@pytest.mark.slow
def test_kills_leave_whole_files_and_nothing_after_the_next_save() -> None:
    outcomes = list(kills.kills(4, seed=1))
    assert not [outcome for outcome in outcomes if outcome.startswith("FAULT")]
    assert sum("killed in a save" in outcome for outcome in outcomes) == 4


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        refused(lambda path=path: check_regular("here", path), "cannot be read as a file")
    with pytest.raises(FileNotFoundError):
        check_regular("here", tmp_path / "none")


@pytest.mark.parametrize("path", [None, 3, b"a", ["a"], "a\0b", "x" * 300])
def test_what_no_file_can_be_called_is_refused(path: object) -> None:
    with pytest.raises(sq.StateError, match=r"^here: (this is no path|no file can have this name)"):
        as_path("here", path)
