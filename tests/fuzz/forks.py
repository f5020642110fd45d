"""Children that are forked while other threads run models: they must run them, too, with the same bits.

``python -m tests.fuzz.forks --count 200`` prints a table of outcomes, and exits with 1 where one is not right.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

from sophq_func.capture import hidden
from tests.fuzz._scenes import Functions, chain, skeletons_of
from tests.helpers import Ready, ready

PATIENCE = 20.0
"""Seconds after which a child hangs: a run takes milliseconds."""

RIGHT, LEFT, WRONG = 7, 8, 9
"""Exit codes of a child: all is well; something of another thread's run is there; other bits."""

MEANING = {RIGHT: "right", LEFT: "something left of another thread's run", WRONG: "other bits"}


def in_child(made: Ready, x: Tensor, expected: Tensor) -> int:
    """The exit code of a child that looks at what it has inherited, and runs the model."""
    left = bool(_get_current_function_mode_stack()) or hidden.CHECKPOINTS._runs or hidden.FUNCTIONS._runs or hidden.STANCES
    left = left or torch.autograd.Function.__dict__["apply"] is not hidden.FUNCTION_APPLY
    for skeleton in skeletons_of(made.q):
        left = left or skeleton._slot.watch is not None or skeleton._turn.depth or skeleton._turn._undo
        left = left or not all(t.is_meta for t in (*skeleton.module.parameters(), *skeleton.module.buffers()))
    if left:
        return LEFT
    return RIGHT if torch.equal(made(x), expected) else WRONG


@contextmanager
def busy(made: Ready, x: Tensor, threads: int) -> Iterator[None]:
    """Other threads run the model all the time."""
    done = threading.Event()

    def run() -> None:
        while not done.is_set():
            made(x)

    workers = [threading.Thread(target=run) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        done.set()
        for worker in workers:
            worker.join()


def campaign(count: int, seed: int) -> Counter[str]:
    """Fork ``count`` times at moments that ``seed`` chooses; half of the runs meanwhile replace functions of torch."""
    chosen = random.Random(seed)
    torch.manual_seed(0)
    subjects = [(chain(), torch.randn(3, 4)), (Functions(), torch.randn(2, 3, 2, 2))]
    context = multiprocessing.get_context("fork")
    outcomes = Counter[str]()
    for index, (model, x) in enumerate(subjects):
        made = ready(model.eval(), x)
        expected = made(x)

        def child(made: Ready = made, x: Tensor = x, expected: Tensor = expected) -> None:
            os._exit(in_child(made, x, expected))

        with busy(made, x, threads=2):
            for _ in range(count // 2 + (index < count % 2)):
                time.sleep(chosen.random() * 0.005)
                process = context.Process(target=child)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)  # that there are threads
                    process.start()
                process.join(PATIENCE)
                if process.is_alive():
                    process.kill()
                    process.join()
                    outcomes["hangs"] += 1
                else:
                    outcomes[MEANING.get(process.exitcode or 0, f"exit code {process.exitcode}")] += 1
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="instead of a count, how long")
    options = parser.parse_args()
    torch.set_num_threads(1)
    outcomes, start, seed = Counter[str](), time.monotonic(), options.seed
    while not outcomes or (options.seconds and time.monotonic() - start < options.seconds):
        outcomes += campaign(20 if options.seconds else options.count, seed)
        seed += 1
    sys.stdout.writelines(f"{times:8}  {outcome}\n" for outcome, times in outcomes.most_common())
    return int(set(outcomes) != {"right"})


if __name__ == "__main__":
    sys.exit(main())
