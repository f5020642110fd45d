"""Each private name of torch that the library uses, and what would break without it or if it meant something else."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch, checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

import sophq_func as sq
from sophq_func.capture import _torch
from sophq_func.core import modes

ROOT = Path(sq.__file__).parent
HOLDERS = ("core/modes.py", "capture/_torch.py")
TESTED: dict[str, Callable[[], None]] = {}


def without(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register the test of a name."""

    def decorate(test: Callable[[], None]) -> Callable[[], None]:
        TESTED[name] = test
        return test

    return decorate


class Counting(TorchFunctionMode):
    """Counts the calls that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


class Passing(TorchDispatchMode):
    """Changes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@without("_get_function_stack_at")
def the_mode_of_a_run_would_not_know_whether_one_of_the_models_own_stands_before_it() -> None:
    assert _torch.innermost_mode() is None
    with Counting() as outer, Counting() as inner:
        assert _torch.innermost_mode() is inner
        assert _torch.innermost_mode() is not outer


@without("_len_torch_function_stack")
def a_mode_that_an_interrupt_left_on_the_stack_could_not_be_told_from_those_of_the_caller() -> None:
    with Counting() as outer:
        depth = _torch.mode_depth()
        _torch.push_mode(Counting())
        _torch.push_mode(Counting())
        _torch.pop_modes(depth)
        assert _torch.innermost_mode() is outer


@without("_subclasses")
def a_model_of_fake_tensors_could_not_be_planned_where_it_transposes_a_weight() -> None:
    with FakeTensorMode():
        fake = torch.ones(2)
        assert _torch.is_empty_shell(fake)
        with _torch.without_fakes():
            assert not _torch.is_empty_shell(torch.ones(2))
    assert not _torch.is_empty_shell(torch.ones(2))


@without("_pop_torch_function_stack")
@without("_push_on_torch_function_stack")
def every_function_inside_a_layer_of_torch_would_be_watched() -> None:
    with Counting() as mode:
        _torch.pop_mode()
        torch.ones(1).add(1)
        assert mode.calls == 0
        _torch.push_mode(mode)
        torch.ones(1)
        assert mode.calls == 1


@without("_autograd")
@without("_top_saved_tensors_default_hooks")
@without("_pop_saved_tensors_default_hooks")
def a_checkpoint_that_an_interrupt_has_cut_off_would_take_what_every_later_backward_pass_saves() -> None:
    with saved_tensors_hooks(Tensor.clone, Tensor.clone):
        outer = _torch.saved_tensors_hooks()
        saved_tensors_hooks(torch.neg, torch.neg).__enter__()
        saved_tensors_hooks(torch.neg, torch.neg).__enter__()
        _torch.pop_saved_tensors_hooks(outer)
        assert _torch.saved_tensors_hooks() == outer == (Tensor.clone, Tensor.clone)
    assert _torch.saved_tensors_hooks() is None


@without("_vmap_decrement_nesting")
@without("_grad_decrement_nesting")
@without("_jvp_decrement_nesting")
def a_transform_that_an_interrupt_has_cut_off_would_last_for_ever() -> None:
    torch._C._functorch._vmap_increment_nesting(2, "error")
    torch._C._functorch._grad_increment_nesting()
    torch._C._functorch._jvp_increment_nesting()
    _torch.end_transforms(1)
    assert modes.level() == 1
    _torch.end_transforms(0)
    assert modes.level() == 0


@without("_python_dispatch")
@without("_get_current_dispatch_mode_stack")
@without("_pop_torch_dispatch_stack")
@without("_push_on_torch_dispatch_stack")
@without("_is_in_")
def a_fake_mode_that_an_interrupt_left_would_take_the_numbers_of_what_a_user_computes() -> None:
    users = Passing()
    with users:  # torch's own modes lie below it, whenever they come
        put_back = _torch.undo_of_dispatch_modes()
        FakeTensorMode().__enter__()
        assert _torch.is_empty_shell(torch.ones(2))
        put_back()
        assert not _torch.is_empty_shell(torch.ones(2))
        assert _python_dispatch._get_current_dispatch_mode_stack() == [users]
    assert not _python_dispatch.is_in_torch_dispatch_mode()


