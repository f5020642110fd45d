"""What every registered number format obeys, and every table; the laws are in ``sq.testing``."""

from __future__ import annotations

import pytest

import sophq_func as sq
from sophq_func.numerics.codebooks import CODEBOOKS
from sophq_func.numerics.formats import FORMATS
from sophq_func.testing.formats import LAWS
from sophq_func.testing.laws import Law

FURTHER = {
    "unsigned": sq.formats.int_(4, signed=False),
    "narrow": sq.formats.int_(5, narrow=True, step=0.25),
    "infinite": sq.formats.float_(4, 3, saturate=False),
}
FORMS = {name: FORMATS.get(name) for name in FORMATS} | CODEBOOKS | FURTHER


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
@pytest.mark.parametrize("name", FORMS)
def test_every_format_obeys_the_laws_of_all(name: str, law: Law) -> None:
    assert law.broken(FORMS[name]) == []
