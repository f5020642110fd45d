"""What a constant is beside a tensor that moves, and what a compiler's own values stand for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._dynamo.variables import ConstantVariable
from torch.autograd import forward_ad
from torch.func import jvp

from sophq_func.core.modes import beside, stands_for_another
from sophq_func.numerics.contracts import Observer

CONSTANT = torch.tensor([1.0, -2.0, 0.0])
MOVING = torch.tensor([0.5, 0.5, 4.0])


def test_outside_forward_mode_a_constant_stays_itself() -> None:
    assert beside(CONSTANT, MOVING) is CONSTANT


def test_in_forward_mode_a_constant_has_the_tangent_zero() -> None:
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(beside(CONSTANT, forward_ad.make_dual(MOVING, torch.ones(3))))
        assert torch.equal(value, CONSTANT)
        assert tangent is not None
        assert torch.equal(tangent, torch.zeros(3))


def test_in_forward_mode_a_constant_beside_a_constant_has_no_tangent() -> None:
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(beside(CONSTANT, MOVING)).tangent is None


def test_derivatives_with_and_without_it_are_the_same_bits() -> None:
    tangent = torch.tensor([3.0, -1.0, 0.25])

    def plainly(x: Tensor) -> Tensor:
        return x * CONSTANT + CONSTANT

    def beside_it(x: Tensor) -> Tensor:
        return x * beside(CONSTANT, x) + beside(CONSTANT, x)

    for expected, actual in zip(jvp(plainly, (MOVING,), (tangent,)), jvp(beside_it, (MOVING,), (tangent,)), strict=True):
        assert torch.equal(expected, actual)


def test_a_tracker_of_the_compiler_stands_for_another_value() -> None:
    """Dynamo of torch 2.11 makes named tuples of trackers, whose fields are then of none of the annotated types."""
    tracker = ConstantVariable(4)
    assert stands_for_another(tracker)
    assert not stands_for_another(4)
    assert Observer(*[tracker] * len(Observer._fields)).init is tracker
