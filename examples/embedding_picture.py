"""The picture of the text demo: how far each sentence's embedding turned, and how large the weights are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from pictures import BLUE, GREY, ORANGE
from torch import Tensor


def draw(found: Mapping[str, tuple[Tensor, float]], path: Path) -> None:
    """A dot for each sentence with a bar at the mean, and the size of the weights, by configuration."""
    names = list(found)
    quantized = [name for name in names if name != "float"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained", width_ratios=(2, 1))
    for row, name in enumerate(names):
        cosines, mib = found[name]
        color = GREY if name == "float" else ORANGE if name.startswith("W4") else BLUE
        if name in quantized:
            spread = [row + 0.5 * ((i * 0.618) % 1 - 0.5) for i in range(len(cosines))]
            left.scatter((1 - cosines).clamp(min=1e-6), spread, s=7, color=color, alpha=0.5, linewidths=0)
            mean = 1 - float(cosines.mean())
            left.plot([mean, mean], [row - 0.36, row + 0.36], color="black", linewidth=2)
            left.annotate(f"{1 - mean:.4f}", (mean, row - 0.38), ha="center", va="bottom", fontsize=9)
        right.barh(row, mib, color=color, height=0.62, alpha=0.85)
        right.annotate(f" {mib:.1f} MiB", (mib, row), va="center", fontsize=9)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xscale("log")
    left.set_xlabel("1 - cosine to the float embedding (dots: sentences; bar and figure: mean cosine)")
    right.set_xlim(0, 1.25 * max(mib for _, mib in found.values()))
    right.set_xlabel("weights, with their scales")
    left.set_title("all-MiniLM-L6-v2: how far embeddings turn", loc="left", fontweight="bold")
    right.set_title("size", loc="left", fontweight="bold")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140, format="png")
    plt.close(figure)
