"""A program as torch.export sees it, with sizes that may differ from those of the example."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sophq_func.capture import reasons_of_refusal, refusals_of_export, suggested_fixes, suggested_range
from sophq_func.core.errors import ConfigError, explain, raise_all, unknown
from sophq_func.core.pytree import flatten, paths, tensors, tree_map
from sophq_func.export._program import Call, Program

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Axes = Mapping[str, Mapping[int, str]]
"""By argument, what the sizes of its axes are called; equal names are equal sizes."""

Bounds = dict[str, dict[str, int]]

OF_BATCH = "pass dynamic_batch=False, or make the model take its sizes from its input"
OF_AXES = "leave it out of dynamic_axes, or make the model take its sizes from its input"


@dataclass(frozen=True)
class _Sized:
    """A tensor of the example, and what the sizes of its dynamic axes are called."""

    tensor: Tensor
    axes: Mapping[int, str]


class Captured(NamedTuple):
    """A program, and what it calls the sizes that are not those of the example.

    Attributes:
      sizes: their names, by the symbols that torch.export has for them.
    """

    program: ExportedProgram
    sizes: dict[str, str]

    def ranges(self) -> dict[str, str]:
        """What is known of the sizes by name, where they may not have any value."""
        known = {}
        for symbol, ends in self.program.range_constraints.items():
            low, high = (int(end) if end.is_Integer else 0 for end in (ends.lower, ends.upper))
            told = [f"at least {low}"] * (low > 1) + [f"at most {high}"] * (high > 0)
            if str(symbol) in self.sizes and told:
                known[self.sizes[str(symbol)]] = ", ".join(told)
        return known


def captured(
    where: str, made: Program, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_batch: bool, axes: Axes | None = None
) -> Captured:
    """The module as torch.export sees it, for sizes of the example alone but for the axes that may have any.

    Args:
      where: who asks, for errors.
      args, kwargs: the example.
      dynamic_batch: the first axis is dynamic, where it is as long as that of the first tensor.
      axes: instead of that, which are.

    Raises:
      ConfigError: there are no such axes, or the model does not take other sizes.
    """
    if axes is not None:
        sized = _by_name(where, made, (args, kwargs), axes)
    else:
        sized = _by_batch((args, kwargs), dynamic_batch)
    bounds: Bounds = {}
    while True:
        try:
            program = _exported(made, sized, bounds)
            return Captured(program, _symbols(program, sized))
        except refusals_of_export() as error:
            found = {} if axes is None or bounds else _bounds(str(error))
            if not found:
                raise ConfigError(_refusal(where, str(error), axes)) from error
            bounds = found


def _exported(made: Program, sized: Call, bounds: Bounds) -> ExportedProgram:
    args, kwargs = tree_map(_example, sized)
    signature = made.signature(len(args), kwargs)
    dims: dict[str, Any] = {}

    def shape(leaf: Any) -> Any:
        names = leaf.axes if isinstance(leaf, _Sized) else {}
        for name in names.values():
            dims.setdefault(name, torch.export.Dim(name, **{"min": 1, **bounds.get(name, {})}))
        return {axis: dims[name] for axis, name in names.items()} or None

    given = signature.bind(*sized[0], **sized[1]).arguments
    shapes = {name: tree_map(shape, value) for name, value in given.items()}

    made.called_as(signature)
    with torch.no_grad():
        return torch.export.export(made, args, kwargs, dynamic_shapes=shapes if dims else None, strict=False)


def _symbols(program: ExportedProgram, sized: Call) -> dict[str, str]:
    """Names of sizes by what torch.export calls them."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    found: dict[str, str] = {}
    for leaf, given in zip(flatten(sized)[0], program.graph_signature.user_inputs, strict=True):
        for axis, name in leaf.axes.items() if isinstance(leaf, _Sized) else ():
            found[str(nodes[given].meta["val"].shape[axis])] = name
    return found


