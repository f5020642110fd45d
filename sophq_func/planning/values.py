"""Third step: which values are quantized, behind the call that makes them or before some that take them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from sophq_func.capture.graph import Graph, Node
from sophq_func.config.names import before_ending, input_quantizer, value_quantizer, weight_quantizer
from sophq_func.config.rules import QuantConfig
from sophq_func.config.site import CallSite, OperandSite, ValueSite
from sophq_func.config.strategies import Placement, SharedInput, Strategy
from sophq_func.core.errors import explain
from sophq_func.planning.deciding import Outcome, decide
from sophq_func.planning.weights import node_types, pattern_name


class Values(NamedTuple):
    """What is decided about values.

    Attributes:
      outcomes: by quantizer.
      inputs: quantizers before single calls, by the call's name and the operand's slot.
      misfits: problems with values that cannot be quantized, however they are configured.
    """

    outcomes: Mapping[str, Outcome]
    inputs: Mapping[tuple[str, int], str]
    misfits: tuple[str, ...]


NO_VALUES = Values({}, {}, ())


def quantize_values(
    graph: Graph, strategy: Strategy, config: QuantConfig, placement: Placement, weights: Mapping[str, Outcome]
) -> Values:
    """Decide which of the chosen values are quantized, and how.

    Args:
      graph: fused.
      strategy: which chose the values.
      config: what is asked for.
      placement: where quantizers go.
      weights: what is decided about weights, by quantizer.
    """
    outcomes: dict[str, Outcome] = {}
    shared_inputs: dict[str, SharedInput] = {}
    for node in graph:
        for value in node.outputs:
            if value in placement.chosen:
                site = value_site(graph, node, value)
                outcomes[site.quantizer] = decide(config, site, placement.chosen[value], placement.presets)
        if strategy.int4_inputs and _is_layer_of_4_bits(node, weights, outcomes):
            name, shared = input_quantizer(node.name), _input_of(node)
            outcomes[name] = decide(config, input_site(graph, name, shared), shared.why, placement.presets)
            shared_inputs[name] = shared
    for name, shared in placement.inputs.items():
        outcome = decide(config, input_site(graph, name, shared), shared.why, placement.presets)
        outcomes[name] = _unless_repeated(outcome, outcomes.get(value_quantizer(shared.value)))
        shared_inputs[name] = shared
    inputs = {}
    for name, shared in shared_inputs.items():
        if outcomes[name].config is not None:
            inputs.update(dict.fromkeys(shared.uses, name))
    return Values(outcomes, inputs, tuple(_misfits(graph, outcomes)))


def _is_layer_of_4_bits(node: Node, weights: Mapping[str, Outcome], values: Mapping[str, Outcome]) -> bool:
    """Whether rules give a layer's weight and its result 4 bits: then its input has a quantizer of its own."""
    weight = weights.get(weight_quantizer(node.parameters.get("weight", "")))
    result = values.get(value_quantizer(node.outputs[0])) if node.outputs else None
    if weight is None or result is None or not node.operands:
        return False
    return _is_given_4_bits(weight) and _is_given_4_bits(result)


def _input_of(node: Node) -> SharedInput:
    """The input of a layer, quantized before this layer alone."""
    return SharedInput(node.name, ((node.name, 0),), f"4-bit layer {node.name}")


def _unless_repeated(outcome: Outcome, behind: Outcome | None) -> Outcome:
    """A quantizer before calls, left out if one of the same kind acts behind the value, or would without rules.

    Args:
      outcome: of the quantizer before the calls.
      behind: of that behind the value, if the strategy places one.
    """
    repeats = behind is not None and behind.kind == outcome.kind
    return outcome._replace(decision=None) if repeats else outcome


def _is_given_4_bits(outcome: Outcome) -> bool:
    """Whether a rule gives a quantizer 4 bits."""
    decision, config = outcome.decision, outcome.config
    if decision is None or config is None:
        return False
    return config.scheme.bits == 4 and decision.reasons["bits"].startswith("Rule(")


