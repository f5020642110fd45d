"""Where the inputs of linear layers can be scaled without changing a model: what makes them, and what reads them.

A value ``x`` whose channels are divided by ``s``, and whose readers have their columns multiplied by ``s``, leaves the model
as it is. The division is folded into what makes the value: the weight of a norm, or the rows of a linear layer before, be it
behind a product with a gate or behind attention, whose values may be shared by several heads.

The graph says which folds are likely to be exact. Whether they are is tried out: the model is run with other factors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from sophq_func.algorithms.contract import Start
from sophq_func.core.operations import DROPOUTS, MOVES
from sophq_func.core.pytree import tensors
from sophq_func.core.types import Tree
from sophq_func.model.tap import unchanged
from sophq_func.model.weight_quantizer import Params

if TYPE_CHECKING:
    from sophq_func.capture.graph import Graph, Node, Operand

NORMS = frozenset(("layer_norm", "rms_norm"))
"""Norms with a weight, and maybe a bias, for each channel of the last axis."""

HOMOGENEOUS = frozenset(("leaky_relu", "relu"))
"""Functions with ``f(x / s) = f(x) / s`` for positive ``s``."""

PASSES = MOVES | DROPOUTS | HOMOGENEOUS
"""Operations that a factor of their operand passes."""

ATTENTION = {"scaled_dot_product_attention": 2, "matmul": 1, "bmm": 1}
"""By function that mixes the values of attention: the slot of the values, in which it is linear."""


MATRICES = {"linear": 1, "matmul": 0, "mm": 0, "addmm": 0}
"""By function that multiplies its input with a matrix on the right: the axis of that matrix that is summed over."""


class Linear(NamedTuple):
    """A call that multiplies its input with a matrix that is a parameter.

    Attributes:
      name: of the call.
      weight, bias: canonical names; the bias is empty without.
      read: name of the value that it reads.
      rows, columns: the axis of the weight along which outputs lie, and that along which inputs do.
      outputs: how many outputs there are.
    """

    name: str
    weight: str
    bias: str
    read: str
    rows: int
    columns: int
    outputs: int

    def scaled(self, params: Mapping[str, Tensor], factors: Tensor) -> Tensor:
        """The weight with its columns multiplied by factors."""
        weight = params[self.weight]
        return weight * _along(factors, weight, self.columns).to(weight.dtype)


class Fold(NamedTuple):
    """A parameter that is divided by the factors, along one axis."""

    parameter: str
    axis: int


class Pair(NamedTuple):
    """A value whose channels can be scaled.

    Attributes:
      value: its name.
      channels: how many it has.
      readers: the linear layers that read it.
      folds: what is divided.
      shared: how many heads of attention share the channels that are folded into, and have their factors in common; 1
        outside of attention.
      head: how many channels of the value one head of attention has; 0 outside of attention.
      values: names of all values that are scaled.
    """

    value: str
    channels: int
    readers: tuple[Linear, ...]
    folds: tuple[Fold, ...]
    shared: int = 1
    head: int = 0
    values: tuple[str, ...] = ()

    def tied(self, x: Tensor) -> Tensor:
        """Numbers ``(channels,)`` with those in common that must be: the largest of the heads that share values."""
        if self.shared == 1:
            return x
        by_head = x.reshape(-1, self.shared, self.head)
        return by_head.amax(1, keepdim=True).expand_as(by_head).reshape(-1)

    def of_folds(self, x: Tensor) -> Tensor:
        """The factors of the channels that are folded into, of which heads that share values have the same."""
        return x if self.shared == 1 else x.reshape(-1, self.shared, self.head)[:, 0].reshape(-1)

    def scaled(self, params: Mapping[str, Tensor], factors: Tensor) -> dict[str, Tensor]:
        """The parameters that change where the value is divided by factors ``(channels,)``."""
        changed = {reader.weight: reader.scaled(params, factors) for reader in self.readers}
        divisors = self.of_folds(factors)
        for fold in self.folds:
            tensor = changed.get(fold.parameter, params[fold.parameter])
            changed[fold.parameter] = tensor / _along(divisors, tensor, fold.axis).to(tensor.dtype)
        return changed


def _along(factors: Tensor, x: Tensor, axis: int) -> Tensor:
    """Factors shaped to broadcast along one axis."""
    shape = [1] * x.ndim
    shape[axis] = -1
    return factors.reshape(shape)


class Skipped(NamedTuple):
    """A value that is not scaled, and why."""

    value: str
    why: str


def pairs_of(graph: Graph) -> tuple[list[Pair], list[Skipped]]:
    """The values of a model that can be scaled, and those read by linear layers that cannot, in execution order."""
    finder = _Finder(graph)
    pairs, skipped = [], []
    for value in finder.read:
        found = finder.pair(value)
        if isinstance(found, Pair):
            pairs.append(found)
        else:
            skipped.append(Skipped(value, found))
    return pairs, skipped


class _Made(NamedTuple):
    """What a factor is folded into, on the way back from a value."""

    folds: tuple[Fold, ...]
    outputs: int
    head: int
    values: tuple[str, ...]


class _Finder:
    """Walks back from the inputs of linear layers to what a factor can be folded into.

    Attributes:
      read: the values that linear layers read, in execution order.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.linear = {node.name: found for node in graph if (found := linear_of(graph, node)) is not None}
        self.read = list(dict.fromkeys(linear.read for linear in self.linear.values()))
        self.uses = Counter(name for node in graph for name in parameters_of(node))

    def pair(self, value: str) -> Pair | str:
        """The pair of a value, or why there is none."""
        users = self.graph.users(value)
        others = [node.name for node, _ in users if node.name not in self.linear]
        if others:
            return f"{others[0]} reads it, too"
        readers = tuple(self.linear[node.name] for node, _ in users)
        repeated = [reader.weight for reader in readers if self.uses[reader.weight] > 1]
        if repeated:
            return f"{repeated[0]} is used elsewhere, too"
        made = self.made(value, self.graph.values[value].shape[-1])
        if isinstance(made, str):
            return made
        channels = self.graph.values[value].shape[-1]
        shared = channels // made.outputs
        if channels % made.outputs or (shared > 1 and not made.head):
            return f"its {channels} channels come from {made.outputs}"
        return Pair(value, channels, readers, made.folds, shared, made.head, made.values)

    def made(self, value: str, channels: int, head: int = 0) -> _Made | str:
        """What makes a value of which everything that reads it is known, or why nothing can be folded into that."""
        if self.graph.values[value].output:
            return "the model returns it"
        node = self.graph.producer(value)
        if node.name in self.linear:
            return self._by_linear(value, self.linear[node.name], head)
        if node.kind == "module" and node.operation in NORMS:
            return self._by_norm(value, node, channels)
        if node.function == "mul":
            return self._by_product(value, node, channels, head)
        if node.function == "add":
            return self._by_bias(value, node, channels, head)
        if node.operation in PASSES or node.is_module(nn.Identity):
            return self._behind(value, node, 0, channels, head)
        if node.function in ATTENTION:
            return self._by_attention(value, node, channels)
        return f"{node.name} makes it"

    def _by_linear(self, value: str, linear: Linear, head: int) -> _Made | str:
        names = [name for name in (linear.weight, linear.bias) if name]
        shared = [name for name in names if self.uses[name] > 1]
        if shared:
            return f"{shared[0]} is used elsewhere, too"
        folds = [Fold(linear.weight, linear.rows), *([Fold(linear.bias, 0)] if linear.bias else [])]
        return _Made(tuple(folds), linear.outputs, head, (value,))

    def _by_norm(self, value: str, node: Node, channels: int) -> _Made | str:
        names = [node.parameters[attribute] for attribute in ("weight", "bias") if attribute in node.parameters]
        if not names or any(self.uses[name] > 1 for name in names):
            return f"{node.name} has no weight of its own"
        return _Made(tuple(Fold(name, 0) for name in names), channels, 0, (value,))

    def _by_product(self, value: str, node: Node, channels: int, head: int) -> _Made | str:
        """Of a product with a parameter, or of two values, one of which takes the factor."""
        for operand in node.operands:
            if operand.parameter and operand.shape == (channels,) and self.uses[operand.parameter] == 1:
                return _Made((Fold(operand.parameter, 0),), channels, 0, (value,))
        tried = []
        for operand in node.operands:
            if operand.value and operand.shape == self.graph.values[value].shape:
                found = self._through(value, operand, node, channels, head)
                if isinstance(found, _Made):
                    return found
                tried.append(found)
        return tried[0] if tried else f"{node.name} makes it"

    def _by_bias(self, value: str, node: Node, channels: int, head: int) -> _Made | str:
        """Of a sum with a parameter, which takes the factor, too."""
        biases = [operand for operand in node.operands if operand.parameter and operand.shape == (channels,)]
        others = [operand for operand in node.operands if operand.value]
        if len(biases) != 1 or len(others) != 1 or self.uses[biases[0].parameter] > 1:
            return f"{node.name} makes it"
        found = self._through(value, others[0], node, channels, head)
        bias = Fold(biases[0].parameter, 0)
        return found if isinstance(found, str) else found._replace(folds=(*found.folds, bias))

    def _by_attention(self, value: str, node: Node, channels: int) -> _Made | str:
        slot = ATTENTION[node.function]
        if len(node.operands) <= slot or not node.operands[slot].value:
            return f"{node.name} makes it"
        return self._behind(value, node, slot, channels, node.operands[slot].shape[-1])

    def _behind(self, value: str, node: Node, slot: int, channels: int, head: int) -> _Made | str:
        """What makes an operand of a call that passes a factor on."""
        operands = [operand for operand in node.operands if operand.slot == slot and operand.value]
        return self._through(value, operands[0], node, channels, head) if operands else f"{node.name} makes it"

    def _through(self, value: str, operand: Operand, node: Node, channels: int, head: int) -> _Made | str:
        """What makes an operand that this call alone reads."""
        others = [user.name for user, _ in self.graph.users(operand.value) if user.name != node.name]
        if others:
            return f"{others[0]} reads {operand.value}, too"
        found = self.made(operand.value, channels, head)
        return found if isinstance(found, str) else found._replace(values=(*found.values, value))


