"""Two pictures of the demo: accuracy by setting, and range and noise of every quantizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt

import sophq_func as sq

BLUE, ORANGE, GREY, GREEN = "#2a6fbb", "#e08214", "#8a8a8a", "#3a9d5d"


def accuracy_picture(results: Mapping[str, Sequence[float]], sizes: Mapping[str, float], path: Path) -> None:
    """A bar for each setting with a dot for each seed, and the size of the parameters beside its name."""
    names = list(results)
    figure, (whole, close) = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained", width_ratios=(1, 1.3))
    for row, name in enumerate(names):
        values = results[name]
        mean = sum(values) / len(values)
        color = GREY if name == "float" else GREEN if "fine" in name else ORANGE if "QAT" in name else BLUE
        for axes in (whole, close):
            axes.barh(row, mean, color=color, height=0.62, alpha=0.85)
        close.scatter(values, [row] * len(values), color="black", s=16, zorder=3, clip_on=True)
        close.annotate(f"{mean:.2f} %", (100.15, row), va="center", fontsize=10, annotation_clip=False)
    whole.set_yticks(range(len(names)), [f"{name}\n{sizes[name]:.1f} KiB" for name in names], fontsize=9)
    whole.invert_yaxis()
    whole.set_xlim(0, 100)
    close.set_xlim(95, 100)
    whole.set_xlabel("test accuracy in percent")
    close.set_xlabel("the same from 95 percent on (bar: mean, dots: seeds)")
    whole.set_title("Handwritten digits: accuracy by setting", loc="left", fontweight="bold")
    for axes in (whole, close):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140, format="png")
    plt.close(figure)


def layer_picture(plan: sq.Plan, found: Mapping[str, sq.Fidelity], path: Path) -> None:
    """For each quantizer, in execution order, the range of its values, and its signal-to-quantization-noise ratio."""
    names = list(plan)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 0.34 * len(names) + 1.6), sharey=True, layout="constrained", width_ratios=(1, 1)
    )
    for row, name in enumerate(names):
        lo, hi, sqnr = (float(value) for value in found[name])
        color = BLUE if plan.site(name).role == "weight" else ORANGE
        left.plot([lo, hi], [row, row], color=color, linewidth=6, solid_capstyle="butt")
        faint = 0.35 if plan[name].observe_only else 0.9
        right.barh(row, sqnr, color=color, height=0.62, alpha=faint)
        note = f"{sqnr:.1f} dB, {plan[name].scheme.bits} bit" + ", observes only" * plan[name].observe_only
        right.annotate(note, (max(sqnr, 0), row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    short = [n.removesuffix(".post_act_fake_quantizer").replace("_fake_quant", "") for n in names]
    left.set_yticks(range(len(names)), short, fontsize=9)
    left.invert_yaxis()
    left.axvline(0, color="black", linewidth=0.6)
    left.set_xscale("symlog", linthresh=1)
    left.set_xlabel("range of values (linear to 1, logarithmic beyond)")
    right.set_xlabel("signal-to-quantization-noise ratio in dB")
    right.set_xlim(0, 1.35 * max(float(f.sqnr_db) for f in found.values()))
    left.set_title("Each quantizer alone: range", loc="left", fontweight="bold")
    right.set_title("noise", loc="left", fontweight="bold")
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (BLUE, ORANGE)]
    figure.legend(handles, ["weight", "activation"], loc="outside upper right", ncols=2, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140, format="png")
    plt.close(figure)
