"""Weights that a model computes from its parameters alone, such as ``w * s`` or a parametrization.

They do not depend on the input, so what leaves the simulation stores them as one number each, like plain weights, and
leaves out the parameters that nothing else reads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.capture import imagined
from sophq_func.capture.calls import restoring
from sophq_func.capture.graph import Graph, Node
from sophq_func.config.site import ComputedSite, WeightSite
from sophq_func.core.modes import is_plain
from sophq_func.core.randomness import kept_generators
from sophq_func.core.types import Args, Kwargs
from sophq_func.model.engine import Engine, QParamsDict
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.model.weight_quantizer import Params, WeightQuantizer

Call = tuple[Args, Kwargs]
"""Positional and keyword arguments of a model."""


class Derived(NamedTuple):
    """The derived weights of a model.

    Attributes:
      weights: by quantizer, as the quantizer sees them.
      parents: names of the parameters and buffers that nothing but these weights is computed from.
      inner: quantizers that act on the way from the parents to the weights, and nowhere else.
    """

    weights: Mapping[str, Tensor]
    parents: frozenset[str]
    inner: frozenset[str]


NONE = Derived({}, frozenset(), frozenset())


def derived_names(engine: Engine) -> list[str]:
    """The quantizers of derived weights."""
    return [name for name, piece in engine.running.items() if isinstance(piece.site, ComputedSite)]


@restoring
def derived(engine: Engine, params: Params, qparams: QParamsDict, example: Call | None, names: Collection[str]) -> Derived:
    """Evaluate the derived weights of a model once.

    Args:
      engine: of the quantized model.
      params, qparams: see :meth:`Quantized.apply`.
      example: one call of the model. ``None``: the traced examples, of which a plan keeps shapes and dtypes; a plan from
        JSON or a pickle has none, and then no weight is found.
      names: of the quantizers whose weights are wanted, some of :func:`derived_names`.
    """
    if not names:
        return NONE
    weights: dict[str, Tensor] = {}
    parents: set[str] = set()
    inner: set[str] = set()
    for graph, call in _examples(engine, params, example):
        found = _evaluated(engine, params, qparams, set(names) - weights.keys(), call)
        weights |= found
        read, acting = _only_for(engine, graph, weights.keys())
        parents |= read
        inner |= acting
    return Derived(weights, _that_may_be_missing(engine, params, weights, parents, example), frozenset(inner))


def as_weight(piece: RunQuantizer, tensor: Tensor, taken: Collection[str]) -> tuple[WeightQuantizer, dict[str, Tensor]]:
    """A derived weight as a parameter of its own: its quantizer, and the params that hold it.

    Args:
      piece: the quantizer that acts while the model runs.
      tensor: the weight.
      taken: names that parameters have already.
    """
    site = derived_site(piece.site, taken)
    return WeightQuantizer(site, piece.config, piece.observer, piece.fake_quantize), {site.parameter: tensor}


def derived_site(site: ComputedSite | object, taken: Collection[str]) -> WeightSite:
    """The site of a derived weight, as that of a parameter."""
    assert isinstance(site, ComputedSite)
    name = site.quantizer.removesuffix("_fake_quant")
    # the quantizer of a computed weight sees it in its own layout: no groups, which would rearrange it
    return WeightSite(
        quantizer=site.quantizer,
        parameter=site.quantizer if name in taken else name,
        path=site.path,
        paths=site.paths,
        function=site.function,
        operation=site.operation,
        anchor=site.anchor,
        axis=site.axis,
        shape=site.shape,
        inputs=site.inputs,
    )


def _examples(engine: Engine, params: Params, example: Call | None) -> Iterator[tuple[Graph, Call]]:
    """The graph and the arguments of each example."""
    if example is not None:
        yield engine.retrace(params, *example), example
        return
    device = next((p.device for p in params.values()), torch.device("cpu"))
    origin = engine.plan.origin
    for graph in () if origin is None else origin.graphs:
        if graph.example is not None:
            yield graph, imagined(graph.example, device)


def _evaluated(
    engine: Engine, params: Params, qparams: QParamsDict, names: Collection[str], call: Call
) -> dict[str, Tensor]:
    """Each of some derived weights that a run of the quantized model reaches, and computes the same at each call."""
    seen: dict[str, list[Tensor]] = {}
    quantize = engine.quantizing(qparams)

    def effect(name: str, x: Tensor) -> Tensor:
        if not is_plain([x]):  # of an imagined input, which has a shape alone
            return x
        if name in names:
            seen.setdefault(name, []).append(x.detach().clone())
        return quantize(name, x)

    with kept_generators(params.values()), torch.no_grad():
        engine.run_quantized(params, qparams, effect, *call)
    return {name: first for name, (first, *more) in seen.items() if all(torch.equal(first, other) for other in more)}


def _only_for(engine: Engine, graph: Graph, weights: Collection[str]) -> tuple[set[str], set[str]]:
    """Names of the tensors that only some derived weights are computed from, and of the quantizers in between."""
    sites = [engine.running[name].site for name in weights]
    replaced = {place for site in sites for place in site.places()}
    inside = {name for site in sites if site.operand < 0 for name in _of_parametrization(engine, site)}
    slots = {(node.name, place.operand) for place in replaced for node in graph if _is_at(node, place.made)}
    varying = _input_dependent(graph)
    made_for_real = [node for node in graph if any(v in varying or graph.values[v].output for v in node.outputs)]
    needed, needed_calls = _read_by(graph, made_for_real, slots)
    for node in made_for_real:
        if node.kind == "module":
            needed |= set(_below(engine, node.path)) - inside
    makers = [graph.producer(o.value) for node in graph for o in node.operands if (node.name, o.slot) in slots and o.value]
    read, calls = _read_by(graph, makers, slots)
    between = {(n.path, n.function, n.call) for n in graph if n.name in calls - needed_calls}
    pieces = {name: piece for name, piece in engine.running.items() if not piece.site.argument and name not in weights}
    inner = {name for name, piece in pieces.items() if all(place.made in between for place in piece.site.places())}
    return (read | inside) - needed, inner


def _is_at(node: Node, call: tuple[str, str, int]) -> bool:
    return node.kind != "input" and (node.path, node.function, node.call) == call


def _read_by(graph: Graph, nodes: Collection[Node], except_for: Collection[tuple[str, int]]) -> tuple[set[str], set[str]]:
    """Names of the tensors that some calls read, or the calls that their operands come from; and of all these calls.

    Args:
      graph: of the example.
      nodes: the calls.
      except_for: operands that do not count, by call and slot.
    """
    read: set[str] = set()
    waiting, visited = list(nodes), {node.name for node in nodes}
    while waiting:
        node = waiting.pop()
        read |= set(node.parameters.values())
        for operand in node.operands:
            if (node.name, operand.slot) in except_for:
                continue
            read |= {operand.parameter} - {""}
            for value in filter(None, (operand.value, operand.stale)):
                producer = graph.producer(value)
                if producer.name not in visited:
                    visited.add(producer.name)
                    waiting.append(producer)
    return read, visited


def _of_parametrization(engine: Engine, site: ComputedSite | object) -> list[str]:
    """Names of the tensors of the parametrization that computes a weight inside a leaf module."""
    assert isinstance(site, ComputedSite)
    attribute = site.quantizer.removesuffix("_fake_quant").removeprefix(f"{site.path}.")
    return _below(engine, f"{site.path}.parametrizations.{attribute}".removeprefix("."))


def _below(engine: Engine, path: str) -> list[str]:
    """Names of all tensors of a module and of the modules in it."""
    owned = engine.skeleton.owned
    return [name for at, names in owned.items() if at == path or at.startswith(f"{path}.") for name in names.values()]


def _that_may_be_missing(
    engine: Engine, params: Params, weights: Mapping[str, Tensor], parents: Collection[str], example: Call | None
) -> frozenset[str]:
    """``parents``, if the model runs without their numbers; else none, as where a decomposition refuses NaN."""
    placed = {**params, **{name: absent(params[name]) for name in parents}}
    try:
        with kept_generators(params.values()), torch.no_grad():
            for _, call in _examples(engine, params, example):
                engine.run_float(placed, lambda name, x: weights.get(name, x), *call)
    except (RuntimeError, ValueError):
        return frozenset()
    return frozenset(parents)


def absent(like: Tensor) -> Tensor:
    """A tensor in the place of one that is left out: NaN, which shows a use of it; 0 where the dtype has no NaN."""
    return torch.full_like(like, torch.nan if like.is_floating_point() else 0)


def _input_dependent(graph: Graph) -> frozenset[str]:
    """Names of the values for which an input of the model is needed, if only for its shape."""
    dependent: set[str] = set()
    for node in graph:
        if node.kind == "input" or any(operand.value in dependent for operand in node.operands):
            dependent.update(node.outputs)
    return frozenset(dependent)
