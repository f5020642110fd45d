"""Checkpoints: what goes in comes out bit for bit, and what does not fit is said by name."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.checkpoint import io, sealed
from sophq_func.core.pytree import leaves
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, OBSERVERS
from tests.helpers import Ready, ready, unchanged
from tests.model.test_quantizers_in_models import quantized

FIXED = sq.QuantConfig(chip="BM1690", weight=sq.override(fake_quantize=sq.fake_quantize.fixed()))
"""Scales of weights are not learned, those of activations are."""


class Net(nn.Module):
    """A convolution with a BatchNorm, a residual, and two linear layers that share a weight."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.first, self.second = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = (x + 1).mean((2, 3))
        return self.second(torch.relu(self.first(x)))


def small(config: sq.QuantConfig | None = None, channels: int = 4, batch: int = 2) -> tuple[Ready, dict[str, Any], Tensor]:
    """A calibrated model, its observer states, and a batch."""
    model, x = Net(channels).eval(), torch.randn(batch, 3, 6, 6)
    r = ready(model, x, config=config or FIXED)
    return r, r.q.observe(r.params, r.q.init(r.params), x)[1], x


def bits(tensor: Tensor) -> tuple[Any, ...]:
    """All that a loaded tensor must have in common with a saved one."""
    data = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), data.view(torch.uint8).tolist() if data.numel() else []


def same_bits(found: Any, saved: Any) -> None:
    """Trees of the same classes, keys and bits."""
    assert type(found) is type(saved)
    if isinstance(saved, dict):
        assert list(found) == sorted(saved)
        for key in saved:
            same_bits(found[key], saved[key])
    elif isinstance(saved, tuple):
        for one, other in zip(found, saved, strict=True):
            same_bits(one, other)
    else:
        assert bits(found) == bits(saved)


def says(error: type[Exception], action: Callable[[], object], *words: str) -> str:
    """The message of the error that an action raises; it has all these words."""
    with pytest.raises(error) as caught:
        action()
    text = str(caught.value)
    for word in words:
        assert word in text, f"{word!r} is missing in: {text}"
    return text


# Round trips


def test_a_whole_checkpoint_comes_back_and_computes_the_same(tmp_path: Path) -> None:
    r, ostate, x = small()
    path = tmp_path / "all.safetensors"
    with unchanged(r.params, r.qparams, ostate):
        sq.save(path, plan=r.q.plan, qparams=r.qparams, ostate=ostate, params=r.params)
    found = sq.load(path).check(r.q).check(r.q.plan)
    assert found.plan == r.q.plan
    assert found.plan.to_json() == r.q.plan.to_json()
    for name, saved in (("qparams", r.qparams), ("ostate", ostate), ("params", r.params)):
        same_bits(getattr(found, name), saved)
    q = sq.build(Net().eval(), found.plan)
    assert torch.equal(q.apply(found.params, found.qparams, x), r(x))
    same_bits(q.qparams(found.params, found.ostate), r.qparams)
    assert dict(found.metadata) == {
        "digest": r.q.plan.digest(),
        "library": sq.__version__,
        "torch": str(torch.__version__),
        "version": str(io.VERSION),
    }
    assert (
        repr(found)
        == f"Checkpoint('{path}': {len(r.params)} params, {len(r.q.plan)} qparams, {len(ostate)} ostate, {r.q.plan!r})"
    )
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("part", ["plan", "qparams", "params"])
def test_each_part_alone_comes_back_and_the_others_are_none(part: str, tmp_path: Path) -> None:
    r, _, _ = small()
    saved = {"plan": r.q.plan, "qparams": r.qparams, "params": r.params}
    sq.save(str(tmp_path / "part"), **{part: saved[part]})
    found = sq.load(str(tmp_path / "part"))
    for name in ("plan", "qparams", "ostate", "params"):
        if name == part == "plan":
            assert found.plan == r.q.plan
        elif name == part:
            same_bits(getattr(found, name), saved[name])
        else:
            assert getattr(found, name) is None
    found.check(r.q)


def test_parts_that_are_empty_are_not_parts_that_are_missing(tmp_path: Path) -> None:
    r = ready(nn.Linear(2, 2), torch.ones(1, 2), config=sq.QuantConfig(weight=None, activation=None))
    sq.save(tmp_path / "a", plan=r.q.plan, qparams={}, ostate={}, params={})
    found = sq.load(tmp_path / "a")
    assert (found.plan, found.qparams, found.ostate, found.params) == (r.q.plan, {}, {}, {})


