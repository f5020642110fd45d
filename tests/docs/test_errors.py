"""The page of errors: each block provokes the error of its heading, with these first words, and then does without it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import sophq_func as sq

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
TEXT = PAGE.read_text()
SETUP = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)[0]
ENTRY = re.compile(r"^### (?P<heading>.+?)\n\n(?P<cause>.+?)\n\n```python\n(?P<code>.*?)```", flags=re.MULTILINE | re.DOTALL)
OURS, TORCHS = TEXT.split("\n## Torch's own\n")
CLASSES = ("ConfigError", "PlanError", "StateError", "CheckpointError")


def entries(text: str) -> dict[str, str]:
    """The code of each entry by its heading, without the marks of code."""
    return {found["heading"].strip("`"): found["code"] for found in ENTRY.finditer(text)}


def run(code: str, heading: str) -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(SETUP, str(PAGE), "exec"), names)
    exec(compile(code, f"{PAGE}, {heading}", "exec"), names)


def test_the_page_has_the_commonest_errors_of_each_class() -> None:
    sections = re.findall(r"^## (\w+)$", OURS, flags=re.MULTILINE)
    assert sections == list(CLASSES)
    assert len(entries(OURS)) >= 25
    assert {sq.ConfigError, sq.PlanError, sq.StateError, sq.CheckpointError} == {getattr(sq, name) for name in sections}


@pytest.mark.parametrize("heading", entries(OURS))
def test_an_error_of_ours_begins_as_its_heading_says(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = entries(OURS)[heading]
    words = re.search(r"with refused\(sq\.\w+, (?:\"(.*)\"|'(.*)')\):", code)
    assert words and heading.startswith(words[1] or words[2])
    run(code, heading)


@pytest.mark.parametrize("heading", [heading for heading in entries(TORCHS) if not heading.startswith("No error")])
def test_an_error_of_torch_is_refused_by_the_words_of_its_heading(heading: str) -> None:
    """That it is raised is seen where all blocks of all pages run: some compile, which takes seconds."""
    code = entries(TORCHS)[heading]
    words = re.search(r"with refused\(\w+, \"(.*)\"\)", code)
    assert words and words[1] in heading


def test_the_helper_of_the_page_can_fail() -> None:
    names: dict[str, object] = {}
    exec(compile(SETUP, str(PAGE), "exec"), names)
    for wrong in ("with refused(ValueError, 'a'):\n    pass", "with refused(ValueError, 'a'):\n    raise ValueError('b')"):
        with pytest.raises(AssertionError):
            exec(wrong, names)
