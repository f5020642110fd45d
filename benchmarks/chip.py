"""How far each strategy is from what chips compute, as the table of ``docs/chips.md``: needs ``CHIP_HOME``.

``CHIP_HOME=... python benchmarks/chip.py`` trains the digits network of the examples, plans it in each way, compiles the
tables with the chips' own compiler, and compares its interpreter with ``q.apply`` on test images. ``--write`` puts the table
into the page, between its marks.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import digits  # noqa: E402

import sophq_func as sq  # noqa: E402
from tools.chip import compiled, home  # noqa: E402

IMAGES = 199
"""A third of the test images, which is one batch of the compiled network."""

CHIPS = ("BM1684X", "BM1688", "BM1690", "CV183X")

PAGE = ROOT / "docs" / "chips.md"
MARKS = ("<!-- measured: begin -->", "<!-- measured: end -->")

AFFINE = sq.override(symmetric=False)


class Way(NamedTuple):
    """A way to plan.

    Attributes:
      name: in the table.
      strategy: that of the config.
      affine: whether activations have a zero point.
    """

    name: str
    strategy: str
    affine: bool = False


WAYS = (
    Way("`Chip`", "Chip"),
    Way("`Chip`, affine", "Chip", affine=True),
    Way("`CNN`", "CNN"),
    Way("`CNN`, affine", "CNN", affine=True),
    Way("`Transformer`", "Transformer"),
)


def config_of(chip: str, way: Way) -> sq.QuantConfig:
    """The config of a way to plan."""
    if way.affine:
        return sq.QuantConfig(chip=chip, strategy=way.strategy, activation=AFFINE)
    return sq.QuantConfig(chip=chip, strategy=way.strategy)


def rows(model: nn.Module, batches: list[Tensor], x: Tensor) -> Iterator[str]:
    """The lines of the table."""
    params = sq.params_of(model)
    for way in WAYS:
        for chip in CHIPS:
            if way.affine and chip.startswith("CV18"):  # they have no zero points
                continue
            q = sq.quantize(model, config_of(chip, way), example_args=(x,))
            qparams = q.calibrate(params, batches, progress=False)
            yield row(way, chip, q, params, qparams, x)


def row(way: Way, chip: str, q: sq.Quantized, params: dict[str, Tensor], qparams: dict[str, sq.QParams], x: Tensor) -> str:
    """One line: shares of equal codes over all values, the value with the fewest, the output, and predictions."""
    with tempfile.TemporaryDirectory() as folder:
        tables = sq.export.tables(q, params, qparams, folder, example_args=x, name="net")
        assert tables.readme is not None
        values = np.load(compiled(Path(folder), tables.readme, {"x": x.numpy()}))
        found = sq.compare_chip(q, params, qparams, folder, x)
        there = torch.from_numpy(values[next(name for name in reversed(values.files) if name.startswith("output"))])
    with torch.no_grad():
        here = q.apply(params, qparams, x)
    worst = min(one.equal for one in found.rows)
    cosine = float(nn.functional.cosine_similarity(here.flatten().double(), there.flatten().double(), 0))
    same = float((here.argmax(1) == there.argmax(1)).double().mean())
    shares = (f"{100 * share:.2f}" for share in (found.equal, found.within_one, worst))
    return f"| {way.name} | {chip} | {' | '.join(shares)} | {cosine:.6f} | {100 * same:.2f} |"


HEAD = (
    "| strategy | chip | codes equal, % | within one, % | equal in the worst value, % | cosine of the output | "
    "same prediction, % |",
    "|---|---|---|---|---|---|---|",
)


def main() -> None:
    """Measure, print, and with ``--write`` change the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/chips.md")
    write = parser.parse_args().write
    if home() is None:
        parser.error("CHIP_HOME does not name the folder of the compiler's environment")
    torch.set_num_threads(1)
    train, _, test, _ = digits.load()
    lines = [*HEAD]
    for line in rows(digits.trained(), list(train[:1200].split(120)), test[:IMAGES]):
        lines.append(line)
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    if write:
        text = PAGE.read_text()
        before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
        PAGE.write_text(f"{before}{MARKS[0]}\n{chr(10).join(lines)}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
