"""What surrounds each call of the library that computes: it is one call of a model around it, and leaves torch as it is."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from sophq_func.capture._torch import (
    WithoutInnermostMode,
    end_transforms,
    innermost_mode,
    mode_depth,
    pop_modes,
    pop_saved_tensors_hooks,
    saved_tensors_hooks,
    undo_of_dispatch_modes,
)
from sophq_func.capture.frame import Watch, drop_finished
from sophq_func.core.modes import is_compiling, level
from sophq_func.core.types import Output

T = TypeVar("T", bound=Callable[..., Any])

TORN = ("dynamicLayerStack", "pop from empty mode stack")
"""In torch's errors about the end of a transform, or of a function mode, that is not active."""


def one_call(name: str) -> Callable[[T], T]:
    """Decorator of what computes with a quantized model: inside the run of another model, it is one call of that.

    Else the other run would take the arithmetic of this library for its model's, and quantize it.

    Args:
      name: of the call.
    """

    def decorate(function: T) -> T:
        # a run in a loop pays for this: no frame more than one, and nothing that only an error needs
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            modes = mode_depth()
            if modes:
                return _among_modes(name, function, args, kwargs)
            if is_compiling():
                return function(*args, **kwargs)
            grad, transforms, hooks = torch.is_grad_enabled(), level(), saved_tensors_hooks()
            try:
                return function(*args, **kwargs)
            except BaseException as error:
                interrupt = _restore(error, grad, transforms, modes, hooks)
                if interrupt is not None:
                    raise interrupt from None
                raise

        return called  # type: ignore[return-value]

    return decorate


def _among_modes(name: str, function: Callable[..., Output], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Output:
    """A call where function modes see what is computed: of the run of another model, or others."""
    if not is_compiling():
        drop_finished()
    watch = innermost_mode() if mode_depth() else None
    if not isinstance(watch, Watch):
        return function(*args, **kwargs)
    alone = functools.partial(_alone, function)
    return alone(*args, **kwargs) if watch.frame.leaf_depth else watch.report(name, alone, args, kwargs)


def _alone(function: Callable[..., Output], *args: Any, **kwargs: Any) -> Output:
    """A call that the run around it sees nothing of."""
    with WithoutInnermostMode():
        return function(*args, **kwargs)


def restoring(function: T) -> T:
    """Decorator of what computes in contexts of torch: an interrupt in these leaves no transform, mode or flag behind."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        grad, transforms, modes, hooks = torch.is_grad_enabled(), level(), mode_depth(), saved_tensors_hooks()
        put_back = undo_of_dispatch_modes()
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            put_back()
            interrupt = _restore(error, grad, transforms, modes, hooks)
            if interrupt is not None:
                raise interrupt from None
            raise

    return called  # type: ignore[return-value]


def _restore(error: BaseException, grad: bool, transforms: int, modes: int, hooks: object) -> BaseException | None:
    """Take back what contexts of torch have not taken back.

    The end of such a context is a function in Python: an interrupt may come when it begins, and before it does anything.
    What is around it then ends in the wrong order, or twice, and torch says so instead of the interrupt.

    Returns:
      The interrupt in whose place there is an error of torch.
    """
    is_of_torch = type(error) is RuntimeError and any(part in str(error) for part in TORN)
    is_torn = is_of_torch and isinstance(error.__context__, KeyboardInterrupt)
    interrupt = error.__context__ if is_torn else None
    if is_torn or level() > transforms or saved_tensors_hooks() != hooks:
        for each in filter(None, (error, interrupt)):  # else contexts that wait there to be deleted would end once more
            traceback.clear_frames(each.__traceback__)
        end_transforms(transforms)
    pop_modes(modes)
    pop_saved_tensors_hooks(hooks)
    torch.set_grad_enabled(grad)
    return interrupt
