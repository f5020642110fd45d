"""The loop over many small cases in one test: nothing that fails is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.each import each, hold


def law(left: int, right: int) -> None:
    if right == 0:
        raise ValueError("no divisor")
    assert left % right == 0, "a rest"


def test_every_case_that_breaks_the_law_is_named_with_its_error() -> None:
    left, right = {"six": 6, "nine": 9}, {"two": 2, "three": 3, "zero": 0}
    with pytest.raises(AssertionError) as caught:
        hold(law, left, right)
    text = str(caught.value)
    assert text.startswith("3 of 6 cases:\nsix, zero: ValueError: no divisor\nnine, two: AssertionError: a rest\n")
    assert "\nnine, zero: ValueError: no divisor" in text


def test_an_error_that_did_not_come_is_a_failure() -> None:
    def refused(value: int) -> None:
        with pytest.raises(ValueError, match="negative"):
            int(value)

    with pytest.raises(AssertionError, match=r"1 of 1 cases:\none: Failed: DID NOT RAISE"):
        hold(refused, {"one": 1})


def test_nothing_is_said_where_all_hold() -> None:
    hold(law, {"six": 6, "nine": 9}, {"three": 3})


def test_a_case_that_skips_is_a_failure() -> None:
    with pytest.raises(AssertionError, match="1 of 2 cases:\none: Skipped: not here"):
        hold(lambda skips: pytest.skip("not here") if skips else None, {"one": True, "two": False})


@pytest.mark.parametrize("number", [1, 2])
@each("case", {"one": "one", "two": "two"})
def test_one_test_tries_each_case_with_its_parameters_and_fixtures(case: str, number: int, tmp_path: Path) -> None:
    assert tmp_path.exists()
    assert torch.initial_seed() == 0
    torch.manual_seed(number)


def test_each_names_the_cases_that_fail() -> None:
    @each("case", {"one": 1, "two": 2, "three": 3})
    def odd(case: int) -> None:
        assert case % 2, "even"

    with pytest.raises(AssertionError, match=r"^1 of 3 cases:\ntwo: AssertionError: even"):
        odd(is_quick=False)


def test_a_quick_run_tries_a_few_of_them() -> None:
    seen = []

    @each("case", {str(number): number for number in range(100)})
    def note(case: int) -> None:
        seen.append(case)

    note(is_quick=True)
    assert seen == [0, 25, 50, 75]
