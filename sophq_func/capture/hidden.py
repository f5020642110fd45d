"""Calls that torch shows to no mode: of a user's ``autograd.Function``, of scripted functions, and of checkpoints.

While a run is in progress, these functions of torch are replaced by others that report to the run of their own thread; where
there is none, they call the original. A compiler sees the originals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from sophq_func.capture._torch import (
    CheckpointParts,
    checkpoint_parts,
    innermost_mode,
    replace_checkpoint_parts,
)
from sophq_func.capture.frame import Frame, Watch
from sophq_func.capture.turns import Guard, Turn
from sophq_func.core.modes import is_compiling
from sophq_func.core.operations import is_operation
from sophq_func.core.types import Output

FUNCTION: Any = torch.autograd.Function
FUNCTION_APPLY = FUNCTION.__dict__["apply"]
"""Torch's own class method, which every ``autograd.Function`` inherits."""

SCRIPT: Any = torch.jit.ScriptFunction
SCRIPT_CALL = SCRIPT.__call__
"""Torch's own."""

STANCES: list[Any] = []
"""The compiler's stance that is in force during runs: none, or one."""

CHECKPOINT = checkpoint_parts()
"""Torch's own."""


def watching() -> Watch | None:
    """What sees the next call of a model; ``None`` between runs, and inside a leaf."""
    watch = None if is_compiling() else innermost_mode()
    return watch if isinstance(watch, Watch) and not watch.frame.leaf_depth else None


def call_name(name: str) -> str:
    """The name of a call of an ``autograd.Function`` or a scripted function, which must not be taken for an operation."""
    if not name.isidentifier():  # that of a lambda
        return "script_function"
    return f"{name}_function" if is_operation(name) else name


def reported_apply(cls: type[Any], *args: Any, **kwargs: Any) -> Output:
    """``autograd.Function.apply``: one call of the model, whose inside is none of it."""
    original = FUNCTION_APPLY.__get__(None, cls)
    watch = watching()
    if watch is None:
        return original(*args, **kwargs)
    if cls.__module__.startswith("torch."):  # a part of a function of torch that is seen, or is looked through
        return original(*args, **kwargs)
    return watch.report(call_name(cls.__name__), original, args, kwargs)


def reported_script(self: Any, *args: Any, **kwargs: Any) -> Output:
    """The call of a function that TorchScript runs."""
    watch = watching()
    if watch is None:
        return SCRIPT_CALL(self, *args, **kwargs)
    return watch.report(call_name(self.name), partial(SCRIPT_CALL, self), args, kwargs)


def reported_steps(fn: Callable[..., Output], *args: Any, **kwargs: Any) -> Iterator[None]:
    """The steps of a checkpoint: what is computed again in a backward pass sees what the run saw."""
    watch = watching()
    if watch is None:
        return CHECKPOINT.steps(fn, *args, **kwargs)
    return _aside(watch.frame, CHECKPOINT.steps(watch.again(fn), *args, **kwargs))


def _aside(frame: Frame, steps: Iterator[None]) -> Iterator[None]:
    """The same steps, without reporting what they compute themselves."""
    with frame.aside():
        next(steps)
    try:
        yield
    except BaseException as error:
        steps.throw(error)  # type: ignore[attr-defined]
        raise
    with frame.aside():
        next(steps, None)


class ReportedReentrant:
    """What a checkpoint calls with ``use_reentrant=True``: the other kind, which has the same result and is reported."""

    @staticmethod
    def apply(run_function: Callable[..., Output], preserve_rng_state: bool, *args: Any) -> Output:
        if watching() is None:
            return CHECKPOINT.function.apply(run_function, preserve_rng_state, *args)
        return checkpoint(run_function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


def _replace_checkpoints() -> None:
    replace_checkpoint_parts(CheckpointParts(reported_steps, ReportedReentrant))


def _restore_checkpoints() -> None:
    replace_checkpoint_parts(CHECKPOINT)


def _replace_functions() -> None:
    """Let functions be reported, and what the model compiles run as it is written.

    Else a compiler would look into ``torch.cond`` and ``flex_attention``, which compile themselves.
    """
    FUNCTION.apply, SCRIPT.__call__ = classmethod(reported_apply), reported_script
    if not STANCES:
        STANCES.append(torch.compiler.set_stance("force_eager"))


def _restore_functions() -> None:
    FUNCTION.apply, SCRIPT.__call__ = FUNCTION_APPLY, SCRIPT_CALL
    while STANCES:
        STANCES[-1].__exit__(None, None, None)
        del STANCES[-1]


class Shared:
    """A change of the whole process that lasts as long as any run needs it.

    Args:
      change: makes it; to call it twice does no harm.
      undo: takes it back; to call it twice, or without a change, does no harm.
    """

    def __init__(self, change: Callable[[], None], undo: Callable[[], None]) -> None:
        self._change, self._undo = change, undo
        self._guard = Guard()
        self._runs: set[object] = set()

    def begin(self, run: object) -> None:
        """A run needs the change from now on."""
        with self._guard.lock:
            self._runs.add(run)
            self._change()  # always: the handler of a signal may have begun and ended a run between these two lines

    def end(self, run: object) -> None:
        """A run does not need the change any more, or never did."""
        with self._guard.lock:
            self._runs.discard(run)
            if not self._runs:
                self._undo()


CHECKPOINTS = Shared(_replace_checkpoints, _restore_checkpoints)
FUNCTIONS = Shared(_replace_functions, _restore_functions)


def report(turn: Turn, functions: bool) -> None:
    """Report hidden calls until the turn ends: of checkpoints, and of functions where asked for.

    The second takes longer, as it empties Python's caches of the methods that it replaces.
    """
    for shared in (CHECKPOINTS, FUNCTIONS) if functions else (CHECKPOINTS,):
        run = object()
        turn.note(partial(shared.end, run))
        shared.begin(run)
