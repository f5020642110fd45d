"""Many small cases in one test: pytest spends more on a test than most laws on a case. Nothing that fails is lost."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from sophq_func.testing import laws
from tests.quick import few

Test = Callable[..., None]

NOT_PASSED = (Exception, pytest.fail.Exception, pytest.skip.Exception)
"""pytest does not derive its own from ``Exception``. A case that skips would hide those after it, so it fails."""

hold = functools.partial(laws.hold, failures=NOT_PASSED)
"""Try all cases of a law; those that break it are reported together, by name."""


def each(argument: str, cases: Mapping[str, Any]) -> Callable[[Test], Test]:
    """Decorator: one test of all cases, where ``pytest.mark.parametrize`` would make a test of each.

    All are tried, each from the seed that a test starts from, and the test names those that fail with their errors.
    ``--quick`` tries a few of them.
    """

    def decorate(test: Test) -> Test:
        signature = inspect.signature(test)
        others = [one for name, one in signature.parameters.items() if name != argument]
        option = inspect.Parameter("is_quick", inspect.Parameter.POSITIONAL_OR_KEYWORD)

        @functools.wraps(test)
        def of_all(*, is_quick: bool, **given: Any) -> None:
            def of_one(case: Any) -> None:
                torch.default_generator.manual_seed(0)
                test(**{argument: case}, **given)

            hold(of_one, few(cases) if is_quick else cases)

        of_all.__signature__ = signature.replace(parameters=[*others, option])  # the fixtures that pytest gives it
        return of_all

    return decorate