@without("_ConvNd")
def weights_of_convolutions_would_all_be_quantized_before_the_run() -> None:
    classes = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    assert all(issubclass(cls, _torch.READS_ITS_OWN) for cls in classes)
    assert not issubclass(nn.MultiheadAttention, _torch.READS_ITS_OWN)


@without("_parameters")
@without("_buffers")
def a_run_could_not_put_tensors_into_modules_without_asking_each_by_name() -> None:
    module = nn.BatchNorm1d(2)
    assert [name for name, _ in _torch.own_tensors(module)] == [
        "weight",
        "bias",
        "running_mean",
        "running_var",
        "num_batches_tracked",
    ]
    plain = torch.full((2,), 3.0)
    _torch.store_of(module, "weight")["weight"] = plain
    _torch.store_of(module, "running_mean")["running_mean"] = plain
    assert module.weight is plain
    assert module.running_mean is plain
    assert _torch.is_parameter(module, "weight")
    assert not _torch.is_parameter(module, "running_mean")


@without("_forward_pre_hooks")
@without("_forward_hooks")
def a_layer_whose_hooks_read_parameters_would_be_given_them_too_late() -> None:
    module = nn.Linear(1, 1)
    module.register_forward_pre_hook(lambda *_: None)
    module.register_forward_hook(lambda *_: None)
    assert _torch.has_only_one_hook_before(module)
    assert _torch.has_only_our_hooks(module)
    module.register_forward_hook(lambda *_: None)
    assert _torch.has_only_one_hook_before(module)
    assert not _torch.has_only_our_hooks(module)
    module.register_forward_pre_hook(lambda *_: None)
    assert not _torch.has_only_one_hook_before(module)


@without("_forward_pre_hooks_with_kwargs")
@without("_forward_hooks_with_kwargs")
@without("_forward_hooks_always_called")
def flags_of_dropped_hooks_would_stay_for_ever() -> None:
    module = nn.Linear(1, 1)

    def hook(*_: Any) -> None:
        return None

    module.register_forward_pre_hook(hook, with_kwargs=True)
    module.register_forward_hook(hook, with_kwargs=True, always_call=True)
    kept = module.register_forward_hook(lambda *_: None, with_kwargs=True)
    _torch.drop_hooks(module, lambda one: one is hook)
    assert not module._forward_pre_hooks and not module._forward_pre_hooks_with_kwargs
    assert list(module._forward_hooks) == list(module._forward_hooks_with_kwargs) == [kept.id]
    assert not module._forward_hooks_always_called


