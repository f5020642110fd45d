"""A function ``f(params, *args)`` as a module, so that it is traced, planned and run like one.

Its parameters are the tensors in the tree ``params``, named by their paths in the tree: ``{"l1": {"w": ...}}`` has
``l1.w``. Floating tensors are parameters, others are buffers; what is no tensor is a constant.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sophq_func.capture._torch import hold
from sophq_func.core.errors import PlanError, StateError, explain, raise_all
from sophq_func.core.pytree import flatten, named_leaves, node_of, refilled, tensors
from sophq_func.core.types import Output, Tree

CALL = "sq.quantize(f, config, params=params, example_args=(x,)), where f(params, x) is what you would call"
"""How a function is quantized, for errors."""


class Structure:
    """The tree of a function's params without its numbers.

    Attributes:
      names: of the tensors, in the order of the tree.
      constants: the leaves that are no tensors, by name.
    """

    def __init__(self, params: Tree, root: str) -> None:
        leaves, rebuild = flatten(params)
        named = [(name or root, leaf) for name, leaf in named_leaves(params)]
        self._root = root
        self._template = rebuild([_empty(leaf) for leaf in leaves])
        self.names = tuple(name for name, leaf in named if isinstance(leaf, Tensor))
        self.constants = {name: leaf for name, leaf in named if not isinstance(leaf, Tensor)}

    def filled(self, tensors: Sequence[Tensor]) -> Tree:
        """The tree with these tensors, in the order of :attr:`names`; its dicts and lists are new."""
        rest = iter(tensors)
        leaves, _ = flatten(self._template)
        return refilled(self._template, [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves])

    def named(self, params: Tree, where: str) -> dict[str, Tree]:
        """The leaves of a tree by name, without those constants that it shares with this structure.

        Trees of other nodes with the same names count as the same: a flat dict of names, as a file has it, for example.

        Args:
          params: the tree.
          where: the function that an error names.

        Raises:
          StateError: for every constant that differs.
        """
        found = {name or self._root: leaf for name, leaf in named_leaves(params)}
        if not isinstance(params, Tensor) and node_of(params) is None:
            sentence, got = "params must be the tree that the function takes", type(params).__name__
            shown = [*self.names[:3], *["..."][: len(self.names) - 3]]
            raise StateError(explain(where, sentence, got=got, allowed=f"a tree with the leaves {', '.join(shown)}"))
        problems = []
        for name, constant in self.constants.items():
            leaf = found.get(name, constant)
            if isinstance(leaf, Tensor):
                continue  # an unknown tensor, which the check of names reports
            found.pop(name, None)
            if not _is_equal(leaf, constant):
                sentence = f"params[{name!r}] is no tensor, and must be what it was when the function was planned"
                fix = "give the tree that the function was planned with, or plan it anew"
                problems.append(explain(where, sentence, got=leaf, allowed=repr(constant), fix=fix))
        raise_all(problems, StateError)
        return found

    def like(self, params: Tree, tensors: Mapping[str, Tensor]) -> Tree:
        """The tree ``params`` with other tensors, by name."""
        named = [(name or self._root, leaf) for name, leaf in named_leaves(params)]
        return refilled(params, [tensors.get(name, leaf) for name, leaf in named])


class FunctionModule(nn.Module):
    """A function of params and inputs as a module, whose forward takes the inputs.

    It is a flat module: the whole path of a leaf is the name of the parameter.

    Attributes:
      f: the function. It is no submodule, even where it is a module.
      structure: the tree that it takes.
      leaves: the tensors of the tree, in order. A run puts its own here, see :mod:`~sophq_func.capture.aliases`.
    """

    f: Callable[..., Output]

    def __init__(self, f: Callable[..., Output], params: Tree) -> None:
        super().__init__()
        object.__setattr__(self, "f", f)
        self.training = False  # a function has no modes, and what leaves the library leaves in this one
        self.structure = Structure(params, _first_argument(f))
        tensors = [leaf for _, leaf in named_leaves(params) if isinstance(leaf, Tensor)]
        pairs = zip(self.structure.names, tensors, strict=True)
        # a tuple, as of a list each run would note the contents
        self.leaves = tuple(hold(self, name, tensor.detach()) for name, tensor in pairs)

    def forward(self, *args: Tree, **kwargs: Tree) -> Output:
        """The value of the function at these params."""
        return self.f(self.structure.filled(self.leaves), *args, **kwargs)


def as_module(model: object, params: Tree, where: str) -> nn.Module:
    """A module as it is, and a function with its params as a module.

    Args:
      model: a module, or a function of params and inputs.
      params: the params of a function; ``None`` for a module.
      where: the function that an error names.

    Raises:
      PlanError: a function without params, params for a module that has its own, or a tree that holds something else than
        tensors and constants, or two leaves of one name.
    """
    if params is None and isinstance(model, nn.Module):
        return model
    if not callable(model) or isinstance(model, type):
        got, allowed = type(model).__name__, "a torch.nn.Module, or a function with params="
        raise PlanError(explain(where, "the model must be a module or a function", got=got, allowed=allowed))
    if params is None:
        sentence = f"{_name_of_function(model)} is a function, which needs its params"
        raise PlanError(explain(where, sentence, got=None, allowed="the tree that it takes first", fix=CALL))
    if isinstance(model, nn.Module) and any(True for _ in (*model.parameters(), *model.buffers())):
        sentence = f"{type(model).__name__} has parameters of its own, and cannot take others by params="
        raise PlanError(explain(where, sentence, fix="leave params= out, or move its parameters into the tree"))
    _check_tree(params, where)
    return FunctionModule(model, params)


def name_of(model: nn.Module) -> str:
    """What errors and reports call a model: its class, or the name of its function."""
    return _name_of_function(model.f) if isinstance(model, FunctionModule) else type(model).__name__


def signature(model: nn.Module) -> inspect.Signature:
    """What a call of a model takes; of a function, without its params."""
    if not isinstance(model, FunctionModule):
        return inspect.signature(model.forward)
    try:
        whole = inspect.signature(model.f)
    except ValueError:  # a function that is written in C says nothing
        return inspect.signature(model.forward)
    parameters = list(whole.parameters.values())
    takes_any = parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL
    return whole if takes_any else whole.replace(parameters=parameters[1:])


def tensors_by_name(params: Tree, where: str) -> dict[str, Tensor]:
    """The tensors of a tree by their paths.

    Raises:
      PlanError: it is no tree of params, see :func:`as_module`.
    """
    if isinstance(params, Tensor) or not tensors(params):
        allowed = "a torch.nn.Module, or a tree of tensors"
        raise PlanError(explain(where, "this has no parameters", got=type(params).__name__, allowed=allowed))
    _check_tree(params, where)
    return {name: leaf for name, leaf in named_leaves(params) if isinstance(leaf, Tensor)}


def _name_of_function(f: object) -> str:
    return getattr(f, "__name__", type(f).__name__)


def _first_argument(f: Callable[..., Output]) -> str:
    """The name of the argument that takes the params: the name of a tree that is a single tensor."""
    try:
        return next(iter(inspect.signature(f).parameters), "params")
    except ValueError:
        return "params"


def _check_tree(params: Tree, where: str) -> None:
    """Raise a :class:`PlanError` with every leaf that has no name of its own, or is neither tensor nor constant."""
    problems, names = [], set()
    for name, leaf in named_leaves(params):
        if name in names:
            sentence, fix = f"two leaves of params are named {name!r}", "rename one of them"
            problems.append(explain(where, sentence, because="names are paths joined by dots", fix=fix))
        names.add(name)
        if not isinstance(leaf, Tensor) and not _is_constant(leaf):
            sentence, got = f"params[{name!r}] cannot be a parameter", type(leaf).__name__
            allowed = "a tensor, None, a number, a string, a dtype, a device or a function"
            problems.append(explain(where, sentence, got=got, allowed=allowed))
    raise_all(problems, PlanError)


def _is_constant(leaf: object) -> bool:
    kinds = str | bytes | int | float | complex | torch.dtype | torch.device | None
    return isinstance(leaf, kinds) or (callable(leaf) and not isinstance(leaf, nn.Module))


def _is_equal(a: object, b: object) -> bool:
    return type(a) is type(b) and bool(a == b)


def _empty(leaf: Tree) -> Tree:
    """A tensor without numbers in place of a tensor; other leaves as they are."""
    return torch.empty_like(leaf, device="meta", requires_grad=False) if isinstance(leaf, Tensor) else leaf
