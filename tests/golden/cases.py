"""Recorded numbers of sophgo-mq, read case by case. Tolerances are those that came with the recording."""

from __future__ import annotations

import fnmatch
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sophq_func.numerics.granularity import PerChannel, PerTensor
from sophq_func.numerics.scheme import QScheme

HERE = Path(__file__).parent


@functools.cache
def _arrays(section: str) -> Any:
    with np.load(HERE / f"{section}.npz") as archive:
        return {key: archive[key] for key in archive.files}


@functools.cache
def cases(section: str) -> list[dict[str, Any]]:
    return json.loads((HERE / f"{section}.json").read_text())["cases"]


class Case:
    """One recorded case: its settings, and its arrays as tensors."""

    def __init__(self, section: str, data: dict[str, Any]) -> None:
        self.section, self.name, self.cls, self.config = section, data["name"], data["class"], data["config"]
        self.facts, self.error, self._index = data["facts"], data["error"], data["arrays"]

    def all(self, role: str) -> list[Tensor]:
        return [self._load(a) for a in self._index if a["role"] == role]

    def get(self, role: str) -> Tensor:
        (found,) = self.all(role)
        return found

    def named(self, role: str) -> dict[str, Tensor]:
        return {a["param"]: self._load(a) for a in self._index if a["role"] == role}

    def has(self, role: str) -> bool:
        return any(a["role"] == role for a in self._index)

    def _load(self, entry: dict[str, Any]) -> Tensor:
        return torch.from_numpy(np.array(_arrays(self.section)[entry["key"]])).reshape(entry["shape"])

    @property
    def scheme(self) -> QScheme:
        c = self.config
        granularity = PerChannel(c["ch_axis"]) if c["per_channel"] else PerTensor()
        return QScheme(
            bits=c["bit"],
            symmetric=c["symmetric"],
            symmetric_range=c.get("symmetric_range", False),
            pot_scale=c.get("pot_scale", False),
            granularity=granularity,
        )


def reason(case: Case, defects: Mapping[str, str], *, outputs: bool = False) -> str | None:
    """Why a case is skipped: the text of the first pattern of ``defects`` that its name matches, or the recorded error.

    With ``outputs`` a case that failed after its output was recorded is kept.
    """
    for pattern, text in defects.items():
        if fnmatch.fnmatchcase(case.name, pattern):
            return text
    failed = case.error and not (outputs and case.has("output"))
    return f"the reference ended in an error: {case.error['message']}" if failed else None


def params(
    section: str,
    *classes: str,
    defects: Mapping[str, str],
    where: Callable[[Case], bool] = lambda case: True,
    outputs: bool = False,
) -> list[Any]:
    """The cases of some classes as pytest parameters; those with a :func:`reason` are skipped with it."""
    found = []
    for data in cases(section):
        case = Case(section, data)
        if data["class"] in classes and where(case):
            why = reason(case, defects, outputs=outputs)
            marks = [pytest.mark.skip(reason=why)] if why else []
            found.append(pytest.param(case, id=case.name, marks=marks))
    return found


def assert_on_grid(actual: Tensor, expected: Tensor, step: Tensor | float, share: float = 0.02) -> None:
    """Equal up to rounding, but for a small share of elements that may lie one step off."""
    off = (actual - expected).abs()
    tolerance = 2e-5 * expected.abs().clamp(min=1e-6) + 1e-12
    moved = off > tolerance
    assert bool((off <= step * 1.001 + tolerance).all()), f"off by {(off / step).max()} steps"
    assert moved.float().mean() <= share, f"{int(moved.sum())} of {moved.numel()} elements are one step off"


def compared(section: str, *classes: str, defects: Mapping[str, str], outputs: bool = False) -> dict[str, dict[str, Case]]:
    """The cases that no :func:`reason` skips, by class and by name: one test holds all of a class."""
    found: dict[str, dict[str, Case]] = {name: {} for name in sorted(classes)}
    for data in cases(section):
        case = Case(section, data)
        if case.cls in classes and not reason(case, defects, outputs=outputs):
            found[case.cls][case.name] = case
    return found
