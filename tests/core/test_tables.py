"""Tables of text: nothing is cut off, no line is too long, and HTML holds text alone."""

from __future__ import annotations

import re
from html import unescape

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sophq_func as sq
from sophq_func.core.tables import SHOWN, Table, broken, wrapped
from tests.notebook import Piece

words = st.text(alphabet="ab.,_(=)'0", min_size=1, max_size=130)
cells = st.lists(words, max_size=4).map(" ".join)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    count = draw(st.integers(1, 6))
    row = st.tuples(words, *(cells for _ in range(count - 1)))
    headings = tuple(f"heading{i}" for i in range(count))
    return Table(headings=headings, rows=tuple(draw(st.lists(row, max_size=4))), right=frozenset(headings[1::2]))


def solid(text: str) -> str:
    """A text without what breaks its lines."""
    return re.sub(r"\s", "", text)


@given(tables(), st.integers(40, 120))
def test_no_line_is_longer_than_asked_for_and_nothing_is_lost(table: Table, width: int) -> None:
    text = table.text(width)
    assert max(map(len, text.splitlines())) <= width
    for row in table.rows:
        for cell in row:
            assert solid(cell) in solid(text)


def test_columns_stand_beside_each_other_as_far_as_they_fit() -> None:
    rows = (("a", "int8", "why a " + 30 * "x"), ("bb", "int4", "why b"))
    table = Table(headings=("name", "grid", "why"), rows=rows)
    assert table.text().splitlines()[2:] == [f"a     int8  why a {30 * 'x'}", "bb    int4  why b"]
    assert table.text(40).splitlines() == [
        "name  grid",
        "----  ----",
        "a     int8",
        "    why: why a",
        f"    {30 * 'x'}",
        "bb    int4",
        "    why: why b",
    ]


def test_what_is_the_same_in_all_rows_is_said_once_where_it_does_not_fit() -> None:
    rows = (("a", "seldom alike", "everywhere alike"), ("b", "not so", "everywhere alike"))
    lines = Table(headings=("name", "other", "kind"), rows=rows).text(40).splitlines()
    assert lines[2:] == ["a     seldom alike  everywhere alike", "b     not so        everywhere alike"]
    rows = tuple((f"{name}{12 * 'x'}", *cells) for name, *cells in rows)
    lines = Table(headings=("name", "other", "kind"), rows=rows).text(40).splitlines()
    assert lines[2:] == [f"a{12 * 'x'}  seldom alike", f"b{12 * 'x'}  not so", "kind of all: everywhere alike"]


def test_a_long_name_has_a_line_of_its_own_where_columns_do_not_fit() -> None:
    rows = (("a.long.name", "8", "why a"), ("b", "4", 30 * "x"))
    lines = Table(headings=("name", "bits", "why"), rows=rows, right=frozenset(("bits",))).text(46).splitlines()
    assert lines == [
        "name         bits",
        "-----------  ----",
        "a.long.name     8",
        "    why: why a",
        "b               4",
        f"    why: {30 * 'x'}",
    ]
    name = ".".join(["encoder"] * 5)
    lines = Table(headings=("name", "bits"), rows=((name, "8"), ("b", "4"))).text(40).splitlines()
    assert lines == ["name              bits", "----------------  ----", name, f"{16 * ' '}  8", f"b{15 * ' '}  4"]


def test_names_are_broken_behind_dots_and_only_if_they_must() -> None:
    name = ".".join(["encoder"] * 6)
    assert Table(headings=("name",), rows=((name,),)).text(60).splitlines()[2:] == [name]
    lines = Table(headings=("name",), rows=((name,),)).text(40).splitlines()
    assert lines[2:] == ["encoder.encoder.encoder.encoder.", "    encoder.encoder"]


@given(words, st.integers(1, 40))
def test_pieces_of_a_word_make_the_word(word: str, width: int) -> None:
    pieces = broken(word, width)
    assert "".join(pieces) == word
    assert max(map(len, pieces)) <= width


def test_no_space_comes_into_a_word() -> None:
    for size in range(30, 60):
        word = f"{20 * 'a'}.{size * 'b'}"
        assert [line.strip() for line in wrapped(word, 40)] == broken(word, 36)


def test_a_short_line_stays_as_it_is() -> None:
    assert wrapped("float: 1 (Linear, 50.0 %)  two  spaces") == ["float: 1 (Linear, 50.0 %)  two  spaces"]


def test_columns_are_picked_in_any_order_and_all_unknown_ones_are_told() -> None:
    table = Table(headings=("name", "bits"), rows=(("conv", "8"),))
    assert table.pick("here", ("bits", "name")).rows == (("8", "conv"),)
    assert table.pick("here", "bits").headings == ("bits",)
    assert table.pick("here", None) is table
    with pytest.raises(sq.ConfigError, match=r"here: column 'bit' is not known, did you mean 'bits'.*\n.*'nam'"):
        table.pick("here", ("bit", "nam"))
    with pytest.raises(sq.ConfigError, match="no columns"):
        table.pick("here", ())
    with pytest.raises(sq.ConfigError, match="here: these are no columns: got 5, allowed a list of some of name, bits"):
        table.pick("here", 5)  # type: ignore[arg-type]


EVIL = '</td><script>alert("x")</script>&amp;\'<img src=x onerror=alert(1)>'


def test_a_notebook_gets_text_whatever_the_names_are() -> None:
    table = Table(headings=("name", EVIL), rows=((EVIL, "1"),), right=frozenset((EVIL,)))
    piece = Piece(table.html(EVIL, [EVIL]))
    assert piece.rows == [["name", EVIL], [EVIL, "1"]]
    assert piece.text.count(EVIL) == 4
    assert unescape(table.html("")).count("<script>") == 2


def test_a_notebook_gets_the_first_rows_of_many() -> None:
    table = Table(headings=("name", "bits"), rows=tuple((str(i), "8") for i in range(SHOWN + 7)))
    rows = Piece(table.html("many")).rows
    assert len(rows) == 1 + SHOWN + 1
    assert rows[-1] == ["... and 7 more"]
