"""Comparison with the values that a chip's compiler wrote."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.reports._chip import tensor_of

FILE = "net_bm1690_int8_sym_tpu_outputs.npz"


class Ready:
    def __init__(self) -> None:
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.model = nn.Sequential(inner, nn.Identity(), nn.Linear(6, 3)).eval()
        self.x = torch.randn(8, 4)
        config = sq.QuantConfig(chip="BM1690", strategy="Chip")
        self.q = sq.quantize(self.model, config, example_args=(self.x,))
        self.params = sq.params_of(self.model)
        self.qparams = self.q.calibrate(self.params, [self.x], progress=False)
        captured = self.q.capture(self.params, self.qparams, self.x)
        self.names = [name for name in self.q.plan if self.q.plan.site(name).role != "weight"]
        self.values = {name: captured[name][1] for name in self.names}

    def write(self, folder: Path, file: str = FILE, **changed: Tensor) -> None:
        """The file that the compiler writes, some of its values changed; by the place of their quantizer in the plan."""
        tensors = ["input0.1_Relu_si8", "0.1_Relu", "output_Gemm"]
        values = dict(zip(tensors, self.values.values(), strict=True)) | changed
        np.savez(folder / file, **{name: value.detach().numpy() for name, value in values.items()})

    def compare(self, folder: Path, **options: str) -> sq.ChipComparison:
        return sq.compare_chip(self.q, self.params, self.qparams, folder, self.x, **options)


@pytest.fixture(scope="module")
def ready() -> Ready:
    return Ready()


def test_equal_values_have_equal_codes(ready: Ready, tmp_path: Path) -> None:
    ready.write(tmp_path)
    found = ready.compare(tmp_path)
    assert [row.quantizer for row in found.rows] == ready.names and not found.missing
    assert all(row.equal == row.within_one == 1 and row.largest == 0 for row in found.rows)
    assert all(abs(row.cosine - 1) < 1e-12 for row in found.rows)
    assert found.file == FILE


def test_codes_are_counted(ready: Ready, tmp_path: Path) -> None:
    name = ready.names[-1]
    value, step = ready.values[name].clone(), ready.qparams[name].scale
    value.view(-1)[0] += step
    value.view(-1)[1] -= 3 * step
    ready.write(tmp_path, output_Gemm=value)
    row = ready.compare(tmp_path)[name]
    assert (row.elements, row.largest) == (24, 3)
    assert row.equal == pytest.approx(22 / 24) and row.within_one == pytest.approx(23 / 24)
    assert row.cosine < 1


def test_the_text_has_a_summary_and_columns(ready: Ready, tmp_path: Path) -> None:
    ready.write(tmp_path)
    found = ready.compare(tmp_path)
    text = found.table(columns=("quantizer", "equal", "largest"))
    assert text.splitlines()[0] == "3 values: 100.000 % of codes equal, 100.000 % within one"
    assert text == found.table(["quantizer", "equal", "largest"]) and str(found) == found.table()
    assert repr(found).startswith("ChipComparison(3 values")
    with pytest.raises(sq.ConfigError, match="column 'equals' is not known, did you mean 'equal'"):
        found.table("equals")


def test_csv_has_a_line_for_each_value(ready: Ready, tmp_path: Path) -> None:
    ready.write(tmp_path)
    path = ready.compare(tmp_path).to_csv(tmp_path / "chip.csv")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["quantizer"] for row in rows] == ready.names and float(rows[0]["equal"]) == 1


def test_a_value_that_the_file_lacks_is_named(ready: Ready, tmp_path: Path) -> None:
    np.savez(tmp_path / FILE, output_Gemm=ready.values[ready.names[-1]].detach().numpy())
    found = ready.compare(tmp_path)
    assert found.missing == tuple(ready.names[:-1])
    assert found.summary.endswith("; 2 not in the file")
    with pytest.raises(KeyError, match="no value of"):
        found[ready.names[0]]


@pytest.mark.parametrize(
    ("name", "tensors", "expected"),
    [
        ("input", ["input", "input0.1_Relu_si8"], "input0.1_Relu_si8"),
        ("input", ["input", "input0.1_Relu_f16"], "input0.1_Relu_f16"),
        ("input", ["input", "input_extra"], ""),
        ("0.0", ["0.0_Gemm", "0.1_Relu"], "0.1_Relu"),
        ("0.0", ["0.10_Relu", "0.1_1_Relu"], ""),
        ("2", ["output_Gemm", "output_Gemm_f32"], "output_Gemm"),
    ],
)
def test_names_of_the_file(ready: Ready, name: str, tensors: list[str], expected: str) -> None:
    assert tensor_of(ready.q.plan, f"{name}.post_act_fake_quantizer", tensors) == expected


def test_files_that_are_not_there_are_said(ready: Ready, tmp_path: Path) -> None:
    with pytest.raises(sq.StateError, match="there is no such folder"):
        ready.compare(tmp_path / "none")
    with pytest.raises(sq.StateError, match=r"no file \*tpu_outputs.npz \(because model_deploy.py writes it"):
        ready.compare(tmp_path)
    ready.write(tmp_path)
    ready.write(tmp_path, "other_tpu_outputs.npz")
    with pytest.raises(sq.StateError, match=r"several files of values.* Fix: outputs="):
        ready.compare(tmp_path)
    assert ready.compare(tmp_path, outputs=FILE).file == FILE
    with pytest.raises(sq.StateError, match=rf"has no .* did you mean .{FILE}"):
        ready.compare(tmp_path, outputs=f"x{FILE}")


def test_files_of_something_else_are_said(ready: Ready, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no zip")
    with pytest.raises(sq.StateError, match="cannot be read"):
        ready.compare(tmp_path)
    np.savez(tmp_path / FILE, other=np.ones(2))
    with pytest.raises(sq.StateError, match=r"has no planned value \(because it has other\)"):
        ready.compare(tmp_path)
    ready.write(tmp_path, output_Gemm=torch.ones(2, 3))
    with pytest.raises(sq.StateError, match=r"output_Gemm has another shape: got \(2, 3\), allowed \(8, 3\), as here"):
        ready.compare(tmp_path)


def test_formats_without_integers_are_compared_by_number(ready: Ready, tmp_path: Path) -> None:
    config = sq.QuantConfig(activation=sq.override(fake_quantize=sq.fake_quantize.bf16()), strategy="Layers")
    q = sq.quantize(ready.model, config, example_args=(ready.x,))
    qparams = q.calibrate(ready.params, [ready.x], progress=False)
    captured = q.capture(ready.params, qparams, ready.x)
    np.savez(tmp_path / FILE, input0_Gemm_bf16=captured["input.post_act_fake_quantizer"][1].numpy())
    (row,) = sq.compare_chip(q, ready.params, qparams, tmp_path, ready.x).rows
    assert (row.equal, row.largest, row.grid) == (1, 0, "bf16")