@without("_checkpoint_without_reentrant_generator_impl")
@without("_checkpoint_without_reentrant_generator")
def what_a_checkpoint_computes_again_would_find_no_tensors() -> None:
    parts = _torch.checkpoint_parts()
    again: list[str] = []

    def steps(fn: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        return parts.steps(lambda *args: (again.append("fn"), fn(*args)), *args, **kwargs)

    x = torch.ones(2, requires_grad=True)
    _torch.replace_checkpoint_parts(parts._replace(steps=steps))
    try:
        checkpoint.checkpoint(torch.sin, x, use_reentrant=False).sum().backward()
    finally:
        _torch.replace_checkpoint_parts(parts)
    assert again == ["fn"]
    checkpoint.checkpoint(torch.sin, x, use_reentrant=False).sum().backward()
    assert again == ["fn"]


@without("_modules")
def a_parametrized_layer_would_be_taken_for_one_that_reads_nothing_but_its_own() -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    module = nn.Linear(1, 1)
    assert not _torch.is_parametrized(module)
    parametrize.register_parametrization(module, "weight", Double())
    assert _torch.is_parametrized(module)


@without("_are_functorch_transforms_active")
def buffers_would_not_be_detached_under_a_transform() -> None:
    assert not modes.is_mapped()
    seen: list[bool] = []
    torch.vmap(lambda x: seen.append(modes.is_mapped()) or x)(torch.ones(2))
    torch.func.grad(lambda x: seen.append(modes.is_mapped()) or x)(torch.tensor(1.0))
    assert seen == [True, True]


@without("is_functorch_wrapped_tensor")
def numbers_of_batched_tensors_would_be_read() -> None:
    seen: list[bool] = []
    torch.vmap(lambda x: seen.extend([modes.is_wrapped(x), modes.is_plain([x])]) or x)(torch.ones(2))
    assert seen == [True, False]
    assert modes.is_plain([torch.ones(2)])
    assert not modes.is_wrapped(torch.ones(2))


@without("_current_level")
def a_tangent_would_be_lost_where_autograd_is_off() -> None:
    x = torch.ones(2)
    with torch.no_grad():
        assert not modes.may_differentiate()
        with torch.autograd.forward_ad.dual_level():
            assert modes.may_differentiate()
            assert modes.has_derivative(x)
        assert not modes.has_derivative(x)


@without("_version")
def a_write_in_place_would_go_unseen() -> None:
    x = torch.ones(2)
    before = modes.writes_into(x)
    x[0] = 0
    assert modes.writes_into(x) == before + 1
    with torch.inference_mode():
        assert modes.writes_into(torch.ones(2)) == -1


@without("_ops")
def operators_that_only_move_data_would_not_be_found_in_a_program() -> None:
    exported = torch.export.export(nn.Flatten(), (torch.ones(1, 2, 3),))
    names = {_torch.operator_name(node.target) for node in exported.graph.nodes}
    assert names & {"flatten", "view", "reshape"}
    assert _torch.operator_name(len) == ""


@without("_dynamo")
def a_size_that_a_model_cannot_take_would_be_an_error_of_torch() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 3)

    dims = {"x": {0: torch.export.Dim("n", min=1)}}
    with pytest.raises(_torch.refusals_of_export()) as caught:
        torch.export.export(Fixed(), (torch.ones(2, 3),), dynamic_shapes=dims)
    assert _torch.suggested_fixes(str(caught.value)) == ["n = 2"]
    assert _torch.suggested_range("n = 2") is None
    assert "n" in _torch.reasons_of_refusal(str(caught.value))[0]


@without("_internal")
@without("_registration")
def an_export_would_warn_of_packages_that_it_does_not_need() -> None:
    assert importlib.util.find_spec(_torch.LOGGER_OF_ONNX) is not None


@without("_get_dispatch_mode")
@without("_TorchDispatchModeKey")
def checks_of_numbers_would_fail_while_a_program_is_recorded() -> None:
    seen: list[bool] = []

    def f(x: Tensor) -> Tensor:
        seen.extend([modes.is_recorded(), modes.is_plain([x]), modes.is_plain_eager()])
        return x + 1

    make_fx(f)(torch.ones(1))
    f(torch.ones(1))
    assert seen == [True, False, False, False, True, True]


@without("_ops")
@without("_schema")
def a_program_would_merge_what_is_written_into_later() -> None:
    assert not _torch.is_operator(torch.add)
    writes = [argument.alias_info for argument in _torch.schema(torch.ops.aten.add_.Tensor).arguments]
    assert writes[0].is_write
    assert writes[1] is None
    assert _torch.has_tag(torch.ops.aten.nonzero.default, torch.Tag.dynamic_output_shape)


@without("_is_zerotensor")
def zeros_of_forward_mode_would_be_taken_for_tensors_of_the_closure() -> None:
    assert _torch.is_zero_for_ever(torch._efficientzerotensor((2,)))
    assert not _torch.is_zero_for_ever(torch.zeros(2))


@without("_op")
def a_program_would_be_a_fourth_slower() -> None:
    assert torch.equal(_torch.kernel(torch.ops.aten.add.Tensor)(torch.ones(1), 2, alpha=3), torch.full((1,), 7.0))


@without("_inductor")
def a_program_could_be_compiled_only_with_guards() -> None:
    assert importlib.util.find_spec("torch._inductor") is not None
    assert callable(torch._inductor.compile)


