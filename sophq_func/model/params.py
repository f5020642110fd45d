"""The two ends of a training loop: a model's tensors taken out, what is trained apart, and new ones put back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from sophq_func.capture.contents import registered_tensors
from sophq_func.capture.skeleton import UNWRAP
from sophq_func.core.errors import PlanError, StateError, explain, near, other_prefix, raise_all
from sophq_func.core.modes import is_plain, is_wrapped
from sophq_func.core.public import public
from sophq_func.core.pytree import sorted_dict

FIX = "load all of sq.params_of(model), or what apply_and_update returned"
"""The fix in errors about names."""


@public
def split_params(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a model in two: what is trained, and what is not.

    Both halves together are :func:`sophq_func.params_of`: the same names, each tensor once, detached, not copied. To train
    in place with ``torch.optim``, train ``tensor.clone().requires_grad_()``, or the model's own tensors change.

    Args:
      model: a module. Parameters are trained that have ``requires_grad``; freeze others before.

    Returns:
      ``(trainable, rest)``, two dicts ``{name: Tensor}``, sorted: parameters that require gradients; the other parameters
      and all buffers. ``{**trainable, **rest}`` are the params of a run.

    Raises:
      PlanError: ``model`` is no module.

    Example:
      >>> trainable, rest = split_params(nn.BatchNorm1d(3))
      >>> list(trainable), list(rest)
      (['bias', 'weight'], ['num_batches_tracked', 'running_mean', 'running_var'])
    """
    _check_module(model, "split_params")
    parameters = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    registered = sorted_dict(registered_tensors(model))
    trainable = {name: tensor.detach() for name, tensor in registered.items() if name in parameters}
    rest = {name: tensor.detach() for name, tensor in registered.items() if name not in parameters}
    return trainable, rest


@public
def load_into(model: nn.Module, params: Mapping[str, Tensor]) -> None:
    """Write params into a model, in place: the only function of the library that changes one.

    Everything is checked before the first write, so that after an error the model is as it was. Tensors of the model stay
    the same objects, at the same addresses and on their devices, so ties, optimizers and references to them hold.

    Args:
      model: a module.
      params: for each name of :func:`sophq_func.params_of` a tensor of the same shape and dtype, on any device.

    Raises:
      PlanError: ``model`` is no module.
      StateError: names that are missing or unknown, other shapes or dtypes, tensors inside a transform, or different
        numbers for tensors of the model that share memory; all problems in one message.

    Example:
      >>> import sophq_func as sq
      >>> model = nn.Linear(2, 3)
      >>> load_into(model, {name: torch.ones_like(tensor) for name, tensor in sq.params_of(model).items()})
      >>> model.bias
      Parameter containing:
      tensor([1., 1., 1.], requires_grad=True)
    """
    _check_module(model, "load_into")
    targets = registered_tensors(model)
    if not isinstance(params, Mapping):
        sentence, got, allowed = "params must be a dict of tensors", type(params).__name__, "a dict {name: Tensor}"
        raise StateError(explain("load_into", sentence, got=got, allowed=allowed, fix=FIX))
    raise_all([*_misnamed(params.keys(), targets.keys())], StateError)
    raise_all(
        [problem for name, target in targets.items() for problem in misfits("load_into", name, target, params[name])],
        StateError,
    )
    memories = {_memory(target) for target in targets.values()}
    sources = {name: _apart(params[name], targets[name], memories) for name in targets}
    raise_all([*_overwritten(targets, sources)], StateError)
    with torch.no_grad():
        for name, target in targets.items():
            if not _is_repeated(target):  # such a tensor has these numbers already, and cannot be written to
                target.copy_(sources[name])


def _check_module(model: object, where: str) -> None:
    if not isinstance(model, nn.Module):
        sentence, fix = "this has no parameters and buffers", "of a tree, take the leaves yourself; sq.params_of names them"
        raise PlanError(explain(where, sentence, got=type(model).__name__, allowed="an nn.Module", fix=fix))


