"""Calls that torch shows to no mode: those of a user's ``autograd.Function``, and of ``torch.utils.checkpoint``.

While a run is in progress, these functions of torch are replaced by others that report to the run of their own thread; where
there is none, they call the original. A compiler sees the originals.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from sophq_func.capture._torch import CheckpointParts, checkpoint_parts, innermost_mode, replace_checkpoint_parts
from sophq_func.capture.frame import Frame, Watch
from sophq_func.core.modes import is_compiling
from sophq_func.core.operations import is_operation
from sophq_func.core.types import Output

FUNCTION_APPLY = torch.autograd.Function.__dict__["apply"]
"""Torch's own, which every ``autograd.Function`` inherits."""

CHECKPOINT = checkpoint_parts()
"""Torch's own."""


def watching() -> Watch | None:
    """What sees the next call of a model; ``None`` between runs, and inside a leaf."""
    watch = None if is_compiling() else innermost_mode()
    return watch if isinstance(watch, Watch) and not watch.frame.leaf_depth else None


def call_name(function: type[torch.autograd.Function]) -> str:
    """The name of a call of an ``autograd.Function``: that of its class, which must not be taken for an operation."""
    name = function.__name__
    return f"{name}_function" if is_operation(name) else name


def reported_apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Output:
    """``autograd.Function.apply``: one call of the model, whose inside is none of it."""
    original = partial(FUNCTION_APPLY.__func__, cls)
    watch = watching()
    if watch is None:
        return original(*args, **kwargs)
    if cls.__module__.startswith("torch."):  # a part of a function of torch that is seen, or is looked through
        return original(*args, **kwargs)
    return watch.report(call_name(cls), original, args, kwargs)


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


class Reported:
    """A context in which hidden calls of one kind are reported; runs enter it, in whatever thread.

    What it replaces belongs to the process. So it counts the runs in progress: the first replaces, the last restores.

    Args:
      replace: puts the functions that report in the place of torch's own.
      restore: puts torch's own back.
    """

    def __init__(self, replace: Callable[[], None], restore: Callable[[], None]) -> None:
        self._replace, self._restore = replace, restore
        self._lock = threading.Lock()
        self._runs = 0

    def __enter__(self) -> None:
        with self._lock:
            self._runs += 1
            if self._runs == 1:
                self._replace()

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._runs -= 1
            if not self._runs:
                self._restore()


def _set_apply(apply: classmethod[torch.autograd.Function, Any, Output]) -> None:
    torch.autograd.Function.apply = apply  # type: ignore[assignment, method-assign]


CHECKPOINTS = Reported(
    partial(replace_checkpoint_parts, CheckpointParts(reported_steps, ReportedReentrant)),
    partial(replace_checkpoint_parts, CHECKPOINT),
)
"""Checkpoints are reported."""

FUNCTIONS = Reported(partial(_set_apply, classmethod(reported_apply)), partial(_set_apply, FUNCTION_APPLY))
"""Calls of an ``autograd.Function`` are. To replace a method empties torch's caches, so only runs that need it do."""


def reported(functions: bool) -> AbstractContextManager[object]:
    """A context in which hidden calls are reported: of checkpoints, and of each ``autograd.Function`` where asked for."""
    if not functions:
        return CHECKPOINTS
    stack = ExitStack()
    stack.enter_context(CHECKPOINTS)
    stack.enter_context(FUNCTIONS)
    return stack
