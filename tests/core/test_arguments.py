"""Messages quote little of what they are given, counts have an upper bound, and tensors are dense and real."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sophq_func as sq
from sophq_func.core.arguments import check_counts, check_reals
from sophq_func.core.errors import LONGEST_QUOTE, explain, quoted


class Verbose:
    def __repr__(self) -> str:
        return "!" * 10_000


class Unseen(torch.Tensor):
    """A tensor that must not be printed."""

    def __repr__(self, *, tensor_contents: object = None) -> str:
        raise AssertionError("it is written out")


LONG = {
    "a text": "x" * 10**6,
    "bytes": b"x" * 10**6,
    "a list": list(range(10**6)),
    "lists in lists": [[["x" * 1000] * 1000] * 10],
    "a dict": dict.fromkeys(range(1000), "x" * 100),
    "a set": set(range(1000)),
    "an object": Verbose(),
    "a tensor": torch.zeros(1000, 1000).as_subclass(Unseen),
    "a model": nn.Sequential(*[nn.Linear(2, 2) for _ in range(100)]),
}


@pytest.mark.parametrize("value", LONG.values(), ids=LONG)
def test_what_is_long_is_quoted_by_its_beginning(value: object) -> None:
    assert len(quoted(value)) <= LONGEST_QUOTE == 200


@pytest.mark.parametrize(
    "value",
    [3, "conv1", None, (1,), (1, 2), [], {}, set(), frozenset({1}), {1}, {"a": [1, (2,)]}, torch.tensor([1.0, 2.0]), 1.5],
    ids=repr,
)
def test_what_is_short_is_quoted_as_it_is(value: object) -> None:
    assert quoted(value) == repr(value)


def test_names_in_the_other_parts_of_a_message_are_cut_too() -> None:
    name = "x" * 10_000
    assert len(explain(f"params[{name!r}]", f"it holds {name!r}", got=name, allowed="a Tensor", fix="rename it")) < 1000


@pytest.mark.parametrize("count", [0, -1, 10**30, 1.0, True, "3", None, float("nan")])
def test_a_count_is_an_integer_between_bounds(count: object) -> None:
    with pytest.raises(sq.ConfigError, match=r"steps must be a positive int.*allowed an int from 1 to 10000000"):
        check_counts("train", {"steps": count})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.ones(2, dtype=torch.complex64), "x is complex.*x.real"),
        (torch.eye(2).to_sparse(), "x is sparse.*x.to_dense"),
        ([1.0], "x is no tensor.*as_tensor"),
    ],
)
def test_a_tensor_is_dense_and_real(value: object, said: str) -> None:
    with pytest.raises(sq.StateError, match=said):
        check_reals("pack", {"x": value})
    check_reals("pack", {"x": torch.ones(2), "y": torch.ones(2, dtype=torch.int8)})


def test_counts_that_never_end_are_refused_where_they_are_given() -> None:
    w = {"w": torch.ones(2)}
    with pytest.raises(sq.ConfigError, match="top_eigenvalue: steps"):
        sq.top_eigenvalue(lambda p: p["w"].square().sum(), w, w, steps=10**30)
    with pytest.raises(sq.ConfigError, match=r"histogram.*bins"):
        sq.observers.histogram(bins=10**30)
    with pytest.raises(sq.ConfigError, match="pareto: there are no budgets"):
        sq.algorithms.pareto({"a": {8: 0.1}}, {"a": 1.0}, budgets=10**30)
    with pytest.raises(sq.ConfigError, match="rademacher: samples"):
        sq.rademacher(w, ["w"], 10**30, torch.Generator())
