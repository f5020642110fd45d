"""Plans and names that are hostile: each is refused in words, or right. See tests/fuzz/README.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import sophq_func as sq
from tests.fuzz.__main__ import FOLDER, campaigns

CORPUS = FOLDER / "corpus"
PLANS = sorted((CORPUS / "plans").glob("*.json"))
NAMES = [name for name in json.loads((CORPUS / "names.json").read_text(encoding="utf-8")) if name]


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_plan_is_refused_in_words_or_runs(path: Path) -> None:
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    try:
        q = sq.build(model, sq.Plan.from_json(path.read_text(encoding="utf-8")))
        params = sq.params_of(model)
        qparams = q.calibrate(params, [x], progress=False)
        output = q.apply(params, qparams, x)
    except (sq.ConfigError, sq.PlanError, sq.StateError) as refused:
        assert "Fix: " in str(refused)
    else:
        assert output.shape == (2, 3)
        assert output.isfinite().all()


@pytest.mark.parametrize("name", NAMES, ids=map(str, range(len(NAMES))))
def test_a_layer_of_any_name_is_planned_stored_and_read(name: str, tmp_path: Path) -> None:
    inner = nn.Linear(4, 3)
    model, x = nn.Sequential(), torch.randn(2, 4)
    model._modules[name.replace(".", "_")] = inner  # add_module refuses some of these names; a subclass may not
    q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
    params = sq.params_of(model)
    qparams = q.calibrate(params, [x], progress=False)
    assert sq.Plan.from_json(q.plan.to_json()) == q.plan
    assert len(q.plan.table()) > 0
    try:
        sq.save(tmp_path / "q.safetensors", plan=q.plan, params=params, qparams=qparams)
    except sq.CheckpointError as refused:
        assert "Fix: " in str(refused)
    else:
        found = sq.load(tmp_path / "q.safetensors")
        assert torch.equal(q.apply(found.params, found.qparams, x), q.apply(params, qparams, x))


def test_what_can_be_run_is_a_campaign(tmp_path: Path) -> None:
    (tmp_path / "names.py").write_text('if __name__ == "__main__":\n    main()\n')
    (tmp_path / "_shared.py").write_text("SEED = 0\n")
    (tmp_path / "__main__.py").write_text('if __name__ == "__main__":\n    main()\n')
    assert campaigns(tmp_path) == ["names"]
    assert "__main__" not in campaigns()