def _example(leaf: Any) -> Any:
    """A tensor whose dynamic axes of one element have two: torch.export takes a size of one for granted."""
    if not isinstance(leaf, _Sized):
        return leaf
    x = leaf.tensor
    for axis in leaf.axes:
        x = torch.cat([x, x], axis) if x.shape[axis] == 1 else x
    return x


def _by_batch(call: Call, dynamic: bool) -> Call:
    """First axes as long as that of the first tensor are ``batch``."""
    sizes = [t.shape[0] for t in tensors(call) if t.ndim and dynamic]

    def sized(x: Any) -> Any:
        return _Sized(x, {0: "batch"}) if sizes and isinstance(x, Tensor) and x.ndim and x.shape[0] == sizes[0] else x

    found: Call = tree_map(sized, call)
    return found


def _by_name(where: str, made: Program, call: Call, axes: Axes) -> Call:
    """The axes that are asked for, after it is checked that they are there."""
    given: dict[str, Tensor] = {}

    def sized(name: str, x: Tensor) -> Any:
        given[name] = x
        return _Sized(x, axes.get(name, {}))

    raise_all(list(_misspelled(where, axes)))
    found = made.map_inputs(*call, sized)
    raise_all(list(_missing(where, axes, given)))
    return found


def _misspelled(where: str, axes: Any) -> Iterator[str]:
    """What is no mapping of arguments to axes and names."""
    fix = "dynamic_axes={'x': {0: 'batch', 1: 'length'}}"
    if not isinstance(axes, Mapping) or not all(isinstance(own, Mapping) for own in axes.values()):
        yield explain(
            where, "dynamic_axes must name sizes by argument and axis", got=axes, allowed="{argument: {axis: name}}", fix=fix
        )
        return
    for argument, own in axes.items():
        for axis, name in own.items():
            if not isinstance(name, str) or not name.isidentifier():
                sentence = f"axis {axis} of {argument!r} cannot have this name"
                yield explain(where, sentence, got=name, allowed="an identifier", fix=fix)


def _missing(where: str, axes: Axes, given: Mapping[str, Tensor]) -> Iterator[str]:
    """Arguments and axes that the example does not have; sizes of one name that differ in it."""
    sizes: dict[str, tuple[int, str]] = {}
    for argument, own in axes.items():
        if argument not in given:
            yield unknown(where, "argument of dynamic_axes", argument, sorted(given))
            continue
        shape = given[argument].shape
        for axis, name in own.items():
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
    """The ranges of sizes where ranges are all that torch.export would have otherwise; else nothing."""
    found = [suggested_range(line) for line in suggested_fixes(message)]
    ranges = [one for one in found if one is not None]
    return dict(ranges) if len(ranges) == len(found) else {}


def _refusal(where: str, message: str, axes: Axes | None) -> str:
    """One sentence for what torch.export says."""
    if axes is None:
        head = message.strip().partition("\n")[0]
        sentence = "the model cannot be exported for batches of any size"
        return explain(where, sentence, because=f"torch.export says: {head}", fix=OF_BATCH)
    suggested = [line for line in suggested_fixes(message) if suggested_range(line) is None]
    named = {name for line in suggested for name in re.findall(r"\w+", line)}
    places: dict[str, list[str]] = {}
    for argument, own in axes.items():
        for axis, name in own.items():
            places.setdefault(name, []).append(f"axis {axis} of {argument!r}")
    at_fault = {name: found for name, found in places.items() if name in named} or places
    sizes = ", ".join(f"{name!r} ({', '.join(of)})" for name, of in at_fault.items())
    because = f"torch.export says: {reasons_of_refusal(message)[0]}"
    because += f"; it suggests {', '.join(suggested)}" if suggested else ""
    return explain(where, f"the model cannot be exported for any size of {sizes}", because=because, fix=OF_AXES)


def output_names(exported: ExportedProgram) -> list[str]:
    """Names of the tensors that the model returns: keys and positions, or ``output`` where there is but one."""
    return [path or "output" for path in paths(exported.call_spec.out_spec)]
