"""Laws over everything registered; the laws, and the grid they run over, are those of ``sq.testing``."""

from __future__ import annotations

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
from tests.each import each

over_schemes, over_static_schemes = each("scheme", SCHEMES), each("scheme", STATIC_SCHEMES)
over_granularities, over_static_granularities = each("scheme", AFFINE), each("scheme", STATIC_AFFINE)
