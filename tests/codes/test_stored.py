"""One answer for all that store or report a quantizer: the same grid, or one reason. Everything registered x granularity."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.capture import quantized_operators
from sophq_func.codes import Grid, Refusal, Stored, stored_form
from sophq_func.codes import _slices as slicing
from sophq_func.core.pytree import sorted_dict
from sophq_func.export._linear import LinearCodes
from sophq_func.export._names import ops
from sophq_func.export._program import Program, Target, program
from sophq_func.export._records import records, word_of_sophgo_mq
from sophq_func.export.onnx import _Onnx
from sophq_func.export.torch import _Decomposed
from sophq_func.model.weight_quantizer import arranged
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, FakeQuantize
from sophq_func.numerics.granularity import Granularity
from sophq_func.numerics.layout import expand
from sophq_func.reports._statistics import clipping
from tests.contracts.test_fake_quantize_laws import ALL, VARIANTS
from tests.contracts.test_fake_quantize_laws import made as made_alone
from tests.helpers import Ready, ready, same

GRAINS: dict[str, Granularity] = {
    "tensor": sq.PerTensor(),
    "channel": sq.PerChannel(),
    "group": sq.PerGroup(size=4),
    "block": sq.PerBlock(2, 4),
    "token": sq.PerToken(),
}
OFF_GRID = "its values do not lie on the grid of these qparams"
TORCH = (
    "PT2E has no operators for codes of float8_e4m3fn",
    "PT2E has no operators for codes of float8_e5m2",
    "no operator has codes of a table",
    "no operator has codes of float16",
    "no operator has codes of bfloat16",
    "PT2E has no operators with one scale for each group",
    "no operator has PerToken on a weight",
)
"""What export.torch cannot express, beyond what has no codes."""

TABLES = ("the tables cannot hold a dynamic range", "the tables cannot hold this granularity")
"""What a chip's tables cannot hold, beyond what has no codes."""

ROUNDED_OTHERWISE = ("learnable", "dorefa")
"""``learnable`` multiplies with a neighbour of its scale, as recorded numbers want it; ``dorefa`` divides by its steps."""

LAST_PLACE = 2.0**-22
"""Two units in the last place of a float32, relative to a number just above a power of two."""

over_quantizers = pytest.mark.parametrize("name", ALL)
OF_VALUES = [name for name in ALL if not made_alone(name).needs]
"""Fake quantizers of values: a Hessian is that of the inputs of a weight."""

over_grains = pytest.mark.parametrize("grain", GRAINS)


def spec_of(name: str) -> Any:
    name, options = VARIANTS.get(name, (name, {}))
    return FAKE_QUANTIZERS.spec(name, **options)


