"""Draws what ``benchmarks/algorithms.py`` measured: what each method reaches, and agreement against mean bits.

python benchmarks/algorithms_pictures.py benchmarks/algorithms.json docs/algorithms
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"choose_bits, measured": "#1f5fa8", "choose_bits, HAWQ-V2": "#c46a1c", "one width": "#6d6d6d"}
"""Dark enough for lines on white, and apart for eyes that tell few colors apart."""


def bits_of(row: dict[str, Any]) -> float:
    """The mean width of the weights of a row: of ``"W4.5A8"`` 4.5."""
    found = re.match(r"W([\d.]+)A", row["grid"])
    assert found is not None, row["grid"]
    return float(found[1])


def mixed_widths(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Agreement against the mean width of the weights."""
    for method, color in COLORS.items():
        points = sorted((bits_of(row), row["percent"]) for row in rows if row["method"] == method)
        axes.plot(*zip(*points, strict=True), marker="o", color=color, label=method)
    axes.set(xlabel="mean bits of a weight", ylabel="agreement with float, %", title="EfficientNet-Lite0, widths of weights")
    axes.set(ylim=(0, 100), xticks=range(3, 9), xlim=(2.8, 8.2))
    axes.legend(loc="lower right", frameon=False)


def methods(axes: Any, rows: list[dict[str, Any]], title: str) -> None:
    """What each method reaches, as bars."""
    names = [row["method"] for row in rows]
    values = [row["percent"] for row in rows]
    bars = axes.barh(names, values, color="#1f5fa8")
    axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=3)
    axes.set(xlim=(0, 110), xlabel="%", title=title)
    axes.invert_yaxis()


def save(figure: Any, target: Path) -> None:
    """Write a picture, with open frames."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=120)


def main() -> None:
    """Read the figures, and draw."""
    source, folder = map(Path, sys.argv[1:3])
    rows = json.loads(source.read_text())
    network = [row for row in rows if row["network"] == "EfficientNet-Lite0"]
    figure, (left, middle) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    methods(left, [row for row in rows if row["network"] == "digits"], "digits, W2A4: accuracy")
    methods(
        middle,
        [row for row in network if row["grid"].startswith("W4A8") and row["method"] not in COLORS],
        "EfficientNet-Lite0, W4A8: agreement",
    )
    save(figure, folder / "figures.png")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    mixed_widths(axes, [row for row in network if row["method"] in COLORS])
    save(figure, folder / "pareto.png")


if __name__ == "__main__":
    main()
