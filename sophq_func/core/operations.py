"""One canonical name for each operation, whether called as operator, method, module, ``torch`` or ``nn.functional``."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set

import torch
from torch import nn

from sophq_func.core.modes import is_compiling

Function = Callable[..., object]
"""A function of torch, of which only the name matters here."""

SYNONYMS: Mapping[str, str] = {
    "absolute": "abs",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "dsmm": "mm",
    "expit": "sigmoid",
    "floordiv": "floor_divide",
    "ger": "outer",
    "hsmm": "hspmm",
    "iadd": "add",
    "ifloordiv": "floor_divide",
    "imatmul": "matmul",
    "imod": "remainder",
    "imul": "mul",
    "ipow": "pow",
    "isub": "sub",
    "itruediv": "div",
    "log_sigmoid": "logsigmoid",
    "mod": "remainder",
    "multiply": "mul",
    "negative": "neg",
    "radd": "add",
    "rdiv": "div",
    "rfloordiv": "floor_divide",
    "rmatmul": "matmul",
    "rmod": "remainder",
    "rmul": "mul",
    "rpow": "pow",
    "rsub": "sub",
    "rtruediv": "div",
    "saddmm": "sspaddmm",
    "spmm": "mm",
    "subtract": "sub",
    "true_divide": "div",
    "truediv": "div",
}
"""Canonical name by other spellings; those with leading or trailing underscores need no entry.

Torch has functions under several names that compare equal (``torch.mm`` and ``torch.spmm``): :data:`BUILTIN` has one entry
for them, so that each such name must have a synonym here.
"""

DROPOUTS = frozenset(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"))
"""Operations that return their operand unchanged in evaluation."""

CONSTANTS = frozenset(
    "empty_like full_like new_empty new_empty_strided new_full new_ones new_tensor new_zeros ones_like rand_like "
    "randint_like randn_like zeros_like".split()
)
"""Operations that read no number of their operand, only its shape, dtype or device."""

ALL = ("*",)
"""In :data:`CONTRACTIONS`: every operand of the function."""

CONTRACTIONS: Mapping[str, tuple[str, ...]] = {
    "addbmm": ("1", "2", "batch1", "batch2"),
    "addmm": ("1", "2", "mat1", "mat2"),
    "addmv": ("1", "2", "mat", "vec"),
    "addr": ("1", "2", "vec1", "vec2"),
    "baddbmm": ("1", "2", "batch1", "batch2"),
    "bilinear": ("0", "1", "2", "input1", "input2", "weight"),
    "bmm": ("0", "1", "input", "mat2"),
    "chain_matmul": ALL,
    "conv1d": ("0", "1", "input", "weight"),
    "conv2d": ("0", "1", "input", "weight"),
    "conv3d": ("0", "1", "input", "weight"),
    "conv_tbc": ("0", "1", "input", "weight"),
    "conv_transpose1d": ("0", "1", "input", "weight"),
    "conv_transpose2d": ("0", "1", "input", "weight"),
    "conv_transpose3d": ("0", "1", "input", "weight"),
    "convolution": ("0", "1", "input", "weight"),
    "dot": ("0", "1", "input", "tensor"),
    "einsum": ALL,
    "embedding": ("1", "weight"),
    "embedding_bag": ("1", "weight"),
    "flex_attention": ("0", "1", "2", "query", "key", "value"),
    "grouped_mm": ("0", "1", "mat_a", "mat_b"),
    "hspmm": ("0", "1", "mat1", "mat2"),
    "inner": ("0", "1", "input", "other"),
    "linear": ("0", "1", "input", "weight"),
    "matmul": ("0", "1", "input", "other"),
    "mm": ("0", "1", "input", "mat2"),
    "multi_dot": ALL,
    "mv": ("0", "1", "input", "vec"),
    "outer": ("0", "1", "input", "vec2"),
    "scaled_dot_product_attention": ("0", "1", "2", "query", "key", "value"),
    "smm": ("0", "1", "input", "mat2"),
    "sparse_addmm": ("1", "2", "mat1", "mat2"),
    "sparse_mm": ("0", "1", "sparse", "dense"),
    "sspaddmm": ("1", "2", "mat1", "mat2"),
    "tensordot": ("0", "1", "a", "b"),
    "vdot": ("0", "1", "input", "other"),
    "vecdot": ("0", "1", "x", "y"),
}
"""By canonical name of a function that multiplies and sums: which operands it multiplies, by position or keyword.

