"""A plan that does not fit the model is refused when it is built, by name; one that fits is not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import sophq_func as sq
from sophq_func.config.site import Requant
from sophq_func.model.requantizing import Requantizer
from tests.fuzz import plans
from tests.fuzz.subjects import SUBJECTS, Attention, Convolutions, Subject

Data = dict[str, Any]

INPUT, CONV, SUM, FC = (
    "x.post_act_fake_quantizer",
    "conv.weight_fake_quant",
    "add.post_act_fake_quantizer",
    "fc.weight_fake_quant",
)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return SUBJECTS["convolutions on a chip"]()


@pytest.fixture(scope="module")
def multipliers() -> Subject:
    return SUBJECTS["convolutions with multipliers"]()


def changed(subject: Subject, change: Callable[[Data, dict[str, Data]], object]) -> sq.Plan:
    """The plan, read from a text in which something is changed: the whole, or the entries of quantizers by name."""
    data = json.loads(subject.q.plan.to_json())
    change(data, {entry["name"]: entry for entry in data["quantizers"]})
    return sq.Plan.from_json(json.dumps(data))


def site(name: str, **fields: Any) -> Callable[[Data, dict[str, Data]], object]:
    return lambda data, entries: entries[name]["site"].update(fields)


def scheme(name: str, **fields: Any) -> Callable[[Data, dict[str, Data]], object]:
    return lambda data, entries: entries[name]["config"]["scheme"].update(fields)


def _counted_again(data: Data, entries: dict[str, Data]) -> None:
    data["counts"][0][0][2] += 1


def _twice(data: Data, entries: dict[str, Data]) -> None:
    entry = copy.deepcopy(entries[CONV])
    entry["name"] = entry["site"]["quantizer"] = "again"
    data["quantizers"].append(entry)
    data["reasons"]["again"] = data["reasons"][CONV]


WRONG: dict[str, tuple[Callable[[Data, dict[str, Data]], object], str]] = {
    "no such parameter": (site(CONV, parameter="conv.kernel"), "no parameter 'conv.kernel'"),
    "a parameter of other axes": (site(CONV, shape=[4, 2]), "has 4 axes"),
    "no such axis": (site(FC, axis=2), "no output axis 2"),
    "groups that do not divide it": (
        scheme(FC, granularity={"name": "PerGroup", "axis": 0, "size": 3}),
        "cannot be cut into groups",
    ),
    "no such BatchNorm": (site(CONV, norm="relu"), "no BatchNorm 'relu'"),
    "no such bias": (site(FC, bias="fc.shift"), "no bias 'fc.shift'"),
    "a bias of other channels": (site(CONV, bias="norm.num_batches_tracked"), "channels"),
    "no such source": (site(FC, source="nobody"), "no quantizer 'nobody'"),
    "a source that is a weight": (site(FC, source=CONV), "cannot round the bias"),
    "no such argument": (site(INPUT, argument="y"), "no argument 'y'"),
    "an argument that is written into": (lambda data, entries: data["written"].append("y"), "no argument 'y'"),
    "counts of another run": (_counted_again, "its example makes"),
    "no counts": (lambda data, entries: data["counts"][0].clear(), "it counts no calls of"),
    "further counts": (lambda data, entries: data["counts"][0].append(["conv", "", 1]), "it counts calls of ('conv', '')"),
    "two examples, of which one has calls": (lambda data, entries: data["counts"].append(data["counts"][0]), "2 examples"),
    "two quantizers of one weight": (_twice, "acts on the same tensor"),
    "blocks far longer than the tensor": (
        lambda data, entries: entries[FC]["config"].update(
            fake_quantize={"name": "mxfp4", "options": {"block_size": 10**9}}
        ),
        "no blocks of 1000000000 elements",
    ),
    "no such input of a layer": (site(FC, inputs=[["x", "nobody"]]), "no quantizer 'nobody'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_plan_that_does_not_fit_is_refused_when_it_is_built(case: str, subject: Subject) -> None:
    change, word = WRONG[case]
    with pytest.raises(sq.PlanError) as caught:
        sq.build(subject.model, changed(subject, change))
    assert word in str(caught.value) and "Fix: " in str(caught.value)


def _requants(data: Data) -> list[list[Any]]:
    return [requant for entry in data["quantizers"] for requant in entry["site"].get("requant", [])]


RULE, SOURCE, RESULT, NUMBER, TRUNCATES, AXIS = range(6)
"""Places in the data of a multiplier."""


def requant(place: int, value: Any) -> Callable[[Data, dict[str, Data]], object]:
    """Another value in the first multiplier of the plan."""

    def change(data: Data, entries: dict[str, Data]) -> None:
        _requants(data)[0][place] = value

    return change


@pytest.mark.parametrize(("place", "value"), [(RULE, "magic"), (SOURCE, "nobody"), (RESULT, INPUT), (AXIS, -9)], ids=str)
def test_multipliers_that_lead_nowhere_are_refused(place: int, value: Any, multipliers: Subject) -> None:
    with pytest.raises(sq.PlanError, match="Fix: plan this model anew"):
        sq.build(multipliers.model, changed(multipliers, requant(place, value)))


def test_a_plan_of_another_model_is_refused_with_a_few_of_its_quantizers(subject: Subject) -> None:
    with pytest.raises(sq.PlanError) as caught:
        sq.build(Attention(), subject.q.plan)
    assert "no parameter 'conv.weight'" in str(caught.value)
    wide = nn.Sequential(*(nn.Linear(2, 2) for _ in range(40)))
    plan = sq.quantize(wide, sq.QuantConfig(), example_args=(torch.ones(1, 2),)).plan
    with pytest.raises(sq.PlanError) as caught:
        sq.build(nn.Linear(2, 2), plan)
    assert len(str(caught.value).splitlines()) < 25 and " more." in str(caught.value)


def test_a_model_of_the_same_structure_fits_whatever_its_sizes(subject: Subject) -> None:
    wide = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    narrow = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    plan = sq.quantize(wide, sq.QuantConfig(), example_args=(torch.ones(1, 4),)).plan
    q, params = sq.build(narrow, plan), sq.params_of(narrow)
    assert q.apply(params, q.calibrate(params, [torch.ones(3, 4)], progress=False), torch.ones(3, 4)).shape == (3, 2)
    sq.build(Convolutions(), subject.q.plan)


@pytest.mark.parametrize("name", SUBJECTS)
def test_parts_of_plans_that_fit_can_be_stored(name: str) -> None:
    q = SUBJECTS[name]().q
    assert sq.build(SUBJECTS[name]().model, sq.Plan.from_json(q.plan.to_json())).plan == q.plan
    for part in q.blocks("*"):
        assert sq.Plan.from_json(part.plan.to_json()) == part.plan


def test_a_call_with_fewer_tensors_than_planned_is_an_error_of_the_run(subject: Subject) -> None:
    q = sq.build(subject.model, changed(subject, site(SUM, output=1)))
    with pytest.raises(sq.StateError, match="1 tensors where the quantizer acts on number 1"):
        q.calibrate(subject.params, [subject.batch], progress=False)


def test_a_value_whose_channels_are_others_is_an_error_of_the_run(subject: Subject) -> None:
    def change(data: Data, entries: dict[str, Data]) -> None:
        entries[INPUT]["config"]["scheme"]["granularity"] = {"name": "PerChannel", "axis": 1}
        entries[INPUT]["site"]["shape"] = [2, 3, 5, 5]
        for entry in entries.values():
            if entry["site"].get("source") == INPUT:
                entry["site"]["source"] = ""

    q = sq.build(subject.model, changed(subject, change))
    with pytest.raises(sq.StateError, match="cannot be observed"):
        q.calibrate(subject.params, [subject.batch], progress=False)


def test_mutated_plans_are_refused_in_words_or_right() -> None:
    assert [(text, found) for text, found in plans.plans(80, seed=5) if found.startswith("FAULT")] == []


def test_two_quantizers_that_have_changed_places_are_refused(multipliers: Subject) -> None:
    def change(data: Data, entries: dict[str, Data]) -> None:
        one, other = (entries[f"{name}.post_act_fake_quantizer"]["site"] for name in ("side", "mean"))
        one["anchor"], other["anchor"] = other["anchor"], one["anchor"]

    with pytest.raises(sq.PlanError, match="the examples call mean where it acts on side"):
        sq.build(multipliers.model, changed(multipliers, change))


def test_multipliers_of_other_channels_are_an_error_of_the_run() -> None:
    requantizer = Requantizer((Requant("layer", "x", axis=-3), Requant("layer", "w", axis=-3)))
    qparams = {name: sq.QParams(torch.ones(shape), torch.zeros(shape), {}) for name, shape in (("x", ()), ("w", (4,)))}
    assert requantizer.integers(torch.ones(2, 4, 1, 1), qparams["x"], qparams).shape == (2, 4, 1, 1)
    with pytest.raises(sq.StateError, match="they have other channels"):
        requantizer.integers(torch.ones(2, 4), qparams["x"], qparams)
