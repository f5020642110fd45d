"""Functions of sophgo-mq that are not here: the error says what is written instead, and that is there."""

from __future__ import annotations

import re

import pytest

import sophq_func as sq
from sophq_func.config.dicts.former import FORMER


@pytest.mark.parametrize("name", FORMER)
def test_an_old_name_teaches_the_new_one(name: str) -> None:
    with pytest.raises(sq.ConfigError, match=re.escape(f"sophq_func: it has no {name!r}. Fix: {FORMER[name]}.")):
        getattr(sq, name)
    assert not hasattr(sq, name)


@pytest.mark.parametrize("name", FORMER)
def test_what_is_written_instead_is_there(name: str) -> None:
    owners = {"sq": sq, "q": sq.Quantized, "sq.export": sq.export}
    for owner, attribute in re.findall(r"\b(sq\.export|sq|q)\.(\w+)", FORMER[name]):
        assert hasattr(owners[owner], attribute)
