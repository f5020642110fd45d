"""A Ctrl-C that waits, where torch itself cannot be interrupted."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Waiting:
    """Between :meth:`begin` and :meth:`end`, a first Ctrl-C waits for the end; a second one is answered at once.

    For ``make_fx``: while its recorder handles an operator, it is off torch's stack of modes, and torch puts it back in C++.
    An interrupt that leaves another copy on the stack ends the process there, with "trying to set the current
    ProxyTorchDispatchMode, but one already exists".

    Python hands signals to the main thread alone, so that elsewhere there is nothing to wait for.
    """

    def __init__(self) -> None:
        self._answer = signal.getsignal(signal.SIGINT)
        self._came: tuple[int, FrameType | None] | None = None
        self._is_on = False

    def begin(self) -> None:
        """Let a Ctrl-C wait."""
        if callable(self._answer) and threading.current_thread() is threading.main_thread():
            self._is_on = True
            signal.signal(signal.SIGINT, self._note)

    def end(self) -> None:
        """Answer as before, and the one that came first of all; a second call does nothing."""
        if not self._is_on:
            return
        is_replaced = signal.getsignal(signal.SIGINT) != self._note  # by what ran meanwhile
        if not is_replaced and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._answer)
        self._is_on = False
        came, self._came = self._came, None
        if came is not None:
            self._pass_on(*came)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """What answers a signal meanwhile."""
        if self._is_on and self._came is None:
            self._came = number, frame
        else:
            self._pass_on(number, frame)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if callable(self._answer):
            self._answer(number, frame)
