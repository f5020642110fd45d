"""A model in which each module has parameters of its own, as a copy."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from sophq_func.capture.contents import params_of
from sophq_func.core.errors import PlanError, StateError, explain, raise_all
from sophq_func.core.public import public
from sophq_func.core.pytree import sorted_dict
from sophq_func.model.params import misfits


@public
def untie(model: nn.Module, params: Mapping[str, Tensor] | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of a model in which no two modules share a parameter, and its params.

    :func:`rotate` turns a table of words by itself, and the head by itself with the norm before it: they cannot be one
    tensor then. Plan the copy. A module that the model registers or calls twice stays one.

    Args:
      model: a module. It stays as it is; its tensors are copied.
      params: of ``model``; by default its own.

    Returns:
      ``(model, params)``. The params have an entry for each name of what was tied, with equal numbers; none is copied.

    Raises:
      PlanError: ``model`` is no module.
      StateError: ``params`` lack a name, or have another one.

    Example:
      >>> head = nn.Linear(4, 9, bias=False)
      >>> model = nn.ModuleDict({"words": nn.Embedding(9, 4), "head": head})
      >>> head.weight = model["words"].weight
      >>> apart, params = untie(model)
      >>> list(params)
      ['head.weight', 'words.weight']
      >>> apart["head"].weight is apart["words"].weight, head.weight is model["words"].weight
      (False, True)
    """
    if not isinstance(model, nn.Module):
        fix = "a function reads what its params hold: give each use an entry of its own"
        raise PlanError(explain("untie", "this has no modules", got=type(model).__name__, allowed="an nn.Module", fix=fix))
    own = params_of(model)
    given = own if params is None else dict(params)
    fix = "params = sq.params_of(model)"
    problems = [explain("untie", f"params lack {name!r}", fix=fix) for name in own if name not in given]
    unknown = sorted(given.keys() - own.keys())
    problems += [explain("untie", f"params hold {name!r}, which is not in the model", fix=fix) for name in unknown]
    problems += [problem for name in own if name in given for problem in misfits("untie", name, own[name], given[name])]
    raise_all(problems, StateError)
    apart = copy.deepcopy(model)
    first: dict[int, str] = {}
    for path, module in apart.named_modules():
        for attribute, parameter in list(module.named_parameters(recurse=False)):
            name = f"{path}.{attribute}".lstrip(".")
            known = first.setdefault(id(parameter), name)
            if known != name:
                setattr(module, attribute, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
                given[name] = given[known]
    config = getattr(apart, "config", None)
    if config is not None and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # else transformers ties them again when it loads what it has saved
    return apart, sorted_dict(given)
