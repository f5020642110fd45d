"""``BF16Mixed``: weight layers in integers, everything between them in bfloat16 (semantics.md 5.7).

Behind each call sits a quantizer: as configured behind weight layers, BF16 behind all others. Before the calls that take a
value sits a second one, shared by all weight layers among them, and another shared by all others, unless it would be of the
same kind as that behind the value.
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
    """Each use of a value; dropout is looked through."""
    for user, operand in graph.users(value):
        if user.operation in DROPOUTS:
            yield from consumers(graph, user.outputs[0])
        else:
            yield user, operand


def place_mixed(graph: Graph, requests: Requests) -> Placement:
    """A quantizer behind each call, and before the calls of the other kind."""
    chosen: dict[str, str] = {}
    inputs: dict[str, SharedInput] = {}
    named_after: Counter[str] = Counter()
    presets: dict[str, Preset] = {}

    def is_layer(node: Node) -> bool:
        return node.is_module(*WEIGHTS, *requests.layers)

    def fuses_with_relu(node: Node) -> bool:
        return is_layer(node) or node.operation in ("add", "batch_norm")

    for node in graph:
        for value in (value for value in node.outputs if graph.values[value].floating and node.operation not in DROPOUTS):
            uses = [(user, operand) for user, operand in consumers(graph, value) if requests.asks(user) is not False]
            stays = len(uses) == 1 and uses[0][0].operation == "relu" and not graph.values[value].output
            if stays and fuses_with_relu(node):
                continue
            if node.kind != "input" and requests.asks(node) is not False:
                chosen[value] = f"result of {node.name}"
                presets |= {} if is_layer(node) else {value_quantizer(value): BF16}
            for layers in (True, False):
                mine = [(user.name, operand.slot) for user, operand in uses if is_layer(user) is layers]
                if mine:
                    first = mine[0][0]
                    name = input_quantizer(first, named_after[first])
                    named_after[first] += 1
                    why = f"input of {', '.join(user for user, _ in mine)}"
                    inputs[name] = SharedInput(first, tuple(mine), why, value)
                    presets |= {} if layers else {name: BF16}
    return Placement(chosen, inputs=inputs, presets=presets)


PLACEMENTS.add("BF16Mixed", Strategy(place_mixed, WEIGHTS))
