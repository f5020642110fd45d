"""What docs/promises.md says of determinism: processes, hash seeds, threads, and the other forms of a quantized model."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import sophq_func as sq
from tests.docs.experiment import ANY_ORDER, EXACT, digest, digests
from tests.docs.pages import ROOT

PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_another_process_with_another_hash_seed_and_number_of_threads() -> None:
    """Everything is the same in it with one thread; with two, all but sums of floats."""
    # a thread that waits for work sleeps, or two of them take all of a busy machine
    threads = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    environment = {**os.environ, **threads, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-m", "tests.docs.experiment"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    there, here = json.loads(run.stdout), digests(1)
    assert there["1"] == here
    exact = {name: value for name, value in here.items() if name.startswith(EXACT)}
    assert len(exact) > 2 * len(ANY_ORDER)
    assert exact.items() <= there["2"].items()


def test_the_page_names_the_observers_whose_grids_depend_on_no_order() -> None:
    (row,) = (line for line in PAGE.splitlines() if line.startswith("| the number of threads"))
    assert all(f"`{name}`" in row for name in ANY_ORDER)


FORMS: dict[str, Callable[[sq.Quantized], sq.Quantized]] = {
    "pickled": lambda q: pickle.loads(pickle.dumps(q)),
    "copied": copy.deepcopy,
    "built again from its plan": lambda q: sq.build(net(), sq.Plan.from_json(q.plan.to_json())),
}


def net() -> nn.Module:
    torch.default_generator.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def test_every_form_of_a_quantized_model_gives_the_same_bits(tmp_path: Path) -> None:
    x = torch.randn(5, 6)
    q = sq.quantize(net(), sq.presets.w4a4_lsq(), example_args=(x,))
    params = sq.params_of(net())
    qparams = q.calibrate(params, [x], progress=False)
    expected = digest(q.apply(params, qparams, x))
    assert digest(q.apply(params, qparams, x)) == expected
    assert digest(sq.stage(q.apply)(params, qparams, x)) == expected
    assert digest(q.bind(params, qparams)(x)) == expected
    sq.save(tmp_path / "q.safetensors", params=params, qparams=qparams)
    found = sq.load(tmp_path / "q.safetensors")
    assert digest(q.apply(found.params, found.qparams, x)) == expected
    for made in FORMS.values():
        assert digest(made(q).apply(params, qparams, x)) == expected
