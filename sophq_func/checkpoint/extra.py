"""A tree of values of Python as tensors and one JSON text, for the part ``extra`` of a checkpoint. Nothing is pickled.

In the text, ``None``, booleans, whole numbers, finite floats, strings and lists stand for themselves. Everything else is an
object with one key, which says what it is, see ``KINDS``. A named tuple comes back in its own class, which is looked up in
the modules that are imported already: a text can neither import a module nor call anything but the constructors named here.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from sophq_func.checkpoint.sealed import name_problem, parse, short
from sophq_func.core.errors import StateError, raise_all
from sophq_func.core.types import Tree

Json: TypeAlias = Any
"""What JSON can hold."""

DEEPEST = 100
"""Most levels of a tree. Each takes up to three of JSON, whose parser ends at Python's limit for recursion, about 1,000."""

WIDEST = 4096
"""Most bits of a whole number: Python reads no decimal numbers of more than 4,300 digits, which is 14,000 bits."""

MAPPINGS: Mapping[str, type[dict[Any, Any]]] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}
"""Classes of dicts, by their kind; ``Counter`` is what ``MultiStepLR`` keeps its milestones in."""

ALLOWED = "tensors, numbers, strings, None, lists, tuples, dicts, named tuples, torch.dtype, torch.device, torch.Size"
"""What a tree may hold, for errors."""


class Packed(NamedTuple):
    """A tree as a file holds it.

    Attributes:
      text: JSON.
      tensors: by the path in the tree, or by another name where the path cannot name a tensor of a file.
    """

    text: str
    tensors: dict[str, Tensor]


def pack(tree: Tree) -> Packed:
    """The text and tensors of a tree.

    Raises:
      StateError: with each value that cannot be stored.

    Example:
      >>> pack({"step": 3, "rate": (0.1, None)}).text
      '{"tree":{"dict":[["step",3],["rate",{"tuple":[0.1,null]}]]}}'
    """
    writer = _Writer()
    data = writer.node(tree, "extra", ())
    raise_all(writer.problems, StateError)
    return Packed(json.dumps({"tree": data}, separators=(",", ":"), allow_nan=False), writer.tensors)


def unpack(packed: Packed, device: torch.device) -> Tree:
    """The tree that :func:`pack` took apart.

    Args:
      packed: text and tensors as a file holds them; anything may stand there.
      device: of those tensors that were not on the CPU before. Others stay there, as states of generators and the steps of
        ``torch.optim`` must.

    Raises:
      ValueError: text and tensors are none that :func:`pack` makes, or the class of a named tuple is not to be found.
    """
    data = parse(packed.text, "the tree of extra")
    if data.keys() != {"tree"}:
        raise ValueError(f"the tree of extra has the keys {short(sorted(data))}")
    reader = _Reader(packed.tensors, device)
    tree = reader.node(data["tree"], 0)
    unread = sorted(packed.tensors.keys() - reader.read)
    if unread:
        raise ValueError(f"its extra holds a tensor {short(unread[0])} that is not in its tree")
    return tree


class ClassNotFoundError(ValueError):
    """The class of a named tuple is in no module that is imported.

    Attributes:
      fix: what to do, to continue ``"Fix: "``.
    """

    def __init__(self, module: str, name: str) -> None:
        if module in sys.modules:
            because, self.fix = "has no such class", "use the version of the package that the file was saved with"
        else:
            because, self.fix = "is not imported, and a file imports nothing", f"import {module} before sq.load"
        super().__init__(f"its extra holds a {short(name)}, and the module {short(module)} {because}")


# Writing


