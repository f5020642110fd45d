"""Every observer against recorded ranges, scales and zero points after each of three batches."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import sophq_func as sq
from sophq_func.numerics.contracts import OBSERVERS
from tests.each import each, hold
from tests.golden.cases import Case, cases, compared, params, reason
from tests.quick import few

ONE_SCALE = ("MinMaxFloorObserver", "PoTModeObserver")
"""These have one scale in the reference, also where a channel axis is given."""

CLASSES = sorted({data["class"] for data in cases("observers")})
ALL = [Case("observers", data) for data in cases("observers")]

WIDENS = "defect 13: the reference widens the range by the standard deviation instead of clipping it"
NO_FLOOR = "defect 14: the reference has no smallest step"
L2_SEARCH = "defect 16: the recorded search, one of squared error under the name of KLD, ignores pot_scale"
OLD_ZERO = "defect 15: the reference keeps the zero point of the scale before its rounding"
DEFECTS = {
    **{f"ClipStdObserver_*_{kind}_*": WIDENS for kind in ("normal", "relu", "heavy", "tiny", "shift", "neg")},
    **{f"LSQ*Observer_*_{kind}_*": NO_FLOOR for kind in ("zero", "tiny")},
    "KLDObserver_*_pot_*": L2_SEARCH,
    **{f"{names}_*_aff_*_pot_*": OLD_ZERO for names in ("*MinMaxObserver", "*MSEObserver", "EMAQuantileObserver")},
}


def observer_of(case: Case) -> sq.Observer:
    """The observer of a case; LSQ+ has the reference's rule as an option."""
    options = dict(case.config["observer_args"])
    if case.config["quant_type"]:
        options["quant_type"] = case.config["quant_type"]
    if case.cls == "LSQPlusObserver":
        options["rule"] = "reference"
    return sq.observer(case.cls, **options)


def scheme_of(case: Case) -> sq.QScheme:
    return replace(case.scheme, granularity=sq.PerTensor()) if case.cls in ONE_SCALE else case.scheme


def recorded(case: Case, role: str) -> list[Tensor]:
    """The values after each step; votes are kept with the extremes of all tensors instead of the last one's."""
    found = case.all(role)
    values = list(found[0]) if len(found) == 1 and role != "input" else found
    if case.cls == "PoTModeObserver" and role.endswith("_val"):
        values = list(torch.stack(values).cummin(0).values if role == "min_val" else torch.stack(values).cummax(0).values)
    return values


def follow(case: Case) -> None:
    """Assert that states and qparams are those recorded, after every batch."""
    observer, scheme = observer_of(case), scheme_of(case)
    inputs = case.all("input")
    expected = {role: recorded(case, role) for role in ("min_val", "max_val", "scale", "zero_point")}
    assert {len(values) for values in expected.values()} == {len(inputs)}
    state = observer.init(inputs[0], scheme)
    for step, x in enumerate(inputs):
        state = observer.update(state, x, scheme)
        scale, zero_point, _ = observer.qparams(state, scheme)
        for value, role in ((state.lo, "min_val"), (state.hi, "max_val"), (scale, "scale")):
            wanted = expected[role][step]
            wanted = wanted.expand(value.shape) if wanted.ndim == 0 else wanted.reshape(value.shape)
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-12)
        assert torch.equal(zero_point.long(), expected["zero_point"][step].reshape(zero_point.shape).long())


def after(observer: sq.Observer, scheme: sq.QScheme, *batches: Tensor) -> Any:
    state = observer.init(batches[0], scheme)
    for x in batches:
        state = observer.update(state, x, scheme)
    return state


RUN = compared("observers", *CLASSES, defects=DEFECTS)


@pytest.mark.parametrize("cls", RUN)
def test_follows_the_recording(cls: str, is_quick: bool) -> None:
    hold(follow, few(RUN[cls]) if is_quick else RUN[cls])


@pytest.mark.parametrize(
    "case", params("observers", *CLASSES, defects=DEFECTS, where=lambda case: bool(reason(case, DEFECTS)))
)
def test_is_skipped_by_name(case: Case) -> None:
    follow(case)


def test_every_case_is_counted_by_why_it_is_skipped() -> None:
    def why(case: Case) -> str:
        if case.error:
            return f"{case.cls}: {case.error['type']}"
        return (reason(case, DEFECTS) or "runs").partition(":")[0]

    assert Counter(map(why, ALL)) == {
        "runs": 998,
        "defect 13": 110,
        "defect 14": 32,
        "defect 15": 21,
        "defect 16": 4,
        "EMAMSEObserver: RuntimeError": 33,
        "EMAQuantileObserver: AssertionError": 8,
        "KLDObserver: NotImplementedError": 1,
        "MSEObserver: RuntimeError": 36,
        "MinMaxFloorObserver: OverflowError": 13,
        "MinMaxFloorObserver: ValueError": 15,
        "PoTModeObserver: OverflowError": 13,
        "PoTModeObserver: ValueError": 15,
    }
    assert len(ALL) == 1299


