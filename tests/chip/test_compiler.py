"""What is simulated, against the chips' own compiler and its interpreter; left out where ``CHIP_HOME`` names none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import sophq_func as sq
from tests.chip.network import Operations, Residual, planned
from tests.chip.record import RECORDED, record
from tools.chip import compiled, home

pytestmark = [
    pytest.mark.chip,
    pytest.mark.skipif(home() is None, reason="CHIP_HOME does not name the folder of tpu-mlir's environment"),
]


def compared(q: sq.Quantized, model: torch.nn.Module, x: torch.Tensor, folder: Path) -> sq.ChipComparison:
    params = sq.params_of(model)
    qparams = q.calibrate(params, [x], progress=False)
    tables = sq.export.tables(q, params, qparams, folder, example_args=x, name="net")
    assert tables.readme is not None
    compiled(folder, tables.readme, {"x": x.numpy()})
    return sq.compare_chip(q, params, qparams, folder, x)


@pytest.mark.parametrize("chip", ["BM1684X", "BM1688", "BM1690", "CV183X", "CV186X"])
def test_every_operation_has_the_codes_of_the_chip(chip: str, tmp_path: Path) -> None:
    model, x = Operations().eval(), torch.randn(2, 2, 8, 8)
    found = compared(planned(chip, model, x), model, x, tmp_path)
    assert not found.missing and len(found.rows) == 18
    assert all(row.equal >= 0.999 and row.within_one == 1 for row in found.rows), found.table()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_residual_network_has_the_codes_of_the_chip(symmetric: bool, tmp_path: Path) -> None:
    model, x = Residual().eval(), torch.randn(16, 2, 8, 8)
    config = sq.QuantConfig(chip="BM1684X", strategy="Chip")
    if not symmetric:
        config = sq.QuantConfig(chip="BM1684X", strategy="Chip", activation=sq.override(symmetric=False))
    found = compared(sq.quantize(model, config, example_args=(x,)), model, x, tmp_path)
    assert not found.missing
    assert all(row.equal >= 0.999 and row.within_one == 1 for row in found.rows), found.table()


def test_the_recorded_file_is_what_the_compiler_computes() -> None:
    before, now = dict(np.load(RECORDED)), record()
    assert before.keys() == now.keys()
    for name, value in now.items():
        np.testing.assert_allclose(value, before[name], rtol=1e-5, atol=0, err_msg=name)
