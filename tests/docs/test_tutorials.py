"""The tutorials run, and their figures say what their text says."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))

# Accuracies are those of 597 images after a short training, which every CPU carries out in another order of sums. Another
# seed moves them by about one percent; asked for is what a reader concludes, which held for each of four seeds.


def first_steps(names: dict[str, Any]) -> None:
    assert names["float_accuracy"] > 95
    assert abs(names["w8a8"] - names["float_accuracy"]) < 2
    assert names["w2a4"] < names["float_accuracy"] - 2
    assert names["better"] > names["w2a4"]
    assert names["report"].rows[0].quantizer == names["worst"]
    assert sum(names["shares"].values()) == pytest.approx(1)


def training(names: dict[str, Any]) -> None:
    assert names["before"] < names["float_accuracy"] - 5
    assert names["after"] > names["before"] + 5
    assert names["with_optim"] > names["before"] + 5


def research(names: dict[str, Any]) -> None:
    assert all(gradient.shape[0] == 128 for gradient in names["each"].values())
    assert names["errors"][0] > names["errors"][1]
    assert names["used"] <= 2.7  # bits for each weight: the budget is 2.5, and widths are whole numbers
    assert names["mixed"] > 85


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "first_steps": first_steps,
    "research": research,
    "training": training,
}


def test_every_tutorial_is_checked() -> None:
    assert [path.stem for path in TUTORIALS] == sorted(CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs_and_its_figures_are_as_it_says(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.syspath_prepend(ROOT / "tools" / "pages")
    tutorials = importlib.import_module("tutorials")
    monkeypatch.delitem(sys.modules, "tutorials")
    names: dict[str, Any] = {}
    for _ in tutorials.run(tutorials.read(path.read_text()), names):
        pass
    CHECKS[path.stem](names)
