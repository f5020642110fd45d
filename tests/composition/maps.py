"""vmap over everything that a quantized model takes; each against the loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

import sophq_func as sq
from tests.composition.registry import MASK_UNDER_VMAP, each, row, same, some, stacked
from tests.composition.subjects import Subject


def alone(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """An example as a batch of one."""
    return {name: value[None] for name, value in batch.items()}


def differ(outputs: Tensor) -> None:
    """No two of a batch agree: the axis is mapped indeed."""
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


@row("vmap over examples", "1e-9", BERT=MASK_UNDER_VMAP)
def check_examples(s: Subject) -> None:
    """the loop."""
    s = s.wide

    def one(example: dict[str, Tensor]) -> Tensor:
        return s.out(s.params, s.qparams, alone(example))[0]

    found = vmap(one)(s.batch)
    differ(found)
    same(found, torch.stack([one(each(s.batch, i)) for i in range(4)]), 1e-9)


@row("vmap over params", "1e-9")
def check_params(s: Subject) -> None:
    """the loop."""
    s = s.wide
    factors = (1.0, 0.9, 1.25)
    many = [{n: p * f if p.is_floating_point() else p for n, p in s.params.items()} for f in factors]
    found = vmap(lambda params: s.out(params, s.qparams, s.batch))(stacked(many))
    differ(found)
    same(found, torch.stack([s.out(params, s.qparams, s.batch) for params in many]), 1e-9)


@row("vmap over qparams", "1e-9")
def check_qparams(s: Subject) -> None:
    """the loop."""
    s = s.wide
    many = [sq.merge({n: v * f for n, v in s.scales.items()}, s.rest) for f in (1.0, 1.5, 0.5)]
    found = vmap(lambda qparams: s.out(s.params, qparams, s.batch))(stacked(many))
    differ(found)
    same(found, torch.stack([s.out(s.params, qparams, s.batch) for qparams in many]), 1e-9)


@row("vmap over settings", "1e-9")
def check_settings(s: Subject) -> None:
    """the loop: over bit widths in `with_bits`, over masks in `enabled`, over a `stack` of both."""
    s, names = s.wide, sorted(s.qparams)

    def at(bits: Tensor, mask: Tensor) -> Tensor:
        return s.out(s.params, sq.enabled(sq.with_bits(s.qparams, s.q.plan, bits), mask), s.batch)

    widths = torch.tensor([2.0, 4.0, 8.0])
    masks = torch.stack([torch.ones(len(names)), torch.arange(len(names)) % 2, torch.arange(len(names)) < 2]).bool()
    for bits, mask in ((widths, masks[:1].expand(3, -1)), (widths[1:2].expand(3), masks), (widths, masks)):
        found = vmap(at)(bits, mask)
        differ(found)
        same(found, torch.stack([at(b, m) for b, m in zip(bits, mask, strict=True)]), 1e-9)
        settings = [sq.enabled(sq.with_bits(s.qparams, s.q.plan, b), m) for b, m in zip(bits, mask, strict=True)]
        same(vmap(lambda setting: s.out(s.params, setting, s.batch))(sq.stack(settings)), found, 1e-9)


@row("vmap of grad: per-example gradients", "1e-5", BERT=MASK_UNDER_VMAP)
def check_gradients(s: Subject) -> None:
    """the loop, for every parameter and learned scale."""
    s = s.wide
    gradient = grad(lambda at, example: s.loss(*at, alone(example)))
    at = (s.scales, s.weights)
    found = vmap(gradient, (None, 0))(at, s.batch)
    some(found[0])
    some(found[1])
    for i in range(4):
        same(each(found, i), gradient(at, each(s.batch, i)), 1e-5)


@row("vmap of observe", "1e-9", BERT=MASK_UNDER_VMAP)
def check_observe(s: Subject) -> None:
    """the loop over examples: every observer's state."""
    s = s.wide
    ostate = s.q.init(s.params)

    def observe(example: dict[str, Tensor]) -> Any:
        return s.q.observe(s.params, ostate, **alone(example))[1]

    found = vmap(observe)(s.batch)
    for i in range(4):
        same(each(found, i), observe(each(s.batch, i)), 1e-9)
