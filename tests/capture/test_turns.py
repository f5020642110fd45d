"""A run that ends where nobody expected it, by an interrupt or in a forked child, leaves nothing behind."""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sophq_func as sq
from sophq_func.capture import _torch, hidden
from tests.helpers import Ready, ready

ROOT = Path(sq.__file__).parent
TRACED = (str(ROOT / "capture"), str(ROOT / "model" / "runner.py"))
Line = tuple[str, int, int]
"""A file, the number of a line, and how many times a run has come there before, counted up to :data:`TIMES`."""

TIMES = 3


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


class Everything(nn.Module):
    """Layers, functions, a scope, an attribute that a run binds anew, an ``autograd.Function``, and a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        x = Doubled.apply(self.body(x)).mean((2, 3))
        return checkpoint(self.head, x, use_reentrant=False) @ torch.ones(2, 2)


@contextmanager
def at_each_line(act: Callable[[Line], None]) -> Iterator[None]:
    """Call ``act`` before each line of the room ``capture`` and of the runner."""
    visits: dict[tuple[str, int], int] = {}

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(TRACED):
            return None
        # the line of a ``with`` comes again when its block is done, outside of what it protects; no interrupt is taken there
        if event == "line" and frame.f_lineno not in withs(frame.f_code.co_filename):
            place = (frame.f_code.co_filename, frame.f_lineno)
            visits[place] = visits.get(place, 0) + 1
            if visits[place] <= TIMES:
                act((*place, visits[place]))
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


@functools.cache
def withs(file: str) -> frozenset[int]:
    """Numbers of the lines with which a context begins."""
    lines = Path(file).read_text().splitlines()
    return frozenset(number for number, line in enumerate(lines, 1) if line.strip().startswith("with "))


def interrupt_at(line: Line) -> Callable[[Line], None]:
    def act(now: Line) -> None:
        if now == line:
            raise KeyboardInterrupt

    return act


def assert_nothing_is_left(made: Ready, x: Tensor, expected: Tensor) -> None:
    skeleton = made.q.engine.skeleton
    assert _torch.innermost_mode() is None
    assert skeleton._slot.watch is None and not skeleton._turn._undo
    assert all(tensor.is_meta for tensor in (*skeleton.module.parameters(), *skeleton.module.buffers()))
    assert skeleton.module.steps == 0
    assert torch.autograd.Function.__dict__["apply"] is hidden.FUNCTION_APPLY
    assert not hidden.STANCES and not hidden.CHECKPOINTS._runs and not hidden.FUNCTIONS._runs
    assert torch.equal(made.q.apply(made.params, made.qparams, x), expected)


@pytest.mark.slow
def test_an_interrupt_at_any_line_is_an_interrupt_and_leaves_nothing() -> None:
    x = torch.randn(2, 3, 2, 2)
    made = ready(Everything().eval(), x)
    expected = made.q.apply(made.params, made.qparams, x)
    lines: list[Line] = []
    with at_each_line(lines.append):
        made.q.apply(made.params, made.qparams, x)
    assert len(lines) > 200
    for line in lines:
        with pytest.raises(KeyboardInterrupt), at_each_line(interrupt_at(line)):
            made.q.apply(made.params, made.qparams, x)
        assert_nothing_is_left(made, x, expected)


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
