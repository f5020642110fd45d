"""Private names of torch that runs and exports need, each behind a function.

For runs: the stack of function modes, and where a module holds its tensors and hooks. For exports: the texts of
``torch.export``'s errors, and the operators that inductor looks for. A test for each name shows what fails without it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch

from sophq_func.core.modes import level
from sophq_func.core.pytree import tree_map
from sophq_func.core.types import Tree

READS_ITS_OWN = (_ConvNd, nn.Linear, nn.Embedding)
"""Layers whose parameters only their own forward reads. ``_ConvNd`` is the base of all convolutions."""


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Layers that write into their buffers in training mode alone."""


def keeps_buffers(module: nn.Module) -> bool:
    """Whether a layer of torch's own writes into none of its buffers."""
    return isinstance(module, NORMS) and not module.training


Store = dict[str, Tensor]
"""A dict in which a module holds tensors, by attribute."""


def innermost_mode() -> TorchFunctionMode | None:
    """The function mode that sees the next call first."""
    depth = torch._C._len_torch_function_stack()
    return torch._C._get_function_stack_at(depth - 1) if depth else None


def pop_mode() -> None:
    """Take the innermost function mode off the stack."""
    torch._C._pop_torch_function_stack()


def push_mode(mode: TorchFunctionMode) -> None:
    """Put a function mode back on the stack."""
    torch._C._push_on_torch_function_stack(mode)


def mode_depth() -> int:
    """How many function modes are on the stack."""
    return torch._C._len_torch_function_stack()


def pop_modes(depth: int) -> None:
    """Take function modes off the stack until no more than ``depth`` are left."""
    while mode_depth() > depth:
        pop_mode()


def undo_of_dispatch_modes() -> Callable[[], None]:
    """What puts back the dispatch modes of now, and what torch notes about them."""
    notes = {name: note for name, note in vars(_python_dispatch).items() if name.startswith("_is_in_")}
    modes = _python_dispatch._get_current_dispatch_mode_stack()

    def undo() -> None:
        # held here, since torch 2.9 reads a mode that it has taken off after nobody else may hold it
        found = _python_dispatch._get_current_dispatch_mode_stack()
        for _ in found:  # all of them: torch keeps its own below those of a user, in whatever order they came
            torch._C._pop_torch_dispatch_stack(None)
        for mode in modes:
            torch._C._push_on_torch_dispatch_stack(mode)
        vars(_python_dispatch).update(notes)

    return undo


def saved_tensors_hooks() -> object:
    """The innermost hooks for tensors that are saved for a backward pass, such as a checkpoint sets; ``None``: none."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def pop_saved_tensors_hooks(outer: object) -> None:
    """Take such hooks off their stack until ``outer`` are the innermost ones."""
    while saved_tensors_hooks() not in (None, outer):
        torch._C._autograd._pop_saved_tensors_default_hooks()


class WithoutInnermostMode:
    """A context in which the innermost function mode sees nothing.

    No generator, which would put the mode back when it is deleted: after an interrupt, when the run is long over.
    """

    def __enter__(self) -> None:
        self.mode = torch._C._pop_torch_function_stack()

    def __exit__(self, *error: object) -> None:
        torch._C._push_on_torch_function_stack(self.mode)


def is_empty_shell(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no numbers."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def without_fakes() -> AbstractContextManager[object]:
    """A context in which tensors get numbers, even where a mode around it makes fake ones."""
    context: AbstractContextManager[object] = unset_fake_temporarily()  # type: ignore[no-untyped-call]
    return context


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Attribute and tensor of each parameter and buffer that a module itself holds."""
    for store in (module._parameters, module._buffers):
        yield from ((attribute, tensor) for attribute, tensor in store.items() if tensor is not None)


