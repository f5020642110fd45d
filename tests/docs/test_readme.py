"""The code in the README and in the documentation runs, block by block, as a reader would type it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.documented import DocumentedNet

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
ELSEWHERE = {
    "text": "tests/docs/test_text.py, with a stand-in for the package that it needs",
    "errors": "tests/docs/test_errors.py, each block after the set-up alone",
    "libraries": "tests/docs/test_libraries.py, each block where its package is installed",
}
"""Pages that other tests run."""
CODED = [page for page in PAGES if "```python" in page.read_text() and page.stem not in ELSEWHERE]


def run(page: Path) -> dict[str, object]:
    """Every block of Python on a page, in order, with the names that a reader has at hand."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    names: dict[str, object] = {
        "torch": torch,
        "model": model,
        "x": x,
        "batches": [x, x],
        "network": DocumentedNet().eval(),
        "image": torch.randn(2, 3, 8, 8),
    }
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(block, str(page), "exec"), names)
    return names


NEEDS = {"export": "onnxruntime", "tables": "onnxscript"}
"""Packages of an extra that a page uses."""


@pytest.mark.slow
@pytest.mark.parametrize("page", CODED, ids=lambda page: page.stem)
def test_every_python_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
    monkeypatch.chdir(tmp_path)
    run(page)


@pytest.mark.slow
def test_the_readme_computes_what_it_says() -> None:
    names = run(ROOT / "README.md")
    assert isinstance(names["rounded"], Tensor)
    assert names["gradients"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target
