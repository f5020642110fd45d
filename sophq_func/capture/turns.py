"""One run at a time, and nothing left of it: at its end, after an interrupt, and in a forked child.

A run changes things that outlive it: tensors in the modules of a skeleton, their attributes, functions of torch. It notes
what undoes each change before it makes the change.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

Undo = Callable[[], object]
"""Takes back a change of a run, whether it was made or not; to call it twice does no harm."""


class Turn:
    """The right to run, which one thread at a time has; shared by skeletons of the same modules.

    Attributes:
      lock: held during a run; reentrant, since a run may start another of the same skeleton.
      depth: how many runs are in progress, one inside the other. After two interrupts it may be too high, never too low.
    """

    def __init__(self) -> None:
        self._undo: list[Undo] = []
        self.lock = threading.RLock()
        self.depth = 0
        TURNS.add(self)

    def __del__(self) -> None:
        if hasattr(self, "_undo"):  # an interrupt may come as it is made
            self.settle(0)  # of a skeleton that is gone no next run takes back what two interrupts have left

    def note(self, undo: Undo) -> None:
        """Note what takes back a change that the run is about to make."""
        self._undo.append(undo)

    def is_nested(self) -> bool:
        """Whether the run that has the turn may be inside another one."""
        return self.depth > 1

    def take(self, run: Callable[[], T]) -> T:
        """What ``run`` returns. No other thread runs meanwhile, and at the end all that it noted is taken back."""
        self.settle_left()
        with self.lock:
            noted, outer = len(self._undo), self.depth
            try:
                try:
                    self.depth = outer + 1
                    return run()
                finally:
                    self.settle(noted)
                    self.depth = outer
            finally:  # again, since an interrupt may have cut it short
                self.settle(noted)
                self.depth = outer

    def settle(self, noted: int) -> None:
        """Take back all changes, the last one first, until ``noted`` are left.

        An interrupt may end this anywhere, and a second call does the rest.
        """
        while len(self._undo) > noted:
            self._undo[-1]()
            del self._undo[-1]

    def settle_left(self) -> None:
        """Take back what a run that is over has left: after two interrupts, the second while the first was dealt with."""
        if self._undo and not self.lock._is_owned():  # type: ignore[attr-defined]
            with self.lock:  # a run of another thread is over then
                self.settle(0)
                self.depth = 0

    def settle_in_child(self) -> None:
        """End the run of a thread that was not copied when the process was forked, and make the lock free."""
        if not self.lock.acquire(blocking=False):
            self.settle(0)
            self.lock, self.depth = threading.RLock(), 0
            return
        self.lock.release()


class Guard:
    """A lock for a few lines that change what all threads share; free in a forked child.

    Reentrant, since a signal may come in these lines, whose handler may run a model.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        GUARDS.append(self)


TURNS: weakref.WeakSet[Turn] = weakref.WeakSet()
"""Those of the process."""

GUARDS: list[Guard] = []
"""Those of the process."""


def _settle_in_child() -> None:
    """Leave nothing in a forked child of the threads that it does not have.

    Why here and not by a lock for each process: the child may be forked while a run of another thread has tensors in the
    skeleton, which a lock alone does not take out.
    """
    for guard in GUARDS:  # first, since to take a change back may need one
        guard.lock = threading.RLock()
    for turn in list(TURNS):
        turn.settle_in_child()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_settle_in_child)