@pytest.mark.parametrize("granularity", [sq.PerTensor(), sq.PerChannel()], ids=["tensor", "channel"])
@pytest.mark.parametrize("name", OBSERVERS.names())
def test_every_observer_survives_with_its_state(name: str, granularity: Any, tmp_path: Path) -> None:
    options = {"lo": -1.0, "hi": 1.0} if name == "fixed_range" else {}
    change = sq.override(observer=OBSERVERS.spec(name, **options))
    of_weights = sq.override(observer=OBSERVERS.spec(name, **options), scheme=sq.QScheme(granularity=granularity))
    r, ostate, _ = small(sq.QuantConfig(weight=of_weights, activation=change))
    sq.save(tmp_path / "a", plan=r.q.plan, ostate=ostate, qparams=r.qparams)
    found = sq.load(tmp_path / "a").check(r.q)
    same_bits(found.ostate, ostate)
    same_bits(r.q.qparams(r.params, found.ostate), r.qparams)


@pytest.mark.parametrize("name", FAKE_QUANTIZERS.names())
def test_every_fake_quantizer_survives_with_its_qparams(name: str, tmp_path: Path) -> None:
    q, params, qparams, x = quantized(name)
    qparams = q.with_noise(params, qparams, torch.Generator().manual_seed(0), x)
    sq.save(tmp_path / "a", plan=q.plan, qparams=qparams, ostate=q.init(params))
    found = sq.load(tmp_path / "a").check(q)
    same_bits(found.qparams, qparams)
    assert torch.equal(q.apply(params, found.qparams, x), q.apply(params, qparams, x))


@pytest.mark.usefixtures("in_float64")
def test_settings_as_data_survive_one_by_one_and_stacked(tmp_path: Path) -> None:
    r, _, x = small()
    several = [sq.enabled(sq.with_bits(r.qparams, r.q.plan, width), True) for width in (3, 5)]
    for name, saved in (("one", several[0]), ("both", sq.stack(several))):
        sq.save(tmp_path / name, plan=r.q.plan, qparams=saved)
        same_bits(sq.load(tmp_path / name).check(r.q).qparams, saved)
    both = sq.load(tmp_path / "both").qparams
    mapped = torch.vmap(lambda own: r.q.apply(r.params, own, x))(both)
    torch.testing.assert_close(mapped[1], r.q.apply(r.params, several[1], x))


def test_scales_that_have_become_negative_in_training_survive(tmp_path: Path) -> None:
    learned = sq.override(fake_quantize=sq.fake_quantize.learnable())
    r, _, _ = small(sq.QuantConfig(weight=learned, activation=learned))
    negative = {name: own._replace(scale=-own.scale) for name, own in r.qparams.items()}
    sq.save(tmp_path / "a", plan=r.q.plan, qparams=negative)
    same_bits(sq.load(tmp_path / "a").qparams, negative)


