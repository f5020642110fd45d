"""What several test files need: a calibrated model in one call, and snapshots that notice every change."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sophq_func as sq
from sophq_func.config.site import WeightSite
from sophq_func.core.pytree import leaves, sorted_dict

RELEASE = tuple(int(number) for number in torch.__version__.partition("+")[0].split(".")[:2])
NEEDS_ATTRIBUTES = pytest.mark.skipif(
    RELEASE < (2, 13), reason="Dynamo before torch 2.13 cannot list an object's attributes"
)
NEEDS_GROUPED_MM = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch 2.9 has no grouped_mm")

DEFAULT = sq.QuantConfig()
FLOAT = sq.QuantConfig(weight=None, activation=None)
WATCHED = sq.QuantConfig(rules=(sq.Rule(name="*", observe_only=True),))
"""Every call is intercepted and nothing is quantized."""


class Digits(NamedTuple):
    """The network of the examples, trained; images to calibrate on, test images, and the labels of these."""

    model: nn.Module
    train: Tensor
    test: Tensor
    labels: Tensor


def accuracy(output: Tensor, digits: Digits) -> float:
    """The share of test images that an output is right about."""
    return float((output.argmax(1) == digits.labels).double().mean())


class Ready(NamedTuple):
    """A quantized model with what its methods take first."""

    q: sq.Quantized
    params: dict[str, Tensor]
    qparams: dict[str, sq.QParams]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.q.apply(self.params, self.qparams, *args, **kwargs)


def ready(model: nn.Module, *args: Any, config: sq.QuantConfig = DEFAULT, **kwargs: Any) -> Ready:
    """``model``, planned and calibrated on one call."""
    q = sq.quantize(model, config, example_args=args, example_kwargs=kwargs)
    params = sq.params_of(model)
    with torch.no_grad():
        _, ostate = q.observe(params, q.init(params), *args, **kwargs)
        return Ready(q, params, with_hessians(q, params, q.qparams(params, ostate)))


def with_hessians(q: sq.Quantized, params: dict[str, Tensor], qparams: dict[str, sq.QParams]) -> dict[str, sq.QParams]:
    """``qparams`` in which quantizers that need a Hessian have one: that of inputs that do not correlate."""
    needing = [name for name in qparams if "hessian" in sq.fake_quantizer(q.plan[name].fake_quantize.name).needs]
    given = dict(qparams)
    for name in needing:
        site = q.plan.site(name)
        shape = params[site.parameter].shape if isinstance(site, WeightSite) else site.shape
        extras = {**qparams[name].extras, "hessian": torch.eye(math.prod(shape[1:]))}
        given[name] = qparams[name]._replace(extras=sorted_dict(extras))
    return given


def same(actual: Any, expected: Any) -> None:
    """Equal bit for bit, in structure too."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def snapshot(value: Any) -> Any:
    """All that may not change in a model, or in a tree of dicts and tensors."""
    if isinstance(value, nn.Module):
        modules = {
            path: (id(m), type(m), m.training, _attributes(m)) for path, m in value.named_modules(remove_duplicate=False)
        }
        return modules, snapshot(dict(value.named_parameters())), snapshot(dict(value.named_buffers()))
    keys = list(value) if isinstance(value, dict) else None
    return keys, [(id(x), x._version, x.requires_grad, x.dtype, _bits(x)) for x in leaves(value) if isinstance(x, Tensor)]


def _attributes(module: nn.Module) -> dict[str, Any]:
    """``__dict__``, with the members of its dicts and lists."""
    members = {dict: lambda v: {k: id(x) for k, x in v.items()}, list: lambda v: [id(x) for x in v]}
    return {name: (id(v), members.get(type(v), lambda v: None)(v)) for name, v in module.__dict__.items()}


def _bits(x: Tensor) -> list[Any]:
    return x.detach().reshape(-1).view(torch.uint8).tolist() if x.numel() else []


@contextmanager
def unchanged(*values: Any) -> Iterator[None]:
    """Fails if one of these is not, afterwards, what it was."""
    before = [snapshot(value) for value in values]
    yield
    for old, value in zip(before, values, strict=True):
        assert snapshot(value) == old


class Block(nn.Module):
    """A residual block of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).relu()


class Inplace(nn.Module):
    """Blocks between which a tensor is written into: it is the same object, with other numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y += 1
        return self.two(y)
