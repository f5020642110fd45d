"""Formulas of the pages, as the site shows them: MathML, which browsers set without a script."""

from __future__ import annotations

import re

from latex2mathml import converter
from links import outside_code

FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(\S(?:[^$\n]*\S)?)\$", flags=re.DOTALL)
"""TeX between dollars: a formula of its own, or one in a line, where a dollar followed by a space is a dollar."""


def as_mathml(text: str) -> str:
    """A page's Markdown with its TeX as MathML."""
    return outside_code(text, FORMULA, _mathml)


def _mathml(found: re.Match[str]) -> str:
    block, inline = found.groups()
    tex = " ".join((block or inline).split())
    return str(converter.convert(tex, display="block" if block else "inline"))
