"""The page on other libraries: a row, a heading and a block for each; ``test_blocks`` runs these."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "libraries.md"
TEXT = PAGE.read_text()
_, *BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
PACKAGES = re.findall(r"With the package\s+`([^`]+)`:", TEXT)


def test_every_block_names_its_package_and_every_library_has_a_row() -> None:
    headings = re.findall(r"^## (.*)$", TEXT, flags=re.MULTILINE)
    rows = re.findall(r"^\| \[([^\]]+)\]\(#[\w-]+\) \|", TEXT, flags=re.MULTILINE)
    assert headings == rows
    assert len(BLOCKS) == len(PACKAGES) == len(headings)
