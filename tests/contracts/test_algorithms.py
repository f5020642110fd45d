"""What every registered algorithm promises, on every kind of small model; the laws are in ``sq.testing``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sophq_func as sq
from sophq_func.algorithms import resume
from sophq_func.config.algorithms import ALGORITHMS
from sophq_func.testing.algorithms import LAWS, done, run
from sophq_func.testing.laws import Law
from tests.helpers import same, snapshot

NAMES = ALGORITHMS.names()
over_algorithms = pytest.mark.parametrize("name", NAMES)


@over_algorithms
@pytest.mark.parametrize("one", LAWS, ids=lambda one: one.name)
def test_laws(name: str, one: Law) -> None:
    if not one.only(name):
        pytest.skip("it does not promise that")
    broken = one.broken(name)
    assert not broken, "\n".join(broken)


@over_algorithms
def test_nothing_of_the_model_changes(name: str) -> None:
    subject, *_ = done(name, "convolutions")
    before = snapshot(subject.model)
    run(name, subject)
    assert snapshot(subject.model) == before


class Killed(BaseException):
    """Ends a run where a kill would."""


@over_algorithms
def test_a_killed_run_goes_on_to_the_same_bits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ALGORITHMS.get(name).resumes:
        pytest.skip("it is short")
    kind, path = "language", tmp_path / "run.steps"
    subject, *expected = done(name, kind)
    monkeypatch.setattr(resume.Resumed, "keep", _killed_after(1, resume.Resumed.keep))
    with pytest.raises(Killed):
        run(name, subject, checkpoint=path)
    monkeypatch.undo()
    assert resume.Resumed.keep.__qualname__ == "Resumed.keep"
    kept = path.read_bytes()
    again = run(name, subject, checkpoint=path)
    same(again, tuple(expected))
    path.write_bytes(kept)
    with pytest.raises(sq.StateError, match="another call"):
        run(name, subject._replace(batches=subject.batches[:1]), checkpoint=path)
    path.write_bytes(b"broken")
    with pytest.raises(sq.StateError, match="cannot be read"):
        run(name, subject, checkpoint=path)


def _killed_after(steps: int, keep: Callable[..., None]) -> Callable[..., None]:
    """A step of :meth:`Resumed.keep` that is written, and the last thing that happens."""
    left = [steps]

    def killed(self: resume.Resumed, *args: Any) -> None:
        keep(self, *args)
        left[0] -= 1
        if not left[0]:
            raise Killed

    return killed


def test_every_algorithm_is_public_documented_and_complete() -> None:
    for name in NAMES:
        function = getattr(sq.algorithms, name)
        assert name in sq.algorithms.__all__
        assert name in dir(sq.algorithms)
        parameters = list(inspect.signature(function).parameters)
        assert parameters[:4] == ["q", "params", "qparams", "batches"]
        assert "Example:" in str(function.__doc__)
