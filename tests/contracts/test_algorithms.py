"""What every registered algorithm promises, on every kind of small model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sophq_func as sq
from sophq_func.algorithms import resume
from sophq_func.config.algorithms import ALGORITHMS, Algorithm
from sophq_func.config.site import WeightSite
from sophq_func.core.pytree import leaves
from sophq_func.model.tap import unchanged
from tests.contracts.algorithms import SUBJECTS, Subject
from tests.helpers import same, snapshot

NAMES = ALGORITHMS.names()
over_algorithms = pytest.mark.parametrize("name", NAMES)
over_subjects = pytest.mark.parametrize("kind", SUBJECTS)


def takes(algorithm: Algorithm, option: str) -> bool:
    return option in inspect.signature(algorithm.run).parameters


def run(name: str, subject: Subject, **options: Any) -> tuple[Any, dict[str, sq.QParams]]:
    algorithm = ALGORITHMS.get(name)
    given = {**algorithm.options, **options}
    if takes(algorithm, "generator") and "generator" not in given:
        given["generator"] = torch.Generator().manual_seed(7)
    if takes(algorithm, "progress"):
        given["progress"] = False
    return algorithm.run(subject.q, subject.params, subject.qparams, subject.batches, **given)


@cache
def done(name: str, kind: str) -> tuple[Subject, Any, dict[str, sq.QParams]]:
    """A subject, and what an algorithm makes of it: most laws only look at that."""
    subject = SUBJECTS[kind]()
    return (subject, *run(name, subject))


def named(subject: Subject, params: Any) -> Mapping[str, Tensor]:
    return subject.q.engine.skeleton.check(params, "test")


def floating(subject: Subject, params: Any, batch: Any) -> Tensor:
    args, kwargs = subject.q.engine.call(batch, "test")
    output: Tensor = subject.q.engine.run_float(named(subject, params), unchanged, args, kwargs)
    return output


@over_algorithms
@over_subjects
def test_inputs_and_model_stay_as_they_are_and_the_same_inputs_give_the_same_bits(name: str, kind: str) -> None:
    subject = SUBJECTS[kind]()
    given = (subject.params, subject.qparams, subject.batches)
    before = snapshot(given), [tensor._version for tensor in leaves(given)]
    model = snapshot(subject.model) if isinstance(subject.model, torch.nn.Module) else None
    first = run(name, subject)
    assert (snapshot(given), [tensor._version for tensor in leaves(given)]) == before
    if model is not None:
        assert snapshot(subject.model) == model
    same(first, done(name, kind)[1:])


@over_algorithms
@over_subjects
def test_names_shapes_and_dtypes_are_kept_and_the_plan_runs(name: str, kind: str) -> None:
    subject, params, qparams = done(name, kind)
    assert type(params) is type(subject.params)
    before, after = named(subject, subject.params), named(subject, params)
    assert {key: (value.shape, value.dtype) for key, value in after.items()} == {
        key: (value.shape, value.dtype) for key, value in before.items()
    }
    assert qparams.keys() == subject.qparams.keys()
    assert list(qparams) == sorted(qparams)
    for key, entry in qparams.items():
        assert entry.scale.shape == subject.qparams[key].scale.shape, key
        assert entry.zero_point.shape == subject.qparams[key].zero_point.shape, key
        assert entry.zero_point.dtype == subject.qparams[key].zero_point.dtype, key
    assert not any(tensor.requires_grad for tensor in (*after.values(), *leaves(qparams)))
    for batch in subject.batches:
        assert bool(subject.q.apply(params, qparams, batch).isfinite().all())


@over_algorithms
@over_subjects
def test_what_rounds_leaves_weights_on_their_grids(name: str, kind: str) -> None:
    if not ALGORITHMS.get(name).rounds:
        pytest.skip("it does not round")
    subject, params, qparams = done(name, kind)
    frozen, baked = subject.q.freeze(params, qparams)
    before, after = named(subject, params), named(subject, baked)
    for quantizer in subject.q.plan:
        site = subject.q.plan.site(quantizer)
        if isinstance(site, WeightSite):
            same(after[site.parameter], before[site.parameter])
    batch = subject.batches[0]
    same(frozen.apply(baked, qparams, batch), subject.q.apply(params, qparams, batch))


@over_algorithms
@over_subjects
def test_what_equalizes_keeps_the_float_model(name: str, kind: str) -> None:
    if not ALGORITHMS.get(name).keeps_float:
        pytest.skip("it changes the float model")
    subject, params, _ = done(name, kind)
    for batch in subject.batches:
        before, after = floating(subject, subject.params, batch), floating(subject, params, batch)
        torch.testing.assert_close(after, before, rtol=0, atol=1e-4 * float(before.abs().max()))


@over_algorithms
@over_subjects
def test_it_never_makes_worse_what_it_measures(name: str, kind: str) -> None:
    measure = ALGORITHMS.get(name).measure
    if measure is None:
        pytest.skip("it proves that for each weight or block")
    subject, params, qparams = done(name, kind)
    before = measure(subject.q, subject.params, subject.params, subject.qparams, subject.batches)
    after = measure(subject.q, subject.params, params, qparams, subject.batches)
    # both are sums in another order than the algorithm's own
    assert float(after) <= float(before) * (1 + 1e-4)


@over_algorithms
def test_where_restricts_the_weights_that_change(name: str) -> None:
    algorithm = ALGORITHMS.get(name)
    if not takes(algorithm, "where") or algorithm.keeps_float:
        pytest.skip("it changes neighbours of a weight, too, or all weights")
    subject = SUBJECTS["convolutions"]()
    chosen = subject.q.plan.site("head.weight_fake_quant")
    params, qparams = run(name, subject, where="head")
    for quantizer in subject.q.plan:
        site = subject.q.plan.site(quantizer)
        if isinstance(site, WeightSite) and site.quantizer != chosen.quantizer:
            same(params[site.parameter], subject.params[site.parameter])
            same(qparams[quantizer], subject.qparams[quantizer])
    with pytest.raises(sq.ConfigError, match="nowhere"):
        run(name, subject, where="nowhere")


class Killed(BaseException):
    """Ends a run where a kill would."""


@over_algorithms
def test_a_killed_run_goes_on_to_the_same_bits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ALGORITHMS.get(name).resumes:
        pytest.skip("it is short")
    kind, path = "language", tmp_path / "run.safetensors"
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


@over_algorithms
def test_the_mode_of_the_model_does_not_matter(name: str) -> None:
    subject, *expected = done(name, "convolutions")
    same(run(name, subject._replace(q=subject.q.train())), tuple(expected))


@over_algorithms
def test_frozen_models_and_data_that_is_none_are_refused(name: str) -> None:
    subject = SUBJECTS["convolutions"]()
    frozen, baked = subject.q.freeze(subject.params, subject.qparams)
    with pytest.raises(sq.StateError, match="frozen"):
        run(name, subject._replace(q=frozen, params=baked))
    with pytest.raises(sq.StateError, match="lack"):
        run(name, subject._replace(qparams={}))


def test_every_algorithm_is_public_documented_and_complete() -> None:
    for name in NAMES:
        function = getattr(sq.algorithms, name)
        assert name in sq.algorithms.__all__
        assert name in dir(sq.algorithms)
        parameters = list(inspect.signature(function).parameters)
        assert parameters[:4] == ["q", "params", "qparams", "batches"]
        assert "Example:" in str(function.__doc__)