base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
KINDS: dict[str, Callable[[], Tensor]] = {
    "not contiguous": lambda: base.t(),
    "a slice": lambda: base[1:3, ::2],
    "expanded": lambda: torch.ones(1).expand(5),
    "channels last": lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "no axes": lambda: torch.tensor(3.5),
    "empty": lambda: torch.empty(0, 3),
    "requires grad": lambda: torch.ones(2, requires_grad=True),
    "a result": lambda: torch.ones(2, requires_grad=True) * 2,
    "a parameter": lambda: nn.Parameter(torch.ones(2)),
    "conjugate": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "negative view": lambda: torch.randn(3, dtype=torch.complex64).conj().imag,
    "NaN with a payload": lambda: torch.tensor([0x7FC01234, -4194301], dtype=torch.int32).view(torch.float32),
    **{str(dtype): lambda dtype=dtype: (torch.randn(5) * 3).to(dtype) for dtype in sealed.CODES},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Casting complex")
def test_tensors_of_every_kind_come_back_plain(kind: str, tmp_path: Path) -> None:
    tensor = KINDS[kind]()
    sq.save(tmp_path / "a", params={"t": tensor})
    found = sq.load(tmp_path / "a").params["t"]
    assert bits(found) == bits(tensor)
    assert type(found) is Tensor
    assert found.is_leaf
    assert not found.requires_grad
    assert found.is_contiguous()
    found.zero_()


def test_tensors_that_share_memory_are_written_each_on_its_own(tmp_path: Path) -> None:
    shared = {"whole": base, "again": base, "row": base[1], "turned": base.t(), "later.row": base[2:]}
    with unchanged(shared):
        sq.save(tmp_path / "a", params=shared)
    found = sq.load(tmp_path / "a").params
    same_bits(found, dict(sorted(shared.items())))
    found["whole"].zero_()
    assert bits(found["again"]) == bits(base)


def test_tensors_go_to_the_device_that_is_asked_for(tmp_path: Path) -> None:
    r, ostate, _ = small()
    sq.save(tmp_path / "a", plan=r.q.plan, qparams=r.qparams, ostate=ostate, params=r.params)
    found = sq.load(tmp_path / "a", device=torch.device("meta"))
    assert all(t.is_meta for part in (found.qparams, found.ostate, found.params) for t in leaves(part))
    says(sq.ConfigError, lambda: sq.load(tmp_path / "a", device="gpu9"), "this is not a device", "'gpu9'")


PART = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="./\\"), min_size=1, max_size=6)
NAME = st.lists(PART, min_size=1, max_size=3).map(".".join)
SHAPE = st.lists(st.integers(0, 3), max_size=4)
DTYPE = st.sampled_from(sorted(sealed.CODES, key=str))


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape, dtype = draw(SHAPE), draw(DTYPE)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    data = torch.randint(
        0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator
    )
    return data.view(dtype).reshape(shape)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(params=st.dictionaries(NAME, tensors(), max_size=4), scales=st.dictionaries(NAME, st.floats(1e-6, 1e6), max_size=3))
def test_names_dtypes_and_shapes_come_back(params: dict[str, Tensor], scales: dict[str, float], tmp_path: Path) -> None:
    qparams = {
        n: sq.QParams(torch.tensor(s), torch.tensor(0, dtype=torch.int32), {"on": torch.tensor(True)})
        for n, s in scales.items()
    }
    sq.save(tmp_path / "a", params=params, qparams=qparams)
    found = sq.load(tmp_path / "a")
    same_bits(found.params, params)
    same_bits(found.qparams, qparams)


def test_other_tools_read_the_file_and_nothing_in_it_is_a_pickle(tmp_path: Path) -> None:
    r, _, _ = small()
    sq.save(tmp_path / "a", plan=r.q.plan, params=r.params)
    with safe_open(tmp_path / "a", framework="pt") as file:
        same_bits({name.removeprefix("params."): file.get_tensor(name) for name in file.keys()}, r.params)  # noqa: SIM118
        assert sq.Plan.from_json(file.metadata()["plan"]) == r.q.plan
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a", weights_only=False)


# What does not fit


def test_a_changed_plan_is_told_quantizer_by_quantizer(tmp_path: Path) -> None:
    r, ostate, _ = small()
    rules = (
        sq.Rule(name="conv", weight=sq.override(bits=4)),
        sq.Rule(name="first", weight=sq.override(scheme=sq.QScheme(bits=8))),
        sq.Rule(name="add", activation=None),
    )
    other, _, _ = small(replace(FIXED, rules=rules))
    sq.save(tmp_path / "a", plan=r.q.plan, qparams=r.qparams, ostate=ostate)
    removed = set(r.q.plan) - set(other.q.plan)
    assert removed
    text = says(
        sq.CheckpointError,
        lambda: sq.load(tmp_path / "a").check(other.q),
        str(tmp_path / "a"),
        "conv.weight_fake_quant: bits is 8 in the file, 4 here",
        "first.weight_fake_quant: granularity is PerChannel(axis=0) in the file, PerTensor() here",
        "qparams of first.weight_fake_quant: scale is torch.float32 (4,), expected torch.float32 ().",
        "ostate of first.weight_fake_quant: lo is torch.float32 (4,), expected torch.float32 ().",
        *(f"unknown to the plan: {name}" for name in removed),
        "Fix: ",
    )
    assert "second" not in text
    sq.save(tmp_path / "b", plan=other.q.plan, qparams=other.qparams)
    says(
        sq.CheckpointError, lambda: sq.load(tmp_path / "b").check(r.q.plan), *(f"missing in the file: {n}" for n in removed)
    )


