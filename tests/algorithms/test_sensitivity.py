"""What each quantizer costs the loss: against plans that hold one quantizer, or all but one.

In float64: a vmap may sum a convolution in another order, and in float32 a sum near a tie would then have another code.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sophq_func as sq
from tests.golden.models import ResidualConvNet
from tests.helpers import Ready, ready, unchanged

LABELS = torch.tensor([0, 2])
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def cross_entropy(output: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(output.mean((2, 3)), LABELS, reduction=reduction)


def config(*rules: sq.Rule) -> sq.QuantConfig:
    half = sq.override(bits=4)
    return sq.QuantConfig(strategy="CNN", weight=half, activation=half, rules=rules)


def prepared(*rules: sq.Rule) -> tuple[nn.Module, Ready, Tensor]:
    torch.manual_seed(0)
    model, x = ResidualConvNet().double().eval(), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    return model, ready(model, x, config=config(*rules)), x


@pytest.mark.isa
@pytest.mark.parametrize("how", ["auto", "loop", "vmap"])
def test_each_loss_is_that_of_a_plan_with_it_alone_or_without_it(how: str) -> None:
    model, all_on, x = prepared()
    found = sq.sensitivity(*all_on, x, cross_entropy, how=how, progress=False)
    assert list(found) == sorted(all_on.qparams)
    for name, own in found.items():
        others = [sq.Rule(name=other, observe_only=True) for other in all_on.qparams if other != name]
        alone = sq.quantize(model, config(*others), example_args=(x,))
        without = sq.quantize(model, config(sq.Rule(name=name, observe_only=True)), example_args=(x,))
        expected = [cross_entropy(q.apply(all_on.params, all_on.qparams, x)) for q in (alone, without)]
        torch.testing.assert_close([own.alone, own.without], expected, **CLOSE)
        torch.testing.assert_close(own.added, expected[0] - cross_entropy(model(x)), **CLOSE)
        torch.testing.assert_close(own.saved, cross_entropy(all_on(x)) - expected[1], **CLOSE)
    assert len({float(own.alone) for own in found.values()}) > len(found) // 2


def test_a_loss_may_have_an_entry_for_each_example() -> None:
    _, (q, params, qparams), x = prepared()
    each = sq.sensitivity(q, params, qparams, (x,), lambda out: cross_entropy(out, "none"), progress=False)
    mean = sq.sensitivity(q, params, qparams, (x,), cross_entropy, progress=False)
    for name, own in each.items():
        assert own.added.shape == (2,)
        torch.testing.assert_close(own.added.mean(), mean[name].added, **CLOSE)


def test_the_only_quantizer_adds_what_leaving_it_out_saves() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    only = ready(model, x, config=sq.QuantConfig(weight=sq.override(bits=2), activation=None))
    found = sq.sensitivity(*only, x, lambda out: out.square().sum(), progress=False)["weight_fake_quant"]
    assert torch.equal(found.added, found.saved)
    assert found.added != 0


def test_quantizers_that_only_observe_are_left_out_and_change_nothing() -> None:
    name = "conv1.weight_fake_quant"
    _, watched, x = prepared(sq.Rule(name=name, observe_only=True))
    found = sq.sensitivity(*watched, x, cross_entropy, progress=False)
    assert set(found) == set(watched.qparams) - {name}
    other = "conv2.weight_fake_quant"
    expected = cross_entropy(watched.q.apply(watched.params, sq.enabled(watched.qparams, {other: False}), x))
    torch.testing.assert_close(found[other].without, expected, **CLOSE)


def test_masks_of_before_are_replaced_and_nothing_changes() -> None:
    _, (q, params, qparams), x = prepared()
    masked = sq.enabled(qparams, 0.5)
    with unchanged(params, masked, x):
        found = sq.sensitivity(q, params, masked, x, cross_entropy, progress=False)
    torch.testing.assert_close(found, sq.sensitivity(q, params, qparams, x, cross_entropy, progress=False), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frozen": True}, "a frozen model"),
        ({"loss": lambda out: 1.0}, "loss must return a tensor: got 'float'"),
        ({"qparams": {}}, "not calibrated"),
        ({"how": "fast"}, "'fast'"),
    ],
    ids=["frozen", "loss", "qparams", "how"],
)
def test_what_cannot_be_measured_is_refused(change: dict[str, Any], message: str) -> None:
    _, (q, params, qparams), x = prepared()
    if change.get("frozen"):
        q, params = q.freeze(params, qparams)
    loss, how = change.get("loss", cross_entropy), change.get("how", "loop")
    with pytest.raises(sq.StateError, match=message):
        sq.sensitivity(q, params, change.get("qparams", qparams), x, loss, how=how, progress=False)
