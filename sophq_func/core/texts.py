"""Texts of a model, a file or a user, made safe for where they are shown: one function for each kind of reader."""

from __future__ import annotations

from html import escape

FORMULA = ("=", "+", "-", "@")
"""What a cell of a spreadsheet begins with if it is computed, not shown; tabs before that are escaped anyway."""


def printable(text: str) -> str:
    r"""A text in one line without control characters: those, line breaks and marks of direction as backslash escapes.

    A name with such a character could otherwise move the cursor of a terminal, forge a line of a log, or be read in another
    order than it is stored. Letters of all scripts stay as they are.

    Example:
      >>> printable("layer1.größe"), printable("a\x1b[2Jb\n")
      ('layer1.größe', 'a\\x1b[2Jb\\n')
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def printable_lines(text: str) -> str:
    r""":func:`printable` of each line, in a text of several.

    Example:
      >>> printable_lines("one\ntwo\r")
      'one\ntwo\\r'
    """
    return "\n".join(map(printable, text.split("\n")))


def html(text: str) -> str:
    r"""A text as HTML, XML or SVG show it, also in an attribute: no markup, and no character that XML forbids.

    Example:
      >>> html('<b>"\x00')
      '&lt;b&gt;&quot;\\x00'
    """
    return escape(printable(text))


def cell(value: object) -> object:
    """A value as a cell of CSV: a text that a spreadsheet would compute has an apostrophe before it. Numbers stay numbers.

    Example:
      >>> cell("=1+1"), cell("conv1"), cell(-2.5)
      ("'=1+1", 'conv1', -2.5)
    """
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(FORMULA) else text
