"""The page on other libraries: each block runs where its library is installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "libraries.md"
TEXT = PAGE.read_text()
SETUP, *BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
PACKAGES = re.findall(r"With the package\s+`([^`]+)`:", TEXT)
MODULES = {"laplace-torch": "laplace", "curvlinops-for-pytorch": "curvlinops", "hydra-core": "hydra"}
"""Names to import, where they are not the packages'."""


def test_every_block_names_its_package_and_every_library_has_a_row() -> None:
    headings = re.findall(r"^## (.*)$", TEXT, flags=re.MULTILINE)
    rows = re.findall(r"^\| \[([^\]]+)\]\(#[\w-]+\) \|", TEXT, flags=re.MULTILINE)
    assert headings == rows
    assert len(BLOCKS) == len(PACKAGES) == len(headings)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # what other libraries warn of is theirs
@pytest.mark.parametrize(("package", "block"), list(zip(PACKAGES, BLOCKS, strict=True)), ids=PACKAGES)
def test_the_block_of_a_library_runs(package: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(MODULES.get(package, package))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(SETUP, str(PAGE), "exec"), names)
    exec(compile(block, f"{PAGE}, {package}", "exec"), names)
