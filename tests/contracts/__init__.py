"""Laws over everything registered; the laws, and the grid they run over, are those of ``sq.testing``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from sophq_func.testing import laws
from sophq_func.testing.subjects import AFFINE as AFFINE
from sophq_func.testing.subjects import COARSE as COARSE
from sophq_func.testing.subjects import GRANULARITIES as GRANULARITIES
from sophq_func.testing.subjects import KINDS as KINDS
from sophq_func.testing.subjects import MIXED as MIXED
from sophq_func.testing.subjects import NARROW as NARROW
from sophq_func.testing.subjects import SCHEMES as SCHEMES
from sophq_func.testing.subjects import SHAPE as SHAPE
from sophq_func.testing.subjects import STATIC as STATIC
from sophq_func.testing.subjects import STATIC_AFFINE as STATIC_AFFINE
from sophq_func.testing.subjects import STATIC_SCHEMES as STATIC_SCHEMES
from sophq_func.testing.subjects import assert_same as assert_same
from sophq_func.testing.subjects import calibrated as calibrated
from sophq_func.testing.subjects import compiled as compiled
from sophq_func.testing.subjects import observed as observed
from sophq_func.testing.subjects import pick as pick
from sophq_func.testing.subjects import sample as sample
from sophq_func.testing.subjects import scheme_of as scheme_of
from sophq_func.testing.subjects import stack as stack
from sophq_func.testing.subjects import unchanged as unchanged
from tests.quick import few

Test = Callable[..., None]

NOT_PASSED = (Exception, pytest.fail.Exception, pytest.skip.Exception)
"""pytest derives its own from no ``Exception``. A case that skips would hide the cases after it, so it fails."""

hold = functools.partial(laws.hold, failures=NOT_PASSED)


def each(argument: str, cases: Mapping[str, Any]) -> Callable[[Test], Test]:
    """Decorator: one test of all cases; every case that fails is named with its error, and all are tried.

    ``pytest.mark.parametrize`` would make a test of each, and pytest spends more on a test than most laws on a case.
    Every case starts from the same seed, as a test does; ``--quick`` tries a few.
    """

    def decorate(test: Test) -> Test:
        signature = inspect.signature(test)
        inner_asks = "request" in signature.parameters
        kept = [one for name, one in signature.parameters.items() if name not in (argument, "request")]
        asked = inspect.Parameter("request", inspect.Parameter.KEYWORD_ONLY)

        @functools.wraps(test)
        def of_all(*, request: pytest.FixtureRequest, **others: Any) -> None:
            own = {"request": request} if inner_asks else {}

            def one_case(case: Any) -> None:
                torch.default_generator.manual_seed(0)
                test(**{argument: case}, **others, **own)

            hold(one_case, few(cases) if request.config.getoption("quick") else cases)

        of_all.__signature__ = signature.replace(parameters=[*kept, asked])
        return of_all

    return decorate


over_schemes, over_static_schemes = each("scheme", SCHEMES), each("scheme", STATIC_SCHEMES)
over_granularities, over_static_granularities = each("scheme", AFFINE), each("scheme", STATIC_AFFINE)
