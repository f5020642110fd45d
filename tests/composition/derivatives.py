"""Derivatives in both modes, to second order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp
from torch.utils import _pytree

import sophq_func as sq
from tests.composition.registry import (
    FORWARD_OVER_FUSED,
    IN_PLACE,
    MASK_IN_LINEARIZE,
    REVERSE_OVER_FUSED,
    differences,
    dot,
    like,
    row,
    same,
    some,
)
from tests.composition.subjects import Subject

Point = tuple[dict[str, Tensor], dict[str, Tensor]]


def point(s: Subject) -> Point:
    """Every learned scale and every parameter."""
    return s.scales, s.weights


def loss(s: Subject) -> Callable[[Point], Tensor]:
    """The loss at such a point."""
    return lambda at: s.loss(*at, s.batch)


def activations(s: Subject) -> tuple[Callable[[Any], Tensor], dict[str, Tensor]]:
    """The loss in the scales of activations, and those."""
    scales = {name: scale for name, scale in s.scales.items() if "post_act" in name}
    return lambda some: s.loss({**s.scales, **some}, {}, s.batch), scales


def leaves(tree: Any) -> Any:
    """Copies that autograd tracks."""
    return _pytree.tree_map(lambda leaf: leaf.clone().requires_grad_(), tree)


def doubled(tree: Any) -> Any:
    """In float64: forward mode has the dtype of the output, reverse mode that of the input."""
    return _pytree.tree_map(Tensor.double, tree)


def backward(value: Tensor, at: Any, **options: bool) -> Any:
    """Gradients by autograd; zero where nothing arrives."""
    flat, spec = _pytree.tree_flatten(at)
    return _pytree.tree_unflatten(
        torch.autograd.grad(value, flat, allow_unused=True, materialize_grads=True, **options), spec
    )


@row("grad", "1e-5; 1e-6")
def check_grad(s: Subject) -> None:
    """autograd's own backward, to every parameter and learned scale; differences."""
    s = s.wide
    at = leaves(point(s))
    found = grad(loss(s))(point(s))
    some(found[0])
    some(found[1])
    same(found, backward(loss(s)(at), at), 1e-5)
    value = s.params[s.smooth]
    same(grad(s.curve)(value), differences(s.curve, value), 1e-6)


@row("jacrev", "1e-5; 1e-6")
def check_jacrev(s: Subject) -> None:
    """autograd's backward of each output, to every learned scale; differences."""
    s = s.wide

    def head(scales: dict[str, Tensor]) -> Tensor:
        return s.out(s.params, sq.merge(scales, s.rest), s.batch).flatten()[:4]

    found, at = jacrev(head)(s.scales), leaves(s.scales)
    some(found)
    for i, value in enumerate(head(at)):
        same({name: rows[i] for name, rows in found.items()}, backward(value, at, retain_graph=True), 1e-5)
    value = s.params[s.smooth]
    same(jacrev(s.bent)(value), differences(s.bent, value), 1e-6)


@row("jacfwd", "1e-5; 1e-6", BERT=FORWARD_OVER_FUSED)
def check_jacfwd(s: Subject) -> None:
    """jacrev, in the scales of activations; differences."""
    s = s.wide
    value, (f, scales) = s.params[s.smooth], activations(s)
    found = jacfwd(f)(scales)
    some(found)
    same(doubled(found), doubled(jacrev(f)(scales)), 1e-5)
    same(jacfwd(s.bent)(value), differences(s.bent, value), 1e-6)


@row("jvp", "1e-5; 1e-6", BERT=FORWARD_OVER_FUSED)
def check_jvp(s: Subject) -> None:
    """the vjp, multiplied with a tangent to every parameter and learned scale; differences."""
    s = s.wide
    tangent, f = like(point(s), 1), loss(s)
    value, pushed = jvp(f, (point(s),), (tangent,))
    assert value == f(point(s))
    (pulled,) = vjp(f, point(s))[1](torch.ones_like(value))
    assert pushed != 0
    same(pushed.double(), dot(pulled, tangent), 1e-5)
    value, direction = s.params[s.smooth], like(s.params[s.smooth], 2)
    same(jvp(s.bent, (value,), (direction,))[1], differences(s.bent, value) @ direction, 1e-6)


@row("linearize", "1e-6", BERT=MASK_IN_LINEARIZE, ResNet=IN_PLACE)
def check_linearize(s: Subject, through: Callable[[Any], Any] = lambda f: f) -> None:
    """jvp, with three tangents, one after the other."""
    s = s.wide
    f, scales = activations(s)
    value, push = linearize(through(f), scales)
    for seed in (1, 2, 1):
        expected = jvp(f, (scales,), (like(scales, seed),))
        some(expected[1])
        same((value, push(like(scales, seed))), expected, 1e-6)


@row("Hessian-vector product, jvp of grad", "1e-5; 1e-6", BERT=FORWARD_OVER_FUSED)
def check_forward_over_reverse(s: Subject) -> None:
    """vjp of grad, to every parameter and learned scale; differences of the gradient."""
    s = s.wide
    gradient, direction = grad(loss(s)), like(point(s), 1)
    found = jvp(gradient, (point(s),), (direction,))[1]
    some(found[0])
    some(found[1])
    same(found, vjp(gradient, point(s))[1](direction)[0], 1e-5)
    value, along = s.params[s.smooth], like(s.params[s.smooth], 2)
    same(jvp(grad(s.curve), (value,), (along,))[1], differences(grad(s.curve), value) @ along, 1e-6)


@row("Hessian-vector product, vjp of grad", "1e-5; 1e-6", BERT=REVERSE_OVER_FUSED)
def check_reverse_over_reverse(s: Subject) -> None:
    """autograd's backward of its backward; differences of the gradient."""
    s = s.wide
    direction, at = like(point(s), 1), leaves(point(s))
    found = vjp(grad(loss(s)), point(s))[1](direction)[0]
    some(found)
    same(found, backward(dot(backward(loss(s)(at), at, create_graph=True), direction), at), 1e-5)
    value, along = s.params[s.smooth], like(s.params[s.smooth], 2)
    same(vjp(grad(s.curve), value)[1](along)[0], differences(grad(s.curve), value) @ along, 1e-6)


@row("hessian", "1e-5; 1e-6", BERT=FORWARD_OVER_FUSED)
def check_hessian(s: Subject) -> None:
    """jacrev of jacrev, in the scales of activations; differences of the gradient."""
    s = s.wide
    value, (f, scales) = s.params[s.smooth], activations(s)
    found = hessian(f)(scales)
    some(found)
    same(doubled(found), doubled(jacrev(jacrev(f))(scales)), 1e-5)
    same(hessian(s.curve)(value), differences(grad(s.curve), value), 1e-6)
