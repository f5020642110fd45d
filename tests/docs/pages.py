"""The pages of the documentation, and the blocks of Python that a reader pastes.

A page's first block may be its set-up: then the sentence before it says "once". Every other block runs alone, or alone
after the set-up. What it needs beyond the package stands in the sentence before it, or in that of the set-up: the extra
``onnx``, the package ``torchao``, each name in backticks.
"""

from __future__ import annotations

import re
from itertools import takewhile
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]

FENCE = re.compile(r"^(?P<indent> *)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```", flags=re.MULTILINE | re.DOTALL)
ONCE = re.compile(r"\bonce\b", flags=re.IGNORECASE)
NEEDS = re.compile(r"\b(extra|package)s?\b((?:,| and|\s|`[^`]+`)+)")


class Block(NamedTuple):
    """A block of Python on a page.

    Attributes:
      line: of its first line of code, counted from 1.
      before: the sentence before it.
    """

    page: Path
    line: int
    code: str
    before: str

    @property
    def once(self) -> bool:
        """Whether its sentence says that the blocks behind it need it."""
        return bool(ONCE.search(self.before))

    @property
    def needs(self) -> frozenset[str]:
        """Packages that its sentence names, an extra as ``sophq-func[extra]``."""
        named = [(kind, name) for kind, listed in NEEDS.findall(self.before) for name in re.findall(r"`([^`]+)`", listed)]
        return frozenset(f"sophq-func[{name}]" if kind == "extra" else name for kind, name in named)

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class Program(NamedTuple):
    """What a reader pastes into a fresh interpreter: a block, after the set-up of its page if that has one."""

    blocks: tuple[Block, ...]

    @property
    def needs(self) -> frozenset[str]:
        """Packages that it needs, as of a block."""
        return frozenset[str]().union(*(block.needs for block in self.blocks))

    def __str__(self) -> str:
        return str(self.blocks[-1])


def sentence(text: str) -> str:
    """The last sentence of the last paragraph; "" behind a heading, a table or another block."""
    lines = takewhile(str.strip, reversed(text.rstrip().splitlines()))
    paragraph = " ".join(reversed([line.strip() for line in lines]))
    return "" if paragraph.startswith(("#", "|", "```")) else re.split(r"(?<=[.!?])\s+(?=[A-Z`*])", paragraph)[-1]


def blocks(page: Path) -> list[Block]:
    """All blocks of Python on a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start("code")) + 1, dedent(found["code"]), sentence(text[: found.start()]))
        for found in FENCE.finditer(text)
    ]


def programs(page: Path) -> list[Program]:
    """One for each block of a page."""
    found = blocks(page)
    setup = tuple(found[:1]) if found and found[0].once else ()
    return [Program((*setup, block)) for block in found[len(setup) :]] or [Program(setup)] * bool(setup)


def run(page: Path) -> dict[str, object]:
    """All blocks of a page in this process, one after the other in one namespace; returns the names that they leave."""
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks(page):
        exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)
    return names