class Net(nn.Module):
    """A convolution with a BatchNorm, one channel of which is dead, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.norm.weight.data.uniform_(-2, 2)
        self.norm.weight.data[1] = 0
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def made(name: str, grain: str, **changes: Any) -> tuple[Ready, Tensor]:
    if name == "gptq_columns" and grain not in ("tensor", "channel"):
        pytest.skip("it has no scale for a column: refused")
    torch.manual_seed(0)
    x = torch.randn(4, 4, 3, 3)
    dynamic = grain == "token"
    weight = sq.override(fake_quantize=spec_of(name), granularity=GRAINS[grain], dynamic=dynamic, **changes)
    r = ready(Net().eval(), x, config=sq.QuantConfig(weight=weight))
    noise = r.q.with_noise(r.params, r.qparams, torch.Generator().manual_seed(0), x)
    return r._replace(qparams=noise), x


def value_of(r: Ready, weight: Any) -> Tensor:
    """The weight that ``apply`` multiplies with, BatchNorm folded in."""
    seen = weight.seen(r.params)
    on_grid = weight.fake_quantize.apply(seen, r.qparams[weight.site.quantizer], weight.scheme)
    return arranged(on_grid, weight.site)


def read(found: LinearCodes | Stored) -> Tensor:
    """What the codes of an export stand for: the formula of DequantizeLinear, or the arithmetic that stands in the file."""
    if isinstance(found, Stored):
        return found.read()
    codes, grid = found
    level, scale, zero = codes.float(), grid.scale, grid.zero_point.float()
    granularity: Granularity = sq.PerTensor() if grid.axis is None else sq.PerChannel(grid.axis)
    granularity = sq.PerGroup(0, grid.size) if grid.size else granularity
    return (level - expand(zero, level, granularity)) * expand(scale, level, granularity)


def exported(r: Ready, target: Target) -> tuple[Program | None, str]:
    """The program, or what its refusal says."""
    origin = r.q.plan.origin
    assert origin is not None
    example = origin.graphs[0].example
    assert example is not None
    try:
        return program("export", r.q, r.params, r.qparams, target, False, example), ""
    except sq.ConfigError as error:
        return None, str(error)


def assert_reads(name: str, actual: Tensor, expected: Tensor) -> None:
    if name in ROUNDED_OTHERWISE:
        torch.testing.assert_close(actual, expected, rtol=LAST_PLACE, atol=0)
    else:
        assert torch.equal(actual, expected)


@over_grains
@over_quantizers
def test_weights_have_one_grid_or_one_reason(name: str, grain: str) -> None:
    """Integers, ONNX, torch, tables and reports say the same, and add only what their own form cannot say."""
    r, _ = made(name, grain)
    for weight in r.q.engine.weights:
        check_weight(name, r, weight)


def check_weight(name: str, r: Ready, weight: Any) -> None:
    own, parameter = r.qparams[weight.site.quantizer], weight.site.parameter
    form = stored_form(weight, own, r.params)
    onnx, no_onnx = exported(r, _Onnx(False))
    torch_, no_torch = exported(r, _Decomposed(quantized_operators()))
    clip = clipping(weight.config, own)
    if isinstance(form, Refusal):
        with pytest.raises(sq.StateError) as error:
            sq.convert(r.q, r.params, r.qparams)
        for text in (str(error.value), no_onnx, no_torch):
            assert f"{weight.site.quantizer}" in text and f"because {form.because}" in text
        assert clip is None
    else:
        assert isinstance(form, Stored) and onnx is not None
        expected = value_of(r, weight)
        assert_reads(name, form.read(), expected)
        assert_reads(name, sq.convert(r.q, r.params, r.qparams).weight(parameter), expected)
        assert_reads(name, read((onnx._found.stored | onnx._found.computed)[parameter]), expected)
        if torch_ is None:
            assert any(f"because {reason}" in no_torch for reason in TORCH), no_torch
        else:
            assert_reads(name, read(torch_._found.stored[parameter]), expected)
        if clip is not None and form.grid.is_integer:
            same(clip.step, form.grid.parts["scale"])
    check_tables(r, weight, form)


def check_tables(r: Ready, weight: Any, form: Any) -> None:
    """The steps and zero points of a chip's table are those of the codes."""
    name = weight.site.quantizer
    try:
        rows = records(r.q.plan, r.qparams, ops(r.q.plan, {}), word_of_sophgo_mq)
        found = {record.quantizer: record for record in rows}[name]
    except sq.ConfigError as error:
        because = form.because if isinstance(form, Refusal) else TABLES[0]
        assert any(reason in str(error) for reason in (because, *TABLES))
        return
    if found.has_range and weight.fake_quantize.integer:
        assert isinstance(form, Stored)
        same(torch.tensor(found.steps), form.grid.parts["scale"].reshape(-1))
        same(torch.tensor(found.zero_points, dtype=torch.int32), form.grid.parts["zero_point"].reshape(-1))


@over_grains
@over_quantizers
def test_frozen_weights_have_the_codes_that_they_had(name: str, grain: str) -> None:
    r, _ = made(name, grain)
    frozen, params = r.q.freeze(r.params, r.qparams)
    still = Ready(frozen, params, r.qparams)
    forms = [stored_form(weight, r.qparams[weight.site.quantizer], r.params) for weight in r.q.engine.weights]
    again = [stored_form(weight, r.qparams[weight.site.quantizer], params, frozen=True) for weight in frozen.engine.weights]
    for before, after in zip(forms, again, strict=True):
        if isinstance(before, Refusal):
            assert after == before
        elif isinstance(after, Refusal):  # its range was computed from the weight, of which rounded values are left
            assert grain == "token" and after.because == OFF_GRID
        else:
            assert isinstance(before, Stored) and isinstance(after, Stored)
            same(after.codes, before.codes)
            old, new = dict(before.grid.parts), dict(after.grid.parts)
            if grain == "token" and "scale" in old:  # computed anew from rounded values
                torch.testing.assert_close(new.pop("scale"), old.pop("scale"), rtol=LAST_PLACE, atol=0)
            same(new, old)
    if not any(isinstance(form, Refusal) for form in (*forms, *again)):
        first, second = (sq.convert(made.q, made.params, r.qparams) for made in (r, still))
        assert first.metadata == second.metadata
        for parameter in first.metadata["weights"]:
            same(second.codes(parameter), first.codes(parameter))
        for target in (_Onnx(False), _Decomposed(quantized_operators())):
            (one, why), (two, again_why) = exported(r, target), exported(still, target)
            assert why == again_why
            if one is not None and two is not None:
                for parameter, codes in one._found.stored.items():
                    if codes.codes.dtype != torch.int32:  # biases, whose sums round otherwise
                        same(two._found.stored[parameter], codes)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