def test_a_changed_model_is_told_parameter_by_parameter(tmp_path: Path) -> None:
    r, _, _ = small()
    wide, _, _ = small(channels=6)
    sq.save(tmp_path / "a", plan=r.q.plan, qparams=r.qparams, params=r.params)
    text = says(
        sq.CheckpointError,
        lambda: sq.load(tmp_path / "a").check(wide.q),
        "qparams of conv.weight_fake_quant: scale is torch.float32 (4,), expected torch.float32 (6,).",
        "parameter first.weight: torch.float32 (4, 4) in the file, torch.float32 (6, 6) here",
    )
    assert "num_batches_tracked" not in text
    sq.save(tmp_path / "b", params={"conv.weight": r.params["conv.weight"].bfloat16(), "tail": base})
    says(
        sq.CheckpointError,
        lambda: sq.load(tmp_path / "b").check(r.q),
        "parameter conv.weight: torch.bfloat16 (4, 3, 3, 3) in the file, torch.float32 (4, 3, 3, 3) here",
        "unknown to the model: parameter tail",
        "missing in the file: parameter norm.running_var",
    )


def test_an_example_with_another_batch_size_makes_no_difference(tmp_path: Path) -> None:
    r, ostate, _ = small()
    other, _, x = small(batch=5)
    assert other.q.plan != r.q.plan
    sq.save(tmp_path / "a", plan=r.q.plan, qparams=r.qparams, ostate=ostate, params=r.params)
    found = sq.load(tmp_path / "a").check(other.q)
    assert torch.equal(other.q.apply(found.params, found.qparams, x), r(x))


def test_qparams_without_a_plan_are_checked_against_that_of_the_model(tmp_path: Path) -> None:
    r, _, _ = small()
    some = dict(r.qparams)
    lost = some.pop("conv.weight_fake_quant")
    first = some["first.weight_fake_quant"]
    some |= {"tail": lost, "first.weight_fake_quant": first._replace(scale=first.scale[:2])}
    sq.save(tmp_path / "a", qparams=some)
    says(
        sq.CheckpointError,
        lambda: sq.load(tmp_path / "a").check(r.q),
        "missing in the file: conv.weight_fake_quant",
        "unknown to the plan: tail",
        "qparams of first.weight_fake_quant: scale is torch.float32 (2,), expected torch.float32 (4,)",
    )


def test_a_model_that_makes_other_calls_is_told(tmp_path: Path) -> None:
    r, _, _ = small()
    plan = json.loads(r.q.plan.to_json())
    plan["written"], plan["opaque"] = ["x"], ["first"]
    plan["counts"][0][0][2] += 1
    sq.save(tmp_path / "a", plan=sq.Plan.from_json(json.dumps(plan)))
    words = "('x',) in the file, () here", "('first',) in the file", "calls of add in '', example 0: 2 in the file, 1 here"
    says(sq.CheckpointError, lambda: sq.load(tmp_path / "a").check(r.q), *words)
    says(sq.CheckpointError, lambda: sq.load(tmp_path / "a").check(5), "check", "int")  # type: ignore[arg-type]


def changed(own: sq.QParams, **fields: Tensor) -> dict[str, sq.QParams]:
    return {"conv.weight_fake_quant": own._replace(**fields)}


NAN, INF = torch.full((4,), torch.nan), torch.full((4,), torch.inf)
BAD_QPARAMS: dict[str, tuple[Callable[[sq.QParams], dict[str, Any]], tuple[str, ...]]] = {
    "NaN scale": (lambda own: changed(own, scale=NAN), ("scale", "NaN or infinity")),
    "infinite scale": (lambda own: changed(own, scale=INF), ("scale", "NaN or infinity")),
    "negative scale": (lambda own: changed(own, scale=-own.scale), ("scale", "0 or less")),
    "zero scale": (lambda own: changed(own, scale=0 * own.scale), ("scale", "0 or less")),
    "integer scale": (lambda own: changed(own, scale=own.scale.int()), ("scale is torch.int32 (4,)",)),
    "scale of another shape": (
        lambda own: changed(own, scale=own.scale[:2]),
        ("zero_point has the shape (4,), scale (2,)",),
    ),
    "zero point of another shape": (
        lambda own: changed(own, zero_point=own.zero_point[0]),
        ("zero_point is torch.int32 ()",),
    ),
    "boolean zero point": (lambda own: changed(own, zero_point=own.zero_point.bool()), ("zero_point is torch.bool",)),
    "no qparams": (lambda own: {"conv.weight_fake_quant": own.scale}, ("Tensor", "QParams")),
    "a number": (lambda own: changed(own, scale=1.0), ("QParams", "tensors")),  # type: ignore[arg-type]
    "extras with a dot": (lambda own: changed(own, extras={"a.b": own.scale}), ("'a.b'", "extras")),  # type: ignore[arg-type]
    "extras called scale": (lambda own: changed(own, extras={"scale": own.scale}), ("'scale'", "extras")),  # type: ignore[arg-type]
    "a name too many": (lambda own: {"tail": own}, ("'tail'",)),
}


