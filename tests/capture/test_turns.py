"""A run that ends where nobody expected it, by an interrupt or in a forked child, leaves nothing behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
from types import FunctionType

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from sophq_func.capture import _torch, hidden
from sophq_func.capture.frame import Frame, Watch
from tests.fuzz import forks, interrupts
from tests.fuzz._scenes import Functions, plain_torch, scenes
from tests.helpers import ready

SAMPLE = ("chain: apply", "functions: apply", "checkpoint: backward", "training: bound", "mapped: observe")
"""Scenes of the campaign of interrupts that show each way to run: without a mode, with one, in a backward pass, as a module,
and with a transform in the model."""


@pytest.mark.slow
@pytest.mark.parametrize("scene, count", [*((scene, 30) for scene in SAMPLE), ("chain: quantize", 10)])
def test_an_interrupt_anywhere_is_an_interrupt_and_leaves_nothing(scene: str, count: int) -> None:
    outcomes = interrupts.campaign(count, seed=0, only=scene)
    assert not outcomes.faults
    # where an object is deleted, Python goes on
    assert outcomes.counts["interrupt"] >= count - 2 and sum(outcomes.counts.values()) == count


@pytest.mark.slow
@pytest.mark.parametrize(
    "scene, function",
    [
        ("mapped: apply", contextlib._GeneratorContextManager.__exit__),
        ("training: bound", torch.no_grad.__exit__),
        ("chain: quantize", contextlib._GeneratorContextManager.__exit__),
        ("checkpoint: backward", torch.autograd.graph.saved_tensors_hooks.__exit__),
    ],
)
def test_an_interrupt_when_a_context_of_torch_begins_to_end(scene: str, function: FunctionType) -> None:
    case, code = interrupts.Case(scenes()[scene]), function.__code__
    point = interrupts.Point("call", code.co_filename, code.co_firstlineno, visit=1)
    assert case.faults(point) == ("interrupt", [])


@pytest.mark.slow
def test_what_a_second_interrupt_leaves_does_nothing_and_the_next_run_takes_it_away() -> None:
    assert not interrupts.campaign(40, seed=0, only="functions: apply", twice=True).faults


def test_a_mode_whose_run_is_over_does_nothing_and_the_next_run_takes_it_away() -> None:
    x = torch.randn(2, 3, 2, 2)
    made = ready(Functions().eval(), x)
    square = torch.ones(4, 4)
    expected, plain = made(x), plain_torch(square)

    class Reports(Frame):
        def function(self, *args: object) -> Tensor:
            raise AssertionError("the run is over")

        inner_function = function

    left = Watch(Reports(), lambda *args: None)
    _torch.push_mode(left)
    left.finish()
    assert all(map(torch.equal, plain_torch(square), plain))
    assert torch.equal(made(x), expected)
    assert _torch.innermost_mode() is None


def test_an_undoing_that_was_cut_short_is_made_good_by_the_next_run() -> None:
    x = torch.randn(2, 3, 2, 2)
    made = ready(Functions().eval(), x)
    expected = made(x)
    turn, undone = made.q.engine.skeleton._turn, []
    turn.note(lambda: undone.append(1))
    turn.depth = 1
    assert torch.equal(made(x), expected)
    assert undone == [1] and turn.depth == 0 and not turn._undo


class Waits(nn.Module):
    """A model that tells when it runs, and goes on when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if STARTED is not None:
            STARTED.set()
            GO_ON.wait()
        return x.relu()


STARTED: threading.Event | None = None
GO_ON = threading.Event()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_that_is_forked_during_a_run_of_another_thread_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 3)
    made = ready(Waits().eval(), x)
    expected = made.q.apply(made.params, made.qparams, x)
    monkeypatch.setattr(sys.modules[__name__], "STARTED", threading.Event())
    runs = threading.Thread(target=made.q.apply, args=(made.params, made.qparams, x))
    runs.start()
    assert STARTED is not None and STARTED.wait(60)
    context = multiprocessing.get_context("fork")

    def child() -> None:
        global STARTED
        STARTED = None
        skeleton = made.q.engine.skeleton
        clean = skeleton._slot.watch is None and all(tensor.is_meta for tensor in skeleton.module.parameters())
        same = torch.equal(made.q.apply(made.params, made.qparams, x), expected)
        os._exit(7 if clean and same else 8)

    process = context.Process(target=child)
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
    GO_ON.set()
    runs.join()
    GO_ON.clear()
    assert process.exitcode == 7


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_children_that_are_forked_at_any_moment_of_runs_of_other_threads_can_run() -> None:
    assert forks.campaign(12, seed=0) == {"right": 12}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_that_is_forked_while_a_function_of_torch_is_replaced_can_run() -> None:
    x = torch.randn(2, 3, 2, 2)
    made = ready(Functions().eval(), x)
    expected = made(x)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with hidden.FUNCTIONS._guard.lock:
            held.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(60)
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(forks.in_child(made, x, expected)))
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
    done.set()
    holder.join()
    assert process.exitcode == forks.RIGHT


def test_an_error_in_a_checkpoint_takes_its_hooks_with_it_and_none_of_the_caller() -> None:
    """Neither at once nor when its frames, in which torch's contexts may wait, are deleted."""

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(torch.matmul, x, torch.ones(len(x), 1), use_reentrant=False)

    made = ready(Broken().eval(), torch.ones(4, 4))
    with saved_tensors_hooks(Tensor.clone, Tensor.clone):
        hooks = _torch.saved_tensors_hooks()
        with pytest.raises(RuntimeError, match=r"size mismatch|shapes cannot be multiplied") as raised:
            made(torch.ones(3, 4))
        assert _torch.saved_tensors_hooks() == hooks
        del raised
        assert _torch.saved_tensors_hooks() == hooks
    assert _torch.saved_tensors_hooks() is None
