"""A function as a flat program of torch's operators: recorded once by ``make_fx``, then written as straight Python.

Such a program has no model, no quantizers and no transforms any more, only their arithmetic: the same operators on the
same numbers in the same order, so that it gives the same bits.
"""

from __future__ import annotations

import operator
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from sophq_func.capture._torch import (
    has_tag,
    is_operator,
    is_zero_for_ever,
    kernel,
    operator_name,
    schema,
    undo_of_recording,
)
from sophq_func.capture.calls import restoring
from sophq_func.capture.interrupts import Waiting
from sophq_func.capture.turns import Turn
from sophq_func.core.errors import PlanError, explain
from sophq_func.core.randomness import kept_generators
from sophq_func.core.types import Args, Kwargs, Tree

WHERE = "torch.where(condition, a, b), or stage the parts before and behind it"
"""What to do about a program that depends on a number."""

HIDDEN = ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")
"""Operators that write into their running statistics, which their schemas do not say."""

STATISTICS, TRAINING = (3, 4), 5
"""Where the running statistics are among the arguments of these, and the flag that says whether they are written."""

RECORDING = Turn()
"""One thread at a time records: a recorder replaces functions of torch, and puts them back at its end."""

SAME = ("detach", "alias")
"""Operators whose result is their argument, where autograd is off."""

READERS = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
"""Methods that read numbers without an operator, so that a recorder sees nothing of them."""


class Recorded(NamedTuple):
    """What was recorded.

    Attributes:
      module: a graph, and the constants that it holds. Its placeholders are the inputs, and then the tensors of
        ``outside``, without those that no operator reads.
      outside: tensors that the function read and that are no inputs.
      read: which of the inputs and then of ``outside`` the placeholders are.
    """

    module: GraphModule
    outside: list[Tensor]
    read: list[int]