class _Writer:
    """Takes a tree apart, and collects its tensors and every problem with it."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.problems: list[str] = []

    def node(self, value: Tree, path: str, around: tuple[int, ...]) -> Json:
        """A value as JSON; ``path`` names it in errors, ``around`` are the identities of the containers around it."""
        if id(value) in around:
            return self._problem(path, "this value contains itself", value, "leave the reference out")
        if len(around) > DEEPEST:
            return self._problem(path, f"it lies below {DEEPEST} levels", value, "store a flatter tree")
        kind = type(value)
        if value is None or kind is bool:
            return value
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if kind is list:
            return self._items(value, path, around)
        if kind in (int, float, str):
            return self._scalar(value, path)
        if kind is tuple:
            return {"tuple": self._items(value, path, around)}
        for name, cls in MAPPINGS.items():
            if kind is cls:
                return {name: self._pairs(value, path, around)}
        if isinstance(value, tuple) and isinstance(getattr(kind, "_fields", None), tuple):
            return self._named_tuple(value, path, around)
        if kind is torch.Size:
            return {"Size": list(value)}
        if kind is torch.dtype or kind is torch.device:
            return {kind.__name__: str(value).removeprefix("torch.")}
        return self._problem(path, "this value cannot be stored", value, _advice(value))

    def _problem(self, path: str, sentence: str, value: object, fix: str) -> Json:
        """Note what is wrong with a value; the result stands for it in a text that is never written."""
        got = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        self.problems.append(f"{short(path)[1:-1]}: {sentence}: got {got}, allowed {ALLOWED}. Fix: {fix}.")
        return None

    def _tensor(self, tensor: Tensor, path: str) -> Json:
        name = path.removeprefix("extra.")
        if path == "extra" or name_problem(path) or name in self.tensors:
            # such as below an empty key, or where the keys 1 and "1" give one path
            name = f"tensor_{len(self.tensors)}"
            while name in self.tensors:
                name += "_"
        self.tensors[name] = tensor
        return {"tensor" if tensor.device.type == "cpu" else "device_tensor": name}

    def _scalar(self, value: float | str, path: str) -> Json:
        if isinstance(value, str):
            # two halves of a surrogate pair would be read as one character
            if any("\ud800" <= letter <= "\udfff" for letter in value):
                return self._problem(path, "this text is no Unicode", value, "store its bytes in a uint8 tensor")
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": repr(value)}
        if value.bit_length() > WIDEST:
            return self._problem(path, f"this number has more than {WIDEST} bits", value, "store hex(number)")
        return value

    def _items(self, values: Sequence[Tree], path: str, around: tuple[int, ...]) -> list[Json]:
        inside = (*around, id(values))
        return [self.node(item, f"{path}.{i}", inside) for i, item in enumerate(values)]

    def _pairs(self, values: Mapping[Any, Tree], path: str, around: tuple[int, ...]) -> list[list[Json]]:
        pairs, inside = [], (*around, id(values))
        for key, item in values.items():
            if not _is_key(key):
                fix = "use strings, numbers, or tuples of them as keys"
                self._problem(path, f"the key {short(key)} cannot be stored", key, fix)
                continue
            pairs.append([self.node(key, path, inside), self.node(item, f"{path}.{key}", inside)])
        return pairs

    def _named_tuple(self, value: Any, path: str, around: tuple[int, ...]) -> Json:
        cls, inside = type(value), (*around, id(value))
        if _class_at(cls.__module__, cls.__qualname__) is not cls:
            fix = "define the class at the top level of a module"
            return self._problem(path, "the class of this named tuple is not to be found by its name", value, fix)
        fields = [[name, self.node(getattr(value, name), f"{path}.{name}", inside)] for name in cls._fields]
        return {"namedtuple": [cls.__module__, cls.__qualname__, fields]}


def _is_key(key: object) -> bool:
    """Whether a key of a dict can be stored: no tensor, and nothing that Python compares by identity."""
    if type(key) is tuple:
        return all(map(_is_key, key))
    return key is None or type(key) in (bool, int, float, str)


def _advice(value: object) -> str:
    """What to store instead."""
    if isinstance(value, torch.Generator):
        return "generator.get_state(), and generator.set_state(...) afterwards"
    if callable(getattr(value, "state_dict", None)):
        return "its state_dict(), and load_state_dict(...) afterwards"
    if hasattr(value, "__array__"):
        return "torch.from_numpy(array), or .item() of a single number"
    if isinstance(value, dict | set | frozenset):
        return "a plain dict(...) or a sorted list"
    return "store the numbers and tensors that it is made of"


# Reading


class _Reader:
    """Puts a tree together; ``read`` are the names of the tensors in it."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self.tensors, self.device = tensors, device
        self.read: set[str] = set()

    def node(self, data: Json, depth: int) -> Tree:
        """The value that a part of the text stands for; ``depth`` is the number of levels above it."""
        if depth > DEEPEST:
            raise ValueError(f"its extra has more than {DEEPEST} levels")
        if isinstance(data, list):
            return self.items(data, depth)
        if not isinstance(data, dict):
            return data
        if len(data) != 1 or not data.keys() <= KINDS.keys():
            raise ValueError(f"its extra holds {short(data)}, which is no known kind of value")
        ((kind, payload),) = data.items()
        try:
            return KINDS[kind](self, payload, depth)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"its extra holds {short(data)}, which is no {kind}: {error}") from error

    def items(self, data: Json, depth: int) -> list[Tree]:
        """The values of a list."""
        if not isinstance(data, list):
            raise TypeError("it has no list")
        return [self.node(item, depth + 1) for item in data]

    def tensor(self, name: str) -> Tensor:
        """A tensor on the CPU; each is read once."""
        if name in self.read:
            raise ValueError(f"its extra holds the tensor {short(name)} twice")
        self.read.add(name)
        return self.tensors[name]

    def pairs(self, data: Json, depth: int) -> dict[Any, Tree]:
        """The entries of a dict."""
        _check_lists(data, 2)
        keys = [self.node(key, depth + 1) for key, _ in data]
        if not all(map(_is_key, keys)) or len(set(keys)) < len(keys):
            raise TypeError("its keys are no keys, or not different")
        return {key: self.node(item, depth + 1) for key, (_, item) in zip(keys, data, strict=True)}

    def named_tuple(self, data: Json, depth: int) -> Tree:
        """A named tuple of the class that the text names, if that is one with these fields."""
        _check_lists([data], 3)
        module, name, fields = data
        _check_lists(fields, 2)
        cls = _class_at(module, name)
        if cls is None:
            raise ClassNotFoundError(module, name)
        names = tuple(field for field, _ in fields)
        if not issubclass(cls, tuple) or getattr(cls, "_fields", None) != names:
            raise TypeError(f"{short(name)} is no named tuple with the fields {short(names)}")
        # no ``cls(...)``: what a class does when it is called is not for a file to start
        return tuple.__new__(cls, [self.node(item, depth + 1) for _, item in fields])


