"""What a quick run keeps."""

from __future__ import annotations

import itertools

from tests.quick import MOST, some


def test_every_value_of_every_parameter_is_kept_once_where_they_fit() -> None:
    cases = [{"name": i, "scheme": j, "flag": k} for i, j, k in itertools.product(range(2), range(MOST), range(2))]
    kept = [cases[i] for i in some(cases)]
    assert len(kept) <= MOST
    for parameter, count in (("name", 2), ("scheme", MOST), ("flag", 2)):
        assert {case[parameter] for case in kept} == set(range(count))


def test_of_many_values_some_are_passed_over_evenly() -> None:
    assert some([{"case": i} for i in range(3 * MOST)]) == list(range(0, 3 * MOST, 3))


def test_a_test_without_parameters_is_kept() -> None:
    assert some([{}]) == [0]
