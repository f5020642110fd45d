"""The digits network compiled for four chips by their own compiler, and run in its simulator: is it what `apply` computes?

Needs the compiler, which ``examples/chip/setup.sh`` installs; ``make demo-chip`` does all. Writes ``demo_chip_out/``: the
figures as JSON, and a picture.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import digits
import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from terminal import contents, write
from torch import Tensor, nn

import sophq_func as sq

sys.path.append(str(Path(__file__).parents[1]))

from tools.chip import compiled, home
from tools.lowered import lowered

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OUT = Path("demo_chip_out")

CHIPS = ("BM1684X", "BM1688", "BM1690", "CV183X")

STRATEGIES = ("CNN", "Chip")
"""The plan that sophgo-mq makes, and one on the grids of the chip."""

CYCLES = re.compile(r"total_cycle:(\d+)")
"""What the compiler estimates, in its profile; it writes none for CV18xx."""


class Result(NamedTuple):
    """What became of one plan on one chip.

    Attributes:
      accuracy: of the chip on the test images, in percent.
      same: share of predictions that are those of ``apply``, in percent.
      codes: by value, the share of codes that are equal, in percent.
      equal: share of all codes that are equal, in percent.
      within: share of all codes that differ by one at most, in percent.
      types: how many operations have a result of each type in the lowered network.
      size: of the compiled model, in KiB.
      cycles: as the compiler estimates; ``None`` where it does not.
    """

    accuracy: float
    same: float
    codes: dict[str, float]
    equal: float
    within: float
    types: dict[str, int]
    size: float
    cycles: int | None


def measured(model: nn.Module, chip: str, strategy: str, folder: Path) -> tuple[Result, sq.ChipComparison]:
    """Plan, calibrate, export, compile with the commands of the export, run, and compare."""
    train, _, x, labels = digits.load()
    q = sq.quantize(model, sq.QuantConfig(chip=chip, strategy=strategy), example_args=(x,))
    params = sq.params_of(model)
    qparams = q.calibrate(params, train.split(100), progress=False)
    files = sq.export.tables(q, params, qparams, folder, name="digits", example_args=x)
    assert files.readme is not None
    values = np.load(compiled(folder, files.readme, {"x": x.numpy()}))
    with torch.no_grad():
        expected = q.apply(params, qparams, x).argmax(1)
    actual = torch.from_numpy(values[next(name for name in reversed(values.files) if name.startswith("output"))]).argmax(1)
    comparison = sq.compare_chip(q, params, qparams, folder, x)
    (built,) = [path for path in folder.iterdir() if path.suffix in (".bmodel", ".cvimodel")]
    (network,) = folder.glob("*_tpu.mlir")
    words = {line.split()[0] for line in files.q_table.read_text().splitlines() if line and line[0] != "#"}
    profile = folder / "compiler_profile_0.txt"
    cycles = CYCLES.findall(profile.read_text()) if profile.exists() else []
    result = Result(
        percent(actual == labels),
        percent(actual == expected),
        {row.quantizer.removesuffix(".post_act_fake_quantizer"): 100 * row.equal for row in comparison.rows},
        100 * comparison.equal,
        100 * comparison.within_one,
        dict(Counter(operation.result for operation in lowered(network) if operation.name in words)),
        built.stat().st_size / 1024,
        int(cycles[-1]) if cycles else None,
    )
    return result, comparison


def percent(hits: Tensor) -> float:
    """Share of what is true, in percent."""
    return float(hits.double().mean()) * 100


def table(results: dict[tuple[str, str], Result]) -> Table:
    """One line for each chip and plan."""
    shown = Table(title="Digits, by the chips' own compiler and simulator")
    for column in ("chip", "plan", "accuracy %", "as apply %", "codes equal %", "within one %", "types", "KiB", "cycles"):
        shown.add_column(column, justify="left" if column in ("chip", "plan", "types") else "right")
    for (chip, strategy), found in results.items():
        types = ", ".join(f"{count} {word}" for word, count in found.types.items())
        cycles = "" if found.cycles is None else f"{found.cycles:,}"
        figures = [f"{value:.2f}" for value in (found.accuracy, found.same, found.equal, found.within)]
        shown.add_row(chip, strategy, *figures, types, f"{found.size:.0f}", cycles)
    return shown


def picture(results: dict[tuple[str, str], Result], path: Path) -> None:
    """The share of equal codes by value, a panel for each plan and a line for each chip."""
    figure, panels = plt.subplots(1, len(STRATEGIES), figsize=(12, 5), sharey=True, layout="constrained")
    for panel, strategy in zip(panels, STRATEGIES, strict=True):
        values = list(dict.fromkeys(name for (_, own), found in results.items() if own == strategy for name in found.codes))
        for i, chip in enumerate(CHIPS):
            codes = results[chip, strategy].codes
            rows = [row + (i - 1.5) * 0.2 for row, name in enumerate(values) if name in codes]
            panel.barh(rows, [codes[name] for name in values if name in codes], height=0.18, label=chip)
        panel.set_yticks(range(len(values)), values, fontsize=8)
        panel.set_xlim(0, 100)
        panel.set_title(f"strategy {strategy}", loc="left", fontweight="bold")
        panel.set_xlabel("codes that are those of apply, in percent")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, ncols=len(CHIPS), loc="outside lower center")
    figure.savefig(path, dpi=140, format="png")
    plt.close(figure)


def main() -> None:
    """Compile and run for each chip and plan, and show what came out."""
    console = Console(width=110)
    if home() is None:
        console.print("CHIP_HOME names no folder with the compiler: make demo-chip sets one up.")
        raise SystemExit(3)
    # said in README.txt, and measured here
    warnings.filterwarnings("ignore", "export.tables: on this chip linear layers")
    model = digits.trained()
    results, shown = {}, None
    for chip in CHIPS:
        for strategy in STRATEGIES:
            folder = OUT / f"{chip}_{strategy}".lower()
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.iterdir():
                if old.is_file():
                    old.unlink()
            console.print(f"{chip}, strategy {strategy} ...")
            results[chip, strategy], comparison = measured(model, chip, strategy, folder)
            shown = shown or comparison
    console.print(table(results))
    if shown is not None:
        console.print(f"{CHIPS[0]}, strategy {STRATEGIES[0]}, value by value:")
        console.print(shown.table(), highlight=False)
    data = [{"chip": chip, "strategy": strategy, **found._asdict()} for (chip, strategy), found in results.items()]
    write(OUT / "results.json", lambda path: path.write_text(json.dumps(data, indent=2)))
    write(OUT / "codes.png", lambda path: picture(results, path))
    console.print(contents(OUT))


if __name__ == "__main__":
    main()
