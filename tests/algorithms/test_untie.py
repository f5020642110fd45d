"""Copies of models in which each module has parameters of its own."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.func import functional_call

import sophq_func as sq
from sophq_func.testing.models import Language
from tests.helpers import same, snapshot

CONFIG = sq.QuantConfig(chip=None)


def test_a_tied_head_can_be_turned_once_it_is_untied(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, ids = Language().eval(), torch.randint(16, (4, 6))
    before = snapshot(model)
    # some channels of the stream are large, for which there is something to turn
    given = {**sq.params_of(model), "embed.weight": model.embed.weight.detach() * torch.tensor([9.0, *[1.0] * 7])}
    expected = functional_call(model, given, (ids,))
    apart, params = sq.algorithms.untie(model, given)
    assert snapshot(model) == before
    assert params.keys() - given.keys() == {"head.weight"}
    assert params["head.weight"] is params["embed.weight"] is given["embed.weight"]
    assert sq.params_of(apart).keys() == params.keys()
    q = sq.quantize(apart, CONFIG, example_args=(ids,))
    with caplog.at_level(logging.INFO, "sophq_func.algorithms"):
        turned, _ = sq.algorithms.rotate(q, params, q.calibrate(params, [ids], progress=False), [ids], progress=False)
    assert "is used elsewhere" not in caplog.text
    assert not torch.equal(turned["embed.weight"], params["embed.weight"])
    limit = 1e-4 * float(expected.detach().abs().max())
    torch.testing.assert_close(functional_call(apart, turned, (ids,)), expected, rtol=0, atol=limit)


def test_without_params_those_of_the_model_are_taken() -> None:
    model = Language()
    _, params = sq.algorithms.untie(model)
    same({name: tensor for name, tensor in params.items() if name != "head.weight"}, sq.params_of(model))


def test_a_model_without_ties_has_the_same_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    apart, params = sq.algorithms.untie(model)
    same(params, sq.params_of(model))
    assert apart is not model


def test_a_module_that_is_used_twice_stays_one() -> None:
    layer = nn.Linear(2, 2)
    apart, params = sq.algorithms.untie(nn.Sequential(layer, nn.ReLU(), layer))
    assert list(params) == ["0.bias", "0.weight"]
    assert apart[0] is apart[2]


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(sq.PlanError, match="this has no modules"):
        sq.algorithms.untie({"w": torch.ones(1)})  # type: ignore[arg-type]
    with pytest.raises(sq.StateError, match=r"lack 'bias'(.|\n)*hold 'b'"):
        sq.algorithms.untie(nn.Linear(1, 1), {"weight": torch.ones(1, 1), "b": torch.ones(1)})


def test_transformers_does_not_tie_the_copy_again() -> None:
    model = Language()
    model.config = type("Config", (), {})()
    model.config.tie_word_embeddings = True
    apart, _ = sq.algorithms.untie(model)
    assert not apart.config.tie_word_embeddings
    assert model.config.tie_word_embeddings