@restoring
def record(f: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> Recorded:
    """Run ``f`` once on tensors, and record what it computes.

    Args:
      f: takes the tensors, and returns others.
      inputs: plain tensors.

    Raises:
      PlanError: what it computes depends on numbers in tensors, or on random numbers that are not torch's; or a gradient
        of it could be asked for.
    """

    def recorded(*tensors: Tensor) -> list[Tensor]:
        with _without_other_randomness():
            outputs = f(*tensors)
        if any(output.requires_grad for output in outputs):
            sentence = "the output requires a gradient, which a program does not record"
            fix = "stage the derivative, sq.stage(torch.func.grad(loss)), or call it in torch.no_grad()"
            raise PlanError(explain("stage", sentence, fix=fix))
        return outputs

    # copies, since the function may write into them, and since a tensor that is given twice is two inputs
    copies = [_copied(tensor) for tensor in inputs]
    with kept_generators(inputs), _Readers():
        try:
            module = RECORDING.take(partial(_recorded, recorded, copies))
        except (RuntimeError, NotImplementedError) as error:
            if _reads_a_number(error):
                raise PlanError(_depends(f"{_line(error)} reads one")) from error
            raise
    _refuse_generators(module)
    for node in module.graph.nodes:
        if _has_other_shapes(node):
            raise PlanError(_depends(f"the shape of what {operator_name(node.target)} returns depends on one"))
    outside = _lift(module)
    _tidy(module.graph)
    read = _drop_unread(module.graph)
    module.recompile()
    return Recorded(module, outside, read)


def _recorded(f: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> GraphModule:
    """What ``make_fx`` records; an interrupt leaves none of the functions replaced that it replaces meanwhile."""
    RECORDING.note(undo_of_recording())
    ctrl_c = Waiting()
    RECORDING.note(ctrl_c.end)
    ctrl_c.begin()
    return make_fx(f)(*inputs)


def _copied(tensor: Tensor) -> Tensor:
    """A leaf with the same numbers, strides and gradient flag, even where elements share memory."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    flat = tensor.detach().as_strided((reach if tensor.numel() else 0,), (1,)).clone()
    return flat.as_strided(tensor.shape, tensor.stride()).requires_grad_(tensor.requires_grad)


class _Readers(TorchFunctionMode):
    """Refuses methods that read the numbers of a tensor without an operator."""

    def __torch_function__(self, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        if func in READERS:
            raise PlanError(_depends(f"Tensor.{func.__name__} reads them"))
        return func(*args, **(kwargs or {}))


@contextmanager
def _without_other_randomness() -> Iterator[None]:
    """Refuse what draws numbers of Python's or numpy's generators: a program would hold the same ones for ever."""
    before = _states()
    yield
    if _states() != before:
        sentence = "random numbers of Python or numpy cannot be drawn anew by a program"
        raise PlanError(explain("stage", sentence, fix="draw them with torch, or pass them as an argument"))


def _states() -> list[str]:
    numpy = sys.modules.get("numpy")
    states = [str(random.getstate())]
    # as bytes, since numpy shortens the text of an array
    return states if numpy is None else [*states, str(numpy.random.get_state()[1].tobytes())]


def _refuse_generators(module: GraphModule) -> None:
    """Refuse generators but the default ones: recording has drawn from them once, which a first call must not."""
    for node in module.graph.nodes:
        values = [*node.args, *node.kwargs.values()]
        held = [getattr(module, str(value.target)) for value in _nodes(values) if value.op == "get_attr"]
        if any(isinstance(value, torch.Generator) for value in (*values, *held)):
            sentence = f"{operator_name(node.target)} draws from a generator"
            raise PlanError(explain("stage", sentence, fix="draw the numbers before, and pass them as an argument"))


def _depends(because: str) -> str:
    return explain("stage", "a program cannot depend on numbers in tensors", because=because, fix=WHERE)


def _reads_a_number(error: Exception) -> bool:
    """Whether the recorder refused to give a number."""
    return "get value out of a tracing tensor" in str(error)


def _line(error: Exception) -> str:
    """The line of the user's code, as far as there is one, in which an error arose."""
    trace, line = error.__traceback__, "the function"
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] not in ("torch", "sophq_func", "contextlib"):
            line = f"line {trace.tb_lineno} of {trace.tb_frame.f_code.co_filename}"
        trace = trace.tb_next
    return line


def _has_other_shapes(node: Node) -> bool:
    """Whether the shape of a node's result depends on numbers."""
    if not has_tag(node.target, torch.Tag.dynamic_output_shape):
        return False
    # an index by numbers has the shape of the numbers; by a mask it has not
    is_index = operator_name(node.target) == "index"
    return not is_index or any(one.meta["val"].dtype in (torch.bool, torch.uint8) for one in _nodes(node.args[1]))


def _lift(module: GraphModule) -> list[Tensor]:
    """Make inputs of the tensors that are held by the program and were there before it, and return these."""
    graph = module.graph
    outside: dict[int, tuple[Tensor, Node]] = {}
    for node in graph.find_nodes(op="get_attr"):
        held = getattr(module, str(node.target))
        if not isinstance(held, Tensor) or is_zero_for_ever(held) or _is_made_by_python(node):
            continue
        if id(held) not in outside:
            first = next(one for one in graph.nodes if one.op != "placeholder")
            with graph.inserting_before(first):
                outside[id(held)] = held, graph.placeholder(f"outside_{len(outside)}")
        node.replace_all_uses_with(outside[id(held)][1])
        graph.erase_node(node)
    return [held for held, _ in outside.values()]


def _is_made_by_python(node: Node) -> bool:
    """Whether a tensor is what Python has made of numbers while the function ran; it is a constant."""
    return any(operator_name(user.target).startswith("lift_fresh") for user in node.users)


def _tidy(graph: Graph) -> None:
    """Take out what changes no number: results that nobody reads, and what is computed twice."""
    memory = _memory(graph)
    written = {own for node in graph.nodes for target in _written(node) for own in memory[target]}
    if any(own.op == "placeholder" for own in written):
        sentence = "the function writes into an argument, or into a tensor of its closure"
        raise PlanError(explain("stage", sentence, fix="let it write into a copy: x.clone()"))
    returned = {own for node in graph.output_node().all_input_nodes for own in memory[node]}
    known: dict[object, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if operator_name(node.target) in SAME and not any(_changes_shape(user) for user in node.users):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        read = {own for one in (node, *node.all_input_nodes) for own in memory[one]}
        # what is written into has another value later; what is returned twice must be two tensors
        if node.is_impure() or read & written or memory[node] & returned:
            continue
        first = known.setdefault(_call(node), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _drop_unread(graph: Graph) -> list[int]:
    """Take out the placeholders that nothing reads, and return the numbers of the others."""
    read = []
    for number, node in enumerate(graph.find_nodes(op="placeholder")):
        if node.users:
            read.append(number)
        else:
            graph.erase_node(node)
    return read


def _memory(graph: Graph) -> dict[Node, set[Node]]:
    """For each node, the nodes that have made the memory in which its result may lie."""
    memory: dict[Node, set[Node]] = {}
    for node in graph.nodes:
        sources = {own for source in _aliased(node) for own in memory[source]}
        memory[node] = sources or {node}
    return memory


def _aliased(node: Node) -> list[Node]:
    """The arguments with which the result of a node may share memory."""
    if is_operator(node.target):
        if operator_name(node.target) == "_unsafe_view":  # whose schema does not say that it is a view
            return _nodes(node.args[0])
        return [one for value, argument in _arguments(node) if argument.alias_info for one in _nodes(value)]
    return list(node.all_input_nodes) if node.op == "call_function" else []


def _written(node: Node) -> list[Node]:
    """The arguments that a node writes into."""
    if not is_operator(node.target):
        return []
    if operator_name(node.target) in HIDDEN:
        if not node.args[TRAINING]:
            return []
        return [one for index in STATISTICS for one in _nodes(node.args[index])]
    arguments = ((value, argument.alias_info) for value, argument in _arguments(node))
    return [one for value, alias in arguments if alias is not None and alias.is_write for one in _nodes(value)]


def _arguments(node: Node) -> Iterator[tuple[Tree, torch.Argument]]:
    """The arguments of an operator's call, as its schema describes them."""
    declared = schema(node.target).arguments  # type: ignore[arg-type]
    yield from zip(node.args, declared, strict=False)
    yield from ((node.kwargs[argument.name], argument) for argument in declared if argument.name in node.kwargs)


def _nodes(value: Tree) -> list[Node]:
    """The nodes in an argument: one, or those of a list."""
    if isinstance(value, list | tuple):
        return [one for item in value for one in _nodes(item)]
    return [value] if isinstance(value, Node) else []


def _changes_shape(node: Node) -> bool:
    """Whether a node gives its argument another shape, in place."""
    return has_tag(node.target, torch.Tag.inplace_view)


def _call(node: Node) -> object:
    """A key that is the same for calls of one function with the same arguments."""
    return node.target, _hashable(node.args), _hashable(tuple(sorted(node.kwargs.items())))


def _hashable(value: Tree) -> object:
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    # by its text, since 0.0 equals -0.0; with the type, since 1 equals True
    return value if isinstance(value, Node) else (type(value), repr(value))


class Source(NamedTuple):
    """A program as Python: a function of the graph's inputs, and its text."""

    function: Callable[..., list[Tensor]]
    text: str


def source(module: GraphModule, inputs: Sequence[str]) -> Source:
    """A graph as straight Python that calls the operators themselves: a fourth faster than the code of torch.fx.

    Each intermediate tensor is let go behind its last use.

    Args:
      module: the graph, and the constants that it holds.
      inputs: what each input is, for the text.
    """
    return _Writer(module).written(module.graph, inputs)


class _Writer:
    """Writes a program. What text cannot spell, such as a dtype, is bound to a name."""

    def __init__(self, owner: GraphModule) -> None:
        self._owner = owner
        self._bound: dict[str, Any] = {}
        self._names: dict[object, str] = {}
        self._taken: Counter[str] = Counter()

    def written(self, graph: Graph, described: Sequence[str]) -> Source:
        inputs = [node.name for node in graph.find_nodes(op="placeholder")]
        last = {one: node for node in graph.nodes for one in node.all_input_nodes}
        lines = [f"# {name}: {text}" for name, text in zip(inputs, described, strict=True)]
        lines.append(f"def program({', '.join(inputs)}):")
        for node in graph.nodes:
            if node.op == "output":
                lines.append(f"    return {self._spelled(node.args[0])}")
            elif node.op == "get_attr":
                self._bound[node.name] = getattr(self._owner, str(node.target))
            elif node.op == "call_function":
                lines.append(f"    {node.name} = {self._called(node)}")
                over = [one.name for one in node.all_input_nodes if last[one] is node and one.op != "get_attr"]
                unread = [] if node.users else [node.name]
                if over or unread:
                    lines.append(f"    {' = '.join(over + unread)} = None")
        text = "\n".join(lines)
        exec(compile(text, "<staged program>", "exec"), self._bound)
        return Source(self._bound["program"], text)

    def _called(self, node: Node) -> str:
        if node.target is operator.getitem:
            return f"{self._spelled(node.args[0])}[{node.args[1]!r}]"
        values = [self._spelled(value) for value in node.args]
        named = [f"{name}={self._spelled(value)}" for name, value in node.kwargs.items()]
        return f"{self._function(node.target)}({', '.join(values + named)})"

    def _function(self, target: Any) -> str:
        if is_operator(target):
            return self._name(kernel(target), target, str(target).replace(".", "_"))
        return self._name(target, target, getattr(target, "__name__", "function"))

    def _spelled(self, value: Tree) -> str:
        if isinstance(value, Node):
            return value.name
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self._spelled, value))}]"
        if value is None or isinstance(value, bool | int | str):
            return repr(value)
        if isinstance(value, float) and value - value == 0:  # no infinity and no NaN, which Python does not spell
            return repr(value)
        return self._name(value, (type(value), repr(value)), str(value).rpartition(".")[2])

    def _name(self, value: object, key: object, wish: str) -> str:
        """The name to which a value is bound, one for each key."""
        if key not in self._names:
            base = "_" + "".join(letter if letter.isalnum() else "_" for letter in wish)
            self._taken[base] += 1
            name = base if self._taken[base] == 1 else f"{base}_{self._taken[base]}"
            self._names[key], self._bound[name] = name, value
        return self._names[key]
