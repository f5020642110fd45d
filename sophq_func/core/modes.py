"""Whether a compiler, an exporter, a transform or autograd is active: the only file that asks torch.

A run of a model calls :func:`now` once. Arithmetic that is used alone, and hooks inside a model that compiles a part of
itself, call the single predicates, since there the answer may differ from that of the run around them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import repeat, starmap
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

T = TypeVar("T")


class Mode(NamedTuple):
    """What is active at one time.

    Attributes:
      compiling: Dynamo or torch.export traces the Python code.
      exporting: torch.export does.
      mapped: a transform of ``torch.func`` is active.
      differentiating: a derivative of what is computed now may be asked for; see :func:`may_differentiate`.
    """

    compiling: bool
    exporting: bool
    mapped: bool
    differentiating: bool


def now() -> Mode:
    """What is active now; Dynamo can trace the call."""
    return Mode(is_compiling(), torch.compiler.is_exporting(), is_mapped(), may_differentiate())


def is_compiling() -> bool:
    """Whether Dynamo or torch.export traces the Python code."""
    return torch.compiler.is_compiling()


def is_compiled_for_use() -> bool:
    """Whether a compiler, not an exporter, makes a program that no derivative is taken of."""
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting() and not may_differentiate()
    return is_recorded_for_compiler() and not may_differentiate()


def is_compiled_for_training() -> bool:
    """Whether a compiler makes a program with a backward pass.

    Inside transforms of ``torch.func`` the derivative is a part of the forward program.
    """
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return compiling and torch.is_grad_enabled() and not is_mapped()


def is_recorded() -> bool:
    """Whether ``make_fx`` records what is computed now as a flat program, in which no number can be read."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


_for_compiler: ContextVar[bool] = ContextVar("for_compiler", default=False)


@contextmanager
def recording_for_compiler(is_compiled: bool) -> Iterator[None]:
    """A context in which what is recorded will be compiled, if it ``is_compiled``, and not run operator by operator."""
    token = _for_compiler.set(is_compiled)
    try:
        yield
    finally:
        _for_compiler.reset(token)


def is_recorded_for_compiler() -> bool:
    """Whether what is recorded now will be compiled: then many small operators cost nothing, and work in blocks much."""
    return _for_compiler.get() and is_recorded()


def makes_numbers() -> bool:
    """Whether a tensor that is made now holds numbers, and becomes no part of a program of a compiler or recorder."""
    if torch.compiler.is_compiling() or is_recorded():
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None


def level() -> int:
    """How many transforms of ``torch.func`` are active, one inside the other."""
    return torch._C._functorch.maybe_current_level() or 0


def outside_of_transforms(f: Callable[[], T], outer: int) -> T:
    """What ``f`` returns while all transforms but the ``outer`` outermost do not act.

    A function, and no context: an interrupt could come when the context's end begins, before it has put anything back.
    """
    before = level()
    removed: list[object] = []
    try:
        try:
            # one loop in C, so that no interrupt comes between taking a transform off and keeping it
            removed.extend(starmap(torch._C._functorch.pop_dynamic_layer_stack, repeat((), before - outer)))
            return f()
        finally:
            _put_back(removed, before)
    finally:  # again, since an interrupt may have cut it short
        _put_back(removed, before)


def _put_back(removed: list[object], before: int) -> None:
    """Let transforms act again, the outermost first, until ``before`` are active."""
    while level() < before:
        torch._C._functorch.push_dynamic_layer_stack(removed[before - level() - 1])  # type: ignore[arg-type]


def outside_of_everything(f: Callable[[], T]) -> T:
    """What ``f`` returns as if no transform of ``torch.func`` and no inference mode were active."""

    def outside_of_inference_mode() -> T:
        with torch.inference_mode(False):
            return f()

    return outside_of_transforms(outside_of_inference_mode, 0)


def is_plain_eager() -> bool:
    """Whether nothing looks at what is computed now: no compiler, recorder, transform of ``torch.func``, or forward mode."""
    return not (is_mapped() or forward_ad._current_level >= 0 or torch.compiler.is_compiling() or is_recorded())


