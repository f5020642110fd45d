"""``BF16Mixed``: weight layers in integers, everything between them in bfloat16, as sophgo-mq's ``bf16_mix_prec``.

Each value has a quantizer behind the call that makes it: as configured behind a weight layer, BF16 behind any other call.
The calls that take a value form two groups, weight layers and others. Before each group is one quantizer for all of its
calls, of the group's kind, unless the quantizer behind the value is of that kind already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from sophq_func.capture.graph import Graph, Node, Operand
from sophq_func.config.names import input_quantizer, value_quantizer
from sophq_func.config.strategies import PLACEMENTS, Placement, Preset, Requests, SharedInput, Strategy
from sophq_func.core.operations import DROPOUTS
from sophq_func.fake_quantize import bf16
from sophq_func.numerics.scheme import override
from sophq_func.planning.strategies._tpu import WEIGHTS

BF16 = Preset(override(fake_quantize=bf16()), "strategy BF16Mixed: no weight layer")


def consumers(graph: Graph, value: str) -> Iterator[tuple[Node, Operand]]:
    """Each use of a value; in the place of a dropout, the uses of its result."""
    for user, operand in graph.users(value):
        if user.operation in DROPOUTS:
            yield from consumers(graph, user.outputs[0])
        else:
            yield user, operand


def place_mixed(graph: Graph, requests: Requests) -> Placement:
    """Place a quantizer behind each call, and one before each group of calls that take a value."""
    chosen: dict[str, str] = {}
    inputs: dict[str, SharedInput] = {}
    named_after: Counter[str] = Counter()
    presets: dict[str, Preset] = {}

    def is_layer(node: Node) -> bool:
        return node.is_module(*WEIGHTS, *requests.layers)

    def fuses_with_relu(node: Node) -> bool:
        return is_layer(node) or node.operation in ("add", "batch_norm")

    def place_before(value: str, uses: list[tuple[Node, Operand]]) -> str:
        """Place a quantizer between a value and some of its uses, and return its name."""
        first = uses[0][0].name
        name = input_quantizer(first, named_after[first])
        named_after[first] += 1
        why = f"input of {', '.join(user.name for user, _ in uses)}"
        inputs[name] = SharedInput(first, tuple((user.name, operand.slot) for user, operand in uses), why, value)
        return name

    for node in graph:
        if node.operation in DROPOUTS:
            continue
        for value in node.outputs:
            if not graph.values[value].floating:
                continue
            uses = [(user, operand) for user, operand in consumers(graph, value) if requests.asks(user) is not False]
            feeds_relu_alone = len(uses) == 1 and uses[0][0].operation == "relu" and not graph.values[value].output
            # The two are fused, so that hardware does not store the value between them.
            if feeds_relu_alone and fuses_with_relu(node):
                continue
            if node.kind != "input" and requests.asks(node) is not False:
                chosen[value] = f"result of {node.name}"
                if not is_layer(node):
                    presets[value_quantizer(value)] = BF16
            to_layers = [(user, operand) for user, operand in uses if is_layer(user)]
            to_others = [(user, operand) for user, operand in uses if not is_layer(user)]
            if to_layers:
                place_before(value, to_layers)
            if to_others:
                presets[place_before(value, to_others)] = BF16
    return Placement(chosen, inputs=inputs, presets=presets)


PLACEMENTS.add("BF16Mixed", Strategy(place_mixed, WEIGHTS))
