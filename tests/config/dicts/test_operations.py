"""Keys that name an operation reach it, however the model and the key spell it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.config.dicts.helpers import (
    ENTRY,
    FIXED,
    POST,
    Net,
    image,
    plan_of,
    told,
    values,
)
from tests.each import each


def unary(call: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> tuple[nn.Module, Tensor]:
    """An operation between two that no list holds."""
    return Net(lambda m, x: torch.exp(call(m, torch.exp(x))), **layers), torch.randn(2, 4, 4, 4)


SLOPE = torch.ones(1)
Call1 = Callable[[Any, Tensor], Tensor]
OPERATIONS: dict[str, dict[str, Call1 | nn.Module]] = {
    "sigmoid": {
        "nn": nn.Sigmoid(),
        "F": lambda m, t: F.sigmoid(t),
        "torch": lambda m, t: torch.sigmoid(t),
        "method": lambda m, t: t.sigmoid(),
        "torch_": lambda m, t: torch.sigmoid_(t),
        "method_": lambda m, t: t.sigmoid_(),
        "special": lambda m, t: torch.special.expit(t),
    },
    "tanh": {
        "nn": nn.Tanh(),
        "F": lambda m, t: F.tanh(t),
        "torch": lambda m, t: torch.tanh(t),
        "method": lambda m, t: t.tanh(),
        "method_": lambda m, t: t.tanh_(),
    },
    "add": {
        "operator": lambda m, t: t + t,
        "scalar": lambda m, t: t + 1.0,
        "reflected": lambda m, t: 1.0 + t,
        "torch": lambda m, t: torch.add(t, t),
        "method": lambda m, t: t.add(t),
        "method_": lambda m, t: t.add_(t),
        "iadd": lambda m, t: operator.iadd(t, 1.0),
    },
    "mul": {
        "operator": lambda m, t: t * 2.0,
        "reflected": lambda m, t: 2.0 * t,
        "torch": lambda m, t: torch.mul(t, t),
        "multiply": lambda m, t: torch.multiply(t, t),
        "method": lambda m, t: t.mul(t),
        "imul": lambda m, t: operator.imul(t, 2.0),
    },
    "sub": {
        "operator": lambda m, t: t - 1.0,
        "reflected": lambda m, t: 1.0 - t,
        "torch": lambda m, t: torch.sub(t, t),
        "rsub": lambda m, t: torch.rsub(t, t),
        "method_": lambda m, t: t.sub_(1.0),
    },
    "div": {
        "operator": lambda m, t: t / 2.0,
        "reflected": lambda m, t: 1.0 / t,
        "torch": lambda m, t: torch.div(t, t),
        "true_divide": lambda m, t: torch.true_divide(t, t),
        "method_": lambda m, t: t.div_(2.0),
    },
    "matmul": {
        "operator": lambda m, t: t @ t,
        "torch": lambda m, t: torch.matmul(t, t),
        "method": lambda m, t: t.matmul(t),
        "function": lambda m, t: operator.matmul(t, t),
    },
    "abs": {
        "builtin": lambda m, t: abs(t),
        "torch": lambda m, t: torch.abs(t),
        "absolute": lambda m, t: t.absolute(),
        "method_": lambda m, t: t.abs_(),
    },
    "clamp": {
        "torch": lambda m, t: torch.clamp(t, 0.0, 1.0),
        "clip": lambda m, t: torch.clip(t, 0.0, 1.0),
        "method": lambda m, t: t.clamp(0.0),
        "method_": lambda m, t: t.clamp_(0.0),
    },
    "cat": {
        "torch": lambda m, t: torch.cat([t, t], 1),
        "keyword": lambda m, t: torch.cat(tensors=(t, t), dim=1),
        "concat": lambda m, t: torch.concat([t, t]),
        "concatenate": lambda m, t: torch.concatenate([t, t]),
    },
    "max_pool2d": {
        "nn": nn.MaxPool2d(2),
        "F": lambda m, t: F.max_pool2d(t, 2),
        "torch": lambda m, t: torch.max_pool2d(t, 2),
    },
    "avg_pool2d": {"nn": nn.AvgPool2d(2), "F": lambda m, t: F.avg_pool2d(t, 2)},
    "adaptive_avg_pool2d": {"nn": nn.AdaptiveAvgPool2d(1), "F": lambda m, t: F.adaptive_avg_pool2d(t, 1)},
    "prelu": {
        "nn": nn.PReLU(),
        "F": lambda m, t: F.prelu(t, SLOPE),
        "torch": lambda m, t: torch.prelu(t, SLOPE),
    },
    "interpolate": {
        "nn": nn.Upsample(scale_factor=2),
        "nearest": nn.UpsamplingNearest2d(scale_factor=2),
        "F": lambda m, t: F.interpolate(t, scale_factor=2),
    },
    "hardswish": {"nn": nn.Hardswish(), "F": lambda m, t: F.hardswish(t), "F_": lambda m, t: F.hardswish(t, inplace=True)},
    "silu": {"nn": nn.SiLU(), "F": lambda m, t: F.silu(t), "nn_": nn.SiLU(inplace=True)},
    "selu": {"nn": nn.SELU(), "F": lambda m, t: F.selu(t), "torch_": lambda m, t: torch.selu_(t)},
    "logsigmoid": {"nn": nn.LogSigmoid(), "F": lambda m, t: F.logsigmoid(t)},
    "gelu": {"nn": nn.GELU(), "F": lambda m, t: F.gelu(t, approximate="tanh")},
    "glu": {"nn": nn.GLU(1), "F": lambda m, t: F.glu(t, 1)},
    "mish": {"nn": nn.Mish(), "F": lambda m, t: F.mish(t)},
    "hardsigmoid": {"nn": nn.Hardsigmoid(), "F": lambda m, t: F.hardsigmoid(t)},
    "gumbel_softmax": {"F": lambda m, t: F.gumbel_softmax(t, dim=1)},
    "softshrink": {"nn": nn.Softshrink(), "F": lambda m, t: F.softshrink(t)},
    "softplus": {"nn": nn.Softplus(), "F": lambda m, t: F.softplus(t)},
    "elu": {"nn": nn.ELU(), "F": lambda m, t: F.elu(t), "F_": lambda m, t: F.elu_(t)},
    "celu": {"nn": nn.CELU(), "F": lambda m, t: F.celu(t), "torch": lambda m, t: torch.celu(t)},
    "layer_norm": {
        "nn": nn.LayerNorm(4),
        "F": lambda m, t: F.layer_norm(t, (4,)),
        "torch": lambda m, t: torch.layer_norm(t, (4,)),
    },
}
"""Spellings of the operations of semantics.md 5.4 that are modules or functions."""

PASSED: dict[str, dict[str, Call1 | nn.Module]] = {
    "relu": {
        "nn": nn.ReLU(),
        "nn_": nn.ReLU(inplace=True),
        "F": lambda m, t: F.relu(t),
        "F_": lambda m, t: F.relu(t, inplace=True),
        "torch": lambda m, t: torch.relu(t),
        "torch_": lambda m, t: torch.relu_(t),
        "method": lambda m, t: t.relu(),
        "method_": lambda m, t: t.relu_(),
    },
    "relu6": {"nn": nn.ReLU6(), "F": lambda m, t: F.relu6(t)},
    "flatten": {"nn": nn.Flatten(), "torch": lambda m, t: torch.flatten(t, 1), "method": lambda m, t: t.flatten(1)},
    "dropout": {"nn": nn.Dropout(), "F": lambda m, t: F.dropout(t, training=m.training)},
}
LAYER_TYPES = {
    "Conv2d": lambda: nn.Conv2d(4, 4, 1),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 4, 1),
    "Linear": lambda: nn.Linear(4, 4),
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
}
UNLISTED: dict[str, Call1 | nn.Module] = {
    "softmax": nn.Softmax(1),
    "F.softmax": lambda m, t: F.softmax(t, 1),
    "bmm": lambda m, t: torch.bmm(t[0], t[1]),
    "mean": lambda m, t: t.mean((2, 3)),
    "Identity": nn.Identity(),
    "Conv1d": nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 4, 1)),
    "reshape": lambda m, t: t.reshape(2, -1),
}


def spelled(table: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    return [pytest.param(name, call, id=f"{name}-{how}") for name, calls in table.items() for how, call in calls.items()]


def between(name: str, call: Any) -> tuple[nn.Module, Tensor]:
    """An operation between two that no list holds; a layer has the name that a function would have."""
    return unary(lambda m, t: getattr(m, name)(t), **{name: call}) if isinstance(call, nn.Module) else unary(call)


@pytest.mark.parametrize(("name", "call"), spelled(OPERATIONS))
def test_a_listed_operation_has_input_and_result_quantized_however_it_is_spelled(name: str, call: Any) -> None:
    assert values(plan_of(*between(name, call))) == {"x", "exp", name}


@pytest.mark.parametrize("name", LAYER_TYPES)
def test_a_listed_layer_has_input_and_result_quantized(name: str) -> None:
    assert values(plan_of(*between("layer", LAYER_TYPES[name]()))) == {"x", "exp", "layer"}


@pytest.mark.parametrize(("name", "call"), spelled(PASSED))
def test_a_passed_operation_asks_for_nothing_by_itself(name: str, call: Any) -> None:
    assert values(plan_of(*between(name, call))) == {"x"}


@pytest.mark.parametrize("name", UNLISTED)
def test_an_operation_that_no_list_holds_asks_for_nothing(name: str) -> None:
    assert values(plan_of(*between("own", UNLISTED[name]))) == {"x"}


@pytest.mark.parametrize(("name", "call"), spelled(PASSED))
def test_a_result_is_quantized_behind_the_passed_operation_however_it_is_spelled(name: str, call: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.exp(x)
        y = y + y
        return torch.exp(getattr(m, name)(y) if isinstance(call, nn.Module) else call(m, y))

    assert values(plan_of(Net(forward, **({name: call} if isinstance(call, nn.Module) else {})), image())) == {
        "x",
        "exp",
        name,
    }


KEYS_OF = {
    "sigmoid": (
        nn.Sigmoid,
        F.sigmoid,
        torch.sigmoid,
        Tensor.sigmoid,
        torch.sigmoid_,
        "sigmoid",
        "torch.sigmoid",
        "Sigmoid",
        "sigmoid_",
    ),
    "tanh": (nn.Tanh, F.tanh, torch.tanh, Tensor.tanh_, "tanh", "torch.nn.functional.tanh", "nn.Tanh"),
    "add": (
        operator.add,
        operator.iadd,
        torch.add,
        Tensor.add,
        Tensor.add_,
        "add",
        "add_",
        "__add__",
        "operator.add",
        "iadd",
    ),
    "matmul": (operator.matmul, torch.matmul, Tensor.matmul, "matmul", "torch.matmul"),
    "div": (operator.truediv, torch.div, torch.true_divide, "truediv", "div"),
    "interpolate": (nn.Upsample, F.interpolate, "interpolate", "Upsample"),
    "layer_norm": (nn.LayerNorm, F.layer_norm, torch.layer_norm, "LayerNorm", "layer_norm"),
}
over_pairs = each(
    "pair",
    {
        f"{name}-{number}-{how}": (key, name, call)
        for name, keys in KEYS_OF.items()
        for number, key in enumerate(keys)
        for how, call in OPERATIONS[name].items()
    },
)
"""A key, the name of its operation, and a call of that."""


@over_pairs
def test_every_spelling_of_a_key_excludes_every_spelling_of_the_operation(pair: tuple[Any, str, Any]) -> None:
    key, name, call = pair
    assert values(plan_of(*between(name, call), extra_quantizer_dict={"exclude_function_type": [key]})) == {"x"}


@over_pairs
def test_every_spelling_of_a_key_configures_every_spelling_of_the_operation(pair: tuple[Any, str, Any]) -> None:
    key, name, call = pair
    plan = plan_of(*between(name, call), extra_qconfig_dict={"object_type": {key: ENTRY}})
    assert {value for value in values(plan) if plan[f"{value}{POST}"].fake_quantize == FIXED} == {name}


@pytest.mark.parametrize("key", [F.softmax, torch.softmax, Tensor.softmax, nn.Softmax, "softmax", "Softmax"], ids=told)
@pytest.mark.parametrize("section", ["additional_function_type", "additional_module_type"])
@pytest.mark.parametrize(
    "call",
    [nn.Softmax(1), lambda m, t: F.softmax(t, 1), lambda m, t: torch.softmax(t, 1), lambda m, t: t.softmax(1)],
    ids=["nn", "F", "torch", "method"],
)
def test_every_spelling_of_a_key_adds_every_spelling_of_the_operation(section: str, key: Any, call: Any) -> None:
    plan = plan_of(*between("softmax", call), extra_quantizer_dict={section: [key]})
    assert values(plan) == {"x", "exp", "softmax"}