def test_a_guard_knows_the_kind_of_tensors() -> None:
    x = torch.ones(2, 3)
    fits = _torch.metadata_guard([x, torch.ones(())])
    others = [torch.ones(2, 4), torch.ones(3, 2).T, x.double(), x.clone().requires_grad_(), nn.Parameter(x), x.to("meta")]
    assert fits(torch.zeros(2, 3), torch.zeros(()))
    assert not any(fits(other, torch.zeros(())) for other in others)
    assert _torch.metadata_guard([])()


WITHOUT_TORCH_AO = """
import sys, torch
sys.modules["torch.ao.quantization.fx._decomposed"] = None
import sophq_func as sq
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16, 2)).eval()
x = torch.randn(2, 3, 4, 4)
q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
params = sq.params_of(model)
qparams = q.calibrate(params, [x], progress=False)
program = sq.export.torch(q, params, qparams, x)
assert "dequantize_per_channel" in str(program.graph), program.graph
assert torch.allclose(program.module()(x), q.apply(params, qparams, x), atol=1e-6)
sys.stdout.write("same")
"""


@without("_decomposed")
def programs_would_end_with_torch_ao() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH_AO], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.stdout == "same", done.stderr


def test_operators_registered_here_compute_what_torch_ao_computes() -> None:
    torch.manual_seed(0)
    x, axis = torch.randn(3, 4, 5) * 40, 1
    theirs = _torch.quantized_operators()
    for scale, zero in ((0.37, 3), (1.0, 0), (0.011, -7)):
        bounds = (-128, 127, torch.int8)
        codes = theirs.quantize_per_tensor(x, scale, zero, *bounds)
        assert torch.equal(_torch.quantize_per_tensor(x, scale, zero, *bounds), codes)
        real = theirs.dequantize_per_tensor(codes, scale, zero, *bounds)
        assert torch.equal(_torch.dequantize_per_tensor(codes, scale, zero, *bounds), real)
        scales, zeros = torch.rand(4) + 0.1, torch.randint(-9, 9, (4,))
        each = theirs.dequantize_per_channel(codes, scales, zeros, axis, *bounds)
        assert torch.equal(_torch.dequantize_per_channel(codes, scales, zeros, axis, *bounds), each)


@without("_symbolic_trace")
@without("_is_fx_tracing_flag")
@without("_is_fx_tracing_tls")
def an_interrupted_recording_would_leave_the_methods_of_modules_replaced() -> None:
    tracing, call = importlib.import_module("torch.fx._symbolic_trace"), nn.Module.__call__
    seen = []

    def recorded(x: Tensor) -> Tensor:
        seen.append((nn.Module.__call__ is call, tracing.is_fx_symbolic_tracing()))
        undo()
        seen.append((nn.Module.__call__ is call, tracing.is_fx_symbolic_tracing()))
        return x + 1

    undo = _torch.undo_of_recording()
    make_fx(recorded)(torch.ones(1))
    assert seen == [(False, True), (True, False)]


def test_the_innermost_mode_sees_nothing_for_a_while() -> None:
    with Counting() as mode:
        with _torch.WithoutInnermostMode():
            torch.ones(1).add(1)
        assert mode.calls == 0
        torch.ones(1)
        assert mode.calls == 1


def private_names(file: str) -> set[str]:
    """The private names of torch that a file imports, reads from something else than ``self``, or spells in a string."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            found.update([*str(node.module).split("."), *(alias.name for alias in node.names)])
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"torch\.\S+|_(?!sophq)\w+", str(node.value)):
            found.update(str(node.value).split("."))
    return {name for name in found if name.startswith("_") and not name.startswith("__")} - {"_C", "_functorch"}


@pytest.mark.parametrize("name", sorted(TESTED))
def test_what_a_private_name_is_for(name: str) -> None:
    TESTED[name]()


def test_every_private_name_has_a_test_and_every_test_a_name() -> None:
    assert set().union(*map(private_names, HOLDERS)) | {"is_functorch_wrapped_tensor"} == TESTED.keys()