def _misnamed(given: Collection[str], known: Collection[str]) -> Iterator[str]:
    """What is wrong with the names of params, in a sentence each; one for a prefix that all have in common."""
    renamed = other_prefix(given, known, known)
    if renamed:
        yield explain("load_into", f"params {renamed}", fix=UNWRAP)
        return
    missing = sorted(set(known) - set(given))
    for name in missing:
        yield explain("load_into", f"params lack {name!r}", fix=FIX)
    for name in sorted(map(str, set(given) - set(known))):
        hint = near(name, missing or known) or "leave it out"
        yield explain("load_into", f"params hold {name!r}, which is not in the model", fix=hint)


def misfits(function: str, name: str, target: Tensor, given: object) -> Iterator[str]:
    """Why a value cannot take the place of a tensor of the model, in a sentence each."""
    where = f"{function}: {name}"
    if not isinstance(given, Tensor):
        yield explain(where, "this value is no tensor", got=type(given).__name__, allowed="a Tensor", fix=FIX)
        return
    if given.layout != target.layout:
        fix = f"params[{name!r}].to_dense()"
        yield explain(where, "the tensor has another layout", got=given.layout, allowed=f"{target.layout}", fix=fix)
    if given.shape != target.shape:
        allowed = f"{tuple(target.shape)}, as in the model"
        yield explain(where, "the tensor has another shape", got=tuple(given.shape), allowed=allowed)
    if given.dtype != target.dtype:
        allowed, fix = f"{target.dtype}, as in the model", f"params[{name!r}].to({target.dtype}), or model.to({given.dtype})"
        yield explain(where, "the tensor has another dtype", got=given.dtype, allowed=allowed, fix=fix)
    if is_wrapped(given):
        fix = "return the params from the transform, and load one member of a batch of them"
        yield explain(where, "the tensor belongs to a transform of torch.func", fix=fix)
    elif given.is_meta and not target.is_meta:
        yield explain(where, "a tensor on the meta device has no numbers", fix=FIX)


# Memory that tensors share


def _apart(given: Tensor, target: Tensor, memories: Collection[int]) -> Tensor:
    """``given``, or a copy where it lies in memory of the model, which a write into another tensor may change first.

    So do params that exchange two weights of the model that they were taken from.
    """
    memory = _memory(given)
    if memory == 0 or memory not in memories or _is_same_place(given, target):
        return given
    return given.clone()


def _overwritten(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> Iterator[str]:
    """A sentence for each tensor that would not have its numbers after all writes, as others share its memory.

    A rehearsal on copies of the shared memory: where tensors of the model only lie side by side in it, nothing is lost.
    """
    sharing: dict[int, list[str]] = {}
    for name, target in targets.items():
        if _memory(target):
            sharing.setdefault(_memory(target), []).append(name)
    for names in sharing.values():
        repeated = [name for name in names if _is_repeated(targets[name])]
        if len(names) == 1 and not repeated:
            continue
        copies = _copied_together([targets[name] for name in names])
        for name, copy in zip(names, copies, strict=True):
            if name not in repeated:
                copy.copy_(sources[name].detach())
        for name, copy in zip(names, copies, strict=True):
            if not torch.equal(_bits(copy), _bits(sources[name].to(copy.device))):
                others = ", ".join(other for other in names if other != name) or "itself, by a stride of 0"
                because = f"it shares memory with {others}"
                fix = "give tensors that share memory the same numbers, or the model clones of them"
                yield explain(f"load_into: {name}", "its numbers would be overwritten", because=because, fix=fix)


def _copied_together(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of tensors of one memory that share theirs in the same way."""
    memory = tensors[0].untyped_storage().clone()  # type: ignore[no-untyped-call]
    return [
        torch.empty(0, dtype=t.dtype, device=t.device).set_(memory, t.storage_offset(), t.shape, t.stride()) for t in tensors
    ]


def _bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes, which are equal where a NaN stands, too."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _memory(tensor: Tensor) -> int:
    """The address of a tensor's memory; 0 where it has none of its own, as on the ``meta`` device."""
    if not is_plain([tensor]) or tensor.layout != torch.strided:
        return 0
    return tensor.untyped_storage().data_ptr()


def _is_same_place(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.stride() == other.stride() and one.shape == other.shape


def _is_repeated(tensor: Tensor) -> bool:
    """Whether one number in memory is several elements of a tensor, as ``expand`` makes them."""
    if tensor.layout != torch.strided:
        return False
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
