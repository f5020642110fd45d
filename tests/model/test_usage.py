"""Calls of a quantized model that lack arguments: what the message says, and that nothing else about a call changes."""

from __future__ import annotations

import inspect
import pickle
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.core.public import ABSENT
from sophq_func.model.usage import CALLS


class Ready(NamedTuple):
    q: sq.Quantized
    x: Tensor
    params: dict[str, Tensor]
    ostate: dict[str, Any]
    qparams: dict[str, sq.QParams]


@pytest.fixture(scope="module")
def ready() -> Ready:
    model, x = nn.Linear(2, 3), torch.ones(4, 2)
    q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
    params = sq.params_of(model)
    _, ostate = q.observe(params, q.init(params), x)
    return Ready(q, x, params, ostate, q.qparams(params, ostate))


@pytest.mark.parametrize("method", CALLS)
def test_a_call_without_params_shows_the_right_call(ready: Ready, method: str) -> None:
    with pytest.raises(sq.ConfigError) as caught:
        getattr(ready.q, method)(ready.x)
    assert "missing" in str(caught.value) and CALLS[method] in str(caught.value)


@pytest.mark.parametrize("method", CALLS)
def test_the_call_that_is_shown_works(ready: Ready, method: str) -> None:
    eval(CALLS[method], {**ready._asdict()})


@pytest.mark.parametrize("method", CALLS)
def test_one_that_is_given_is_not_called_missing(ready: Ready, method: str) -> None:
    with pytest.raises(sq.ConfigError, match="^" + method + ": (ostate|qparams) is missing"):
        getattr(ready.q, method)(*[ready.params, ready.ostate][: 2 if method == "observe_quantized" else 1])


def test_arguments_by_keyword_are_missing_by_position(ready: Ready) -> None:
    with pytest.raises(sq.ConfigError, match=r"params and qparams are missing .*come first, by position"):
        ready.q.apply(params=ready.params, qparams=ready.qparams, input=ready.x)  # type: ignore[call-arg]
    with pytest.raises(sq.ConfigError, match="init: params is given by keyword"):
        ready.q.init(params=ready.params)  # type: ignore[call-arg]


def test_the_signature_is_the_one_that_is_written(ready: Ready) -> None:
    parameters = inspect.signature(ready.q.apply).parameters
    assert list(parameters) == ["params", "qparams", "args", "kwargs"]
    assert all(parameter.default is parameter.empty for parameter in parameters.values())


def test_a_copy_and_a_compiler_find_the_same_method(ready: Ready, fresh_dynamo: None) -> None:
    q, x, params, _, qparams = ready
    copied = pickle.loads(pickle.dumps(q))
    expected = q.apply(params, qparams, x)
    assert torch.equal(copied.apply(params, qparams, x), expected)
    assert torch.equal(torch.compile(q.apply, backend="eager", fullgraph=True)(params, qparams, x), expected)


def test_there_is_one_value_for_nothing() -> None:
    assert repr(ABSENT) == "nothing"
