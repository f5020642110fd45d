"""The file of a long algorithm, and what a kill leaves of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sophq_func.algorithms._steps import HEAD, MAGIC, append, read
from tests.helpers import same

ONE = {"w": torch.arange(6.0).reshape(2, 3), "scale": torch.tensor(0.5)}
TWO = {"v": torch.arange(70, dtype=torch.int8)}


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "run"
    made = {
        "transposed": torch.arange(6.0).reshape(2, 3).mT,
        "bfloat16": torch.tensor([1.5, -2.0, 3.0], dtype=torch.bfloat16),
        "bool": torch.tensor([True, False, True]),
        "float64": torch.tensor(0.1, dtype=torch.float64),
        "empty": torch.ones(0, 3),
    }
    step = append(path, 0, "call", made)
    same(step.tensors, made)
    (again,) = read(path)
    assert (again.call, again.end) == ("call", step.end) == ("call", path.stat().st_size)
    same(again.tensors, made)


def test_a_step_that_is_cut_short_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first = append(path, 0, "call", ONE)
    second = append(path, first.end, "call", TWO)
    whole = path.read_bytes()
    for size in range(first.end, second.end, 7):
        path.write_bytes(whole[:size])
        (left,) = read(path)
        same(left.tensors, ONE)
    append(path, left.end, "call", TWO)
    assert path.read_bytes() == whole


def test_a_step_without_its_length_is_none(tmp_path: Path) -> None:
    path = tmp_path / "run"
    step = append(path, 0, "call", ONE)
    data = path.read_bytes()
    _, _, described = HEAD.unpack(data[: HEAD.size])
    path.write_bytes(HEAD.pack(MAGIC, 0, described) + data[HEAD.size :])
    assert read(path) == []
    assert append(path, 0, "call", ONE).end == step.end


def test_a_file_that_was_just_begun_has_no_steps(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for begun in (b"", MAGIC[:3]):
        path.write_bytes(begun)
        assert read(path) == []


def test_writing_into_a_tensor_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run"
    append(path, 0, "call", ONE).tensors["w"].zero_()
    same(read(path)[0].tensors, ONE)


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_bytes(b"PK\3\4 and more")
    with pytest.raises(ValueError, match="begins otherwise"):
        read(path)