def hold(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Make a tensor a parameter of a module if it is floating, else a buffer, and return it.

    Names may have dots and be those of attributes, which ``register_parameter`` refuses; ``getattr`` does not find them.
    """
    if tensor.is_floating_point() or tensor.is_complex():
        tensor = nn.Parameter(tensor)
    store: dict = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
    store[name] = tensor
    return tensor


def store_of(module: nn.Module, attribute: str) -> Store:
    """The dict in which a module holds a parameter or buffer.

    Writing a tensor into it is the fastest way to bind one: ``setattr`` refuses a plain tensor for a parameter, and
    ``functional_call`` searches the module of every tensor by its name.
    """
    return module._parameters if attribute in module._parameters else module._buffers  # type: ignore[return-value]


def parameters_in(module: nn.Module) -> Store:
    """The dict in which a module holds its parameters."""
    return module._parameters  # type: ignore[return-value]


def is_parameter(module: nn.Module, attribute: str) -> bool:
    """Whether a module holds a parameter, and not a buffer, under a name."""
    return attribute in module._parameters


def has_only_one_hook_before(module: nn.Module) -> bool:
    """Whether the skeleton's hook is the only one before the module's forward."""
    return len(module._forward_pre_hooks) == 1


def has_only_our_hooks(module: nn.Module) -> bool:
    """Whether the skeleton's two hooks are the only ones, before and after the module's forward."""
    return len(module._forward_pre_hooks) == len(module._forward_hooks) == 1


def wrap_hooks_before(module: nn.Module, wrap: Callable[[Callable[..., object]], Callable[..., object]]) -> None:
    """Put ``wrap(hook)`` in the place of each hook before a module's forward."""
    for key, hook in module._forward_pre_hooks.items():
        module._forward_pre_hooks[key] = wrap(hook)


def drop_hooks(module: nn.Module, are_dropped: Callable[[object], bool]) -> None:
    """Remove those hooks around a module's forward for which a predicate holds."""
    flags = (
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    )
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if are_dropped(hook)]:
            del hooks[key]
            for flag in flags:
                flag.pop(key, None)


def links(module: nn.Module) -> Iterator[tuple[dict[str, nn.Module | None], str, nn.Module]]:
    """Where each module inside another is held: the dict of its parent, its name there, and the module."""
    for parent in module.modules():
        yield from ((parent._modules, name, child) for name, child in parent._modules.items() if child is not None)


def is_hooked(module: nn.Module) -> bool:
    """Whether a module of a skeleton has its hooks."""
    return "_sophq_info" in vars(module)


def is_parametrized(module: nn.Module) -> bool:
    """Whether ``torch.nn.utils.parametrize`` computes a parameter of the module at each use."""
    return "parametrizations" in module._modules


def imagined(tree: Tree, device: torch.device) -> Tree:
    """``tree`` with fake tensors in the place of its tensors: they have shape and dtype, but no numbers.

    What a model computes from parameters alone is then computed for real, and what depends on its input only in shape.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    def fake(leaf: Tree) -> Tree:
        if not isinstance(leaf, Tensor):
            return leaf
        with mode:
            return torch.empty(leaf.shape, dtype=leaf.dtype, device=device)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return tree_map(fake, tree)


def drop_unread(program: torch.export.ExportedProgram) -> None:
    """Remove from a program the buffers that no operation reads, with their numbers."""
    unread = {node.name for node in program.graph.nodes if node.op == "placeholder" and not node.users}
    kept = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is torch.export.graph_signature.InputKind.BUFFER and spec.arg.name in unread:
            node = next(node for node in program.graph.nodes if node.name == spec.arg.name)
            program.graph.erase_node(node)
            program.state_dict.pop(str(spec.target), None)
            program.constants.pop(str(spec.target), None)
        else:
            kept.append(spec)
    program.graph_signature.input_specs[:] = kept


def end_transforms(outer: int) -> None:
    """End the transforms of ``torch.func`` that began inside ``outer`` others, as far as nobody has ended them."""
    end = {
        "Vmap": torch._C._functorch._vmap_decrement_nesting,
        "Grad": torch._C._functorch._grad_decrement_nesting,
        "Jvp": torch._C._functorch._jvp_decrement_nesting,
    }
    while level() > outer:
        end[torch._C._functorch.peek_interpreter_stack().key().name]()


def wrapper_level(tensor: Tensor) -> int:
    """The level of the transform whose wrapper a tensor is, from 1; 0 for a tensor that is none, or of one that ended."""
    return max(torch._C._functorch.maybe_get_level(tensor), 0)


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor is the wrapper of a transform, even of one that has ended."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor inside a wrapper: the same object each time, while somebody holds it."""
    return torch._C._functorch.get_unwrapped(tensor)


def mapped_axis(tensor: Tensor) -> int | None:
    """The axis of the tensor inside a wrapper over which ``vmap`` maps; ``None`` for wrappers of derivatives."""
    if not torch._C._functorch.is_batchedtensor(tensor):
        return None
    return torch._C._functorch.maybe_get_bdim(tensor)


class CheckpointParts(NamedTuple):
    """What ``torch.utils.checkpoint.checkpoint`` calls.

    Attributes:
      steps: a generator function, whose steps come before and after the first computation of what is checkpointed; its
        first argument computes it once more.
      function: has an ``apply`` that computes it with ``use_reentrant=True``.
    """

    steps: Callable[..., Iterator[None]]
    function: Any


