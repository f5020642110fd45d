"""Calls that do not fit a signature: what the message says, and what stays as it was."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import sophq_func as sq
from sophq_func.core.public import constructor, fits, public, public_as


@public
def scaled(x: float, *, by: int = 1, names: Sequence[str] = ()) -> float:
    """A function of the kinds of arguments that there are."""
    return x * by + len(names)


@public_as("export.text")
def text(value: str) -> str:
    return value.upper()


@public
def fails(value: object) -> None:
    raise TypeError("of the model's own")


@constructor
def checked(*, low: int = 0, high: int = 1) -> tuple[int, int]:
    if low > high:
        raise sq.ConfigError("checked: low lies above high.")
    return low, high


@public
def placed(first: int, /, *rest: int, **names: int) -> int:
    return first + len(rest) + len(names)


@public
def bare() -> None:
    """It takes nothing."""


def message(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(sq.ConfigError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_a_call_that_fits_is_as_without() -> None:
    assert scaled(2.0, by=3, names=("a",)) == 7.0
    assert list(inspect.signature(scaled).parameters) == ["x", "by", "names"]
    assert (scaled.__name__, scaled.__module__) == ("scaled", __name__)
    assert pickle.loads(pickle.dumps(scaled)) is scaled


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((1.0,), {"bye": 2}, ("scaled: keyword 'bye' is not known, did you mean 'by'?",)),
        ((1.0,), {"bye": 2, "name": ()}, ("2 problems", "'by'", "'names'")),
        ((), {}, ("scaled: x is missing",)),
        ((), {"y": 1.0, "bye": 1}, ("3 problems", "x is missing", "'y'", "'bye'")),
        ((1.0, 2), {}, ("too many positional arguments: got 2, allowed x by position", "use the keywords x, by, names")),
        ((1.0,), {"x": 2.0}, ("x is given twice",)),
        ((None,), {}, ("scaled: x has the wrong type: got None, allowed float",)),
        ((1.0,), {"by": "2", "names": 3}, ("2 problems", "by has the wrong type: got '2', allowed int", "allowed Sequence")),
    ],
)
def test_every_problem_of_a_call_is_named(args: tuple[Any, ...], kwargs: dict[str, Any], words: tuple[str, ...]) -> None:
    found = message(scaled, *args, **kwargs)
    assert [word for word in words if word not in found] == [], found


def test_a_function_may_have_another_name_in_messages() -> None:
    assert message(text, 3) == "export.text: value has the wrong type: got 3, allowed str."


def test_a_long_value_is_named_by_its_type() -> None:
    assert "got a Sequential, allowed float" in message(scaled, torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert "got a list" in message(scaled, [0.0] * 100)


def test_what_fails_with_arguments_that_fit_fails_as_before() -> None:
    with pytest.raises(TypeError, match="of the model's own"):
        fails(3)


class Raises(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("of the model's own")


@pytest.mark.parametrize("args", [torch.ones(1), [torch.ones(1)], (torch.ones(1),)], ids=["tensor", "list", "tuple"])
def test_an_error_of_the_model_stays_what_it_is(args: Any) -> None:
    with pytest.raises(RuntimeError, match="of the model's own"):
        sq.trace(Raises(), args)
    with pytest.raises(RuntimeError, match="of the model's own"):
        sq.quantize(Raises(), sq.QuantConfig(), example_args=args)


def test_a_constructor_tells_what_its_own_checks_find_too() -> None:
    found = message(checked, low=3, hihg=1)
    assert "2 problems" in found and "did you mean 'high'?" in found and "low lies above high" in found
    assert "3 problems" in message(sq.QScheme, bit=4, symmetric="yes", dynamic=1)


def test_classes_stay_what_they_are() -> None:
    for value in (
        sq.QScheme(bits=4),
        sq.PerGroup(32),
        sq.override(bits=4),
        sq.QuantConfig(),
        sq.Rule(name="a", weight=None),
    ):
        assert pickle.loads(pickle.dumps(value)) == copy.deepcopy(value) == value
    observer = sq.observer("minmax")
    assert observer._replace(merge=observer.merge) == observer
    assert list(inspect.signature(sq.QScheme).parameters)[:2] == ["bits", "symmetric"]
    assert "bits" in inspect.signature(sq.override).parameters


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (True, int, False),
        (3, float, True),
        (True, float, False),
        (np.int64(3), int, True),
        (np.float32(3), float, True),
        ([1, 2], tuple[int, ...], True),
        ("a", str | None, True),
        (None, str | None, True),
        ([1], Sequence[int], True),
        (3, Sequence[int], False),
        (len, Any, True),
        (torch.ones(1), torch.Tensor, True),
    ],
)
def test_types_are_compared_as_far_as_they_can_be_seen(value: object, annotation: object, expected: bool) -> None:
    assert fits(value, annotation) is expected


@pytest.mark.slow
def test_decorated_functions_compile_as_one_graph(fresh_dynamo: None) -> None:
    x = torch.ones(2, 3)
    q = sq.quantize(torch.nn.Linear(3, 3), sq.QuantConfig(), example_args=(x,))
    params = sq.params_of(torch.nn.Linear(3, 3))
    qparams = q.calibrate(params, [x], progress=False)
    learnable, rest = q.split(qparams)

    def f(learnable: dict[str, torch.Tensor]) -> torch.Tensor:
        return q.apply(params, sq.enabled(sq.merge(learnable, rest), True), x)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(learnable), f(learnable))


def test_an_argument_without_a_name_is_asked_for_by_position() -> None:
    assert "placed: first is given by keyword: allowed by position. Fix: placed(first, ...)" in message(placed, first=1)
    assert "first is missing. Fix: give first, as in placed(first, ...)" in message(placed)
    assert placed(1, 2, first=3) == 3


def test_what_takes_no_arguments_says_so() -> None:
    assert "got 3, allowed no arguments. Fix: leave it out" in message(bare, 3)
