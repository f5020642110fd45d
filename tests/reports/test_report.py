"""The report: its figures against independent computations, and what it looks like as text, CSV and HTML."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.numerics.contracts import FAKE_QUANTIZERS
from tests.golden.models import DeconvNet, ResidualConvNet
from tests.helpers import Ready, ready, unchanged
from tests.notebook import Piece

CLOSE = 1e-5
"""Relative; sums of float32 values in float64, against float32 sums."""

VOID = frozenset(("meta", "br", "wbr", "hr", "img", "link", "input"))


def config(*rules: sq.Rule, bits: int = 4) -> sq.QuantConfig:
    half = sq.override(bits=bits)
    return sq.QuantConfig(strategy="CNN", weight=half, activation=half, rules=rules)


def prepared(*rules: sq.Rule, bits: int = 4) -> tuple[Ready, list[Tensor]]:
    torch.manual_seed(0)
    model, batches = ResidualConvNet().eval(), [torch.randn(2, 3, 12, 12), 2 * torch.randn(3, 3, 12, 12)]
    return ready(model, batches[0], config=config(*rules, bits=bits)), batches


def measured(*rules: sq.Rule) -> tuple[sq.Report, Ready, list[Tensor]]:
    made, batches = prepared(*rules)
    return sq.report(*made, batches, progress=False), made, batches


def with_a_bad_layer() -> tuple[sq.Report, Ready]:
    """All at 8 bits, and one weight at 2."""
    rule = sq.Rule(name="conv3.weight_fake_quant", weight=sq.override(bits=2))
    made, batches = prepared(rule, bits=8)
    return sq.report(*made, batches[:1], progress=False), made


@pytest.mark.usefixtures("in_float64")
def test_the_share_is_the_squared_error_of_the_output_with_each_alone() -> None:
    found, (q, params, qparams), batches = measured()
    off = sq.enabled(qparams, False)
    errors = dict.fromkeys(qparams, 0.0)
    signal = total = 0.0
    for x in batches:
        truth = q.apply(params, off, x)
        signal += float(truth.square().sum())
        total += float((q.apply(params, qparams, x) - truth).square().sum())
        for name in qparams:
            out = q.apply(params, {**off, name: qparams[name]}, x)
            errors[name] += float((out - truth).square().sum())
    for row in found.rows:
        assert row.error == pytest.approx(errors[row.quantizer] / signal, rel=1e-3)
        assert row.share == pytest.approx(errors[row.quantizer] / sum(errors.values()), rel=1e-3)
    assert {row.quantizer for row in found.rows} == set(qparams)
    assert math.isclose(sum(row.share for row in found.rows), 1, rel_tol=1e-9)
    assert found.sqnr_db == pytest.approx(10 * math.log10(signal / total), abs=1e-2)


def test_rows_come_with_the_largest_share_first() -> None:
    found, made = with_a_bad_layer()
    shares = [row.share for row in found.rows]
    assert shares == sorted(shares, reverse=True)
    assert found.rows[0].quantizer == "conv3.weight_fake_quant"
    assert [row.position for row in sorted(found.rows, key=lambda row: list(made.q.plan).index(row.quantizer))] == list(
        range(len(found.rows))
    )


def test_noise_and_range_of_activations_are_those_of_all_batches_together() -> None:
    found, (q, params, qparams), batches = measured()
    runs = [q.capture(params, qparams, x) for x in batches]
    for name in (name for name in q.plan if q.plan.site(name).role == "activation"):
        x, y = (torch.cat([run[name][i].flatten() for run in runs]).double() for i in (0, 1))
        row = found[name]
        assert (row.low, row.high) == (float(x.min()), float(x.max()))
        assert row.sqnr_db == pytest.approx(float(10 * (x.square().sum() / (y - x).square().sum()).log10()), rel=CLOSE)
        assert row.cosine == pytest.approx(float(torch.cosine_similarity(x, y, dim=0)), rel=CLOSE)
        step, bits = float(qparams[name].scale), q.plan[name].scheme.bits
        assert (row.clip_low, row.clip_high) == pytest.approx((-(2 ** (bits - 1)) * step, (2 ** (bits - 1) - 1) * step))
        assert row.step == step
        code = (x / step).round()
        assert row.clipped == pytest.approx(float(((code < -8) | (code > 7)).double().mean()), abs=1e-3)
        assert sum(row.histogram) == pytest.approx(len(x), abs=32)  # half a value a bin, where bins were split
        exact = torch.histc(x, 64, row.low, row.high)
        assert float((torch.tensor(row.histogram) - exact).abs().sum()) < 0.15 * len(x)
    assert any(row.clipped for row in found.rows)


def test_one_batch_says_what_fidelity_says() -> None:
    made, batches = prepared()
    found = sq.report(*made, batches[:1], progress=False)
    plain = [name for name in made.q.plan if not made.q.plan.site(name).norm]
    expected = sq.fidelity(*made, batches[0])
    assert len(plain) > 4
    for name in plain:
        row, own = found[name], expected[name]
        assert (row.low, row.high) == (float(own.lo), float(own.hi))
        assert row.sqnr_db == pytest.approx(float(own.sqnr_db), rel=1e-4)


def test_a_weight_is_judged_with_its_norm_folded_in() -> None:
    found, (q, params, qparams), _ = measured()
    name = "conv1.weight_fake_quant"
    factor = params["bn1.weight"] / (params["bn1.running_var"] + 1e-5).sqrt()
    weight = params["conv1.weight"] * factor.reshape(-1, 1, 1, 1)
    assert q.plan.site(name).norm == "bn1"
    assert (found[name].low, found[name].high) == pytest.approx((float(weight.min()), float(weight.max())))
    made = q.quantize_value(name, weight, qparams[name])
    ratio = weight.double().square().sum() / (made.double() - weight.double()).square().sum()
    assert found[name].sqnr_db == pytest.approx(float(10 * ratio.log10()), rel=CLOSE)


def test_clipping_per_channel_counts_each_channel_by_its_own_grid() -> None:
    layer, x = nn.Linear(2, 2, bias=False).eval(), torch.ones(1, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 8.0], [0.1, 0.05]]))
    q, params, qparams = ready(layer, x, config=sq.QuantConfig(weight=sq.override(bits=4), activation=None))
    scale = torch.tensor([0.5, 0.5])
    narrow = {"weight_fake_quant": qparams["weight_fake_quant"]._replace(scale=scale)}
    row = sq.report(q, params, narrow, [x], progress=False).rows[0]
    assert (row.clip_low, row.clip_high, row.clipped) == (-4, 3.5, 0.25)
    narrow = {"weight_fake_quant": qparams["weight_fake_quant"]._replace(scale=torch.tensor([2.0, 0.01]))}
    row = sq.report(q, params, narrow, [x], progress=False).rows[0]
    assert (row.clip_low, row.clip_high, row.clipped) == (-16, 14, 0.25)


def test_sizes_are_codes_and_scales_of_weights_and_all_else_as_it_is() -> None:
    found, (q, params, _), _ = measured()
    weights = {name: params[q.plan.site(name).parameter] for name in q.plan if q.plan.site(name).parameter}
    for name, weight in weights.items():
        assert found[name].bytes_before == 4 * weight.numel()
        assert found[name].bytes_after == weight.numel() // 2 + 4 * weight.shape[0]
    assert all(row.bytes_before == 0 for row in found.rows if row.role == "activation")
    assert found.bytes_before == sum(p.numel() * p.element_size() for p in params.values())
    saved = sum(4 * w.numel() - w.numel() // 2 - 4 * w.shape[0] for w in weights.values())
    assert found.bytes_after == found.bytes_before - saved


SIZES = {
    "e4m3": (sq.fake_quantize.e4m3(), 64 * 1 + 4),
    "fp16": (sq.fake_quantize.fp16(), 64 * 2),
    "mxfp4": (sq.fake_quantize.mxfp4(), 64 // 2 + 64 // 32),
    "mxfp6": (sq.fake_quantize.mxfp6(), 64 * 6 // 8 + 64 // 32),
    "nvfp4": (sq.fake_quantize.nvfp4(), 64 // 2 + 64 // 16 + 4),
    "nf4": (sq.fake_quantize.fp4(data_type="nf4"), 64 // 2 + 4),
    "fp6 in groups": (sq.fake_quantize.fpxgroup(group_size=32), 64 * 6 // 8 + 2 * 4),
    "integers": (sq.fake_quantize.fixed(), 64 * 3 // 8 + 4),
}


@pytest.mark.parametrize(("fake", "size"), SIZES.values(), ids=SIZES)
def test_formats_are_stored_in_their_own_width(fake: sq.Spec, size: int) -> None:
    layer, x = nn.Linear(32, 2, bias=False).eval(), torch.randn(1, 32)
    weight = sq.override(bits=3, fake_quantize=fake, granularity=sq.PerTensor())
    q, params, qparams = ready(layer, x, config=sq.QuantConfig(weight=weight, activation=None))
    row = sq.report(q, params, qparams, [x], progress=False).rows[0]
    assert (row.bytes_before, row.bytes_after) == (256, size)


@pytest.mark.parametrize("field", ["scale", "zero_point"])
@pytest.mark.parametrize("quantizer", ["weight_fake_quant", "post_act_fake_quantizer"])
def test_numbers_that_are_none_make_no_report(quantizer: str, field: str) -> None:
    q, params, qparams = ready(nn.Linear(4, 2).eval(), x := torch.randn(3, 4), config=config())
    quantizer = next(name for name in q.plan if name.endswith(quantizer))
    nothing = torch.full_like(getattr(qparams[quantizer], field), torch.nan, dtype=torch.float32)
    broken = qparams | {quantizer: qparams[quantizer]._replace(**{field: nothing})}
    with pytest.raises(sq.StateError, match=f"{quantizer}.*{field}"):
        sq.report(q, params, broken, [x], progress=False)


@pytest.mark.parametrize("name", sorted(FAKE_QUANTIZERS))
def test_every_fake_quantizer_can_be_reported(name: str) -> None:
    x = torch.randn(4, 16)
    half = sq.override(bits=4, fake_quantize=FAKE_QUANTIZERS.spec(name))
    q, params, qparams = ready(nn.Linear(16, 16).eval(), x, config=sq.QuantConfig(weight=half, activation=half))
    qparams = q.with_noise(params, qparams, torch.Generator().manual_seed(0), x)
    found = sq.report(q, params, qparams, [x], progress=False)
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    assert 0 < found["weight_fake_quant"].bytes_after < found["weight_fake_quant"].bytes_before
    assert all(row.clipped is None or 0 <= row.clipped <= 1 for row in found.rows)
    assert found.table() and _checked(found)


def test_quantizers_that_only_observe_have_no_share_and_dynamic_ones_no_clipping() -> None:
    quiet, moving = "conv1.weight_fake_quant", "conv2.weight_fake_quant"
    found, _, _ = measured(sq.Rule(name=quiet, observe_only=True), sq.Rule(name=moving, weight=sq.override(dynamic=True)))
    assert found[quiet].observe_only and found[quiet].share == 0
    assert found[quiet].bytes_after == found[quiet].bytes_before
    assert math.isfinite(found[quiet].sqnr_db)
    assert (found[moving].clip_low, found[moving].clip_high, found[moving].clipped) == (None, None, None)
    assert found[moving].share > 0


def test_grouped_deconvolutions_are_reported() -> None:
    model, x = nn.ConvTranspose2d(4, 6, 2, groups=2).eval(), torch.randn(1, 4, 3, 3)
    found = sq.report(*ready(model, x, config=config()), [x], progress=False)
    assert found["weight_fake_quant"].share > 0
    model = DeconvNet().eval()
    x = torch.randn(1, 3, 8, 8)
    assert sq.report(*ready(model, x, config=config()), [x], progress=False)["up1.weight_fake_quant"].share > 0


@pytest.mark.usefixtures("in_float64")
def test_all_ways_of_running_agree_and_nothing_changes() -> None:
    made, batches = prepared()
    masked = made._replace(qparams=sq.enabled(made.qparams, 0.5))
    with unchanged(made.params, masked.qparams, batches):
        found = {how: sq.report(*masked, batches, how=how, progress=False) for how in ("loop", "vmap")}
    for row in found["loop"].rows:
        assert found["vmap"][row.quantizer].share == pytest.approx(row.share, rel=1e-3)
    assert sq.report(*made, batches, how="loop", progress=False) == found["loop"]


def test_a_model_of_several_outputs_and_keyword_batches() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> dict[str, Any]:
            y = self.fc(x)
            return {"logits": y, "top": y.argmax(-1), "aux": (y * 2,)}

    x = torch.randn(3, 4)
    q, params, qparams = ready(Two().eval(), x, config=config())
    found = sq.report(q, params, qparams, [{"x": x}, (x,)], progress=False)
    assert found.batches == 2
    assert sum(row.share for row in found.rows) == pytest.approx(1)


Change = Callable[[Ready, list[Tensor]], Any]
REFUSED: dict[str, tuple[Change, str]] = {
    "training": (lambda r, b: sq.report(r.q.train(), r.params, r.qparams, b), "training mode"),
    "one tensor": (lambda r, b: sq.report(*r, b[0]), "these batches cannot be observed"),
    "nothing": (lambda r, b: sq.report(*r, []), "no batches to observe"),
    "number": (lambda r, b: sq.report(*r, [1.0]), "this batch"),
    "qparams": (lambda r, b: sq.report(r.q, r.params, {}, b), "not calibrated"),
}


@pytest.mark.parametrize(("call", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_reported_is_refused(call: Change, words: str) -> None:
    made, batches = prepared()
    with pytest.raises(sq.StateError, match=words):
        call(made, batches)


def test_the_report_of_a_frozen_model_shows_the_same_values_and_no_noise_of_weights() -> None:
    made, batches = prepared()
    whole = sq.report(*made, batches, progress=False)
    frozen, params = made.q.freeze(made.params, made.qparams)
    found = sq.report(frozen, params, made.qparams, batches, progress=False)
    assert {row.quantizer for row in found.rows} == {row.quantizer for row in whole.rows}
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    for row in whole.rows:
        own = found[row.quantizer]
        assert own.grid == row.grid
        same = ["clip_low", "clip_high", "step", "bytes_before", "bytes_after"]
        if row.role == "activation":
            same += ["low", "high", "clipped", "sqnr_db", "cosine"]
        else:
            assert own.sqnr_db == math.inf
            assert own.share == pytest.approx(0, abs=1e-9), "two runs that differ in the order of their sums at most"
        for name in same:
            assert getattr(own, name) == pytest.approx(getattr(row, name), rel=CLOSE), (row.quantizer, name)


def test_an_output_without_floating_tensors_is_refused() -> None:
    class Top(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(-1)

    x = torch.randn(2, 4)
    made = ready(nn.Sequential(Top(4, 4)).eval(), x, config=config())
    with pytest.raises(sq.StateError, match="this output"):
        sq.report(*made, [x], progress=False)


def test_a_row_is_found_by_either_spelling_and_near_names_are_told() -> None:
    found, _, _ = measured()
    assert found["conv1_weight_fake_quant"] is found["conv1.weight_fake_quant"]
    with pytest.raises(KeyError, match=r"did you mean 'conv1\.weight_fake_quant'"):
        found["conv1.weight_fake_quantt"]


def test_csv_holds_every_row_in_full(tmp_path: Path) -> None:
    found, _, _ = measured(sq.Rule(name="conv2.weight_fake_quant", weight=sq.override(dynamic=True)))
    path = found.to_csv(tmp_path / "report.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [field.name for field in fields(sq.ReportRow) if field.name != "histogram"]
    assert list(rows[0]) == names
    for text, row in zip(rows, found.rows, strict=True):
        for name in names:
            value = getattr(row, name)
            read = text[name] if isinstance(value, str) else None if text[name] == "" else type(value)(text[name] == "True")
            if isinstance(value, int | float) and not isinstance(value, bool):
                read = type(value)(text[name])
            assert read == value, name


def test_the_table_names_the_worst_first() -> None:
    found, _ = with_a_bad_layer()
    assert repr(found).startswith("Report(ResidualConvNet: output SQNR ")
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[1].startswith("conv3.weight_fake_quant makes ")
    first = [line.split()[0] for line in lines[3:]]
    places = [first.index(row.quantizer) for row in found.rows]
    assert places == sorted(places)
    above, _, picked = found.table(columns=("quantizer", "grid"), width=60).partition("\n\n")
    assert max(map(len, above.splitlines())) <= 60
    head, _, first_row, *_ = picked.splitlines()
    assert head.split() == ["quantizer", "grid"]
    assert first_row.split()[:2] == ["conv3.weight_fake_quant", "int2"]
    with pytest.raises(sq.ConfigError, match=r"report\.table: column 'SQN' is not known, did you mean 'SQNR'"):
        found.table(columns=("SQN",))


def test_a_notebook_shows_the_table() -> None:
    found, _ = with_a_bad_layer()
    piece = Piece(found._repr_html_())
    assert [row[0] for row in piece.rows[1:]] == [row.quantizer for row in found.rows]
    assert "conv3.weight_fake_quant makes" in piece.text and "output SQNR" in piece.text


def test_a_narrow_console_cuts_nothing_off() -> None:
    console = pytest.importorskip("rich.console").Console(width=60, file=io.StringIO())
    found, _ = with_a_bad_layer()
    console.print(found)
    assert "…" not in console.file.getvalue()


def test_rich_prints_a_report_in_colors() -> None:
    console = pytest.importorskip("rich.console").Console(width=250, force_terminal=True, file=io.StringIO())
    found, _ = with_a_bad_layer()
    console.print(found)
    styled = console.file.getvalue()
    assert "\x1b[1;31mconv3.weight_fake_quant" in styled


class Page(HTMLParser):
    """Reads a page, and fails where tags are not closed in order or something outside is named."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.values: list[list[str]] = []
        self.bars: list[float] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            assert name not in ("src", "href", "xlink:href", "srcset", "action", "data") and not name.startswith("on"), name
            assert "url(" not in str(value) and "//" not in str(value), value
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.values.append([])
        if tag == "data":
            (self.values or [[]])[-1].append(str(dict(attrs)["value"]))
        if tag == "rect" and self.open[-3:-1] == ["td", "svg"] and dict(attrs).get("class") is None:
            self.bars.append(float(str(dict(attrs)["width"])))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _checked(found: sq.Report) -> Page:
    """The page of a report, parsed."""
    from sophq_func.reports._html import page

    text, parser = page(found), Page()
    parser.feed(text)
    parser.close()
    assert not parser.open
    assert not parser.tags & {"script", "link", "iframe", "object", "embed", "img", "base"}
    for word in ("http:", "https:", "@import", "url(", "<script", "nan", 'inf"'):
        assert word not in text, word
    return parser