@pytest.mark.parametrize("grain", [sq.PerTensor(), sq.PerChannel(1), sq.PerToken()], ids=repr)
@pytest.mark.parametrize("name", OF_VALUES)
def test_values_have_one_grid_or_one_reason(name: str, grain: Granularity, symmetric: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 4, 3, 3)
    activation = sq.override(
        fake_quantize=spec_of(name), granularity=grain, dynamic=grain == sq.PerToken(), symmetric=symmetric
    )
    rules = (sq.Rule(name="*", activation=None), sq.Rule(name="x", activation=activation))
    r = ready(Net().eval(), x, config=sq.QuantConfig(weight=None, rules=rules))
    (quantizer,) = r.q.plan
    piece = r.q.engine.running[quantizer]
    form = stored_form(piece, r.qparams[quantizer])
    onnx, no_onnx = exported(r, _Onnx(False))
    torch_, no_torch = exported(r, _Decomposed(quantized_operators()))
    if isinstance(form, Refusal):
        with pytest.raises(sq.StateError) as error:
            sq.convert(r.q, r.params, r.qparams)
        for text in (str(error.value), no_onnx, no_torch):
            assert f"because {form.because}" in text
        return
    assert isinstance(form, Grid)
    kept = sq.convert(r.q, r.params, r.qparams).metadata["values"][quantizer]
    assert (kept in ("integer", "dynamic")) == form.is_integer
    if form.is_integer and not form.dynamic:
        value = piece.fake_quantize.apply(3 * x, r.qparams[quantizer], piece.scheme)
        scale, zero = (expand(form.parts[part], x, grain) for part in ("scale", "zero_point"))
        low, high = (expand(bound, x, grain) for bound in (form.low, form.high))
        codes = torch.clamp((value / scale).round() + zero, low, high)
        torch.testing.assert_close(form.read(codes), value, rtol=LAST_PLACE, atol=0)
        assert onnx is not None
        grid = onnx._found.grids[quantizer]
        shift = 128 if grid.dtype == torch.uint8 and form.is_signed else 0
        assert (grid.low, grid.high) == (int(form.low.min()) + shift, int(form.high.max()) + shift)
        same(grid.scale, form.parts["scale"])
    for found, why in ((onnx, no_onnx), (torch_, no_torch)):
        assert found is not None or "because " in why


@over_grains
@over_quantizers
def test_sliced_codes_are_those_of_the_whole(name: str, grain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    r, _ = made(name, grain)
    for frozen, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
        params = r.q.freeze(r.params, r.qparams)[1] if frozen else r.params
        given = sorted_dict({n: p.to(dtype) if p.ndim > 1 else p for n, p in params.items()})
        for weight in r.q.engine.weights:
            own = r.qparams[weight.site.quantizer]
            whole = stored_form(weight, own, given, frozen=frozen, wide=True)
            monkeypatch.setattr(slicing, "SIZE", 8)
            parts = stored_form(weight, own, given, frozen=frozen, wide=True)
            monkeypatch.undo()
            assert type(parts) is type(whole)
            if isinstance(whole, Stored) and isinstance(parts, Stored):
                same(parts.codes, whole.codes)
                same(dict(parts.grid.parts), dict(whole.grid.parts))


def test_a_weight_is_cut_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slicing, "SIZE", 8)
    for grain, count in {"tensor": 4, "channel": 4, "group": 4, "block": 4, "token": 1}.items():
        r, _ = made("fixed", grain)
        weight = next(w for w in r.q.engine.weights if w.site.parameter == "head.weight")
        found = list(slicing.slices(weight, r.params, r.qparams[weight.site.quantizer]))
        assert len(found) == (2 if grain == "block" else count)
        assert torch.equal(torch.cat([part.seen for part in found], found[0].axis), r.params["head.weight"])


def test_a_weight_with_nan_has_no_codes() -> None:
    r, _ = made("fixed", "channel")
    broken = {**r.params, "head.weight": torch.full_like(r.params["head.weight"], torch.nan)}
    weight = next(w for w in r.q.engine.weights if w.site.parameter == "head.weight")
    assert stored_form(weight, r.qparams[weight.site.quantizer], broken) == Refusal("the weight holds NaN")


def test_a_fake_quantizer_of_somebody_else_is_looked_at() -> None:
    """One without ``encode`` has codes where its values turn out to be some."""
    r, _ = made("fixed", "channel")
    weight = next(w for w in r.q.engine.weights if w.site.parameter == "head.weight")
    own, expected = r.qparams[weight.site.quantizer], stored_form(weight, r.qparams[weight.site.quantizer], r.params)
    plain = FakeQuantize(weight.fake_quantize.init, weight.fake_quantize.apply)
    found = stored_form(replace(weight, fake_quantize=plain), own, r.params)
    assert isinstance(found, Stored) and isinstance(expected, Stored)
    same(found.codes, expected.codes)
    off = plain._replace(apply=lambda x, *rest: weight.fake_quantize.apply(x, *rest) * 1.001)
    assert stored_form(replace(weight, fake_quantize=off), own, r.params) == Refusal(OFF_GRID)
