"""What :func:`sophq_func.plan` says beside the plan."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sophq_func as sq

WEIGHTS = sq.QuantConfig(weight=sq.override(bits=2, granularity=sq.PerChannel()), activation=None)


class Given(nn.Module):
    """Its weights are an argument."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor], first: nn.Module | None = None) -> None:
        super().__init__()
        self.product, self.first = product, first or nn.Identity()

    def forward(self, params: dict[str, dict[str, Tensor]], x: Tensor) -> Tensor:
        return torch.tanh(self.product(self.first(x), params["l1"]["w"]))


PARAMS = {"l1": {"w": torch.ones(6, 6)}}
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda x, w: x @ w,
    "linear": lambda x, w: F.linear(x, w.T),
    "einsum": lambda x, w: torch.einsum("bi,io->bo", x, w),
    "convolution": lambda x, w: F.conv1d(x[..., None], w[..., None]),
}


def planned(model: Any, config: sq.QuantConfig, *args: Any, **options: Any) -> list[str]:
    return list(sq.quantize(model, config, example_args=args, **options).plan)


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("first", [None, nn.LayerNorm(6)], ids=["nothing else", "a norm"])
def test_weights_that_are_arguments_are_no_weights(
    product: Callable[[Tensor, Tensor], Tensor], first: nn.Module | None
) -> None:
    model, x = Given(product, first), torch.randn(2, 6)
    with pytest.warns(UserWarning, match=r"nothing is quantized.*arguments are values.*params=params") as caught:
        assert planned(model, WEIGHTS, PARAMS, x) == []
    assert caught[0].filename == __file__
    if first is None:
        assert planned(model, WEIGHTS, x, params=PARAMS) == ["l1.w_fake_quant"]


class Attention(nn.Module):
    """Multiplies values, behind layers with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) @ self.k(x).mT


class Derived(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.s = nn.Parameter(torch.ones(6, 6)), nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.w * self.s)


QUIET: dict[str, tuple[nn.Module, sq.QuantConfig, tuple[Any, ...]]] = {
    "values, too": (Given(PRODUCTS["matmul"]), sq.QuantConfig(), (PARAMS, torch.ones(2, 6))),
    "nothing is asked for": (
        Given(PRODUCTS["matmul"]),
        sq.QuantConfig(weight=None, activation=None),
        (PARAMS, torch.ones(2, 6)),
    ),
    "a layer": (Given(PRODUCTS["matmul"], nn.Linear(6, 6)), WEIGHTS, (PARAMS, torch.ones(2, 6))),
    "no product": (Given(lambda x, w: x * w.sum()), WEIGHTS, (PARAMS, torch.ones(2, 6))),
    "products of values": (Attention(), WEIGHTS, (torch.ones(2, 6),)),
    "a rule leaves all out": (
        Attention(),
        sq.QuantConfig(activation=None, rules=(sq.Rule(type=nn.Linear, weight=None),)),
        (torch.ones(2, 6),),
    ),
    "a derived weight": (Derived(), WEIGHTS, (torch.ones(2, 6),)),
}


@pytest.mark.parametrize(("model", "config", "args"), QUIET.values(), ids=QUIET)
def test_nothing_is_said_of_other_models(model: nn.Module, config: sq.QuantConfig, args: tuple[Any, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned(model, config, *args)