@pytest.mark.parametrize("text", sorted(set(DEFECTS.values())))
def test_no_case_is_skipped_for_nothing(text: str) -> None:
    skipped = [case for case in ALL if reason(case, DEFECTS) == text and not case.error]
    assert skipped
    for case in skipped:
        with pytest.raises(AssertionError):
            follow(case)


@each("case", {case.name: case for case in ALL if case.error})
def test_where_the_reference_failed_there_is_a_grid(case: Case) -> None:
    observer, scheme = observer_of(case), case.scheme
    inputs = case.all("input") or [torch.linspace(-1.0, 2.0, 800).reshape(4, 8, 5, 5)]
    scale, zero_point, _ = observer.qparams(after(observer, scheme, *inputs), scheme)
    channels = [] if not case.config["per_channel"] else [inputs[0].shape[case.config["ch_axis"]]]
    assert list(scale.shape) == list(zero_point.shape) == channels
    assert bool((torch.isfinite(scale) & (scale >= 2**-23)).all())
    assert bool(((zero_point >= scheme.qmin) & (zero_point <= scheme.qmax)).all())


@pytest.mark.parametrize("name", ONE_SCALE)
@pytest.mark.parametrize("symmetric", [True, False])
def test_defect_18_without_a_quant_type_a_value_is_a_tensor(name: str, symmetric: bool) -> None:
    scheme, x = sq.QScheme(symmetric=symmetric), torch.randn(1000)
    plain, tensor = (sq.observer(name, quant_type=kind) for kind in (None, "tensor"))
    assert plain.qparams(after(plain, scheme, x), scheme) == tensor.qparams(after(tensor, scheme, x), scheme)


@pytest.mark.parametrize("name", ["EMAQuantileObserver", "HistogramObserver", *ONE_SCALE])
def test_where_the_reference_has_one_scale_or_none_each_channel_has_that_of_its_own(name: str) -> None:
    observer, x = sq.observer(name), torch.randn(3, 1000) * torch.tensor([[1.0], [5.0], [20.0]])
    scheme = sq.QScheme(granularity=sq.PerChannel(0))
    scales = observer.qparams(after(observer, scheme, x), scheme).scale
    alone = [observer.qparams(after(observer, sq.QScheme(), row), sq.QScheme()).scale for row in x]
    torch.testing.assert_close(scales, torch.stack(alone))


def test_defect_13_clip_std_clips() -> None:
    observer, scheme, x = sq.observer("ClipStdObserver", std_scale=2.0), sq.QScheme(), torch.randn(1000)
    mean, std = x.mean(), x.std()
    state = after(observer, scheme, x)
    torch.testing.assert_close((state.lo, state.hi), (mean - 2 * std, mean + 2 * std))
    assert x.min() < state.lo
    assert state.hi < x.max()
    flat = torch.tensor([-1.0, 1.0])
    assert after(observer, scheme, flat) == (-1.0, 1.0)


@pytest.mark.parametrize("name", ["LSQObserver", "LSQPlusObserver"])
@pytest.mark.parametrize("value", [0.0, 1e-9])
def test_defect_14_steps_have_a_floor(name: str, value: float) -> None:
    observer, scheme = sq.observer(name), sq.QScheme()
    assert observer.qparams(after(observer, scheme, torch.full((4,), value)), scheme).scale == 2**-23


def test_defect_15_zero_point_belongs_to_the_rounded_scale() -> None:
    observer, scheme = sq.observer("minmax"), sq.QScheme(bits=8, symmetric=False, pot_scale=True)
    x = torch.tensor([-1.0, 2.3])
    scale, zero_point, _ = observer.qparams(after(observer, scheme, x), scheme)
    assert torch.equal(torch.log2(scale), torch.log2(scale).round())
    assert zero_point == scheme.qmin - torch.round(-1.0 / scale)


@pytest.mark.parametrize("name", ["histogram", "kld"])
def test_defect_16_both_searches_honour_pot_scale(name: str) -> None:
    observer, x = sq.observer(name), torch.randn(1000)
    plain = observer.qparams(after(observer, sq.QScheme(), x), sq.QScheme()).scale
    power = sq.QScheme(pot_scale=True)
    scale = observer.qparams(after(observer, power, x), power).scale
    assert torch.equal(scale, torch.exp2(torch.log2(plain).round()))


def test_defect_16_the_name_of_the_reference_means_its_search_and_kld_one_of_divergence() -> None:
    assert sq.observers.histogram() == OBSERVERS.spec("KLDObserver") == OBSERVERS.spec("HistogramObserver")
    assert OBSERVERS.aliases("kld") == ["kld"]
    quant = {"chip": "BM1690", "quantmode": "weight_activation", "strategy": "CNN"}
    config = sq.from_dicts({"quant_dict": quant, "extra_qconfig_dict": {"a_observer": "KLDObserver"}})
    half = config.default("activation")
    assert half is not None
    assert half.observer == sq.observers.histogram()
