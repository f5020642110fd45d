"""What a model consists of: its tensors by name, its leaves, its paths; and a copy of it without the weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from sophq_func.capture._torch import own_tensors, store_of
from sophq_func.capture.functions import tensors_by_name
from sophq_func.core import modes
from sophq_func.core.errors import PlanError, explain
from sophq_func.core.public import public
from sophq_func.core.pytree import sorted_dict
from sophq_func.core.types import Given

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Classes of ``torch.nn`` that are not leaves even where they have no children."""


def is_leaf(module: nn.Module) -> bool:
    """Whether ``module`` is seen as one call, without the calls inside.

    That is a module without children whose ``forward`` is that of a class of torch.nn. Parametrizations
    (``torch.nn.utils.parametrize``) do not count as children. What computes one is a leaf, too, since its arithmetic is
    not the model's; so is a ScriptModule, which runs where no call can be seen.
    """
    if isinstance(module, ParametrizationList | torch.jit.ScriptModule):
        return True
    has_children = any(name != "parametrizations" for name, _ in module.named_children())
    if has_children or isinstance(module, CONTAINERS):
        return False
    owner = next(cls for cls in type(module).__mro__ if "forward" in cls.__dict__)
    return owner is not nn.Module and owner.__module__.startswith("torch.nn.modules.")


@public
def params_of(model: nn.Module | Given) -> dict[str, Tensor]:
    """All parameters and buffers of a model by sorted name, detached, not copied.

    Non-persistent buffers are included; a tensor that has several names is listed once, by the first. This dict is what
    every function of the library calls ``params``.

    Args:
      model: a module; or the tree of a function's params, of which every leaf that is a tensor is listed by its path.

    Raises:
      PlanError: ``model`` is neither.

    Example:
      >>> list(params_of(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, affine=False))))
      ['0.bias', '0.weight', '1.num_batches_tracked', '1.running_mean', '1.running_var']
      >>> list(params_of({"l1": {"w": torch.ones(2, 3)}, "head": [torch.ones(3)]}))
      ['head.0', 'l1.w']
    """
    named = registered_tensors(model) if isinstance(model, nn.Module) else tensors_by_name(model, "params_of")
    return sorted_dict({name: tensor.detach() for name, tensor in named.items()})


def registered_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by canonical name: the first of their names."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def all_paths(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every path of each module, by its first; a module registered twice has two."""
    first = {id(module): path for path, module in model.named_modules()}
    by_first: dict[str, list[str]] = {path: [] for path in first.values()}
    for path, module in model.named_modules(remove_duplicate=False):
        by_first[first[id(module)]].append(path)
    return {path: tuple(paths) for path, paths in by_first.items()}


def copied_without_weights(
    model: nn.Module, registered: Mapping[str, Tensor]
) -> tuple[nn.Module, list[Tensor], dict[int, str]]:
    """A copy of a model without its weights.

    Returns:
      A deep copy with registered tensors on ``meta``; its tensors that are plain attributes; and the canonical names of its
      registered tensors, by identity.
    """
    # what ``deepcopy`` finds in its memo, by identity of the original, it takes for the copy
    memo: dict[int, Tensor] = {}
    for tensor in registered.values():
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    constants = []
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = value.detach().clone()
                constants.append(memo[id(value)])
    try:
        names = {id(memo[id(tensor)]): name for name, tensor in registered.items()}
        module = copy.deepcopy(model, memo)
    except Exception as error:
        sentence = f"{type(model).__name__} cannot be copied, which a pure run needs"
        fix = "give the class whose instance cannot be copied a __deepcopy__"
        if modes.is_distributed(registered.values()):
            fix = "plan and build before fully_shard or another function shards the model; params may be DTensors then"
        raise PlanError(explain("trace", sentence, because=f"copy.deepcopy says: {error}", fix=fix)) from error
    for part in module.modules():
        if isinstance(part, torch.jit.ScriptModule):  # copied by its own method, which knows nothing of the memo
            for attribute, tensor in list(own_tensors(part)):
                store_of(part, attribute)[attribute] = torch.empty_like(tensor, device="meta", requires_grad=False)
    return module, constants, names
