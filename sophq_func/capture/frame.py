"""The frame that sees each call of one run, and the hooks and the function mode that report the calls to it.

The hooks are registered once, when a skeleton is made, and find the run in progress in a slot that all of them share. The
mode is active for the time of the run, and pauses while torch's own layers compute.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode

from sophq_func.capture._torch import (
    WithoutInnermostMode,
    drop_hooks,
    has_only_our_hooks,
    innermost_mode,
    is_higher_order,
    is_parametrized,
    mode_depth,
    pop_mode,
    push_mode,
    wrap_hooks_before,
)
from sophq_func.capture.decompose import DECOMPOSED
from sophq_func.capture.lazy import Deferred
from sophq_func.core.errors import StateError
from sophq_func.core.modes import is_compiling, is_mapped, now
from sophq_func.core.operations import called
from sophq_func.core.pytree import tensors
from sophq_func.core.types import Args, Kwargs, Output, Tree

Function: TypeAlias = Callable[..., Output]
"""A function of torch."""


Rerun: TypeAlias = "Callable[[Frame, Function, Args, Kwargs], Output]"
"""Calls a function of the model as a run does, and reports its calls to a frame."""


class Frame:
    """The state of one run, and what happens at each of its calls; subclasses override the methods.

    A *leaf* is a module that is called as a whole; a *scope* is any other module, inside which calls are seen one by one.

    Attributes:
      mode: which compiler, transform or derivative was active when the frame was made.
      scopes: paths of the scopes that are running, outermost first.
      before: for each of these, the module with parameters that it called last: its path, empty at the start of the scope.
      leaf_depth: how many leaves are running, one inside the other; functions called inside one are not the model's.
      computing: how many computations of a module's own parameters are running, one inside the other: parametrizations,
        and hooks before the forward. They belong to the module.
      given: while a hook before a forward runs, the tensors that depend on what the module is given; else ``None``.
      deferred: parameters whose values are computed when they are read; ``None`` where there are none.
      paused: whether the mode is off the stack.
      idle: builtin functions whose calls, in eager, may go unreported, since the frame does nothing there.
      acts_at: paths of the leaves at which the frame does something; ``None``: at any.
      sees_leaves_alone: whether it may miss all functions in a model that calls none outside of leaves.
      sees_functions: whether calls of an ``autograd.Function`` are reported, which makes each of them one call.
    """

    sees_functions = True

    def __init__(self) -> None:
        self.mode = now()
        self.scopes = [""]
        self.before = [""]
        self.leaf_depth = 0
        self.computing = 0
        self.given: list[Tensor] | None = None
        self.deferred: Deferred | None = None
        self.paused = False
        self.idle: frozenset[Function] = frozenset()
        self.acts_at: Collection[str] | None = None
        self.sees_leaves_alone = False

    @property
    def scope(self) -> str:
        """Path of the innermost scope that is running."""
        return self.scopes[-1]

    def aside(self) -> Aside:
        """A context for calls that the frame makes itself, so that they do not count as the model's."""
        return Aside(self)

    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        """The run starts, with these parameters and buffers."""

    def enter_scope(self, path: str, args: Args, kwargs: Kwargs) -> None:
        """A scope starts."""

    def leave_scope(self, path: str, args: Args, kwargs: Kwargs, output: Output) -> None:
        """A scope ends; the output is ``None`` where it returned ``None`` or raised an error."""

    def before_module(self, path: str, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The operands with which a leaf is called: those given, or others."""
        return args, kwargs

    def after_module(self, path: str, module: nn.Module, args: Args, kwargs: Kwargs, output: Output) -> Output:
        """The result of a leaf's call: the output, or another."""
        return output

    def function(self, name: str, func: Function, args: Args, kwargs: Kwargs) -> Output:
        """Call a torch function outside leaves; ``name`` is canonical."""
        return func(*args, **kwargs)

    def inner_function(self, func: Function, args: Args, kwargs: Kwargs) -> Output:
        """Call a torch function inside a leaf, or inside a computation of a module's own parameters."""
        return func(*args, **kwargs)

    def after_hook(self, path: str, module: nn.Module) -> None:
        """A hook before the forward of a module that is not a leaf is done."""

    def again(self) -> Frame:
        """The frame for a part of the run that begins now, and that a checkpoint computes once more in a backward pass.

        It does to values what this one does, and records nothing. Nothing that was computed before this part may be shared
        with it: autograd must save the same tensors both times.
        """
        other = Frame()
        self.begin_again(other)
        return other

    def begin_again(self, other: Frame) -> None:
        """Let another frame start where this one is, each with values that it computes itself."""
        other.scopes, other.before = list(self.scopes), list(self.before)
        if self.deferred is not None:
            other.deferred = self.deferred.again()

    def looks_inside(self) -> bool:
        """Whether :meth:`inner_function` must see the calls inside the leaf that starts now."""
        return True


class Aside:
    """A context in which calls are treated as they are inside a leaf: they are not the model's.

    A class, since a context made by a generator takes more than twice as long, and a trace enters one for each leaf.
    """

    def __init__(self, frame: Frame) -> None:
        self._frame = frame

    def __enter__(self) -> None:
        self._frame.leaf_depth += 1

    def __exit__(self, *error: object) -> None:
        self._frame.leaf_depth -= 1


class Slot:
    """What the hooks of a skeleton share.

    Attributes:
      watch: the mode of the run in progress, from which the hooks reach its frame; ``None`` between runs.
      closed: for the path of each module that must not be called outside of a run, the error that says so.
    """

    def __init__(self) -> None:
        self.watch: Watch | None = None
        self.closed: Mapping[str, str] = {}


class ModuleInfo:
    """What the hooks of one module read.

    Attributes:
      path: of the module.
      leaf: whether it is a leaf.
      computes: whether it is a parametrization: a module that computes a parameter of another one.
      marks: whether calls around it are told apart by it, see :attr:`Frame.before`: it has parameters.
      reads_its_own: whether it is a leaf that runs code of torch alone, which reads no parameters but its own.
      slot: that of its skeleton.
    """

    def __init__(self, path: str, leaf: bool, module: nn.Module, slot: Slot) -> None:
        self.path, self.leaf, self.slot = path, leaf, slot
        self.computes = isinstance(module, ParametrizationList)
        self.marks = not self.computes and next(module.parameters(), None) is not None
        is_of_torch = type(module).__module__.startswith("torch.nn.modules.")
        self.reads_its_own = leaf and is_of_torch and not is_parametrized(module)


def enter(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
    """The hook before a module's forward; returns the operands of a leaf, ``None`` for others."""
    info: ModuleInfo = module._sophq_info  # type: ignore[assignment]
    watch = info.slot.watch
    if watch is None:
        if info.path in info.slot.closed and not is_compiling():
            raise StateError(info.slot.closed[info.path])
        return None
    frame = watch.frame
    if not info.leaf:
        if not frame.leaf_depth:
            _enter_scope(frame, info, args, kwargs)
        return None
    frame.leaf_depth += 1
    frame.computing += info.computes
    watch.pause()
    if frame.deferred is not None:
        frame.deferred.enter(module)
    replaced = None
    if frame.leaf_depth == 1 and (frame.acts_at is None or info.path in frame.acts_at):  # a leaf in a leaf is a part of it
        replaced = frame.before_module(info.path, args, kwargs)
    if frame.looks_inside() or not (info.reads_its_own and has_only_our_hooks(module)):
        watch.resume()
    return replaced


def leave(module: nn.Module, args: Args, kwargs: Kwargs, output: Output) -> Output:
    """The hook after a module's forward; returns the result of a leaf, ``None`` for others.

    Torch calls it with ``None`` when the module raised an error, which the model may catch and go on.
    """
    info: ModuleInfo = module._sophq_info  # type: ignore[assignment]
    watch = info.slot.watch
    if watch is None:
        return None
    frame = watch.frame
    if not info.leaf:
        if not frame.leaf_depth:
            _leave_scope(frame, info, args, kwargs, output)
        return None
    frame.leaf_depth -= 1
    frame.computing -= info.computes
    watch.pause()
    if frame.deferred is not None:
        frame.deferred.leave(module)
    if not frame.leaf_depth:
        if output is not None and (frame.acts_at is None or info.path in frame.acts_at):
            output = frame.after_module(info.path, module, args, kwargs, output)
        if info.marks:
            frame.before[-1] = info.path
    watch.resume()
    return output


def _enter_scope(frame: Frame, info: ModuleInfo, args: Args, kwargs: Kwargs) -> None:
    if info.marks:
        frame.before[-1] = info.path
    frame.scopes.append(info.path)
    frame.before.append("")
    frame.enter_scope(info.path, args, kwargs)


def _leave_scope(frame: Frame, info: ModuleInfo, args: Args, kwargs: Kwargs, output: Output) -> None:
    frame.scopes.pop()
    frame.before.pop()
    frame.leave_scope(info.path, args, kwargs, output)


def report_by_forward(module: nn.Module) -> None:
    """Let a module without hooks report its calls by a forward of its own, which torch calls faster than hooks.

    Only for modules whose forward nothing but torch calls: a model may call that of another module itself.
    """
    module.forward = MethodType(_reported, module)


def _reported(module: nn.Module, *args: Tree, **kwargs: Tree) -> Output:
    """The forward of a module's class, between what its hooks would do."""
    given, named = enter(module, args, kwargs) or (args, kwargs)
    output = None
    try:
        output = type(module).forward(module, *given, **named)
    finally:
        replaced = leave(module, given, named, output)
    return output if replaced is None else replaced


def calls_leaves_alone(module: nn.Module) -> bool:
    """Whether a module with hooks calls no function outside of leaves: it is a leaf of torch's, or a chain of modules."""
    info: ModuleInfo = module._sophq_info  # type: ignore[assignment]
    is_chain = getattr(type(module), "forward", None) is nn.Sequential.forward and "forward" not in vars(module)
    return (info.reads_its_own or is_chain) and has_only_our_hooks(module)


def unhook(module: nn.Module) -> None:
    """Take the hooks of a skeleton off a module, which keeps those of the model's own."""
    drop_hooks(module, lambda hook: hook is enter or hook is leave)
    wrap_hooks_before(module, lambda hook: hook.own if isinstance(hook, OwnHook) else hook)


def item(function: str, args: Args) -> int | None:
    """The number in ``x[number]``; ``None`` for calls of other functions, and indices of other kinds.

    Args:
      function: canonical name.
      args: of the call.
    """
    if function != "getitem" or not isinstance(args[0], Tensor):
        return None
    index = args[1]
    if isinstance(index, int) and not isinstance(index, bool):
        return index
    # a number that an operation has computed, where it can be read; an index of another dtype is a mask
    is_number = isinstance(index, Tensor) and index.ndim == 0 and index.dtype in (torch.int64, torch.int32)
    return int(index) if is_number and not is_compiling() and not is_mapped() else None


class OwnHook:
    """A hook of the model's own before the forward of a module, such as ``torch.nn.utils.spectral_norm`` registers.

    What it computes from the module's tensors belongs to the module, as a parametrization does. What it computes from the
    module's arguments is the model's, as if the caller did it.
    """

    def __init__(self, hook: Callable[..., Output], info: ModuleInfo) -> None:
        self.own, self._info = hook, info

    def __call__(self, module: nn.Module, *args: Args | Kwargs) -> Output:
        watch = self._info.slot.watch
        if watch is None:
            return self.own(module, *args)
        frame = watch.frame
        outer = frame.given
        frame.given = tensors(args)
        try:
            result = self.own(module, *args)
        finally:
            frame.given = outer
        if not self._info.leaf and not frame.leaf_depth:
            frame.after_hook(self._info.path, module)
        return result


def is_watched() -> bool:
    """Whether a function mode would see what is computed now, in eager."""
    return mode_depth() > 0


def unwatched() -> AbstractContextManager[object]:
    """A context for what a frame computes itself, in eager: the mode does not see the functions that it calls.

    Faster than :meth:`Frame.aside`, with which the mode still sees each function.
    """
    # not from the mode that the frame noted when the run began: a model may compile a part of itself
    if is_compiling() or not isinstance(innermost_mode(), Watch):
        return nullcontext()
    return WithoutInnermostMode()


class Watch(TorchFunctionMode):
    """Reports to a frame each torch function that is called.

    While a leaf of torch's own classes computes, the mode is off the stack: a trip through it takes longer than many a
    function. It must stay on the stack while Dynamo traces, and where a mode of the model lies above it.

    Args:
      frame: what sees the calls.
      rerun: computes a part of the run once more, watched by another frame.
      stays_away: the mode never comes on the stack; only hooks report to the frame.
    """

    def __init__(self, frame: Frame, rerun: Rerun, stays_away: bool = False) -> None:
        super().__init__()
        self.stays_away = frame.paused = stays_away
        self.frame = frame
        self.rerun = rerun

    def __exit__(self, *error: object) -> None:
        self.resume()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Report nothing any more, even where the mode is still on the stack: the run is over."""
        self.frame = FINISHED

    def is_finished(self) -> bool:
        """Whether the run is over."""
        return self.frame is FINISHED

    def is_missing(self) -> bool:
        """Whether an interrupt has kept torch from putting it back, which takes it off the stack for a moment."""
        return not self.frame.paused and innermost_mode() is not self

    def pause(self) -> None:
        """See nothing until :meth:`resume`, where that is possible."""
        if not self.frame.paused and not is_compiling() and innermost_mode() is self:
            # in this order, an interrupt in between leaves the mode on the stack once too often, and the end of the run
            # takes it off; in the other order, one of the caller's would be taken off
            self.frame.paused = True
            pop_mode()

    def resume(self) -> None:
        """See every function again."""
        if self.frame.paused and not self.stays_away:
            push_mode(self)
            self.frame.paused = False  # after the line above, for the same reason

    def again(self, fn: Function) -> Function:
        """A function of the model that may be called after the run, and sees then what it would see now."""
        frame = self.frame.again()
        return lambda *args, **kwargs: self.rerun(frame, fn, args, kwargs)

    def report(self, name: str, func: Function, args: Args, kwargs: Kwargs) -> Output:
        """Report a call that torch shows to no mode, and no call inside it."""
        if self.frame.deferred is not None:
            args, kwargs = self.frame.deferred.filled((args, kwargs))
        with WithoutInnermostMode():
            return self._opaque(name, func, args, kwargs)

    def _opaque(self, name: str, func: Function, args: Args, kwargs: Kwargs) -> Output:
        """Report a call, and no call inside it."""

        def opaque(*args: Tree, **kwargs: Tree) -> Output:
            with self, self.frame.aside():  # watched, since it may read a parameter whose value is deferred
                return func(*args, **kwargs)

        return self.frame.function(name, opaque, args, kwargs)

    def __torch_function__(
        self, func: Function, types: Sequence[type], args: Args = (), kwargs: Kwargs | None = None
    ) -> Output:
        kwargs = kwargs or {}
        # of a language model, nine in ten calls; a compiler, which may trace a part of the model alone, asks for no set
        if not is_compiling() and func in self.frame.idle and self.frame.deferred is None and self.frame.given is None:
            return func(*args, **kwargs)
        # attributes such as ``shape`` are the same without the value, and reading one must not compute it
        if self.frame.deferred is not None and func.__name__ != "__get__":
            args, kwargs = self.frame.deferred.filled((args, kwargs))
        given = self.frame.given
        if given is None:
            return self._report(func, args, kwargs)
        if any(operand is tensor for operand in tensors((args, kwargs)) for tensor in given):
            output = self._report(func, args, kwargs)
            given.extend(tensors(output))
            return output
        self.frame.computing += 1
        try:
            return self.frame.inner_function(func, args, kwargs)
        finally:
            self.frame.computing -= 1

    def _report(self, func: Function, args: Args, kwargs: Kwargs) -> Output:
        """Report a call to the frame, as one inside a leaf or one of the model."""
        if self.frame.leaf_depth:
            return self.frame.inner_function(func, args, kwargs)
        if is_higher_order(func):
            return self._opaque(func.__name__, func, args, kwargs)
        name = called(func)
        if name in DECOMPOSED:
            # torch takes a mode off the stack while it handles a call: on it again, it sees the parts
            with self:
                return DECOMPOSED[name](*args, **kwargs)
        return self.frame.function(name, func, args, kwargs)


def _finished() -> Frame:
    frame = Frame()
    frame.leaf_depth = 1  # as inside a leaf, where a call is not even taken apart
    return frame


FINISHED = _finished()
"""What a mode reports to when its run is over: it calls each function as it is."""


def drop_finished() -> None:
    """Take modes of runs that are over off the stack; two interrupts, one after the other, may have left one there."""
    mode = innermost_mode()
    while isinstance(mode, Watch) and mode.is_finished():
        pop_mode()
        mode = innermost_mode()