def _misfits(graph: Graph, outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    """Problems with values that are written in place, and that a call takes under an old name."""
    late = late_uses(graph)
    for outcome in outcomes.values():
        site, config = outcome.site, outcome.config
        is_result = site.operand < 0
        if is_result and config is not None and not config.observe_only and site.value in late:
            because = f"it is written in place, and {late[site.value]} uses it under an old name"
            fix = f'write the operation out of place, or add sq.Rule(name="{site.quantizer}", activation=None)'
            yield explain(site.quantizer, f"{site.value} cannot be quantized", because=because, fix=fix)


def late_uses(graph: Graph) -> dict[str, str]:
    """By value, the first call that takes the value under a name from before it was written in place.

    A quantizer puts a new tensor in the place of the latest result. A call that was given an earlier result of the same
    tensor would still read the old one.
    """
    late: dict[str, str] = {}
    for node in graph:
        for operand in node.operands:
            if operand.stale:
                late.setdefault(operand.stale, node.name)
                # The operand itself may be a view of what was written.
                if operand.value and graph.values[operand.value].view:
                    late.setdefault(operand.value, node.name)
    for value in graph.values.values():
        if value.overwritten:
            late.setdefault(value.name, "the model's result")
    return late


def node_site(graph: Graph, node: Node) -> ValueSite:
    """The site of a call, which rules match to say whether the values around the call are quantized."""
    return ValueSite(**_common(graph, node), quantizer=value_quantizer(node.name), value=node.name)


def value_site(graph: Graph, node: Node, value: str) -> ValueSite:
    """The site behind one of the values that a call makes."""
    last, result = node.last, graph.values[value]
    return ValueSite(
        **_common(graph, node),
        quantizer=value_quantizer(value),
        value=value,
        anchor=CallSite(last.path, last.step, last.call),
        output=result.index,
        shape=result.shape,
        argument=node.argument,
        aliases=aliases(node, value, value_quantizer),
    )


def input_site(graph: Graph, name: str, shared: SharedInput) -> ValueSite:
    """The site of a quantizer before some calls only, described as the first of them."""
    first, slot = graph.nodes[shared.consumer], shared.uses[0][1]
    operand = first.operands[slot]
    calls = [(graph.nodes[user].first, at) for user, at in shared.uses]
    (lead, _), *others = calls
    return ValueSite(
        **_common(graph, first),
        quantizer=name,
        value=first.outputs[0],
        anchor=CallSite(lead.path, lead.step, lead.call),
        output=-1,
        operand=slot,
        more=tuple(OperandSite(call.path, call.step, call.call, at) for call, at in others),
        shape=graph.values[operand.value].shape if operand.value else (),
        argument=first.argument,
        aliases=aliases(first, before_ending(name), input_quantizer),
        note=f"operand of {', '.join(dict.fromkeys(user for user, _ in shared.uses))}",
    )


def _common(graph: Graph, node: Node) -> dict[str, Any]:
    """What the sites of a call have in common."""
    further = [path for member in node.members[1:] if member.kind == "module" for path in member.paths]
    return {
        "path": node.path,
        "paths": (*node.paths, *further),
        "types": node_types(graph, node),
        "pattern": pattern_name(node),
        "members": tuple(member.name for member in node.members),
        "function": node.function,
        "operation": node.operation,
        "also": node.also,
        "groups": int(node.options.get("groups", 1)),
    }


def aliases(node: Node, value: str, quantizer_of: Callable[[str], str]) -> tuple[str, ...]:
    """Further names of a module's value, and of the quantizer on it, by the other paths of the module.

    Args:
      node: the call of the module.
      value: name of the value by the module's first path.
      quantizer_of: from the name of a value to that of its quantizer.
    """
    if node.kind != "module" or not node.path or not value.startswith(node.path):
        return ()
    others = [f"{path}{value.removeprefix(node.path)}" for path in node.paths if path != node.path]
    return (*others, *(quantizer_of(other) for other in others))
