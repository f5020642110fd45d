"""Qparams are looked at once: by identity, numbers included; and never by what a transform or a step of training makes."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sophq_func as sq
from sophq_func.numerics import kinds
from sophq_func.numerics.entries import check_entries
from sophq_func.numerics.kinds import ALONE, Kind, KindCheck

KINDS = {"a": ALONE, "b": Kind(axes=1, extras=frozenset(("alpha",)), is_read=True, is_signed=True)}


def entry(scale: Any = 0.5, zero_point: Any = 0, **extras: Any) -> sq.QParams:
    zero = torch.as_tensor(zero_point, dtype=torch.int32)
    return sq.QParams(torch.as_tensor(scale, dtype=torch.float32), zero, extras)


def good() -> dict[str, sq.QParams]:
    return {"a": entry(), "b": entry([0.5, -0.25], [0, 0])}


def test_the_same_tensors_are_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    check, qparams = KindCheck(KINDS), good()

    def looked(entry: sq.QParams, axes: int | None) -> bool:
        seen.append("looked")
        return True

    monkeypatch.setattr(kinds, "_is_usual", looked)
    check(qparams)
    assert len(seen) == 2
    check({name: own._replace() for name, own in qparams.items()})  # other tuples and dicts, of the same tensors
    assert len(seen) == 2
    check({**qparams, "a": entry()})
    assert len(seen) == 3


def test_what_was_seen_is_not_kept_alive() -> None:
    check, qparams = KindCheck(KINDS), good()
    check(qparams)
    scale = weakref.ref(qparams["b"].scale)
    del qparams
    gc.collect()
    assert scale() is None
    with pytest.raises(sq.StateError):
        check({**good(), "a": entry(math.nan)})


def test_a_tensor_that_is_gone_is_not_taken_for_none() -> None:
    check = KindCheck({"a": ALONE})
    check({"a": entry()})
    gc.collect()
    for bad in ({"scale": None}, {"zero_point": None}, {"scale": None, "zero_point": None}):
        with pytest.raises(sq.StateError, match="is no tensor"):
            check({"a": entry()._replace(**bad)})


def test_another_name_of_the_same_extras_is_looked_at() -> None:
    check, low, high = KindCheck(KINDS), torch.tensor(-4.0), torch.tensor(3.0)
    qparams = good()
    check({**qparams, "a": qparams["a"]._replace(extras={"qmin": low, "qmax": high})})
    with pytest.raises(sq.StateError, match="hold no code"):
        check({**qparams, "a": qparams["a"]._replace(extras={"qmin": high, "qmax": low})})
    check(qparams)
    with pytest.raises(sq.StateError, match="extras are no dict"):
        check({**qparams, "a": qparams["a"]._replace(extras=None)})  # type: ignore[arg-type]


NUMBERS: dict[str, tuple[sq.QParams, str]] = {
    "NaN": (entry(math.nan), "the scale is not finite"),
    "infinity": (entry(math.inf), "the scale is not finite"),
    "zero": (entry(0.0), "a scale must be positive"),
    "below zero": (entry(-1.0), "a scale must be positive"),
    "a zero point": (entry()._replace(zero_point=torch.tensor(math.nan)), "the zero_point is not finite"),
    "bounds": (entry(qmin=torch.tensor(4.0), qmax=torch.tensor(-4.0)), "these bounds hold no code"),
    "no bounds": (entry(qmin=torch.tensor(math.nan), qmax=torch.tensor(4.0)), "these bounds hold no code"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_cannot_be_used_are_named(name: str) -> None:
    bad, said = NUMBERS[name]
    for others in ({}, {"b": good()["b"]}):  # alone, and beside a learned scale below zero
        with pytest.raises(sq.StateError, match=f"qparams of a: {said}"):
            KindCheck({name: KINDS[name] for name in ("a", *others)})({**others, "a": bad})


def test_numbers_are_not_read_where_they_mean_nothing() -> None:
    unread = {"a": ALONE._replace(is_read=False)}
    KindCheck(unread)({"a": entry(math.nan)})
    KindCheck({"a": ALONE})({"a": entry(math.nan, enabled=torch.tensor(False))})  # it is switched off
    learned = entry()._replace(scale=torch.tensor(math.nan, requires_grad=True))
    KindCheck({"a": ALONE})({"a": learned})  # of a step of training
    with torch.no_grad(), pytest.raises(sq.StateError, match="not finite"):
        KindCheck({"a": ALONE})({"a": learned})


def test_transforms_and_compilers_compare_and_read_nothing() -> None:
    check = KindCheck({"a": ALONE})

    def checked(scale: Tensor) -> Tensor:
        check({"a": sq.QParams(scale, torch.zeros((), dtype=torch.int32), {})})
        return scale * 2

    nan = torch.tensor([1.0, math.nan])
    assert torch.vmap(checked)(nan).isnan().tolist() == [False, True]
    assert torch.func.grad(checked)(torch.tensor(math.nan)).item() == 2
    with pytest.raises(sq.StateError, match="dtype without use"):
        torch.vmap(checked)(torch.ones(2, dtype=torch.int32))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda check: pickle.loads(pickle.dumps(check))], ids=["copy", "pickle"])
def test_a_copy_has_seen_nothing(copied: Callable[[KindCheck], KindCheck]) -> None:
    check = KindCheck(KINDS)
    check(good())
    with pytest.raises(sq.StateError):
        copied(check)({**good(), "a": entry(math.nan)})


FLAWS: dict[str, tuple[Any, str]] = {
    "no QParams": ((1, 2, 3), "this value is not QParams: got 'tuple'"),
    "extras": (entry()._replace(extras=None), "extras are no dict"),  # type: ignore[arg-type]
    "a number as name": (entry()._replace(extras={3: torch.ones(())}), "cannot have the name 3"),  # type: ignore[dict-item]
    "a dot": (entry(**{"a.b": torch.ones(())}), "cannot have the name 'a.b'"),
    "no tensor": (entry()._replace(scale=1.0), "scale of these QParams is no tensor: got '1.0'"),  # type: ignore[arg-type]
    "sparse": (entry()._replace(scale=torch.eye(2).to_sparse()), "scale is sparse"),
    "complex": (entry()._replace(zero_point=torch.zeros((), dtype=torch.complex64)), "zero_point has a dtype without use"),
    "meta": (entry()._replace(zero_point=torch.zeros((), dtype=torch.int32, device="meta")), "on another device"),
    "another shape": (entry(zero_point=[0, 0]), r"zero_point has another shape: got \(2,\), allowed \(\)"),
    "one bound": (entry(qmin=torch.ones(())), "bounds of codes come in pairs"),
}


@pytest.mark.parametrize("name", FLAWS)
def test_what_is_no_sound_entry_is_named_without_a_plan(name: str) -> None:
    bad, said = FLAWS[name]
    qparams = {"good": entry(), "bad": bad}
    with pytest.raises(sq.StateError, match=said):
        check_entries("stack", qparams)
    for take in (lambda: sq.cast(qparams, torch.float64), lambda: sq.stack([qparams]), lambda: sq.enabled(qparams, False)):
        with pytest.raises(sq.StateError, match=said):
            take()


def test_what_is_no_dict_of_them_is_one_problem() -> None:
    with pytest.raises(sq.StateError, match=r"stack: these are no qparams: got 'a dict of Tensor'"):
        check_entries("stack", {"a": torch.ones(2), "b": torch.ones(2)})
    with pytest.raises(sq.StateError, match=r"unstack: .*first axis.*Fix: sq.unstack\(sq.stack"):
        sq.unstack({"a": entry()})