An embedding counts, as a product with one-hot rows.
"""

LAYERS: Mapping[str, int] = {
    name: max(int(role) for role in roles if role.isdigit()) for name, roles in CONTRACTIONS.items() if "weight" in roles
}
"""Those of :data:`CONTRACTIONS` that layers with a weight call, and where the weight is among the operands: the last."""

MOVES = frozenset(
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d channel_shuffle chunk clone contiguous detach expand "
    "expand_as flatten flip float gather get getitem index_select max_pool1d max_pool2d max_pool3d movedim moveaxis narrow "
    "pad permute pixel_shuffle pixel_unshuffle repeat repeat_interleave reshape roll select split squeeze swapaxes t tile "
    "to transpose type_as unbind unflatten unfold unsqueeze view view_as".split()
)
"""Operations that move, repeat, select or leave out numbers of their input, but change none; padding adds a constant."""


def canonical_name(name: str) -> str:
    """The canonical spelling of a function's ``__name__``.

    Example:
      >>> [canonical_name(n) for n in ("add_", "__radd__", "__itruediv__", "concat", "sigmoid")]
      ['add', 'add', 'div', 'cat', 'sigmoid']
    """
    # ``__add__``, ``add_`` and ``add`` are one operation, and so are ``torch.linalg.norm`` and ``torch.norm``
    bare = name.strip("_").removeprefix("linalg_").removeprefix("special_")
    return SYNONYMS.get(bare, bare)


def canonical(func: Function | str) -> str:
    """The canonical name of a function, a Tensor method, an operator, or of a string that names one of them.

    Example:
      >>> import operator
      >>> {canonical(f) for f in (torch.add, torch.Tensor.add_, operator.iadd, "torch.add")}
      {'add'}
    """
    return canonical_name(func.rpartition(".")[2] if isinstance(func, str) else func.__name__)


def _torch_functions() -> Iterable[Function]:
    """Every function of torch that a function mode can see, and every public one besides."""
    for functions in torch.overrides.get_overridable_functions().values():
        yield from functions
    for module in (torch, torch.nn.functional):
        members = (getattr(module, name) for name in dir(module))
        yield from (member for member in members if callable(member) and not isinstance(member, type))


def _with_names() -> list[tuple[Function, str]]:
    """Torch's functions with their ``__name__``, without those that have none."""
    names = ((function, getattr(function, "__name__", None)) for function in _torch_functions())
    return [(function, name) for function, name in names if isinstance(name, str)]


# Two tables, since Dynamo traces the lookup: it reads the name of a Python function, but not of a builtin, which it can
# look up as a key. Getters of tensor attributes (method wrappers) need no entry: `called` answers "get" for all of them.

PYTHON: Mapping[str, str] = {
    name: canonical_name(name) for function, name in _with_names() if isinstance(function, types.FunctionType)
}
"""Canonical name by ``__name__``, of functions written in Python."""

# Nothing else that can be called: torch has types of ``typing`` among its names, and a cached function, which Dynamo of
# torch 2.9 refuses as a key of a dict.
WRITTEN_IN_C = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
"""The types of functions that are not written in Python: of a module, of a class, and of an operator of a class."""

BUILTIN: Mapping[Function, str] = {
    function: canonical_name(name) for function, name in _with_names() if isinstance(function, WRITTEN_IN_C)
}
"""Canonical name by function, of those not written in Python."""


def called(func: Function) -> str:
    """The canonical name of a function that a ``TorchFunctionMode`` sees.

    ``"get"`` for the getter of a tensor's attribute, such as ``T``. Under a compiler, empty for a function that is not
    torch's.
    """
    if isinstance(func, types.MethodWrapperType):
        return "get"
    if isinstance(func, types.FunctionType):
        name = PYTHON.get(func.__name__)
    else:
        name = BUILTIN.get(func)
    if name is not None:
        return name
    return "" if is_compiling() else canonical_name(getattr(func, "__name__", ""))


def _getters() -> Iterator[Function]:
    """What a mode sees where an attribute of a tensor is read."""
    attributes = (getattr(torch.Tensor, name) for name in dir(torch.Tensor))
    return (attribute.__get__ for attribute in attributes if isinstance(attribute, types.GetSetDescriptorType))


