"""Keywords of other libraries: the error says how it is written here, and that is right."""

from __future__ import annotations

import re
from typing import Any

import pytest

import sophq_func as sq
from sophq_func.numerics.elsewhere import ELSEWHERE

CALLS = {
    "weight": sq.QuantConfig,
    "activation": sq.QuantConfig,
    "granularity": sq.QScheme,
    "bits": sq.override,
    "symmetric": sq.override,
}
"""By keyword, something that has it."""

NAMES = {"observer": "mse", "fake_quantize": "lsq", "granularity": "per_channel"}
"""By keyword, a name to write where the message has dots."""


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_keyword_that_is_meant_is_named_and_works(name: str) -> None:
    keyword, written = ELSEWHERE[name]
    call: Any = CALLS[keyword]
    with pytest.raises(sq.ConfigError, match=re.escape(f"Fix: {written}, or use one of ")):
        call(**{name: 4})
    assert written.startswith(f"{keyword}=")
    example = written.replace("...", repr(NAMES.get(name)))
    eval(f"call({example})", {"sq": sq, "call": call})


def test_what_has_no_such_keyword_does_not_name_it() -> None:
    with pytest.raises(sq.ConfigError) as caught:
        sq.override(bits=4, weight_bits=4)  # type: ignore[call-arg]
    assert "field 'weight_bits' is not known" in str(caught.value)
    assert "weight=" not in str(caught.value)