@pytest.mark.parametrize("case", BAD_QPARAMS)
def test_qparams_that_cannot_be_are_refused_before_they_are_written(case: str, tmp_path: Path) -> None:
    change, words = BAD_QPARAMS[case]
    r, _, _ = small()
    wrong = {**r.qparams, **change(r.qparams["conv.weight_fake_quant"])}
    says(sq.CheckpointError, lambda: sq.save(tmp_path / "a", plan=r.q.plan, qparams=wrong), *words)
    assert not list(tmp_path.iterdir())


def test_a_quantizer_that_no_batch_reached_keeps_its_nan_where_the_plan_allows_it(tmp_path: Path) -> None:
    for optional in (True, False):
        r, _, _ = small(replace(FIXED, rules=(sq.Rule(name="*", optional=optional),)))
        name = "conv.weight_fake_quant"
        blank = {**r.qparams, name: r.qparams[name]._replace(scale=NAN)}
        if optional:
            sq.save(tmp_path / "a", plan=r.q.plan, qparams=blank)
            same_bits(sq.load(tmp_path / "a").qparams, blank)
        else:
            says(sq.CheckpointError, lambda r=r, b=blank: sq.save(tmp_path / "a", plan=r.q.plan, qparams=b), "optional=True")


BAD_CALLS: dict[str, tuple[Callable[[Ready, dict[str, Any]], dict[str, Any]], tuple[str, ...]]] = {
    "nothing": (lambda r, o: {}, ("plan=, qparams=",)),
    "states without a plan": (lambda r, o: {"ostate": o}, ("plan=q.plan",)),
    "states that lack one": (lambda r, o: {"plan": r.q.plan, "ostate": dict(list(o.items())[1:])}, ("ostate lacks",)),
    "states of another class": (lambda r, o: {"plan": r.q.plan, "ostate": r.qparams}, ("QParams",)),
    "half states": (
        lambda r, o: {"plan": r.q.plan, "ostate": {n: type(s)(*(t.half() for t in s)) for n, s in o.items()}},
        ("torch.float16", "expected torch.float32", "problems"),
    ),
    "a model for a plan": (lambda r, o: {"plan": r.q}, ("plan=q.plan", "Quantized")),
    "a list of params": (lambda r, o: {"params": [base]}, ("list", "params_of")),
    "a param that is no tensor": (lambda r, o: {"params": {"a": 1.0}}, ("'a'", "float")),
    "a name that is no text": (lambda r, o: {"params": {1: base}}, ("params", "1")),
    "a list of qparams": (lambda r, o: {"qparams": [base]}, ("list",)),
    "a sparse param": (lambda r, o: {"params": {"a": base.to_sparse()}}, ("'params.a'", "sparse")),
    "a param without data": (lambda r, o: {"params": {"a": base.to("meta")}}, ("'params.a'", "meta")),
    "a dtype that the format has not": (lambda r, o: {"params": {"a": base.to(torch.complex128)}}, ("complex128",)),
    "a name like a path": (lambda r, o: {"params": {"../../etc/passwd": base}}, ("empty part",)),
    "an absolute path": (lambda r, o: {"params": {"/etc/passwd": base}}, ("path",)),
    "a line break": (lambda r, o: {"params": {"a\nb": base}}, ("'params.a\\nb'", "printed")),
    "half a character": (lambda r, o: {"params": {"\ud800": base}}, ("printed",)),
    "an empty name": (lambda r, o: {"params": {"": base}}, ("empty part",)),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_what_cannot_be_saved_is_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    given_, words = BAD_CALLS[case]
    r, ostate, _ = small()
    says(sq.CheckpointError, lambda: sq.save(tmp_path / "a", **given_(r, ostate)), str(tmp_path / "a"), *words)
    assert not list(tmp_path.iterdir())


def test_batched_tensors_are_refused(tmp_path: Path) -> None:
    def inside(row: Tensor) -> Tensor:
        sq.save(tmp_path / "a", params={"row": row})
        return row

    says(sq.CheckpointError, lambda: torch.vmap(inside)(base), "'params.row'", "plain")


@pytest.mark.parametrize("path", [5, None, "a\0b", b"a"])
def test_a_path_that_is_none_is_refused(path: Any) -> None:
    says(sq.CheckpointError, lambda: sq.save(path, params={}), "save", "path")
    says(sq.CheckpointError, lambda: sq.load(path), "load", "path")


def test_the_system_speaks_for_itself(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sq.load(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        sq.save(tmp_path / "no" / "a", params={})
    with pytest.raises(IsADirectoryError):
        sq.save(tmp_path, params={})
    assert not list(tmp_path.parent.glob("*.tmp"))
    says(sq.CheckpointError, lambda: sq.load(tmp_path), "folder")
    os.mkfifo(tmp_path / "pipe")
    says(sq.CheckpointError, lambda: sq.load(tmp_path / "pipe"), "device")


# Versions


def old_file(path: Path, r: Ready, version: str = "0") -> None:
    """A file as an invented version 0 had it: scales under another name, and no list of parts."""
    leaves_ = {f"q/{n}/step": own.scale for n, own in r.qparams.items()}
    zeros = {f"q/{n}/zero_point": own.zero_point for n, own in r.qparams.items()}
    text = {"format": "sophq_func", "version": version, "library": "0.0.1", "torch": "2.9", "plan": r.q.plan.to_json()}
    sealed.write(path, {**leaves_, **zeros}, {**text, "digest": r.q.plan.digest()})


def from_zero(tensors: dict[str, Tensor], text: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The step from the invented version 0 to version 1."""
    new = {}
    for name, tensor in tensors.items():
        _, quantizer, field = name.split("/")
        new[f"qparams.{quantizer}.{field.replace('step', 'scale')}"] = tensor
    return new, {**text, "parts": "qparams plan"}


def test_a_file_of_an_old_version_is_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    r, _, _ = small()
    old_file(tmp_path / "a", r)
    says(sq.CheckpointError, lambda: sq.load(tmp_path / "a"), "version is 0", "from 0 to 1")
    monkeypatch.setattr(io, "MIGRATIONS", {**io.MIGRATIONS, 0: from_zero})
    found = sq.load(tmp_path / "a").check(r.q)
    same_bits(found.qparams, r.qparams)
    assert found.metadata["version"] == "0"
    monkeypatch.setattr(
        io, "MIGRATIONS", {**io.MIGRATIONS, 0: lambda tensors, text: (tensors, {**text, "parts": "qparams plan"})}
    )
    says(sq.CheckpointError, lambda: sq.load(tmp_path / "a"), "belongs to none of its parts")


def test_steps_follow_each_other_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    r, _, _ = small()
    old_file(tmp_path / "a", r)
    monkeypatch.setattr(io, "VERSION", 3)
    seen = []

    def step(n: int) -> io.Migration:
        return lambda tensors, text: (seen.append(n), from_zero(tensors, text) if n == 0 else (tensors, text))[1]

    monkeypatch.setattr(io, "MIGRATIONS", {n: step(n) for n in range(3)})
    same_bits(sq.load(tmp_path / "a").qparams, r.qparams)
    assert seen == [0, 1, 2]


def test_histograms_that_were_counted_in_float32_are_read_as_whole_counts(tmp_path: Path) -> None:
    """Counts of version 1 were float32: whole where a bin was never split, sixteenths after one split."""
    of_activations = sq.override(observer=sq.observers.histogram(bins=16))
    r, ostate, _ = small(sq.QuantConfig(weight=sq.override(observer=sq.observers.kld()), activation=of_activations))
    sq.save(tmp_path / "new", plan=r.q.plan, ostate=ostate, qparams=r.qparams)
    tensors, text = sealed.read(tmp_path / "new")
    histograms = [name for name, config in r.q.plan.items() if config.observer.name == "histogram"]
    split = {f"ostate.{name}.counts" for name in histograms}
    assert split and split < {name for name in tensors if name.endswith(".counts")}
    old = {name: (x / 2**20).float() if name in split else x for name, x in tensors.items()}
    sealed.write(tmp_path / "old", old, {**text, "version": "1"})
    found = sq.load(tmp_path / "old").check(r.q)
    assert found.metadata["version"] == "1"
    same_bits(found.ostate, ostate)
    same_bits(r.q.qparams(r.params, found.ostate), r.qparams)
    sealed.write(tmp_path / "bare", {"params.w": torch.ones(2)}, {**_bare(text), "version": "1"})
    same_bits(sq.load(tmp_path / "bare").params, {"w": torch.ones(2)})


def _bare(text: dict[str, str]) -> dict[str, str]:
    """The text of a file that holds params alone."""
    return {key: value for key, value in text.items() if key not in ("plan", "digest")} | {"parts": "params"}


@pytest.mark.parametrize("version", ["3", "-1", "1.0", "", "9" * 5000, "٣"])
def test_a_version_that_nobody_knows_is_refused(version: str, tmp_path: Path) -> None:
    r, _, _ = small()
    old_file(tmp_path / "a", r, version)
    says(sq.CheckpointError, lambda: sq.load(tmp_path / "a"), "version", f"up to {io.VERSION}")


# Failures while writing


def failing(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("there", [True, False], ids=["over a file", "new"])
@pytest.mark.parametrize("fails", ["open", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_no_other(
    fails: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    if there:
        sq.save(path, params={"old": base})
    with monkeypatch.context() as patch:
        patch.setattr(os if fails == "fsync" else Path, fails, failing)
        with pytest.raises(OSError, match="No space left"):
            sq.save(path, params={"new": base})
    assert list(tmp_path.iterdir()) == [path] * there
    assert not there or list(sq.load(path).params) == ["old"]


def test_the_file_is_on_the_disk_before_it_is_renamed_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, Path.replace

    def flushing(file: int) -> None:
        found = os.fstat(file)
        assert stat.S_ISDIR(found.st_mode) or found.st_size > 1000, "flushed before all is written"
        done.append("folder" if stat.S_ISDIR(found.st_mode) else "file")
        fsync(file)

    def renaming(self: Path, target: Path) -> Path:
        done.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(Path, "replace", renaming)
    sq.save(tmp_path / "a", params={"a": torch.zeros(1000)})
    assert done == ["file", "rename", "folder"]


@pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt])
def test_a_write_that_stops_in_the_middle_leaves_the_old_file_and_no_other(
    stop: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    sq.save(path, params={"old": base})
    opened = Path.open

    def breaking(self: Path, mode: str = "r", *args: Any) -> Any:
        file = opened(self, mode, 0) if "x" in mode else opened(self, mode, *args)
        if "x" not in mode:
            return file

        class Breaking:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *error: object) -> None:
                file.close()

            def fileno(self) -> int:
                return file.fileno()

            def write(self, data: bytes) -> None:
                file.write(data[: len(data) // 2])
                raise stop

        return Breaking()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", breaking)
        with pytest.raises(stop):
            sq.save(path, params={"new": base})
    assert list(tmp_path.iterdir()) == [path]
    assert list(sq.load(path).params) == ["old"]


def test_a_disk_that_is_really_full_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a"
    sq.save(path, params={"old": base})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            sq.save(path, params={"new": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [path]
    assert list(sq.load(path).params) == ["old"]


def test_a_link_is_followed_and_the_file_is_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    sq.save(tmp_path / "link", params={"a": base})
    assert (tmp_path / "link").is_symlink()
    assert list(sq.load(tmp_path / "folder" / "file").params) == ["a"]
    (tmp_path / "other").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("folder/file", "other")]
    assert modes[0] == modes[1]


def test_the_longest_name_that_a_folder_takes_is_no_trouble(tmp_path: Path) -> None:
    for name in ("a" * 255, "ä" * 127):
        sq.save(tmp_path / name, params={"a": base})
        assert list(sq.load(tmp_path / name).params) == ["a"]


def test_a_file_of_torch_save_is_told_of_torch_load(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, tmp_path / "weights.pt")
    with pytest.raises(sq.CheckpointError, match=r"a zip file, as torch.save writes one, which torch.load reads"):
        sq.load(tmp_path / "weights.pt")