def is_mapped() -> bool:
    """Whether a transform of ``torch.func`` is active."""
    return torch._C._are_functorch_transforms_active()


def is_forward_mode() -> bool:
    """Whether tangents are computed beside values: in eager, inside ``jvp`` or ``torch.autograd.forward_ad.dual_level``."""
    return forward_ad._current_level >= 0


def may_differentiate() -> bool:
    """Whether a derivative of what is computed now may be asked for; Dynamo can trace the call.

    True under any transform of ``torch.func``, since a ``vmap`` may lie inside a ``grad``.
    """
    # the level of forward-mode derivatives is -1 outside ``dual_level``
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or is_mapped()


def as_constant(tensor: Tensor) -> Tensor:
    """``tensor`` without a derivative; itself where none can be asked for of it. Dynamo and torch.export can trace the call.

    A program of torch.export cannot hold the ``detach`` of a constant that nothing reads.
    """
    tracked = tensor.requires_grad and torch.is_grad_enabled()
    if tracked or forward_ad._current_level >= 0 or is_mapped():
        return tensor.detach()
    return tensor


def beside(constant: Tensor, moving: Tensor) -> Tensor:
    """``constant``, to be combined with ``moving``, against which it broadcasts; its value and derivatives stay the same.

    In eager forward mode it gets a tangent of zeros where ``moving`` has a tangent: torch takes some ten times longer for an
    operation of a tensor with a tangent and one without than for one of two tensors with tangents.
    """
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return constant
    always = torch.ones((), dtype=torch.bool, device=constant.device)
    return torch.where(always, constant, moving)


def outside_inference(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy for autograd where it was made in ``torch.inference_mode``; Dynamo can trace the call."""
    if torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def has_derivative(*tensors: Tensor | None) -> bool:
    """Whether a derivative may be asked for of one of these tensors; if not, an autograd.Function need not be applied."""
    if forward_ad._current_level >= 0 or is_wrapped(*tensors):
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_recording(*tensors: Tensor | None) -> bool:
    """Whether the backward pass that is running may be differentiated itself."""
    return torch.is_grad_enabled() or has_derivative(*tensors)


def is_wrapped(*tensors: Tensor | None) -> bool:
    """Whether one of these tensors is a wrapper of ``torch.func``: batched, or of a derivative in progress."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    # the first question is one call, however many tensors there are, and mostly answers no
    return is_mapped() and any(tensor is not None and wrapped(tensor) for tensor in tensors)


def may_have_derivative(tensor: Tensor) -> bool:
    """Whether a derivative with respect to a tensor may be asked for, at any level of nested transforms."""
    if forward_ad._current_level >= 0:  # only the innermost level can be asked for its tangents
        return True
    while is_wrapped(tensor):
        if tensor.requires_grad:
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def is_plain(values: Iterable[Tensor]) -> bool:
    """Whether the numbers in all tensors can be read: in eager, and none is batched, traced, fake or on ``meta``."""
    if torch.compiler.is_compiling() or is_recorded():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    for value in values:
        is_subclass = type(value) not in (Tensor, torch.nn.Parameter)  # a fake or traced tensor, for example
        if is_subclass or wrapped(value) or value.is_meta:
            return False
    return True


def stands_for_another(value: object) -> bool:
    """Whether a value is one of Dynamo's own, which stands for another while Dynamo traces.

    Dynamo of torch 2.11 and 2.12 makes named tuples that hold such values instead of their own.
    """
    return type(value).__module__.startswith("torch._dynamo.")


def is_distributed(tensors: Iterable[Tensor]) -> bool:
    """Whether one of these tensors is a ``DTensor``, of which each process holds a part; never while Dynamo traces."""
    # without the module there are none; to import it takes a second
    module = None if torch.compiler.is_compiling() else sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(tensor, module.DTensor) for tensor in tensors)


def writes_into(tensor: Tensor) -> int:
    """How often a tensor, or one that shares its memory, was written into; -1 for inference tensors, which do not count."""
    return -1 if tensor.is_inference() else tensor._version
