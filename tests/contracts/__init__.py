"""Laws over everything registered; the laws, and the grid they run over, are those of ``sq.testing``."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest

import sophq_func as sq
from sophq_func.numerics.scheme import Granularity
from sophq_func.testing import laws
from sophq_func.testing.subjects import COARSE as COARSE
from sophq_func.testing.subjects import GRANULARITIES as GRANULARITIES
from sophq_func.testing.subjects import KINDS as KINDS
from sophq_func.testing.subjects import MIXED as MIXED
from sophq_func.testing.subjects import SCHEMES as SCHEMES
from sophq_func.testing.subjects import SHAPE as SHAPE
from sophq_func.testing.subjects import STATIC as STATIC
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


def scheme_param(name: str, granularity: Granularity, bits: int = 4) -> Any:
    return pytest.param(scheme_of(name, granularity, bits), id=f"{name}-{granularity}")


def over(schemes: Mapping[str, sq.QScheme]) -> Any:
    return pytest.mark.parametrize("scheme", schemes.values(), ids=schemes.keys())


over_schemes, over_static_schemes = over(SCHEMES), over(STATIC_SCHEMES)
over_granularities = pytest.mark.parametrize("scheme", [scheme_param("affine", g) for g in GRANULARITIES])
over_static_granularities = pytest.mark.parametrize("scheme", [scheme_param("affine", g) for g in STATIC])

hold = functools.partial(laws.hold, failures=(Exception, pytest.fail.Exception))
"""With the failures that pytest does not derive from ``Exception``."""
