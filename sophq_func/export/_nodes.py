"""The nodes of a float ONNX file as data, and the operations that the compiler tpu-mlir makes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import onnx

PRODUCTS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
"""Op types that multiply and sum."""

TAKES_RELU = frozenset(("Add", "AveragePool", "Concat", "Conv", "ConvTranspose", "Gemm", "MatMul", "MaxPool", "Mul", "Sub"))
"""Op types into which the compiler fuses a Relu that alone takes their result."""


MERGED = frozenset(("Reshape", "Transpose"))
"""Op types of which the compiler merges two in a row."""


class Node(NamedTuple):
    """A node of a file.

    Attributes:
      kind: its op type.
      inputs: tensors that are computed, or given to the model.
      constants: shapes of stored tensors, by name, in the order of the operands.
      output: the tensor that it computes.
      transposed: whether a Gemm transposes its weight.
    """

    kind: str
    inputs: tuple[str, ...]
    constants: Mapping[str, tuple[int, ...]]
    output: str
    transposed: bool = False

    @property
    def name(self) -> str:
        """``<tensor>_<op type>``."""
        return f"{self.output}_{self.kind}"

    @property
    def weight(self) -> str:
        """The stored tensor that a product multiplies with; empty without one."""
        return next(iter(self.constants), "") if self.kind in PRODUCTS and len(self.inputs) == 1 else ""

    @property
    def channels(self) -> int:
        """How many output channels the weight has."""
        shape = self.constants[self.weight]
        first = self.kind == "Conv" or self.transposed
        return shape[0] if first else shape[1 if self.kind == "ConvTranspose" else -1]


@dataclass(frozen=True)
class Operation:
    """Nodes that the compiler computes at once.

    Attributes:
      nodes: first to last.
    """

    nodes: tuple[Node, ...]

    @property
    def name(self) -> str:
        """What the compiler calls it: the name of its last node."""
        return self.nodes[-1].name

    @property
    def kind(self) -> str:
        """The op type of its first node."""
        return self.nodes[0].kind

    @property
    def inputs(self) -> tuple[str, ...]:
        """The tensors that it reads."""
        return self.nodes[0].inputs

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors that its nodes compute, first to last."""
        return tuple(node.output for node in self.nodes)


def nodes_of(proto: onnx.ModelProto) -> list[Node]:
    """The nodes of a file, in order of computation; one with several results is one for each, as the compiler has it."""
    graph = proto.graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        constants = {name: shapes[name] for name in node.input if name in shapes}
        inputs = tuple(name for name in node.input if name and name not in shapes)
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        nodes += [Node(node.op_type, inputs, constants, output, transposed) for output in node.output if output]
    return nodes


def operations(nodes: Sequence[Node], returned: Sequence[str]) -> list[Operation]:
    """The operations that the compiler makes of a file's nodes.

    Args:
      nodes: from :func:`nodes_of`.
      returned: the outputs of the file.
    """
    uses = Counter((*(tensor for node in nodes for tensor in node.inputs), *returned))
    takers = {tensor: node for node in nodes for tensor in node.inputs}
    fused: set[str] = set()
    made = []
    for node in nodes:
        if node.name in fused:
            continue
        chain = [node]
        while (after := _follower(chain, uses, takers)) is not None:
            chain.append(after)
        fused.update(member.name for member in chain)
        made.append(Operation(tuple(chain)))
    return made


def _follower(chain: Sequence[Node], uses: Mapping[str, int], takers: Mapping[str, Node]) -> Node | None:
    """The node that the compiler fuses into an operation: a bias of a linear layer, or a Relu."""
    last = chain[-1]
    taker = takers.get(last.output)
    if taker is None or uses[last.output] > 1:
        return None
    is_bias = taker.kind == "Add" and any(len(shape) == 1 for shape in taker.constants.values())
    if len(chain) == 1 and last.kind == "MatMul" and last.weight and is_bias:
        return taker
    if last.kind == taker.kind and last.kind in MERGED:
        return taker
    if last.kind == "Add" and taker.kind == "Add" and last.constants and taker.constants and len(chain) == 1:
        return taker
    rectifies = taker.kind == "Relu" and last.kind != "Relu" and chain[0].kind in TAKES_RELU
    return taker if rectifies else None
