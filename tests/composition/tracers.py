"""functionalize, make_fx and torch.export: what is traced at one point holds at another; in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functionalize, grad
from torch.fx.experimental.proxy_tensor import make_fx

import sophq_func as sq
from tests.composition.registry import MASK_WHILE_TRACING, each, row, same, some
from tests.composition.subjects import Subject


class Wrapped(nn.Module):
    """A quantized model as a module, for exporters; parameters and qparams are its buffers by way of constants."""

    def __init__(self, s: Subject) -> None:
        super().__init__()
        self.run, self.given = s.out, (s.params, s.qparams)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.run(*self.given, batch)


def elsewhere(s: Subject) -> tuple[dict[str, Tensor], dict[str, sq.QParams], dict[str, Tensor]]:
    """Other parameters, qparams and examples of the same shapes."""
    scales = {name: scale * 1.3 for name, scale in s.scales.items()}
    params = {name: p * 1.1 if p.is_floating_point() else p for name, p in s.params.items()}
    return params, sq.merge(scales, s.rest), each(s.batch, torch.tensor([2, 0, 3, 1]))


@row("functionalize", "1e-9; 1e-5")
def check_functionalize(s: Subject) -> None:
    """eager; so is that of grad."""
    s = s.wide
    given = (s.params, s.qparams, s.batch)
    same(functionalize(s.out)(*given), s.out(*given), 1e-9)
    gradient, at = grad(s.loss, argnums=(0, 1)), (s.scales, s.weights, s.batch)
    some(gradient(*at))
    same(functionalize(gradient)(*at), gradient(*at), 1e-5)


@row("make_fx", "1e-9; 1e-5", BERT=MASK_WHILE_TRACING)
def check_make_fx(s: Subject) -> None:
    """eager, at other params, qparams and examples than traced; so is that of grad."""
    s = s.wide
    given, other = (s.params, s.qparams, s.batch), elsewhere(s)
    traced = make_fx(lambda params, qparams, batch: s.out(params, qparams, batch))(*given)
    assert not torch.equal(s.out(*given), s.out(*other))
    same(traced(*other), s.out(*other), 1e-9)

    def gradient(scales: dict[str, Tensor], weights: dict[str, Tensor], batch: dict[str, Tensor]) -> Any:
        return grad(s.loss, argnums=(0, 1))(scales, weights, batch)

    at = (s.scales, s.weights)
    some(gradient(*at, s.batch))
    same(make_fx(gradient)(*at, s.batch)(*at, other[2]), gradient(*at, other[2]), 1e-5)


@row("export, any batch size", "1e-9")
def check_export(s: Subject) -> None:
    """eager, with other examples than exported, and more of them; `strict=False`."""
    s = s.wide
    size = torch.export.Dim("size", min=2, max=64)
    shapes = ({name: {0: size} for name in s.batch},)
    program = torch.export.export(Wrapped(s), (s.batch,), strict=False, dynamic_shapes=shapes)
    for rows in ([0, 1, 2, 3], [3, 1, 1, 0, 2, 3, 0]):
        batch = each(s.batch, torch.tensor(rows))
        same(program.module()(batch), s.out(s.params, s.qparams, batch), 1e-9)
