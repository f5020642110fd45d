"""What each quantizer costs the loss: against plans that hold one quantizer, or all but one.

In float64: a vmap may sum a convolution in another order, and in float32 a sum near a tie would then have another code.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.core.pytree import named_leaves, tree_map
from tests.golden.models import ResidualConvNet
from tests.helpers import Ready, ready, unchanged
from tests.notebook import Piece

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


def costs(**added: float) -> sq.Sensitivities:
    """The costs of some quantizers; one that adds more saves less."""
    made = sq.Sensitivities()
    for name, value in added.items():
        made[name] = sq.Sensitivity(*map(torch.tensor, (value + 1, 1.0, value, -value)))
    return made


def test_a_batch_without_examples_has_no_costs() -> None:
    _, all_on, x = prepared()
    with pytest.raises(sq.StateError, match="loss of the float model is not finite"):
        sq.sensitivity(*all_on, x[:0], lambda y: y.square().mean(), progress=False)


def test_the_costs_print_as_a_table_with_the_largest_first() -> None:
    found = costs(a=0.0, b=0.5, c=-0.25)
    assert repr(found).splitlines() == [
        "quantizer  alone  added  without  saved",
        "---------  -----  -----  -------  -----",
        "b            1.5   +0.5        1   -0.5",
        "a              1     +0        1     +0",
        "c           0.75  -0.25        1  +0.25",
    ]
    assert str(found) == repr(found)
    assert [line.split() for line in found.table("saved", by="saved").splitlines()[2:]] == [["+0.25"], ["+0"], ["-0.5"]]
    assert [row[0] for row in Piece(found._repr_html_()).rows[1:]] == ["b", "a", "c"]
    assert costs(a=1.0, b=math.nan).ranked() == ["b", "a"]
    with pytest.raises(sq.ConfigError, match=r"measure 'save' is not known, did you mean 'saved'"):
        found.ranked("save")


def test_the_costs_of_each_example_print_as_their_mean() -> None:
    found = sq.Sensitivities(a=sq.Sensitivity(*(torch.tensor([1.0, 2.0]) for _ in range(4))))
    assert found.table().splitlines()[2].split() == ["a", "1.5", "+1.5", "1.5", "+1.5"]


def test_the_costs_are_a_tree_of_tensors() -> None:
    found = costs(a=0.0, b=0.5)
    mapped = torch.vmap(lambda x: tree_map(lambda leaf: leaf * x, found))(torch.ones(3))
    assert type(mapped) is sq.Sensitivities
    assert mapped["b"].added.tolist() == [0.5, 0.5, 0.5]
    assert optree.tree_map(lambda leaf: leaf * 2, found)["b"].added == 1
    assert [path for path, _ in named_leaves(found)][:2] == ["a.alone", "a.without"]
    assert copy.deepcopy(found) == found == dict(found)
    shown: list[str] = []
    torch.vmap(lambda x: (shown.append(repr(tree_map(lambda leaf: leaf * x, found))), x)[1])(torch.ones(3))
    assert shown[0].startswith("{'a': Sensitivity(alone=")
