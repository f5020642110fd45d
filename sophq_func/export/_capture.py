"""Capture a program with torch.export, with dynamic axes, and translate its refusals into error sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sophq_func.capture import reasons_of_refusal, refusals_of_export, suggested_fixes, suggested_range
from sophq_func.core.errors import ConfigError, explain, raise_all, unknown
from sophq_func.core.pytree import paths, tensors, torch_leaves, tree_map
from sophq_func.core.types import Args, Tree
from sophq_func.export._program import Call, Program

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Axes = Mapping[str, Mapping[int, str]]
"""Names of sizes by argument and axis; equal names are equal sizes."""

Bounds = dict[str, dict[str, int]]
"""By name of a size, its ``"min"`` and ``"max"``, as :class:`torch.export.Dim` takes them."""

OF_BATCH = "pass dynamic_batch=False, or make the model take its sizes from its input"
OF_AXES = "leave it out of dynamic_axes, or make the model take its sizes from its input"


@dataclass(frozen=True)
class _Sized:
    """A tensor of the example, with the names of its dynamic axes' sizes."""

    tensor: Tensor
    axes: Mapping[int, str]


class Captured(NamedTuple):
    """A captured program with its dynamic sizes.

    Attributes:
      program: from torch.export.
      sizes: names of the dynamic sizes, by torch.export's symbols for them.
    """

    program: ExportedProgram
    sizes: dict[str, str]

    def ranges(self) -> dict[str, str]:
        """The limits of sizes by name, as text; only of those that may not have any value."""
        texts = {}
        for symbol, ends in self.program.range_constraints.items():
            low, high = (int(end) if end.is_Integer else 0 for end in (ends.lower, ends.upper))
            limits = []
            if low > 1:
                limits.append(f"at least {low}")
            if high > 0:  # 0: the upper end is infinite
                limits.append(f"at most {high}")
            if limits and str(symbol) in self.sizes:
                texts[self.sizes[str(symbol)]] = ", ".join(limits)
        return texts


def captured(
    where: str, module: Program, args: Args, kwargs: dict[str, Any], dynamic_batch: bool, axes: Axes | None = None
) -> Captured:
    """The program of a module, captured by torch.export; only dynamic axes accept sizes other than those of the example.

    Args:
      where: the function that the user called, for errors.
      module: from :func:`~sophq_func.export._program.program`.
      args, kwargs: the example.
      dynamic_batch: each first axis is dynamic that is as long as the first axis of the first tensor.
      axes: the dynamic axes; replaces ``dynamic_batch``.

    Raises:
      ConfigError: there are no such axes, or the model does not accept other sizes.
    """
    if axes is not None:
        sized = _by_name(where, module, (args, kwargs), axes)
    else:
        sized = _by_batch((args, kwargs), dynamic_batch)
    try:
        program = _exported(module, sized, {})
    except refusals_of_export() as error:
        # Axes that the user names may be limited to a range that torch.export suggests; a second refusal is final.
        bounds = {} if axes is None else _bounds(str(error))
        if not bounds:
            raise ConfigError(_refusal(where, str(error), axes)) from error
        try:
            program = _exported(module, sized, bounds)
        except refusals_of_export() as second:
            raise ConfigError(_refusal(where, str(second), axes)) from second
    except RuntimeError as error:
        if not module.dtypes:
            raise
        raise ConfigError(not_in_float32(where, module, str(error))) from error
    return Captured(program, _symbols(program, sized))


def not_in_float32(where: str, module: Program, message: str) -> str:
    """The error sentence for a model of other dtypes that cannot be computed in float32."""
    dtypes = " and ".join(sorted(map(str, module.dtypes)))
    sentence = f"a model in {dtypes} is exported in float32, and this one cannot be"
    because, fix = f"it says: {message.strip().splitlines()[0]}", "export model.float(), or take dtypes from the tensors"
    return explain(where, sentence, because=because, fix=fix)


def _exported(module: Program, sized: Call, bounds: Bounds) -> ExportedProgram:
    """The program that torch.export makes, with sizes limited to ``bounds``."""
    args, kwargs = tree_map(_example, sized)
    signature = module.signature(len(args), kwargs)
    dims: dict[str, Any] = {}

    def shape(leaf: Tree) -> dict[int, Any] | None:
        names = leaf.axes if isinstance(leaf, _Sized) else {}
        for name in names.values():
            limits = {"min": 1, **bounds.get(name, {})}
            dims.setdefault(name, torch.export.Dim(name, **limits))
        return {axis: dims[name] for axis, name in names.items()} or None

    arguments = signature.bind(*sized[0], **sized[1]).arguments
    shapes = {name: tree_map(shape, value) for name, value in arguments.items()}

    module.called_as(signature)
    with torch.no_grad():
        return torch.export.export(module, args, kwargs, dynamic_shapes=shapes if dims else None, strict=False)


