"""A report as one frozen value, which can be printed, indexed by quantizer, and written to a file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sophq_func.config.names import underscored
from sophq_func.core.errors import near
from sophq_func.core.files import write_text
from sophq_func.reports import _html, _text
from sophq_func.reports._row import ReportRow

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Report:
    """What :func:`sophq_func.report` measured. ``print`` shows a table, ``report["conv1.weight_fake_quant"]`` is a row.

    Attributes:
      model: name of the model's class.
      digest: of the plan.
      batches: how many were run.
      rows: one for each quantizer that a batch reached, the largest share of the error first.
      sqnr_db: of the output with all quantizers on, in dB: squared float output divided by squared difference.
      bytes_before, bytes_after: size of all parameters and buffers; before as they are, after with weights as codes.
    """

    model: str
    digest: str
    batches: int
    rows: tuple[ReportRow, ...]
    sqnr_db: float
    bytes_before: int
    bytes_after: int

    def __getitem__(self, name: str) -> ReportRow:
        for row in self.rows:
            if name in (row.quantizer, underscored(row.quantizer)):
                return row
        hint = near(str(name), [row.quantizer for row in self.rows])
        raise KeyError(f"no quantizer {name!r} in the report; {hint}")

    def __repr__(self) -> str:
        what = f"{self.model}, {len(self.rows)} quantizers over {self.batches} batches"
        return f"Report({what}, sqnr_db={self.sqnr_db:.1f}, plan {self.digest[:12]})"

    def __str__(self) -> str:
        return self.table()

    def __rich__(self) -> Table:
        return _text.rich_table(self)

    def table(self) -> str:
        """The report as text; with lines between the columns where rich is installed, else plain."""
        return _text.table(self)

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write the rows as CSV (RFC 4180), without histograms; numbers in full, ``None`` as an empty cell.

        Returns:
          The path. The file is written to a temporary name first, so that no reader finds half of it.

        Raises:
          StateError: no such folder.
        """
        return write_text("report.to_csv", path, _text.csv_text(self))

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write a page with pictures: one file that needs no other, and no script.

        Returns:
          The path. The file is written to a temporary name first, so that no reader finds half of it.

        Raises:
          StateError: no such folder.
        """
        return write_text("report.to_html", path, _html.page(self))
