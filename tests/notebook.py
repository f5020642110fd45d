"""Reads what a notebook shows of a value."""

from __future__ import annotations

from html.parser import HTMLParser


class Piece(HTMLParser):
    """Reads a piece of HTML, and fails where a tag is not closed in order or could load or run something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("div", "b", "table", "thead", "tbody", "tr", "th", "td", "wbr")
        assert {name for name, _ in attrs} <= {"style", "colspan"}
        assert "url" not in str(attrs)
        if tag != "wbr":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data