def _symbols(program: ExportedProgram, sized: Call) -> dict[str, str]:
    """Names of dynamic sizes, by torch.export's symbols for them."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    symbols: dict[str, str] = {}
    for leaf, placeholder in zip(torch_leaves(sized), program.graph_signature.user_inputs, strict=True):
        if isinstance(leaf, _Sized):
            shape = nodes[placeholder].meta["val"].shape
            symbols |= {str(shape[axis]): name for axis, name in leaf.axes.items()}
    return symbols


def _example(leaf: Tree) -> Tree:
    """The example's tensor, with dynamic axes of size 1 repeated: torch.export makes a size of 1 a constant."""
    if not isinstance(leaf, _Sized):
        return leaf
    x = leaf.tensor
    for axis in leaf.axes:
        x = torch.cat([x, x], axis) if x.shape[axis] == 1 else x
    return x


def _by_batch(call: Call, dynamic: bool) -> Call:
    """The call with first axes named ``batch`` where they are as long as the first axis of the first tensor."""
    first_sizes = [t.shape[0] for t in tensors(call) if t.ndim]
    if not dynamic or not first_sizes:
        return call

    def sized(leaf: Tree) -> Tree:
        has_batch = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == first_sizes[0]
        return _Sized(leaf, {0: "batch"}) if has_batch else leaf

    named: Call = tree_map(sized, call)
    return named


def _by_name(where: str, module: Program, call: Call, axes: Axes) -> Call:
    """The call with the axes named that the user asks for.

    Raises:
      ConfigError: ``axes`` is malformed, or names arguments and axes that the example does not have.
    """
    arguments: dict[str, Tensor] = {}

    def sized(name: str, x: Tensor) -> _Sized:
        arguments[name] = x
        return _Sized(x, axes.get(name, {}))

    raise_all(list(_misspelled(where, axes)))
    named = module.map_inputs(*call, sized)
    raise_all(list(_missing(where, axes, arguments)))
    return named


def _misspelled(where: str, axes: object) -> Iterator[str]:
    """Errors where ``axes`` is not a mapping of arguments to mappings of axes to identifiers."""
    fix = "dynamic_axes={'x': {0: 'batch', 1: 'length'}}"
    if not isinstance(axes, Mapping) or not all(isinstance(names, Mapping) for names in axes.values()):
        yield explain(
            where, "dynamic_axes must name sizes by argument and axis", got=axes, allowed="{argument: {axis: name}}", fix=fix
        )
        return
    for argument, names in axes.items():
        for axis, name in names.items():
            if not isinstance(name, str) or not name.isidentifier():
                sentence = f"axis {axis} of {argument!r} cannot have this name"
                yield explain(where, sentence, got=name, allowed="an identifier", fix=fix)


def _missing(where: str, axes: Axes, arguments: Mapping[str, Tensor]) -> Iterator[str]:
    """Errors for arguments and axes that the example does not have, and for one name of two sizes."""
    sizes: dict[str, tuple[int, str]] = {}
    for argument, names in axes.items():
        if argument not in arguments:
            yield unknown(where, "argument of dynamic_axes", argument, sorted(arguments))
            continue
        shape = arguments[argument].shape
        for axis, name in names.items():
            if type(axis) is not int or not 0 <= axis < len(shape):
                allowed = f"0 to {len(shape) - 1}" if shape else "none"
                yield explain(where, f"{argument!r} has no such axis", got=axis, allowed=allowed)
                continue
            size, first = sizes.setdefault(name, (shape[axis], f"axis {axis} of {argument!r}"))
            if size != shape[axis]:
                because = f"{first} has {size} in the example, axis {axis} of {argument!r} has {shape[axis]}"
                yield explain(
                    where, f"{name!r} cannot name two sizes", because=because, fix="give one of the axes another name"
                )


def _bounds(message: str) -> Bounds:
    """The ranges that torch.export suggests for sizes; empty where it suggests anything else, such as constants."""
    suggestions = [suggested_range(line) for line in suggested_fixes(message)]
    ranges = [suggestion for suggestion in suggestions if suggestion is not None]
    return dict(ranges) if len(ranges) == len(suggestions) else {}


def _refusal(where: str, message: str, axes: Axes | None) -> str:
    """The error sentence for a refusal of torch.export, which names the axes that it is about."""
    if axes is None:
        head = message.strip().partition("\n")[0]
        sentence = "the model cannot be exported for batches of any size"
        return explain(where, sentence, because=f"torch.export says: {head}", fix=OF_BATCH)
    suggested = [line for line in suggested_fixes(message) if suggested_range(line) is None]
    named = {name for line in suggested for name in re.findall(r"\w+", line)}
    places: dict[str, list[str]] = {}
    for argument, names in axes.items():
        for axis, name in names.items():
            places.setdefault(name, []).append(f"axis {axis} of {argument!r}")
    at_fault = {name: axes_of for name, axes_of in places.items() if name in named} or places
    sizes = ", ".join(f"{name!r} ({', '.join(axes_of)})" for name, axes_of in at_fault.items())
    because = f"torch.export says: {reasons_of_refusal(message)[0]}"
    because += f"; it suggests {', '.join(suggested)}" if suggested else ""
    return explain(where, f"the model cannot be exported for any size of {sizes}", because=because, fix=OF_AXES)


def output_names(exported: ExportedProgram) -> list[str]:
    """Names of the tensors that the model returns: their keys and positions; a single tensor is ``output``."""
    return [path or "output" for path in paths(exported.call_spec.out_spec)]
