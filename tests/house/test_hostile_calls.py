"""A small sample of the campaign of :mod:`tests.fuzz.calls`, always the same one, in this process."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.fuzz import calls as campaign
from tests.fuzz.valid_calls import valid_calls

QUICK = ("q.", "plan.", "config.", "merge", "stack", "unstack", "cast", "enabled", "with_bits", "lerp", "pack", "observer(",
         "fake_quantizer(", "formats.", "override", "QScheme", "Rule", "Per", "algorithms.reconstruct",
         "algorithms.from_ptq_config")  # fmt: skip
"""How the names begin of calls that take no time; none that registers anything."""

COUNT = 400


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, campaign.Outcome]:
    folder = tmp_path_factory.mktemp("calls")
    found = [call for call in valid_calls(folder) if call.name.startswith(QUICK) and not call.alone]
    expected = campaign.results_of(found)
    ended = {}
    for case in campaign.sample(found, COUNT, seed=1):
        call = found[case.call]
        ended[f"{call.name}: {case.where} = {case.spoiled.label}"] = campaign.outcome(case, call, expected[case.call])
    return ended


def test_no_spoiled_call_is_silently_wrong_or_hangs(outcomes: dict[str, campaign.Outcome]) -> None:
    assert {name: found for name, found in outcomes.items() if found.kind in campaign.FAULTS} == {}


def test_errors_teach(outcomes: dict[str, campaign.Outcome]) -> None:
    counts = Counter(found.kind for found in outcomes.values())
    raw = {name: found.said for name, found in outcomes.items() if found.kind == "raw"}
    assert not campaign.is_fault(counts), raw
    assert counts["clear"] > COUNT / 2


def test_a_fault_is_found() -> None:
    """The campaign itself: what is wrong is told from what is right."""
    call = campaign.ValidCall("half", lambda x, /: x / 2, (1.0,))
    cases = {case.spoiled.label: case for case in campaign.cases_of(0, call)}

    def kind(label: str, function: object) -> str:
        spoiled = campaign.ValidCall("half", function, (1.0,))  # type: ignore[arg-type]
        return campaign.outcome(cases[label], spoiled, 0.5).kind

    assert kind("nan", lambda x, /: x / 2) == "silent"
    assert kind("'x'", lambda x, /: 0.25) == "silent"
    assert kind("'x'", lambda x, /: 0.5) == "same"
    assert kind("-1.0", lambda x, /: x / 2) == "other"
    assert campaign.is_fault({"silent": 1, "clear": 999}) and campaign.is_fault({"raw": 6, "clear": 94})
    assert not campaign.is_fault({"raw": 5, "clear": 95})
