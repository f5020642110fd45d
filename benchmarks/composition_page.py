"""Runs every cell of ``docs/composition.md``, whole models through every transform, and writes its table if all agree.

``python benchmarks/composition_page.py``; about four minutes. The checks are those of ``tests/composition``, which
``pytest tests/composition/test_cells.py`` runs, too.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

import torch
from measure import write_text

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.composition import SUBJECTS, Row, Subject  # noqa: E402
from tests.composition.page import cell, rows, written  # noqa: E402

PAGE = ROOT / "docs" / "composition.md"


def run(row: Row, s: Subject) -> None:
    """One cell: the numbers agree, or exactly the named error comes and each way around it agrees."""
    torch._dynamo.reset()
    limit = row.limits.get(s.name)
    if limit is None:
        row.check(s)
        return
    try:
        row.check(s)
    except limit.error as error:
        if limit.message not in str(error):
            raise
    else:
        raise AssertionError(f"{row.name}, {s.name}: the limit {limit.key!r} is gone; take it out of the registry")
    for around in limit.ways.values():
        around(row.check, s)


def main() -> None:
    """Run, print and write; an error where a cell is wrong."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start, subjects = time.perf_counter(), [make() for make in SUBJECTS.values()]
    for row in rows():
        skipped = row.needs_cuda and not torch.cuda.is_available()
        for s in () if skipped else subjects:
            run(row, s)
        found = "skipped: no CUDA device" if skipped else " | ".join(cell(row, s.name) for s in subjects)
        print(f"{time.perf_counter() - start:6.1f} s  {row.name:<45} {found}", flush=True)
    write_text(PAGE, written(PAGE.read_text()))


if __name__ == "__main__":
    main()
