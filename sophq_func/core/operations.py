"""One name for each operation, however it is spelled: operator, Tensor method, ``torch`` or ``torch.nn.functional``."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sophq_func.core.modes import is_compiling

SAME: dict[str, str] = {
    "absolute": "abs",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "expit": "sigmoid",
    "floordiv": "floor_divide",
    "iadd": "add",
    "imatmul": "matmul",
    "imul": "mul",
    "isub": "sub",
    "itruediv": "div",
    "log_sigmoid": "logsigmoid",
    "mod": "remainder",
    "multiply": "mul",
    "negative": "neg",
    "radd": "add",
    "ifloordiv": "floor_divide",
    "imod": "remainder",
    "ipow": "pow",
    "rdiv": "div",
    "rfloordiv": "floor_divide",
    "rmod": "remainder",
    "rpow": "pow",
    "rmatmul": "matmul",
    "rmul": "mul",
    "rsub": "sub",
    "rtruediv": "div",
    "subtract": "sub",
    "true_divide": "div",
    "truediv": "div",
}
"""Spellings that differ by more than underscores."""


def canonical_name(name: str) -> str:
    """The canonical spelling of a function's ``__name__``.

    Example:
      >>> [canonical_name(n) for n in ("add_", "__radd__", "__itruediv__", "concat", "sigmoid")]
      ['add', 'add', 'div', 'cat', 'sigmoid']
    """
    bare = name.strip("_").removeprefix("linalg_").removeprefix("special_")
    return SAME.get(bare, bare)


def canonical(func: Callable[..., Any] | str) -> str:
    """The canonical name of a function, a Tensor method, an operator, or of a string that names one of them.

    Example:
      >>> import operator
      >>> {canonical(f) for f in (torch.add, torch.Tensor.add_, operator.iadd, "torch.add")}
      {'add'}
    """
    return canonical_name(func.rpartition(".")[2] if isinstance(func, str) else func.__name__)


def _all_functions() -> Iterable[Callable[..., Any]]:
    for functions in torch.overrides.get_overridable_functions().values():
        yield from functions
    for place in (torch, torch.nn.functional):
        yield from (f for name in dir(place) if callable(f := getattr(place, name)) and not isinstance(f, type))


def _named() -> list[tuple[Callable[..., Any], str]]:
    return [(f, f.__name__) for f in _all_functions() if isinstance(getattr(f, "__name__", None), str)]


PYTHON: Mapping[str, str] = {name: canonical_name(name) for f, name in _named() if isinstance(f, types.FunctionType)}
"""Canonical name by the name of a Python function of torch."""

BUILTIN: Mapping[Callable[..., Any], str] = {
    f: canonical_name(name) for f, name in _named() if not isinstance(f, types.FunctionType | types.MethodWrapperType)
}
"""Canonical name by function, for all others: Dynamo looks them up in a table, but does not read their names."""


def called(func: Callable[..., Any]) -> str:
    """The canonical name of a function that a mode sees; ``"get"`` for attributes of tensors, such as ``T``.

    Empty for one unknown to torch, when compiling.
    """
    if isinstance(func, types.MethodWrapperType):
        return "get"
    name = PYTHON.get(func.__name__) if isinstance(func, types.FunctionType) else BUILTIN.get(func)
    if name is None:
        name = "" if is_compiling() else canonical_name(getattr(func, "__name__", ""))
    return name


def operations() -> frozenset[str]:
    """The canonical names of all functions that torch has."""
    return frozenset((*PYTHON.values(), *BUILTIN.values()))


def is_operation(name: str) -> bool:
    """Whether a canonical name is one that torch has."""
    return name in PYTHON.values() or name in BUILTIN.values()


def _compact(name: str) -> str:
    return name.replace("_", "").lower()


_FUNCTIONS: Mapping[str, str] = {
    _compact(name): canonical_name(name)
    for place in (torch, nn.functional)
    for name in dir(place)
    if not name.startswith("_") and not isinstance(getattr(place, name), type) and callable(getattr(place, name))
}

FAMILIES: Mapping[type, str] = {
    cls: _FUNCTIONS[_compact(name)]
    for name, cls in vars(nn).items()
    if isinstance(cls, type) and issubclass(cls, nn.Module) and _compact(name) in _FUNCTIONS
} | {
    nn.BatchNorm1d: "batch_norm",
    nn.BatchNorm2d: "batch_norm",
    nn.BatchNorm3d: "batch_norm",
    nn.InstanceNorm1d: "instance_norm",
    nn.InstanceNorm2d: "instance_norm",
    nn.InstanceNorm3d: "instance_norm",
    nn.Softmax2d: "softmax",
    nn.Upsample: "interpolate",
    nn.UpsamplingBilinear2d: "interpolate",
    nn.UpsamplingNearest2d: "interpolate",
}
"""Canonical name of the function that a module class stands for: ``nn.Sigmoid`` is ``sigmoid``, as ``F.sigmoid`` is."""


def family(cls: type) -> str:
    """The canonical name of the operation that modules of a class do; empty where no function does it.

    Example:
      >>> family(nn.Sigmoid), family(nn.AdaptiveAvgPool2d), family(nn.Transformer)
      ('sigmoid', 'adaptive_avg_pool2d', '')
    """
    return next((FAMILIES[base] for base in cls.__mro__ if base in FAMILIES), "")


def hidden_from_compile() -> frozenset[str]:
    """Canonical names of operations that Dynamo does not show to function modes in one of their spellings.

    They are the Python functions in ``torch.nn.functional`` that cannot be overridden, and Python's ``abs``.
    """
    shown = {f for functions in torch.overrides.get_overridable_functions().values() for f in functions}
    public = (getattr(torch.nn.functional, name) for name in dir(torch.nn.functional) if not name.startswith("_"))
    hidden = (f for f in public if isinstance(f, types.FunctionType) and f not in shown)
    return frozenset(("abs", "pad", *(canonical_name(f.__name__) for f in hidden)))


DROPOUTS = frozenset(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"))


ALL = ("*",)


CONTRACTIONS: Mapping[str, tuple[str, ...]] = {
    "addbmm": ("1", "2", "batch1", "batch2"),
    "addmm": ("1", "2", "mat1", "mat2"),
    "addmv": ("1", "2", "mat", "vec"),
    "baddbmm": ("1", "2", "batch1", "batch2"),
    "bilinear": ("0", "1", "2", "input1", "input2", "weight"),
    "bmm": ("0", "1", "input", "mat2"),
    "conv1d": ("0", "1", "input", "weight"),
    "conv2d": ("0", "1", "input", "weight"),
    "conv3d": ("0", "1", "input", "weight"),
    "conv_transpose1d": ("0", "1", "input", "weight"),
    "conv_transpose2d": ("0", "1", "input", "weight"),
    "conv_transpose3d": ("0", "1", "input", "weight"),
    "embedding": ("1", "weight"),
    "dot": ("0", "1", "input", "tensor"),
    "einsum": ALL,
    "inner": ("0", "1", "input", "other"),
    "linear": ("0", "1", "input", "weight"),
    "matmul": ("0", "1", "input", "other"),
    "mm": ("0", "1", "input", "mat2"),
    "multi_dot": ALL,
    "mv": ("0", "1", "input", "vec"),
    "outer": ("0", "1", "input", "vec2"),
    "scaled_dot_product_attention": ("0", "1", "2", "query", "key", "value"),
    "tensordot": ("0", "1", "a", "b"),
}
"""Which operands of a function are multiplied and summed, by position or name; an embedding multiplies by one-hot rows."""


LAYERS = frozenset(name for name, roles in CONTRACTIONS.items() if "weight" in roles)
"""The functions among them that modules with a weight call."""


MOVES = frozenset(
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d channel_shuffle chunk clone contiguous detach expand "
    "expand_as flatten flip float gather get getitem index_select max_pool1d max_pool2d max_pool3d movedim moveaxis narrow "
    "pad permute pixel_shuffle pixel_unshuffle repeat repeat_interleave reshape roll select split squeeze swapaxes t tile "
    "to transpose type_as unbind unflatten unfold unsqueeze view view_as".split()
)
