"""Each private name of torch that the library uses, and what would break without it or if it meant something else."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

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


@without("_get_current_function_mode")
def the_mode_of_a_run_would_not_know_whether_one_of_the_models_own_stands_before_it() -> None:
    assert _torch.innermost_mode() is None
    with Counting() as outer, Counting() as inner:
        assert _torch.innermost_mode() is inner
        assert _torch.innermost_mode() is not outer


@without("_pop_mode")
@without("_push_mode")
def every_function_inside_a_layer_of_torch_would_be_watched() -> None:
    with Counting() as mode:
        _torch.pop_mode()
        torch.ones(1).add(1)
        assert mode.calls == 0
        _torch.push_mode(mode)
        torch.ones(1)
        assert mode.calls == 1


@without("_pop_mode_temporarily")
def the_arithmetic_of_quantizers_would_be_counted_as_calls_of_the_model() -> None:
    with Counting() as mode:
        with _torch.without_innermost_mode():
            torch.ones(1).add(1)
        assert mode.calls == 0
        torch.ones(1)
        assert mode.calls == 1


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


def private_names(file: str) -> set[str]:
    """The private names that a file imports from torch, or reads from something else than ``self``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Compare) and isinstance(node.left, ast.Constant):
            found |= {one.attr for one in node.comparators if isinstance(one, ast.Attribute)}
    public = {name for name in found if not name.startswith("_")} - {"is_functorch_wrapped_tensor"}
    return found - public - {"_C", "_functorch"}


@pytest.mark.parametrize("name", sorted(TESTED))
def test_what_a_private_name_is_for(name: str) -> None:
    TESTED[name]()


def test_every_private_name_has_a_test_and_every_test_a_name() -> None:
    assert set().union(*map(private_names, HOLDERS)) == TESTED.keys()
