"""The loop over many small cases in one test: nothing that fails is lost."""

from __future__ import annotations

import pytest

from tests.contracts import hold


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
