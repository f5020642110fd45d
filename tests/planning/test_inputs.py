"""The site of a weight has the weight's shape, and says which value and which quantizer its layer reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sophq_func as sq
from sophq_func.config.site import LayerInput

FOUR = sq.override(bits=4)


def planned(model: nn.Module, *args: Tensor, **config: Any) -> sq.Plan:
    return sq.plan(sq.trace(model.eval(), args), sq.QuantConfig(**config))


def reads(plan: sq.Plan, weight: str) -> tuple[str, str]:
    return plan.site(f"{weight}_fake_quant").input


def behind(value: str) -> str:
    return f"{value}.post_act_fake_quantizer"


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.b(torch.relu(self.a(x)))
        return self.head(F.dropout(x.reshape(-1, 8), training=self.training))


RESIDUAL = torch.ones(2, 4)


def test_the_value_and_the_quantizer_behind_it() -> None:
    plan = planned(Residual(), RESIDUAL)
    assert reads(plan, "a.weight") == ("x", behind("x"))
    assert reads(plan, "b.weight") == ("a", behind("a"))


@pytest.mark.parametrize(("chip", "strategy"), [(None, "Dataflow"), ("BM1690", "CNN")])
def test_views_and_dropout_are_looked_through(chip: str | None, strategy: str) -> None:
    plan = planned(Residual(), RESIDUAL, chip=chip, strategy=strategy, rules=(sq.Rule(type=F.dropout, activation=None),))
    assert reads(plan, "head.weight") == ("dropout", behind("add"))


def test_a_quantizer_behind_the_view_itself_is_the_one_in_force() -> None:
    plan = planned(Residual(), RESIDUAL, rules=(sq.Rule(name="dropout", outputs=True),))
    assert reads(plan, "head.weight") == ("dropout", behind("dropout"))


def test_a_value_without_a_quantizer_or_one_that_observes_is_read_in_float() -> None:
    for rule in (sq.Rule(name="x", activation=None), sq.Rule(name="x", observe_only=True)):
        assert reads(planned(Residual(), RESIDUAL, rules=(rule,)), "a.weight") == ("x", "")
    weights = planned(Residual(), RESIDUAL, strategy="Dataflow", quantmode="weight_only")
    assert reads(weights, "b.weight") == ("a", "")


def test_layers_that_share_an_input_read_it_through_one_quantizer() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) * torch.tanh(self.k(x))

    x = torch.ones(2, 4)
    plan = planned(Shared(), x)
    assert reads(plan, "q.weight") == reads(plan, "k.weight") == ("x", behind("x"))
    mixed = planned(Shared(), x, chip="BM1690", strategy="BF16Mixed")
    assert reads(mixed, "q.weight") == reads(mixed, "k.weight") == ("x", "q.input_act_fake_quantizer")


def test_a_layer_of_4_bits_reads_through_its_own_input_quantizer() -> None:
    rules = (sq.Rule(name="b", weight=FOUR, activation=FOUR),)
    plan = planned(Residual(), RESIDUAL, chip="BM1688", strategy="CNN", rules=rules)
    assert reads(plan, "b.weight") == ("a", "b.input_act_fake_quantizer")
    assert reads(plan, "a.weight") == ("x", behind("x"))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.m = (nn.Parameter(torch.ones(*shape)) for shape in ((4, 3), (5, 4), (5, 2)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.w).relu(), self.v.abs()) @ self.m


def test_functions_read_the_operand_that_is_not_the_weight() -> None:
    plan = planned(Functional(), torch.ones(2, 3))
    assert reads(plan, "w") == ("x", behind("x"))
    assert reads(plan, "m") == ("linear_1", behind("linear_1"))
    computed = next(site for site in map(plan.site, plan) if site.role == "weight" and not site.parameter)
    assert computed.input == ("relu", behind("relu"))


def test_attention_and_embeddings() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.qkv, self.out = nn.Embedding(7, 4), nn.Linear(4, 12), nn.Linear(4, 4)

        def forward(self, ids: Tensor) -> Tensor:
            q, k, v = self.qkv(self.emb(ids)).chunk(3, -1)
            return self.out(F.scaled_dot_product_attention(q, k, v).flatten(1).unflatten(1, (3, 4)))

    plan = planned(Attention(), torch.zeros(1, 3, dtype=torch.long))
    assert reads(plan, "emb.weight") == ("ids", "")
    assert reads(plan, "qkv.weight") == ("emb", behind("emb"))
    assert reads(plan, "out.weight") == ("unflatten", behind("scaled_dot_product_attention"))


def test_a_weight_of_several_calls_has_an_input_for_each_and_examples_add_theirs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, once: bool = False) -> Tensor:
            y = torch.relu(self.fc(x))
            return y if once else self.fc(y)

    model, x = Twice().eval(), torch.ones(1, 4)
    once, twice = (sq.trace(model, (x,), {"once": once}) for once in (True, False))
    both = (LayerInput("x", behind("x")), LayerInput("fc", behind("fc")))
    assert sq.plan(twice, sq.QuantConfig()).site("fc.weight_fake_quant").inputs == both
    assert sq.plan([once, twice], sq.QuantConfig()).site("fc.weight_fake_quant").inputs == both
    assert sq.plan(once, sq.QuantConfig()).site("fc.weight_fake_quant").inputs == both[:1]


def test_the_shape_of_a_weight_is_the_weights() -> None:
    plan = planned(Residual(), RESIDUAL)
    assert plan.site("head.weight_fake_quant").shape == (2, 8)
    assert plan.site(behind("x")).shape == (2, 4)
    rule = sq.Rule(where=lambda site: site.role == "weight" and site.shape[1] == 8, weight=FOUR)
    four = planned(Residual(), RESIDUAL, rules=(rule,))
    assert [name for name in four if four[name].scheme.bits == 4] == ["head.weight_fake_quant"]
    assert not four.unused
    functional = planned(Functional(), torch.ones(2, 3))
    assert functional.site("w_fake_quant").shape == (4, 3)


def test_a_predicate_may_ask_every_site_for_every_attribute() -> None:
    asked = []

    def where(site: sq.Site) -> bool:
        asked.append((site.value, site.argument, site.also, site.parameter, site.norm, site.bias, site.axis, site.groups))
        asked.append((site.output, site.operand, site.more, site.source, site.input, site.inputs, site.call))
        return site.groups > 1 or bool(site.pattern)

    planned(Functional(), torch.ones(2, 3), rules=(sq.Rule(where=where, weight=FOUR, activation=FOUR),))
    assert len(asked) > 10