def linear_of(graph: Graph, node: Node) -> Linear | None:
    """The linear layer or product that a call is; ``None`` for other calls."""
    outputs = graph.values[node.outputs[0]].shape[-1:] if node.outputs else ()
    if not outputs:
        return None
    if node.kind == "module" and node.operation == "linear" and "weight" in node.parameters and node.operands:
        names = node.parameters["weight"], node.parameters.get("bias", "")
        return Linear(node.name, *names, node.operands[0].value, 0, 1, outputs[0])
    summed = MATRICES.get(node.function)
    if node.kind != "function" or summed is None:
        return None
    by_slot = {operand.slot: operand for operand in node.operands}
    first = 1 if node.function == "addmm" else 0
    read, weight, bias = by_slot.get(first), by_slot.get(first + 1), by_slot.get(0 if first else 2)
    if read is None or weight is None or not read.value or not weight.parameter or weight.axes is None:
        return None
    if len(weight.axes) != 2 or any(len(along) != 1 for along in weight.axes):
        return None
    (columns,), (rows,) = weight.axes[summed], weight.axes[1 - summed]
    return Linear(node.name, weight.parameter, bias.parameter if bias else "", read.value, rows, columns, outputs[0])


SPREAD = 1.0
"""Largest magnitude of the logarithm of the factors that are tried out: they lie between 0.37 and 2.7."""

