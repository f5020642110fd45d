"""Calls that torch shows to no mode: of a user's ``autograd.Function``, of scripted functions, and of checkpoints.

While a run is in progress, these functions of torch are replaced by others that report to the run of their own thread; where
there is none, they call the original. A compiler sees the originals.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
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

SCRIPT_CALL = torch.jit.ScriptFunction.__call__
"""Torch's own."""

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
    original = partial(FUNCTION_APPLY.__func__, cls)
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


@contextmanager
def _checkpoints() -> Iterator[None]:
    """A context in which checkpoints are reported."""
    replace_checkpoint_parts(CheckpointParts(reported_steps, ReportedReentrant))
    try:
        yield
    finally:
        replace_checkpoint_parts(CHECKPOINT)


@contextmanager
def _functions() -> Iterator[None]:
    """A context in which functions are reported, and in which what the model compiles runs as it is written.

    Else a compiler would look into ``torch.cond`` and ``flex_attention``, which compile themselves.
    """
    function: Any = torch.autograd.Function
    script: Any = torch.jit.ScriptFunction
    function.apply, script.__call__ = classmethod(reported_apply), reported_script
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        function.apply, script.__call__ = FUNCTION_APPLY, SCRIPT_CALL


class Shared:
    """A context that acts on the whole process: of the runs inside it, the first begins it and the last ends it.

    Args:
      make: returns the context.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._runs = 0
        self._stack = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._runs:
                self._stack.enter_context(self._make())
            self._runs += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._runs -= 1
            if not self._runs:
                self._stack.close()


CHECKPOINTS = Shared(_checkpoints)
FUNCTIONS = Shared(_functions)


@contextmanager
def _both() -> Iterator[None]:
    with CHECKPOINTS, FUNCTIONS:
        yield


def reported(functions: bool) -> AbstractContextManager[None]:
    """A context in which hidden calls are reported: of checkpoints, and of functions where asked for.

    The second takes longer, as it empties Python's caches of the methods that it replaces.
    """
    return _both() if functions else CHECKPOINTS
