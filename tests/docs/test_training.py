"""The complete loops among the examples: a run that was saved and loaded ends with the bits of one that was not."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from tests.checkpoint.test_extra import same
from tests.docs.pages import ROOT
from tests.helpers import Ready, ready, unchanged

pytestmark = pytest.mark.slow

STEPS = 10


def loaded(name: str) -> ModuleType:
    """An example as a module; it runs nothing then."""
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["example"] = module  # where a named tuple of a checkpoint is looked for
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["10_qat_torch_optim", "qat_torchopt"])
def example(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Each of the loops."""
    if request.param == "qat_torchopt":
        pytest.importorskip("torchopt")
    yield loaded(request.param)
    sys.modules.pop("example", None)


@pytest.fixture
def task() -> tuple[Ready, Tensor, Tensor, set[str]]:
    """A network with a BatchNorm and a frozen bias, with learned scales; images, labels, and what is trained."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    model[4].bias.requires_grad_(False)
    x, y = torch.randn(80, 1, 6, 6), torch.arange(80) % 3
    half = sq.override(bits=4, fake_quantize="lsq")
    r = ready(model, x[:16], config=sq.QuantConfig(strategy="CNN", weight=half, activation=half))
    return r, x, y, set(sq.split_params(model)[0])


def leaves(run: Any) -> dict[str, Any]:
    """Everything of a run that training changes."""
    optimizer = run.moments if hasattr(run, "moments") else (run.optimizer.state_dict(), run.schedule.state_dict())
    generator = run.generator.get_state() if hasattr(run, "generator") else run.step
    parts = {"params": run.params, "qparams": run.qparams, "optimizer": optimizer, "generator": generator, "step": run.step}
    return {name: part if name != "params" else {k: t.detach() for k, t in part.items()} for name, part in parts.items()}


def trained(example: ModuleType, task: tuple[Ready, Tensor, Tensor, set[str]], path: Path, pause: int) -> Any:
    """A run of all steps, saved and loaded after ``pause`` of them where that is not 0."""
    r, x, y, names = task
    q = r.q.train()

    def advance(run: Any, steps: int) -> Any:
        # torch.optim's loop changes the run that it is given, and returns none
        after = example.advance(run, q, x, y, steps)
        return run if after is None else after

    run = example.start(r.q, r.params, r.qparams, names)
    if pause:
        run = advance(run, pause)
        example.save(run, r.q, path)
        del run
        run = example.resume(r.q, path)
    return advance(run, STEPS - run.step)


def test_a_run_that_was_saved_and_loaded_has_the_bits_of_one_that_was_not(
    example: ModuleType, task: tuple[Ready, Tensor, Tensor, set[str]], tmp_path: Path
) -> None:
    r, _, _, names = task
    whole, resumed = (trained(example, task, tmp_path / "run", pause) for pause in (0, 5))
    same(leaves(resumed), leaves(whole))
    assert whole.step == STEPS
    for name, tensor in whole.params.items():
        assert torch.equal(tensor, r.params[name]) == (name == "4.bias"), name
    for name, entry in whole.qparams.items():
        assert not torch.equal(entry.scale, r.qparams[name].scale), name
    assert "4.bias" not in names


@pytest.mark.parametrize("lost", ["optimizer", "schedule", "generator"])
def test_every_part_of_the_checkpoint_is_needed(
    lost: str, task: tuple[Ready, Tensor, Tensor, set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = loaded("10_qat_torch_optim")
    whole = trained(example, task, tmp_path / "run", 0)
    load: Callable[..., sq.Checkpoint] = sq.load

    def forgetful(path: Path) -> sq.Checkpoint:
        found = load(path)
        r, names = task[0], task[3]
        run = example.start(r.q, r.params, r.qparams, names)
        fresh = run.generator.get_state() if lost == "generator" else getattr(run, lost).state_dict()
        found.extra[lost] = fresh
        return found

    monkeypatch.setattr(sq, "load", forgetful)
    resumed = trained(example, task, tmp_path / "run", 5)
    assert any(not torch.equal(tensor, whole.params[name]) for name, tensor in resumed.params.items())


def test_the_rate_rises_falls_and_scales_have_their_own(task: tuple[Ready, Tensor, Tensor, set[str]]) -> None:
    example = loaded("10_qat_torch_optim")
    shares = [example.share(step) for step in range(example.STEPS + 1)]
    assert shares.index(max(shares)) in (example.WARMUP - 1, example.WARMUP)
    assert max(shares) == 1
    assert shares[-1] == pytest.approx(0, abs=1e-12)
    r, _, _, names = task
    run = example.start(r.q, r.params, r.qparams, names)
    rates = [group["lr"] for group in run.optimizer.param_groups]
    assert rates == pytest.approx([example.RATE / example.WARMUP, example.SCALE_RATE / example.WARMUP])


def test_a_step_with_torchopt_writes_into_nothing(task: tuple[Ready, Tensor, Tensor, set[str]]) -> None:
    pytest.importorskip("torchopt")
    example = loaded("qat_torchopt")
    r, x, y, names = task
    with unchanged(r.params, r.qparams):
        first = example.start(r.q, r.params, r.qparams, names)
        second = example.advance(first, r.q.train(), x, y, 1)
        with unchanged(first.params, first.qparams, second.params, second.qparams):
            again = example.advance(first, r.q.train(), x, y, 2)
        same(leaves(example.advance(second, r.q.train(), x, y, 1)), leaves(again))


def test_without_torchopt_its_example_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchopt", None)
    with pytest.raises(SystemExit, match="Fix: pip install torchopt"):
        loaded("qat_torchopt")
