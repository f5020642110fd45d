"""Names that a module does not have."""

from __future__ import annotations

import pytest

import sophq_func as sq
from sophq_func.core.absent import refuse_name


def test_what_is_near_or_written_instead_is_said() -> None:
    with pytest.raises(sq.ConfigError, match=r"^here: it has no 'minmx'. Fix: did you mean 'minmax'\?$"):
        refuse_name("here", "minmx", ["minmax", "mse"])
    with pytest.raises(sq.ConfigError, match=r"^here: it has no 'old'. Fix: new\(\)\.$"):
        refuse_name("here", "old", ["older"], {"old": "new()"})
    with pytest.raises(sq.ConfigError, match=r"^here: it has no 'zzz'. Fix: dir\(here\) lists its names\.$"):
        refuse_name("here", "zzz", ["minmax"])


@pytest.mark.parametrize("module", [sq, sq.presets])
def test_modules_still_answer_whether_they_have_a_name(module: object) -> None:
    assert not hasattr(module, "zzz")
    assert not hasattr(module, "__zzz__")
    assert getattr(module, "zzz", None) is None


def test_a_preset_that_there_is_not_names_its_like() -> None:
    with pytest.raises(AttributeError, match=r"presets: it has no 'w4a4'\. Fix: did you mean .*'w4a4_lsq'"):
        sq.presets.w4a4  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match="it has no 'lsq'"):  # an observer of this name is no preset
        sq.presets.lsq  # type: ignore[attr-defined]  # noqa: B018