def _check_lists(data: Json, length: int) -> None:
    """Raise a TypeError unless this is a list of lists of one length."""
    if not isinstance(data, list) or not all(isinstance(item, list) and len(item) == length for item in data):
        raise TypeError(f"it is no list of lists of {length}")


def _class_at(module: str, name: str) -> type | None:
    """The class of a dotted name in a module that is imported; ``None`` where there is none. It runs no code."""
    found: object = sys.modules.get(module)
    for step in name.split("."):
        found = vars(found).get(step) if found is not None and hasattr(found, "__dict__") else None
    return found if isinstance(found, type) else None


def _float(text: str) -> float:
    if text not in ("inf", "-inf", "nan"):
        raise ValueError(f"its extra holds the number {short(text)}")
    return float(text)


def _dtype(name: str) -> torch.dtype:
    found = vars(torch).get(name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"its extra holds the dtype {short(name)}")
    return found


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"its extra holds the device {short(name)}") from error


def _size(sizes: Json) -> torch.Size:
    if not isinstance(sizes, list) or not all(type(size) is int for size in sizes):
        raise TypeError("its sizes are no whole numbers")
    return torch.Size(sizes)


KINDS: Mapping[str, Callable[[_Reader, Json, int], Tree]] = {
    "tensor": lambda reader, name, depth: reader.tensor(name),
    "device_tensor": lambda reader, name, depth: reader.tensor(name).to(reader.device),
    "float": lambda reader, text, depth: _float(text),
    "tuple": lambda reader, items, depth: tuple(reader.items(items, depth)),
    "dict": lambda reader, pairs, depth: reader.pairs(pairs, depth),
    "OrderedDict": lambda reader, pairs, depth: OrderedDict(reader.pairs(pairs, depth)),
    "Counter": lambda reader, pairs, depth: Counter(reader.pairs(pairs, depth)),
    "namedtuple": lambda reader, data, depth: reader.named_tuple(data, depth),
    "Size": lambda reader, sizes, depth: _size(sizes),
    "dtype": lambda reader, name, depth: _dtype(name),
    "device": lambda reader, name, depth: _device(name),
}
"""By key of an object in the text, what it stands for."""