def test_the_page_holds_what_the_rows_hold(tmp_path: Path) -> None:
    found, _, _ = measured(sq.Rule(name="conv2.weight_fake_quant", weight=sq.override(dynamic=True)))
    page = _checked(found)
    shown = page.values[1:]
    assert len(shown) == len(found.rows)
    for values, row in zip(shown, found.rows, strict=True):
        expected = [row.share, row.sqnr_db, row.cosine, row.clipped, row.low, row.high, row.clip_low, row.clip_high]
        sizes = [row.bytes_before, row.bytes_after] if row.bytes_before else []
        assert values == [repr(value) for value in (*expected, *sizes) if value is not None]
    assert page.bars == pytest.approx([100 * row.share for row in found.rows], abs=0.005)
    assert f"{found.rows[0].quantizer} makes" in page.text
    path = found.to_html(tmp_path / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_hostile_names_are_text_and_nothing_more() -> None:
    found, _, _ = measured()
    evil = '</title><script>alert("x")</script>&amp;\'"><img src=x onerror=alert(1)>'
    rows = tuple(replace(row, quantizer=f"{evil}{i}", where=evil, grid=evil) for i, row in enumerate(found.rows))
    page = _checked_hostile(replace(found, rows=rows, model=evil, digest=evil))
    assert page.text.count(evil) >= len(rows)
    assert "img" not in page.tags and "script" not in page.tags


def _checked_hostile(found: sq.Report) -> Page:
    from sophq_func.reports._html import page

    parser = Page()
    parser.feed(page(found))
    parser.close()
    assert not parser.open
    return parser


def test_degenerate_values_make_a_whole_page() -> None:
    found, _, _ = measured()
    odd = {
        "low": 0.0,
        "high": 0.0,
        "clip_low": 0.0,
        "clip_high": 0.0,
        "step": 0.0,
        "sqnr_db": math.inf,
        "histogram": (4, 0, 0),
    }
    strange = replace(found.rows[0], **odd)
    unseen = replace(found.rows[1], low=math.nan, high=math.nan, clip_low=math.nan, clip_high=math.nan, histogram=())
    for rows in ((strange, unseen), (replace(strange, share=0.0),), ()):
        assert _checked_hostile(replace(found, rows=rows)).text


def test_files_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _, _ = measured()
    with pytest.raises(sq.StateError, match="folder"):
        found.to_html(tmp_path / "none" / "report.html")
    with pytest.raises(sq.StateError, match="path"):
        found.to_csv(tmp_path)

    def full(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        found.to_html(tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []
