"""Tables of text: as lines of a limited width for terminals and logs, and as HTML for notebooks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from sophq_func.core.errors import ConfigError, explain, raise_all, unknown
from sophq_func.core.texts import html, printable

WIDTH = 100
"""Characters in a line, unless a user asks for another number; few terminals and notebooks show fewer."""

LEAST_WIDTH = 40
"""Below this number, names and settings would be broken in most lines."""

SHARE_OF_NAMES = 40
"""Percent of a line that names may take where not all columns fit: names of quantizers in a transformer need 80 columns."""

GAP = "  "
"""Between two columns."""

INDENT = "    "
"""Before what continues the line above."""

SHOWN = 50
"""Rows of a table in a notebook; a plan of a large model has thousands, and the page would be slow."""

CUT = re.compile(r"(?<=[./_,=(])")
"""Where a word that is longer than a line is broken: behind the signs between the parts of names and of settings."""

LINE = "border-bottom: 1px solid rgba(128, 128, 128, .35);"
"""A half transparent gray, which can be seen on white and on black."""

CELL = f"padding: .25em .8em .25em 0; vertical-align: top; background: none; color: inherit; {LINE}"
"""Style of a cell. A notebook that is not trusted drops style sheets, and keeps the style of an element."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under headings. The first column is the name of a row.

    Attributes:
      headings: of the columns, from left to right.
      rows: each with as many cells as there are headings.
      right: headings of numbers, which are aligned on the right.

    Example:
      >>> table = Table(headings=("name", "bits"), rows=(("conv", "8"), ("head", "16")), right=frozenset(("bits",)))
      >>> print(table.text())
      name  bits
      ----  ----
      conv     8
      head    16
    """

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[str] = frozenset()

    def pick(self, where: str, columns: str | Sequence[str] | None) -> Table:
        """A table with some of the columns, in the order that is asked for; ``None``: all of them.

        Args:
          where: the function that a user called, for errors.
          columns: headings, or a single one.

        Raises:
          ConfigError: a heading that the table does not have; all of them in one message.
        """
        if columns is None:
            return self
        allowed = ", ".join(self.headings)
        if not isinstance(columns, Iterable):
            raise ConfigError(explain(where, "these are no columns", got=columns, allowed=f"a list of some of {allowed}"))
        names = (columns,) if isinstance(columns, str) else tuple(columns)
        raise_all([unknown(where, "column", name, self.headings) for name in names if name not in self.headings])
        if not names:
            raise ConfigError(explain(where, "there are no columns", got=columns, allowed=allowed))
        places = [self.headings.index(name) for name in names]
        return replace(self, headings=names, rows=tuple(tuple(row[i] for i in places) for row in self.rows))

    def text(self, width: int = WIDTH) -> str:
        """The table as lines of at most ``width`` characters, in which nothing is cut off.

        Where the columns do not fit beside each other, a long name has a line of its own, above the cells of its row.
        Columns then stand beside each other, from the left, as far as they fit. Of the others, one that says the same of all
        rows is said once, at the end; the cells of the rest follow below each row, behind their headings.

        Args:
          width: characters.
        """
        return self._printable()._text(width)

    def _printable(self) -> Table:
        """The table with cells that move no cursor, each of one line."""
        headings, *rows = (tuple(map(printable, cells)) for cells in (self.headings, *self.rows))
        return replace(self, headings=headings, rows=tuple(rows))

    def _text(self, width: int) -> str:
        widths = self._widths(width)
        below, everywhere = self._others(len(widths))
        lines = [*self._beside(self.headings, widths, width), GAP.join("-" * size for size in widths)]
        for row in self.rows:
            lines += self._beside(row, widths, width)
            rest = " | ".join(f"{self.headings[i]}: {row[i]}" for i in below if row[i])
            lines += wrapped(rest, width, first=INDENT) if rest else []
        for i in everywhere:
            lines += wrapped(f"{self.headings[i]} of all: {self.rows[0][i]}", width)
        return "\n".join(lines)

    def _widths(self, width: int) -> list[int]:
        """The widths of the columns that stand beside each other, one at least."""
        natural = [max(map(len, cells)) for cells in zip(self.headings, *self.rows, strict=True)]
        if sum(natural) + len(GAP) * (len(natural) - 1) <= width:
            return natural
        names, *others = natural
        widths = [min(names, max(len(self.headings[0]), width * SHARE_OF_NAMES // 100))]
        used = widths[0]
        for size in others:
            used += len(GAP) + size
            if used > width:
                break
            widths.append(size)
        return widths

    def _others(self, beside: int) -> tuple[list[int], list[int]]:
        """Of the columns that do not fit, those whose cells stand below their rows, and those that are said once."""
        below: list[int] = []
        everywhere: list[int] = []
        for i in range(beside, len(self.headings)):
            is_same = len(self.rows) > 1 and len({row[i] for row in self.rows}) == 1
            (everywhere if is_same else below).append(i)
        return below, everywhere

    def _beside(self, cells: Sequence[str], widths: Sequence[int], width: int) -> Iterator[str]:
        """The cells of one row that stand beside each other, below the name if that is long."""
        name, *others = cells[: len(widths)]
        if len(name) > widths[0]:
            yield from wrapped(name, width)
            name = ""
        aligned = []
        for heading, cell, size in zip(self.headings[: len(widths)], (name, *others), widths, strict=True):
            aligned.append(cell.rjust(size) if heading in self.right else cell.ljust(size))
        line = GAP.join(aligned).rstrip()
        if line:
            yield line

    def html(self, title: str, remarks: Iterable[str] = (), marked: Iterable[int] = ()) -> str:
        """The table as a piece of HTML for a notebook, light or dark: no script, no style sheet, no other file.

        Args:
          title: a line above.
          remarks: lines below.
          marked: indices of rows that are written in bold.
        """
        bold = frozenset(marked)
        head = "".join(self._cell("th", heading, heading) for heading in self.headings)
        body = [self._row(row, i in bold) for i, row in enumerate(self.rows[:SHOWN])]
        hidden = len(self.rows) - len(body)
        if hidden:
            more = f'<td colspan="{len(self.headings)}" style="{CELL} text-align: left;">... and {hidden} more</td>'
            body.append(f"<tr>{more}</tr>")
        table = (
            '<table style="border-collapse: collapse; font-size: .9em; background: none; color: inherit;">'
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        )
        below = "".join(f'<div style="font-size: .9em; opacity: .8;">{html(remark)}</div>' for remark in remarks)
        scrolled = f'<div style="overflow-x: auto;">{table}</div>' if self.rows else ""
        return f"<div><div><b>{html(title)}</b></div>{scrolled}{below}</div>"

    def _row(self, row: Sequence[str], is_bold: bool) -> str:
        cells = "".join(self._cell("td", heading, cell) for heading, cell in zip(self.headings, row, strict=True))
        return f'<tr style="font-weight: bold;">{cells}</tr>' if is_bold else f"<tr>{cells}</tr>"

    def _cell(self, tag: str, heading: str, text: str) -> str:
        # a notebook's own style aligns cells on the right
        side = "right" if heading in self.right else "left"
        content = " ".join("<wbr>".join(map(html, _breakable(word))) for word in text.split(" "))
        return f'<{tag} style="{CELL} text-align: {side};">{content}</{tag}>'


def _breakable(word: str) -> list[str]:
    """A word in the pieces between which a browser may break it: only a long one, as cells are made narrow first."""
    return CUT.split(word) if len(word) > LEAST_WIDTH else [word]


def check_width(where: str, width: int) -> None:
    """Check the width that a user asks for.

    Raises:
      ConfigError: it is no integer, or less than :data:`LEAST_WIDTH`.
    """
    if not isinstance(width, int) or isinstance(width, bool) or width < LEAST_WIDTH:
        allowed = f"an integer of at least {LEAST_WIDTH}"
        raise ConfigError(explain(where, "a table cannot have this width", got=width, allowed=allowed, fix=f"width={WIDTH}"))


def wrapped(line: str, width: int = WIDTH, first: str = "", rest: str = INDENT) -> list[str]:
    """A line of text as lines of at most ``width`` characters, broken at spaces; longer words as by :func:`broken`.

    Args:
      line: what it holds of control characters and line breaks is escaped.
      width: characters, with the indent.
      first, rest: indent of the first line, and of all others.

    Example:
      >>> wrapped("float: encoder.layer (Linear, 50.0 %): its weight", 40)
      ['float: encoder.layer (Linear, 50.0 %):', '    its weight']
    """
    longest = width - max(len(first), len(rest))
    lines: list[str] = []
    for word in printable(line).split(" "):
        joined = f"{lines[-1]} {word}" if lines else first + word
        if len(joined) <= width:
            lines[-1:] = [joined]
            continue
        # each piece has a line of its own: a space before it would be read as one in the middle of the word
        for piece in broken(word, longest):
            lines.append((rest if lines else first) + piece)
    return [made.rstrip() for made in lines]


def broken(word: str, width: int) -> list[str]:
    """A word in pieces of at most ``width`` characters, broken behind dots and the like where there are any.

    Example:
      >>> broken("encoder.layer.0.attention", 16)
      ['encoder.layer.0.', 'attention']
    """
    pieces = [""]
    for part in CUT.split(word):
        if pieces[-1] and len(pieces[-1]) + len(part) > width:
            pieces.append("")
        pieces[-1] += part
        while len(pieces[-1]) > width:  # a part without such a sign
            pieces[-1:] = [pieces[-1][:width], pieces[-1][width:]]
    return pieces