NAMES_OF_STEPS = ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator")
"""The function that ``checkpoint`` calls for its steps: torch 2.15 calls the first, and keeps the second for others."""

NAME_OF_STEPS = next(name for name in NAMES_OF_STEPS if hasattr(torch.utils.checkpoint, name))


def checkpoint_parts() -> CheckpointParts:
    """What ``checkpoint`` calls now."""
    module: Any = torch.utils.checkpoint
    return CheckpointParts(getattr(module, NAME_OF_STEPS), module.CheckpointFunction)


def replace_checkpoint_parts(parts: CheckpointParts) -> None:
    """Let ``checkpoint`` call others."""
    module: Any = torch.utils.checkpoint
    setattr(module, NAME_OF_STEPS, parts.steps)
    module.CheckpointFunction = parts.function


def is_higher_order(func: object) -> bool:
    """Whether a function is an operation that takes functions, such as the one that ``flex_attention`` calls."""
    return isinstance(func, torch._ops.HigherOrderOperator)


def operator_name(target: object) -> str:
    """Name, without its overload, of the operator that is the target of a graph's node; empty for other targets."""
    return target.overloadpacket.__name__ if isinstance(target, torch._ops.OpOverload) else ""


def refusals_of_export() -> tuple[type[Exception], ...]:
    """The exceptions of ``torch.export`` for a program that cannot have the dynamic sizes that it was asked for."""
    from torch._dynamo.exc import UserError
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

    return UserError, ConstraintViolationError


LOGGER_OF_ONNX = "torch.onnx._internal.exporter._registration"
"""The logger by which ``torch.onnx`` reports optional packages that are not installed."""

SIZE_RANGE = re.compile(r"(\w+) = Dim\('\1'(?:, min=(\d+))?(?:, max=(\d+|oo))?\)")
"""The range of a size in an error of ``torch.export``: ``n = Dim('n', min=2, max=8)``, where ``oo`` is infinity."""


def suggested_fixes(message: str) -> list[str]:
    """The lines in which an error of ``torch.export`` suggests other sizes.

    Example:
      >>> suggested_fixes("No.\\n\\nSuggested fixes:\\n  n = Dim('n', max=8)\\n  m = 3\\n\\nmore")
      ["n = Dim('n', max=8)", 'm = 3']
    """
    lines = message.partition("Suggested fixes:")[2].strip().partition("\n\n")[0].splitlines()
    return [line.strip() for line in lines]


def suggested_range(line: str) -> tuple[str, dict[str, int]] | None:
    """The name of a size and its range, from a line of :func:`suggested_fixes`; ``None`` for a line of another kind.

    Example:
      >>> suggested_range("n = Dim('n', min=2, max=8)"), suggested_range("m = 3")
      (('n', {'min': 2, 'max': 8}), None)
    """
    match = SIZE_RANGE.fullmatch(line)
    if match is None:
        return None
    name, smallest, largest = match.groups()
    bounds = {"min": smallest, "max": largest}
    return name, {key: int(text) for key, text in bounds.items() if text and text != "oo"}


def reasons_of_refusal(message: str) -> list[str]:
    """The reasons that an error of ``torch.export`` lists, without explanations; its first line where it lists none."""
    head, *rest = message.strip().splitlines()
    items = (line.strip().removeprefix("- ") for line in rest if line.startswith("  - "))
    reasons = [item.partition(". ")[0].rstrip(".") for item in items]
    # that a size is not free "in the specified range" follows from the other reasons, if there are any
    specific = [reason for reason in reasons if "in the specified range" not in reason]
    return specific or reasons or [head]


def quantized_operators() -> ModuleType:
    """The operators ``quantize_per_tensor``, ``dequantize_per_tensor`` and ``dequantize_per_channel`` of PT2E.

    Inductor's passes for x86 look for operators of these names in the namespace ``quantized_decomposed``. Torch plans to
    remove the private module that registers them, together with ``torch.ao``; without it they are registered here.
    """
    try:
        importlib.import_module("torch.ao.quantization.fx._decomposed")
    except ModuleNotFoundError:
        _register_operators()
    return torch.ops.quantized_decomposed


