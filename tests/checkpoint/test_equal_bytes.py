"""The same content gives the same bytes, in every process: whoever compares files compares what is in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import sophq_func as sq
from tests.fuzz import same_bytes


@pytest.mark.slow
def test_two_processes_with_other_hash_seeds_write_the_same_bytes(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        same_bytes.write_small(tmp_path)  # this process has a hash seed of its own
    finally:
        torch.set_num_threads(threads)
    here, there = same_bytes.digests(tmp_path), same_bytes.in_process("small", seed=4242)
    assert here == there
    assert {"checkpoint", "plan.json", "report.html", "report.csv", "plan.svg", "plan.png", "model.onnx"} <= here.keys()
    assert any(name.startswith("net_cali_table") for name in here)


def test_two_saves_write_the_same_bytes_in_whatever_order_names_are_given(tmp_path: Path) -> None:
    params = {"b": torch.ones(3), "a": torch.zeros(2), "c": torch.ones(2, dtype=torch.int64)}
    for name, given in (("one", params), ("two", dict(reversed(params.items())))):
        sq.save(tmp_path / name, params=given, extra={"step": 1})
    one = (tmp_path / "one").read_bytes()
    assert one == (tmp_path / "two").read_bytes()
    header = json.loads(one[8 : 8 + int.from_bytes(one[:8], "little")])
    assert list(header) == ["__metadata__", "params.c", "params.a", "params.b"]


def test_a_picture_has_no_date_and_no_random_names(tmp_path: Path) -> None:
    plan = sq.quantize(nn.Linear(2, 2), sq.QuantConfig(), example_args=(torch.ones(1, 2),)).plan
    for ending in ("svg", "png", "pdf"):
        one, two = (sq.draw(plan, tmp_path / f"{name}.{ending}").read_bytes() for name in ("one", "two"))
        assert one == two
        assert b"CreationDate" not in one and b"<dc:date>" not in one