@functools.cache
def _seen_by_name() -> Mapping[str, frozenset[Function]]:
    """Builtin functions, and getters of attributes, as a mode sees them, by canonical name."""
    found: dict[str, set[Function]] = {"get": set(_getters())}
    for function, name in BUILTIN.items():
        found.setdefault(name, set()).add(function)
    return {name: frozenset(functions) for name, functions in found.items()}


def without_names(names: Collection[str]) -> frozenset[Function]:
    """The builtin functions of torch, and getters of attributes, whose canonical name is none of these.

    Example:
      >>> torch.add in without_names({"mul"}), torch.Tensor.mul_ in without_names({"mul"})
      (True, False)
    """
    return frozenset().union(*(functions for name, functions in _seen_by_name().items() if name not in names))


def operations() -> frozenset[str]:
    """Every canonical name of a torch function."""
    return frozenset((*PYTHON.values(), *BUILTIN.values()))


def is_operation(name: str) -> bool:
    """Whether a canonical name is that of a torch function."""
    return name in PYTHON.values() or name in BUILTIN.values()


def _compact(name: str) -> str:
    """A spelling in which a class and its function agree: ``AvgPool2d`` and ``avg_pool2d``."""
    return name.replace("_", "").lower()


def _public_functions() -> Mapping[str, str]:
    """Canonical name by compact name, of the public functions of ``torch`` and ``torch.nn.functional``."""
    names: dict[str, str] = {}
    for module in (torch, nn.functional):
        for name in dir(module):
            member = getattr(module, name)
            if callable(member) and not isinstance(member, type) and not name.startswith("_"):
                names[_compact(name)] = canonical_name(name)
    return names


def _classes_named_like_functions() -> Mapping[type, str]:
    """Canonical name of its function by class of ``torch.nn``, where the two are named alike."""
    functions = _public_functions()
    modules = (cls for cls in vars(nn).values() if isinstance(cls, type) and issubclass(cls, nn.Module))
    compact = ((cls, _compact(cls.__name__)) for cls in modules)
    return {cls: functions[name] for cls, name in compact if name in functions}


_CLASSES_NAMED_OTHERWISE: Mapping[type, str] = {
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

FAMILIES: Mapping[type, str] = {**_classes_named_like_functions(), **_CLASSES_NAMED_OTHERWISE}
"""Canonical name of the function that a module class calls: ``sigmoid`` for ``nn.Sigmoid``, as for ``F.sigmoid``."""


def family(cls: type) -> str:
    """The canonical name of the operation of a module class, or of its nearest base; empty where no function does it.

    Example:
      >>> family(nn.Sigmoid), family(nn.AdaptiveAvgPool2d), family(nn.Transformer)
      ('sigmoid', 'adaptive_avg_pool2d', '')
    """
    return next((FAMILIES[base] for base in cls.__mro__ if base in FAMILIES), "")


@functools.cache
def hidden_from_compile() -> frozenset[str]:
    """Canonical names of operations of which Dynamo hides at least one spelling from function modes.

    These are the Python functions of ``torch.nn.functional`` that cannot be overridden, the functions of ``torch`` and of
    ``torch.nn.functional`` that write in place (``torch.relu_``, unlike ``x.relu_``), ``F.pad``, and Python's ``abs``.

    Example:
      >>> {"relu", "tanh", "pad"} <= hidden_from_compile(), "matmul" in hidden_from_compile()
      (True, False)
    """
    overridable = torch.overrides.get_overridable_functions().values()
    shown = {function for functions in overridable for function in functions}
    hidden = {name for module in (torch, nn.functional) for name in _written_in_place(module, shown)}
    public = (getattr(nn.functional, name) for name in dir(nn.functional) if not name.startswith("_"))
    hidden |= {member.__name__ for member in public if isinstance(member, types.FunctionType) and member not in shown}
    return frozenset(("abs", "pad", *map(canonical_name, hidden)))


def _written_in_place(module: types.ModuleType, shown: Set[Function]) -> Iterator[str]:
    """Names of the functions of a module that write into their argument and cannot be overridden."""
    names = (name for name in dir(module) if name.endswith("_") and not name.startswith("_"))
    return (name for name in names if getattr(module, name) not in shown)
