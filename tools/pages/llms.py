"""The text of llms.txt: what the library is, and where each page is, for readers that are programs."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
GENERATED = ("Made by",)
"""How a paragraph begins that says how its page is made, not what the page is about."""


class Entry(NamedTuple):
    """A page of the site, with its Markdown."""

    section: str
    title: str
    url: str
    markdown: str


def text(name: str, description: str, pages: Sequence[Entry]) -> str:
    """The file: a heading, a summary, and under each section a link to each page with its first sentence.

    Example:
      >>> print(text("demo", "A demo.", [Entry("How-to", "Rules", "rules.html", "# Rules\\n\\nOne line. Another.")]))
      # demo
      <BLANKLINE>
      > A demo.
      <BLANKLINE>
      ## How-to
      <BLANKLINE>
      * [Rules](rules.html): One line.
      <BLANKLINE>
    """
    parts = [f"# {name}", f"> {description}"]
    for section, own in itertools.groupby(pages, key=lambda page: page.section):
        parts += [f"## {section}", "\n".join(map(_line, own))]
    return "\n\n".join(parts) + "\n"


def _line(page: Entry) -> str:
    said = first_sentence(page.markdown)
    return f"* [{page.title}]({page.url})" + (f": {said}" if said else "")


def first_sentence(markdown: str) -> str:
    """The first sentence of the first paragraph, without links and tags; empty where a page has no paragraph.

    Example:
      >>> first_sentence("# Title\\n\\nSee [this](a.md) page,\\nwhich helps. And so on.")
      'See this page, which helps.'
    """
    for block in re.split(r"\n\s*\n", markdown):
        if re.match(r"[A-Z`]", block) and not block.startswith(("```", *GENERATED)):
            plain = html.unescape(re.sub(r"<[^>]+>", "", LINK.sub(r"\1", " ".join(block.split()))))
            return re.split(r"(?<=\.) ", plain)[0]
    return ""
