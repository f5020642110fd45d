"""Names of any characters in everything that shows them: terminals, HTML, SVG, CSV, DOT, logs, and tables of chips."""

from __future__ import annotations

import csv
import io
import logging
import xml.dom.minidom
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import sophq_func as sq
from sophq_func.core.texts import cell, html, printable, printable_lines
from sophq_func.export._compiler import check_words
from tests.helpers import Ready, ready

X = torch.ones(2, 4)
HOSTILE = (
    "a\x1b[2J\x1b]0;title\x07",  # clears a terminal and sets its title
    "line\nforged line",
    "back\x08\x7f\rover",
    "c1\x9b31m",
    "\u202etxt exe\u2066",  # turns the direction of writing
    "\u2028\ufffe\x00\ud800",  # ends a line, is forbidden in XML, ends a string in C, is no Unicode
    "\t=1+1",
    "=1+1",
    "-2+3",
    "+x",
    "@x",
    "$a_b$",
    "$\\frac{$",
    '"><script>&',
    "back\\slash\\",
)


def hostile(*names: str) -> Ready:
    """A chain of layers with these names."""
    model = nn.Sequential()
    for name in names:
        model.add_module(name, nn.Linear(4, 4))
    model.add_module("last", nn.Linear(4, 4))
    return ready(model.eval(), X, config=sq.QuantConfig(chip="BM1684X", strategy="CNN"))


def checked(text: str) -> str:
    """A text of which no character but the end of a line does anything to a terminal, and no line is the name's own."""
    assert [sign for sign in text if sign != "\n" and not sign.isprintable()] == []
    assert not any(line.startswith("forged") for line in text.splitlines())
    return text


def shown(made: Ready) -> Iterator[str]:
    """Every text about a quantized model."""
    q, params, qparams = made
    report = sq.report(q, params, qparams, [X], progress=False)
    other = sq.quantize(nn.Linear(4, 4), sq.QuantConfig(), example_args=(X,)).plan
    yield from (q.plan.table(), q.plan.table(width=40), str(q.plan.tree()), repr(q), str(q.plan.coverage), q.plan.to_dot())
    yield from (str(q.plan.diff(other)), str(other.diff(q.plan)), *map(q.plan.explain, q.plan))
    yield from (str(report), repr(report), *map(repr, report.rows))
    yield from (q.plan._repr_html_(), report._repr_html_(), sq.convert(q, params, qparams)._repr_html_())
    for wrong in ({}, {"x\x1b": torch.ones(1)}):
        with pytest.raises(sq.StateError) as caught:
            q.apply(wrong, qparams, X)
        yield str(caught.value)
    with pytest.raises(sq.ConfigError) as refused:
        q.plan.with_bits({"x\x1b\r": 4})
    yield str(refused.value)


def test_no_name_moves_a_cursor_or_forges_a_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "sophq_func"):
        made = hostile(*HOSTILE)
    assert caplog.messages
    for text in (*caplog.messages, *shown(made)):
        checked(text)


def test_files_with_such_names_stay_what_they_are(tmp_path: Path) -> None:
    q, params, qparams = hostile(*HOSTILE)
    report = sq.report(q, params, qparams, [X], progress=False)
    checked(report.to_html(tmp_path / "a.html").read_text())
    drawn = sq.draw(q.plan, tmp_path / "a.svg").read_text()
    xml.dom.minidom.parseString(drawn)
    checked(drawn)
    cells = [one for row in csv.reader(io.StringIO(report.to_csv(tmp_path / "a.csv").read_text())) for one in row]
    assert [name for name in HOSTILE if not any(printable(name) in one for one in cells)] == []
    assert [one for one in cells if one.startswith(("=", "+", "-", "@", "\t", "\r")) and not is_number(one)] == []


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def test_numbers_are_not_guarded() -> None:
    assert [cell(value) for value in (-1, -0.5, None, "-1", "a")] == [-1, -0.5, None, "'-1", "a"]


@pytest.mark.parametrize("text", ["layer1.0.größe", "層", "a b", "", "e\u0301"])
def test_names_in_any_script_stay_as_they_are(text: str) -> None:
    assert printable(text) == printable_lines(text) == html(text) == text


def test_a_name_is_escaped_once() -> None:
    once = printable("a\x1b\n\\")
    assert once == "a\\x1b\\n\\" == printable(once)


@pytest.mark.parametrize("name", ["sp ace", "#hash", "line\nforged", "tab\t", "nul\x00", "\u2003wide", ""])
def test_tables_of_chips_refuse_names_that_a_line_cannot_hold(name: str) -> None:
    with pytest.raises(sq.ConfigError, match="cannot hold the name") as caught:
        check_words([name, "fine_Conv"], "rename it")
    checked(str(caught.value))
    check_words(["fine_Conv", "größe"], "rename it")


def test_tables_check_their_names_before_a_file_is_written(tmp_path: Path) -> None:
    with pytest.raises(sq.ConfigError, match="cannot hold the name '#1_Gemm_weight'"):
        sq.export.tables(*hostile("#1"), tmp_path, compiler="sophgo-mq")
    names = {"input.post_act_fake_quantizer": "x\ny"}
    with pytest.raises(sq.ConfigError, match="cannot hold the name"):
        sq.export.tables(*hostile("a"), tmp_path, compiler="sophgo-mq", names=names)
    with pytest.raises(sq.ConfigError, match="file names cannot begin"):
        sq.export.tables(*hostile("a"), tmp_path, name="a\nb", compiler="sophgo-mq")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_unicode_is_refused_before_a_model_is_captured(tmp_path: Path) -> None:
    made = hostile("\ud800")
    with pytest.raises(sq.ConfigError, match="no Unicode"):
        sq.export.onnx(*made, X, tmp_path / "a.onnx")
    with pytest.raises(sq.ConfigError, match="no Unicode"):
        sq.export.tables(*made, tmp_path, example_args=X)
    assert list(tmp_path.iterdir()) == []
