"""What happens around one run: the frame that sees each call, and the hooks and the mode that show it.

Hooks sit on the modules of a skeleton for good and find the run in progress in a slot; the mode is entered for the time
of the run, and stands aside while torch's own layers compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sophq_func.capture._torch import (
    has_only_our_hooks,
    innermost_mode,
    is_parametrized,
    pop_mode,
    push_mode,
    without_innermost_mode,
)
from sophq_func.capture.decompose import DECOMPOSED
from sophq_func.capture.lazy import Deferred
from sophq_func.core.modes import is_compiling, now
from sophq_func.core.operations import called


class Frame:
    """All state of one run: which module is running, whether it is a leaf, and which parameters are yet to come.

    Subclasses say what happens at each call. ``scope`` is the path of the innermost module that is no leaf.

    Attributes:
      mode: who looked on when the run was prepared.
    """

    def __init__(self) -> None:
        self.mode = now()
        self.scopes = [""]
        self.leaves = 0
        self.deferred: Deferred | None = None

    @property
    def scope(self) -> str:
        return self.scopes[-1]

    def aside(self) -> Aside:
        """A context for calls that the frame makes itself: they are not the model's."""
        return Aside(self)

    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        """The run starts; the model's parameters and buffers are these."""

    def enter_scope(self, path: str, args: Any, kwargs: Any) -> None:
        """A module that is no leaf starts."""

    def leave_scope(self, path: str, args: Any, kwargs: Any, output: Any) -> None:
        """A module that is no leaf is done; the output is ``None`` where it raised an error, too."""

    def before_module(self, path: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Operands of a leaf module's call, perhaps replaced."""
        return args, kwargs

    def after_module(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Result of a leaf module's call, perhaps replaced."""
        return output

    def function(self, name: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Make the call of a torch function outside leaf modules; ``name`` is canonical."""
        return func(*args, **kwargs)

    def inner_function(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Make the call of a torch function inside a leaf module."""
        return func(*args, **kwargs)

    def looks_inside(self) -> bool:
        """Whether :meth:`inner_function` wants the calls of the leaf module that starts now."""
        return True


class Aside:
    """A part of a run in which calls are the frame's own, as they are inside a leaf; left by an error, too."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame

    def __enter__(self) -> None:
        self._frame.leaves += 1

    def __exit__(self, *error: object) -> None:
        self._frame.leaves -= 1


class Slot:
    """Where the hooks of one skeleton find the frame of the run in progress, and the mode that shows it functions."""

    watch: Watch | None = None


class Place:
    """What a hook needs to know of the module that it sits on."""

    def __init__(self, path: str, leaf: bool, slot: Slot) -> None:
        self.path, self.leaf, self.slot = path, leaf, slot

    def watch(self) -> Watch | None:
        """The mode of the run in progress, unless there is none, or a leaf around this module is running."""
        watch = self.slot.watch
        return None if watch is None or (watch.frame.leaves and not self.leaf) else watch


def enter(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """The hook before a module's forward: what a leaf is called with, perhaps replaced."""
    place: Place = module._sophq_place  # type: ignore[assignment]
    watch = place.watch()
    if watch is None:
        return None
    frame = watch.frame
    if not place.leaf:
        frame.scopes.append(place.path)
        frame.enter_scope(place.path, args, kwargs)
        return None
    frame.leaves += 1
    watch.pause()
    if frame.leaves == 1:
        args, kwargs = frame.before_module(place.path, args, kwargs)
    if frame.deferred is not None and place.path in frame.deferred.readers:
        frame.deferred.enter(place.path, module)
    if frame.looks_inside() or not _reads_its_own(module):
        watch.resume()
    return args, kwargs


def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """The hook behind a module's forward: the result of a leaf, perhaps replaced.

    Torch calls it when the module raised an error, too, which the model may catch; then there is no output.
    """
    place: Place = module._sophq_place  # type: ignore[assignment]
    watch = place.watch()
    if watch is None:
        return None
    frame = watch.frame
    if not place.leaf:
        frame.scopes.pop()
        frame.leave_scope(place.path, args, kwargs, output)
        return None
    frame.leaves -= 1
    watch.pause()
    if frame.deferred is not None and place.path in frame.deferred.readers:
        frame.deferred.leave(place.path, module)
    if output is not None and not frame.leaves:
        output = frame.after_module(place.path, module, args, kwargs, output)
    watch.resume()
    return output


def _reads_its_own(module: nn.Module) -> bool:
    """Whether the code of a leaf module is torch's, which reads no parameters but its own."""
    own = type(module).__module__.startswith("torch.nn.modules.") and not is_parametrized(module)
    return own and has_only_our_hooks(module)


def unwatched() -> AbstractContextManager[Any]:
    """While a frame computes something of its own, in eager, the mode need not see each function that it calls."""
    # asked here and not once a run: a model may compile a part of itself
    if is_compiling() or not isinstance(innermost_mode(), Watch):
        return nullcontext()
    return without_innermost_mode()


class Watch(TorchFunctionMode):
    """Shows a frame each torch function that is called outside leaf modules."""

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.frame = frame
        self.paused = False

    def __exit__(self, *error: object) -> None:
        self.resume()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def pause(self) -> None:
        """See nothing until :meth:`resume`; in eager, and where no mode of the model's own stands before this one."""
        if not self.paused and not is_compiling() and innermost_mode() is self:
            pop_mode()
            self.paused = True

    def resume(self) -> None:
        """See again."""
        if self.paused:
            push_mode(self)
            self.paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.frame.deferred is not None and func.__name__ != "__get__":
            args, kwargs = self.frame.deferred.filled((args, kwargs))
        if self.frame.leaves:
            return self.frame.inner_function(func, args, kwargs)
        name = called(func)
        if name in DECOMPOSED:
            with self:
                return DECOMPOSED[name](*args, **kwargs)
        return self.frame.function(name, func, args, kwargs)