GOLDEN = 0.6180339887
"""Multiples of it, modulo 1, repeat nowhere and have no pattern that channels could have, too."""

TOLERANCE = 1e-4
"""How far the output may move, of its largest magnitude: far above the rounding of float32, far below any wrong fold."""


def trial(channels: int, number: int) -> Tensor:
    """Factors to try out, others for each number. Not random ones, which a transform around the algorithm may forbid.

    Example:
      >>> trial(3, 0)
      tensor([0.3679, 1.2663, 0.5899])
    """
    places = torch.arange(channels, dtype=torch.float64) * GOLDEN + number * GOLDEN**2
    return torch.exp(SPREAD * (2 * (places % 1) - 1)).float()


class Probe:
    """Tells whether the float model computes with other params what it computed before, on one batch.

    Args:
      start: with the model and its params.
      batch: a call of the model.
    """

    def __init__(self, start: Start, batch: Tree) -> None:
        self._start = start
        self._call = start.engine.call(batch, "probe")
        self._expected = self._outputs(start.params)

    def agrees(self, params: Params) -> bool:
        """Whether no output moves by more than the tolerance."""
        pairs = zip(self._outputs(params), self._expected, strict=True)
        return all(_distance(x, y) <= TOLERANCE * float(y.abs().max()) for x, y in pairs)

    def _outputs(self, params: Params) -> list[Tensor]:
        args, kwargs = self._call
        with self._start.engine.constant():
            output = self._start.engine.run_float(params, unchanged, args, kwargs)
        return [y for y in tensors(output) if y.is_floating_point() and y.numel()]


def _distance(x: Tensor, y: Tensor) -> float:
    """The largest difference of two tensors; row by row, since logits of a large vocabulary are large."""
    flat, other = x.reshape(-1, x.shape[-1] if x.ndim else 1), y.reshape(-1, y.shape[-1] if y.ndim else 1)
    return max(float((one - two).abs().max()) for one, two in zip(flat, other, strict=True))


def exact(start: Start, batch: Tree, pairs: Sequence[Pair]) -> tuple[list[Pair], list[Skipped]]:
    """Those pairs of which a run of the model with other factors shows that they leave it as it is, and the others."""
    tried = []
    for number, pair in enumerate(pairs):
        device = start.params[pair.readers[0].weight].device
        tried.append((pair, pair.tied(trial(pair.channels, number)).to(device)))
    if not pairs:
        return [], []
    probe = Probe(start, batch)
    if probe.agrees(_all_scaled(start.params, tried)):
        return list(pairs), []
    kept, skipped = [], []
    for pair, factors in tried:
        if probe.agrees(_all_scaled(start.params, [(pair, factors)])):
            kept.append(pair)
        else:
            skipped.append(Skipped(pair.value, "a run shows that scaling it changes the model"))
    return kept, skipped


def _all_scaled(params: Params, tried: Sequence[tuple[Pair, Tensor]]) -> dict[str, Tensor]:
    """Params with the values of some pairs divided by factors."""
    new = dict(params)
    for pair, factors in tried:
        new |= pair.scaled(new, factors)
    return new


def found_pairs(start: Start, batch: Tree) -> tuple[list[Pair], list[Skipped]]:
    """The pairs of a model that are exact, in execution order, and what was skipped, with reasons."""
    args, kwargs = start.engine.call(batch, "pairs")
    graph = start.engine.retrace(start.params, args, kwargs)
    pairs, skipped = pairs_of(graph)
    kept, inexact = exact(start, batch, pairs)
    return kept, [*skipped, *inexact]


def parameters_of(node: Node) -> Iterator[str]:
    """The parameters that a call reads, once for each time."""
    yield from node.parameters.values()
    yield from (operand.parameter for operand in node.operands if operand.parameter)
