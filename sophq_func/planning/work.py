"""What the examples of a plan multiply, and why a part of it stays float.

A contraction is a call that multiplies floating tensors and sums the products. It is quantized if all that it multiplies is
on the grid of a quantizer that acts. In a plan for weights only, its weight is enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from sophq_func.capture.graph import Graph, Node, Operand
from sophq_func.config.names import value_quantizer, weight_quantizer
from sophq_func.config.resolving import requested
from sophq_func.config.rules import QuantConfig
from sophq_func.planning.deciding import Outcome
from sophq_func.planning.inputs import Planned, quantizer_of
from sophq_func.planning.strategies import contracted, source_of
from sophq_func.planning.values import node_site
from sophq_func.planning.weights import WeightPlace, WeightUse, is_spread, weights_of_layer

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVOLUTIONS, nn.Linear)
"""Classes of layers that are missed where no quantizer is on their weight."""

FUNCTIONS_OF_LAYERS = frozenset(("linear", *(f"conv{n}d" for n in (1, 2, 3)), *(f"conv_transpose{n}d" for n in (1, 2, 3))))
"""Functions that such layers call."""

LOOKUPS = frozenset(("embedding", "embedding_bag"))
"""Operations that multiply nothing, but whose weight is quantized."""

WITH_WEIGHT = (*LAYERS, nn.Embedding, nn.EmbeddingBag, nn.Bilinear, nn.RNNBase, nn.RNNCellBase)
"""Classes of layers that have a line where no example calls them."""

WITH_TWO_INPUTS = (nn.Bilinear, nn.RNNCellBase)
"""Layers that multiply two of their operands with weights."""


class Reason(NamedTuple):
    """Why something stays float.

    Attributes:
      text: in words.
      excluded: whether the user asked for it, by a rule or by the config, or nobody could: there is nothing to warn of.
    """

    text: str
    excluded: bool = False


class Contraction(NamedTuple):
    """One contraction of an example, or one lookup.

    Attributes:
      name, kind: as of :class:`Left`.
      multiplications: how many.
      reason: why it is not quantized; ``None`` where it is.
      missed: whether it is a convolution or linear layer without a quantizer on its weight that nobody excluded.
    """

    name: str
    kind: str
    multiplications: int
    reason: Reason | None
    missed: bool = False


class Work(NamedTuple):
    """What one example multiplies.

    Attributes:
      contractions: in execution order.
      sizes: number of elements of each parameter, by canonical name.
      quantized: names of the parameters that are quantized, or from which a quantized weight is computed.
      used: names of the parameters and buffers that a call reads.
      layers: class by path, of the layers that have weights.
    """

    contractions: tuple[Contraction, ...]
    sizes: Mapping[str, int]
    quantized: frozenset[str]
    used: frozenset[str]
    layers: Mapping[str, str]


class Decided(NamedTuple):
    """What the coverage of one example is measured from.

    Attributes:
      planned: what is quantized how.
      config: what was asked for.
      weights: each weight with the calls that use it.
      outcomes: what is decided about weights and values, by quantizer.
    """

    planned: Planned
    config: QuantConfig
    weights: Sequence[WeightPlace]
    outcomes: Mapping[str, Outcome]


def measure(decided: Decided) -> Work:
    """What one example multiplies, and how much of that is quantized."""
    graph = decided.planned.graph
    quantized = frozenset(_quantized_parameters(decided))
    shapes = {name: shape for name, shape in graph.shapes.items() if name not in graph.buffers or name in quantized}
    return Work(
        contractions=tuple(_Measure(decided).contractions()),
        sizes={name: math.prod(shape) for name, shape in shapes.items()},
        quantized=quantized,
        used=frozenset(_used_parameters(graph)),
        layers={path: cls.__name__ for path, cls in graph.modules.items() if issubclass(cls, WITH_WEIGHT)},
    )


def _quantized_parameters(decided: Decided) -> Iterator[str]:
    """Names of the parameters that weight quantizers round, or from which they compute what they round."""
    for place in decided.weights:
        if decided.planned.acts(place.site.quantizer):
            for use in place.uses:
                graph = decided.planned.graph
                # of the tensors that a computed weight comes from, masks and vectors of power iterations are buffers
                parents = (name for name in _sources(graph, use) if name not in graph.buffers)
                yield from [use.parameter] if use.parameter else parents


def _sources(graph: Graph, use: WeightUse) -> Iterator[str]:
    """Names of the parameters from which a weight is computed."""
    if not use.source:
        yield from (source for factor in use.node.factors if not factor.parameter for source in factor.sources)
        return
    pending, seen = [use.source], {use.source}
    while pending:
        for operand in graph.producer(pending.pop()).operands:
            if operand.parameter:
                yield operand.parameter
            elif operand.value and operand.value not in seen:
                seen.add(operand.value)
                pending.append(operand.value)


def _used_parameters(graph: Graph) -> Iterator[str]:
    """Names of the parameters and buffers that a call reads."""
    for node in graph:
        for member in node.members or (node,):
            yield from member.parameters.values()
            yield from (operand.parameter for operand in member.operands)
            yield from (source for factor in member.factors for source in factor.sources)


class _Measure:
    """Goes through the calls of one example."""

    def __init__(self, decided: Decided) -> None:
        self._planned, self._config, _, self._outcomes = decided
        self._graph = decided.planned.graph
        self._strategy = f"strategy {decided.config.placement}"
        # A plan for weights only quantizes no values, whatever they are.
        self._weights_only = decided.config.quantmode == "weight_only" or decided.config.activation is None
        self._weights: dict[str, list[WeightPlace]] = {}
        self._computed: dict[tuple[str, int], str] = {}
        for place in decided.weights:
            for use in place.uses:
                self._weights.setdefault(use.node.name, []).append(place)
                if use.operand >= 0:
                    self._computed[use.node.name, use.operand] = place.site.quantizer

    def contractions(self) -> Iterator[Contraction]:
        """Every contraction and lookup, in execution order."""
        for node in self._graph:
            lead, *followers = node.members or (node,)
            if lead.multiplications or lead.operation in LOOKUPS:
                yield from self._of_call(node)
            for member in followers:
                if member.multiplications:
                    reason = Reason(f"it is inside a fused {node.type.__name__ if node.type else 'group'}")
                    yield Contraction(member.name, _kind(member), member.multiplications, reason)

    def _of_call(self, node: Node) -> Iterator[Contraction]:
        if node.kind == "function":
            reasons = list(self._of_function(node))
        else:
            reasons = list(self._of_layer(node))
        on_weight = next((reason for is_weight, reason in reasons if is_weight and reason), None)
        reason = on_weight or next((reason for _, reason in reasons if reason), None)
        missed = on_weight is not None and not on_weight.excluded and self._is_layer(node)
        total = node.multiplications
        inside = 0 if reason or self._weights_only else self._with_states(node)
        if inside < total or not total:
            yield Contraction(node.name, _kind(node.first), total - inside, reason, missed)
        if inside:
            states = Reason("it multiplies states that it makes itself", excluded=True)
            yield Contraction(node.name, _kind(node.first), inside, states)

    def _is_layer(self, node: Node) -> bool:
        """Whether a call is that of a convolution or linear layer, or of the function of one."""
        return node.is_module(*LAYERS) or node.function in FUNCTIONS_OF_LAYERS

    def _with_states(self, node: Node) -> int:
        """How many multiplications of a recurrent layer have a state as a factor, that no quantizer reaches."""
        if not node.is_module(nn.RNNBase):
            return 0
        sizes = {name: math.prod(self._graph.shapes[node.parameters[name]]) for name in weights_of_layer(node)}
        # Layers behind the first one read states, too.
        of_input = sum(size for name, size in sizes.items() if name.startswith("weight_ih_l0"))
        return node.multiplications - node.multiplications * of_input // max(1, sum(sizes.values()))

    def _of_layer(self, node: Node) -> Iterator[tuple[bool, Reason | None]]:
        """For each factor of a layer: whether it is a weight, and why it is not quantized."""
        places = self._weights.get(node.name, [])
        if not places:
            yield True, self._without_weight(node)
            return
        yield from ((True, self._of_quantizer(place.site.quantizer, "its weight")) for place in places)
        names = {place.site.parameter for place in places}
        own = set(node.parameters.values())
        lost = [f for f in node.factors if f.parameter not in names and (not f.parameter or f.parameter in own)]
        if lost and all(place.site.parameter for place in places):
            yield True, Reason(f"it computes a weight itself, from {', '.join(lost[0].sources)}")
        if node.first.operation not in LOOKUPS and not self._weights_only:
            count = 2 if node.is_module(*WITH_TWO_INPUTS) else 1
            yield from ((False, self._of_operand(node, operand)) for operand in node.operands[:count])

    def _without_weight(self, node: Node) -> Reason:
        """Why none of a layer's weights has a quantizer."""
        kind = _kind(node.first)
        if node.path in self._graph.opaque:
            return Reason(f"{kind} is one call, whose inside is not seen (leaf_module)", excluded=True)
        if not node.factors:
            return Reason("it has no weight of its own: it multiplies what it is given")
        return Reason(f"{self._strategy} quantizes no weight of {kind}")

    def _of_function(self, node: Node) -> Iterator[tuple[bool, Reason | None]]:
        """For each factor of a function: whether it is a weight, and why it is not quantized."""
        operands = [operand for operand in node.operands if contracted(node, operand)]
        if not operands:
            yield False, Reason(f"no strategy knows {node.function}")
        is_weight = [self._is_weight(node, operand) for operand in operands]
        for operand, weight in zip(operands, is_weight, strict=True):
            if weight:
                yield True, self._of_weight(node, operand)
            elif not self._weights_only:
                yield False, self._of_operand(node, operand)
        if self._weights_only and not any(is_weight):
            yield False, Reason("weights only: it multiplies two values", excluded=True)

    def _is_weight(self, node: Node, operand: Operand) -> bool:
        return (node.name, operand.slot) in self._computed or bool(source_of(self._graph, operand).parameter)

    def _of_weight(self, node: Node, operand: Operand) -> Reason | None:
        """Why a weight of a function has no quantizer."""
        computed = self._computed.get((node.name, operand.slot))
        if computed is not None:
            return self._of_quantizer(computed, "its weight")
        name = weight_quantizer(source_of(self._graph, operand).parameter)
        if name in self._outcomes:
            return self._of_quantizer(name, "its weight")
        if is_spread(self._graph, node, operand):
            return Reason("it sums nothing: an outer product with a buffer", excluded=True)
        text = f"{self._strategy} quantizes weights of layers alone, not of functions"
        return self._excluded_call(node) or Reason(text)

    def _of_operand(self, node: Node, operand: Operand) -> Reason | None:
        """Why a value that a call multiplies is not on a grid."""
        before = self._planned.inputs.get((node.name, operand.slot), "")
        if self._planned.acts(before) or quantizer_of(self._planned, operand):
            return None
        source = source_of(self._graph, operand)
        if not operand.value or (not source.value and not source.parameter):
            return Reason("it multiplies a constant", excluded=True)
        for value in dict.fromkeys((operand.value, source.value)):
            if value and value_quantizer(value) in self._outcomes:
                return self._of_quantizer(value_quantizer(value), f"its input {value}")
        text = f"{self._strategy} does not quantize its input {operand.value}"
        return self._excluded_call(node) or Reason(text)

    def _excluded_call(self, node: Node) -> Reason | None:
        """The rule that says that a call asks for no quantizers; ``None`` without."""
        request = requested(self._config, node_site(self._graph, node)) if self._config.rules else None
        if request is None or request.answer is not False:
            return None
        return Reason(repr(self._config.rules[request.matched[-1]]), excluded=True)

    def _of_quantizer(self, name: str, what: str) -> Reason | None:
        """Why a quantizer does not act; ``None`` where it does."""
        if self._planned.acts(name):
            return None
        outcome = self._outcomes[name]
        if outcome.decision is not None:  # it only observes
            said = outcome.decision.reasons.get("observe_only", "")
            return Reason(f"{what} is only observed: {said}", excluded=said.startswith(("Rule(", "config ")))
        half = "weight" if outcome.site.role == "weight" else "activation"
        said = repr(self._config.rules[outcome.used[-1]]) if outcome.used else f"config {half}=None"
        return Reason(f"{what}: {said}", excluded=True)


def _kind(node: Node) -> str:
    return node.type.__name__ if node.kind == "module" and node.type is not None else node.function
