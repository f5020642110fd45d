"""What torch keeps to itself, and a run needs: the stack of function modes, and where a module holds its tensors and hooks.

Each name here has a test that says what breaks without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode,
    _pop_mode,
    _pop_mode_temporarily,
    _push_mode,
)

READS_ITS_OWN = (_ConvNd, nn.Linear, nn.Embedding)
"""Layers whose forward, and nothing else, reads their parameters. ``_ConvNd`` is the base of all convolutions."""

Store = dict[str, Any]
"""A dict in which a module holds tensors, by attribute."""


def innermost_mode() -> TorchFunctionMode | None:
    """The function mode that sees the next call first."""
    mode: TorchFunctionMode | None = _get_current_function_mode()  # type: ignore[no-untyped-call]
    return mode


def pop_mode() -> None:
    """Take the innermost function mode off the stack."""
    _pop_mode()  # type: ignore[no-untyped-call]


def push_mode(mode: TorchFunctionMode) -> None:
    """Put a function mode back on the stack."""
    _push_mode(mode)  # type: ignore[no-untyped-call]


def without_innermost_mode() -> AbstractContextManager[Any]:
    """A context in which the innermost function mode sees nothing."""
    return _pop_mode_temporarily()


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Attribute and tensor of each parameter and buffer that a module itself holds."""
    for store in (module._parameters, module._buffers):
        yield from ((attribute, tensor) for attribute, tensor in store.items() if tensor is not None)


def store_of(module: nn.Module, attribute: str) -> Store:
    """The dict in which a module holds a parameter or buffer.

    To put a tensor there costs a dictionary's time. ``setattr`` would refuse a plain tensor for a parameter, and
    ``functional_call`` looks for the module of every tensor by its name.
    """
    return module._parameters if attribute in module._parameters else module._buffers


def is_parameter(module: nn.Module, attribute: str) -> bool:
    """Whether a module holds a parameter, and not a buffer, under a name."""
    return attribute in module._parameters


def has_only_one_hook_before(module: nn.Module) -> bool:
    """Whether a single hook, which is ours, sits before the module's forward."""
    return len(module._forward_pre_hooks) == 1


def has_only_our_hooks(module: nn.Module) -> bool:
    """Whether one hook sits before the module's forward and one behind it: those of the skeleton."""
    return len(module._forward_pre_hooks) == len(module._forward_hooks) == 1


def is_parametrized(module: nn.Module) -> bool:
    """Whether ``torch.nn.utils.parametrize`` computes a parameter of the module at each use."""
    return "parametrizations" in module._modules