@cache
def _register_operators() -> torch.library.Library:
    """Register operators with the schemas and the arithmetic of PT2E; cached, since they vanish with the library."""
    library = torch.library.Library("quantized_decomposed", "DEF")  # type: ignore[no-untyped-call]
    grid = "int quant_min, int quant_max, ScalarType dtype"
    grid_and_output = f"{grid}, *, ScalarType? out_dtype=None"
    define: Callable[[str], None] = library.define
    define(f"quantize_per_tensor(Tensor input, float scale, int zero_point, {grid}) -> Tensor")
    define(f"dequantize_per_tensor(Tensor input, float scale, int zero_point, {grid_and_output}) -> Tensor")
    define(
        f"dequantize_per_channel(Tensor input, Tensor scales, Tensor? zero_points, int axis, {grid_and_output}) -> Tensor"
    )
    for operator in (quantize_per_tensor, dequantize_per_tensor, dequantize_per_channel):
        library.impl(operator.__name__, operator, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    return library


def quantize_per_tensor(
    input: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: torch.dtype
) -> Tensor:
    """Codes ``clamp(round(x * (1 / s)) + z)``, in ``dtype``."""
    return (torch.round(input * (1.0 / scale)) + zero_point).clamp(quant_min, quant_max).to(dtype)


def dequantize_per_tensor(
    input: Tensor,
    scale: float,
    zero_point: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Values ``(q - z) * s``; the bounds and the dtype of the codes are not read."""
    return (input.to(out_dtype or torch.float32) - zero_point) * scale


def dequantize_per_channel(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Values ``(q - z) * s`` with a scale and a zero point for each index along an axis."""
    shape = [-1 if i == axis % input.ndim else 1 for i in range(input.ndim)]
    zeros = 0 if zero_points is None else zero_points.reshape(shape)
    return ((input - zeros) * scales.reshape(shape)).to(out_dtype or torch.float32)


def is_zero_for_ever(tensor: Tensor) -> bool:
    """Whether a tensor is one of those without memory that stand for 0 in forward mode."""
    return tensor._is_zerotensor()


def is_operator(target: object) -> bool:
    """Whether the target of a graph's node is an operator of torch, and no other function."""
    return isinstance(target, torch._ops.OpOverload)


def has_tag(target: object, tag: torch.Tag) -> bool:
    """Whether the target of a graph's node is an operator that torch has given a tag."""
    return isinstance(target, torch._ops.OpOverload) and tag in target.tags


def schema(overload: torch._ops.OpOverload) -> torch.FunctionSchema:
    """The arguments of an operator, and which of them it writes into or returns views of."""
    return overload._schema


def undo_of_recording() -> Callable[[], None]:
    """What takes back what ``make_fx`` changes while it records, where an interrupt keeps it from doing so itself."""
    tracing: Any = importlib.import_module("torch.fx._symbolic_trace")
    own = getattr(tracing, "_is_fx_tracing_tls", None)  # from torch 2.15 on, each thread has a flag
    flags, flag = (vars(tracing), "_is_fx_tracing_flag") if own is None else (vars(own), "flag")
    is_tracing = flags.get(flag, False)
    methods = {name: vars(nn.Module)[name] for name in ("__call__", "__getattr__")}

    def undo() -> None:
        flags[flag] = is_tracing
        for name, method in methods.items():
            setattr(nn.Module, name, method)

    return undo


def kernel(overload: torch._ops.OpOverload) -> Callable[..., Any]:
    """An operator without the Python around it, which takes a fifth of the time of a call on a small tensor."""
    function: Callable[..., Any] = overload._op
    return function


def compiled_by_inductor(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., list[Tensor]]:
    """A flat program as a function that inductor has compiled for inputs of these shapes, without guards of Dynamo."""
    from torch._inductor import compile as compiled

    # who calls it has compared sizes and strides already
    options = {"size_asserts": False, "alignment_asserts": False}
    function: Callable[..., list[Tensor]] = compiled(module, [*inputs], options)  # type: ignore[assignment]
    return function


def metadata_guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A function that tells whether other tensors have the class, dtype, device, shape, strides and gradient flag of these.

    One call in C++ for all of them: in Python it takes a tenth of the time of a small network.
    """
    if not tensors:
        return _no_tensors
    from torch._C._dynamo.guards import TensorGuards

    # without fixed sizes and strides it would read past the end of a list
    sizes = [list(tensor.shape) for tensor in tensors]
    strides = [list(tensor.stride()) for tensor in tensors]
    guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)  # type: ignore[arg-type]
    check: Callable[..., bool] = guards.check
    return check


def _no_tensors(*tensors: Tensor) -> bool:
    return not tensors
