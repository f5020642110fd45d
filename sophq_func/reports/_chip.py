"""How far a simulated model is from what a chip computes: code by code, from the files that the chip's compiler writes.

tpu-mlir writes each value of its lowered network to an ``.npz`` file, as numbers, under the name of the operation that makes
it: ``<tensor>_<op type>``. The tensors of a file that :func:`sophq_func.export.tables` writes are called as in the plan.
"""

from __future__ import annotations

import csv
import io
import os
import re
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sophq_func.config.names import underscored
from sophq_func.core.errors import ConfigError, StateError, explain, near
from sophq_func.core.files import write_text
from sophq_func.core.public import public
from sophq_func.core.tables import WIDTH, Table, check_width, wrapped
from sophq_func.core.texts import cell, printable
from sophq_func.core.types import Given, Tree
from sophq_func.model.apply import capture
from sophq_func.model.quantized import Quantized
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.layout import expand
from sophq_func.numerics.ranges import positive
from sophq_func.planning.picture import OUTPUT
from sophq_func.planning.plan import Plan
from sophq_func.planning.text import short

ENDING = "_outputs.npz"
"""How the compiler's files of values end."""

OP_TYPE = "_[A-Z][A-Za-z0-9]*"
"""What follows the name of a tensor: the type of its operation."""

CAST = "_(s?i8|ui8|bf16|f16|f8e4m3|f8e5m2)"
"""What follows the name of an input and of the operation that reads it: the type that the input was converted to."""


@dataclass(frozen=True, kw_only=True)
class ChipRow:
    """One planned value, as the model computes it here and as the chip does.

    Attributes:
      quantizer: its name.
      tensor: name of the value in the compiler's file.
      grid: the integer grid, or the name of the number format.
      elements: how many were compared.
      equal: share of elements with the same code; for other formats with the same number.
      within_one: share of elements whose codes differ by 1 at most; as ``equal`` for other formats.
      largest: the largest difference of two codes; for other formats of two numbers.
      cosine: of the angle between both values.
    """

    quantizer: str
    tensor: str
    grid: str
    elements: int
    equal: float
    within_one: float
    largest: float
    cosine: float

    def __repr__(self) -> str:
        return f"ChipRow({printable(self.quantizer)}, equal={self.equal:.4f}, within_one={self.within_one:.4f})"


@dataclass(frozen=True, kw_only=True)
class ChipComparison:
    """What :func:`sophq_func.compare_chip` found. ``print`` shows a table; by the name of a quantizer it gives a row.

    Attributes:
      file: name of the file with the chip's values.
      rows: one for each planned value that the file has, in execution order.
      missing: quantizers of values that the file does not have.
    """

    file: str
    rows: tuple[ChipRow, ...]
    missing: tuple[str, ...]

    def __getitem__(self, name: str) -> ChipRow:
        for row in self.rows:
            if name in (row.quantizer, underscored(row.quantizer)):
                return row
        hint = near(str(name), [row.quantizer for row in self.rows])
        raise KeyError(f"no value of {name!r} in the comparison; {hint}")

    def __repr__(self) -> str:
        return f"ChipComparison({self.summary})"

    def __str__(self) -> str:
        return self.table()

    @property
    def summary(self) -> str:
        """The figures of all values, in one line."""
        absent = f"; {len(self.missing)} not in the file" if self.missing else ""
        return (
            f"{len(self.rows)} values: {_percent(self.equal)} of codes equal, {_percent(self.within_one)} within one{absent}"
        )

    @property
    def equal(self) -> float:
        """The share of all codes that are equal."""
        return sum(row.elements * row.equal for row in self.rows) / self._elements

    @property
    def within_one(self) -> float:
        """The share of all codes that differ by 1 at most."""
        return sum(row.elements * row.within_one for row in self.rows) / self._elements

    @property
    def _elements(self) -> int:
        return sum(row.elements for row in self.rows)

    def table(self, columns: str | Sequence[str] | None = None, width: int = WIDTH) -> str:
        """The comparison as text. Columns that do not fit beside each other follow below their row.

        Args:
          columns: those to show: ``"quantizer"``, ``"equal"``, ``"within one"``, ``"largest"``, ``"cosine"``, ``"grid"``,
            ``"tensor"``; all by default.
          width: characters in a line.

        Raises:
          ConfigError: a column that there is not, or a width of less than 40.
        """
        check_width("table", width)
        body = _cells(self.rows).pick("table", columns).text(width)
        return "\n".join([*wrapped(self.summary, width), "", body])

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write the rows as CSV (RFC 4180), numbers in full.

        Returns:
          The path. The file is written to a temporary name first, so that no reader finds half of it.

        Raises:
          StateError: no such folder.
        """
        names = [field.name for field in fields(ChipRow)]
        file = io.StringIO()
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([cell(getattr(row, name)) for name in names] for row in self.rows)
        return write_text("to_csv", path, file.getvalue())


@public
def compare_chip(
    q: Quantized,
    params: Given,
    qparams: Mapping[str, QParams],
    folder: str | os.PathLike[str],
    x: Tree,
    *,
    outputs: str | None = None,
) -> ChipComparison:
    """Compare each planned value with what a chip computes, from the values that its compiler wrote to a file.

    The compiler, which is not imported, writes them with ``model_deploy.py --test_input x.npz ... --debug``; see
    ``docs/chips.md``.

    Args:
      q: a quantized model in eval mode.
      params, qparams: see :meth:`Quantized.apply`.
      folder: where the compiler ran.
      x: what it ran on: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
      outputs: name of the file of values; left out, it is the only one whose name ends in ``tpu_outputs.npz``.

    Returns:
      A :class:`ChipComparison`.

    Raises:
      StateError: no such folder or file, several files, a file that holds none of the planned values, or values of another
        shape; see :meth:`Quantized.apply`.

    Example:
      >>> import tempfile, numpy, torch, sophq_func as sq
      >>> model, x = torch.nn.Linear(2, 3).eval(), torch.randn(4, 2)
      >>> q = sq.quantize(model, sq.QuantConfig(chip="BM1690", strategy="Chip"), example_args=(x,))
      >>> params = sq.params_of(model)
      >>> qparams = q.calibrate(params, [x])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     values = {"output_Gemm": q.apply(params, qparams, x).detach().numpy()}
      ...     numpy.savez(f"{folder}/net_bm1690_int8_sym_tpu_outputs.npz", **values)
      ...     compare_chip(q, params, qparams, folder, x)
      ChipComparison(1 values: 100.000 % of codes equal, 100.000 % within one; 1 not in the file)
    """
    if outputs is not None and (not isinstance(outputs, str) or not outputs):
        allowed = "the name of a file in the folder, or None"
        raise ConfigError(explain("compare_chip", "outputs is no name", got=outputs, allowed=allowed))
    path = _file(folder, outputs)
    computed = _read(path)
    args, kwargs = q.engine.call(x, "compare_chip")
    with torch.no_grad():
        captured = capture(q.engine, params, qparams, args, kwargs)
    rows, missing = [], []
    for name in q.plan:
        site = q.plan.site(name)
        if site.role == "weight" or site.is_term or name not in captured or q.plan[name].observe_only:
            continue
        tensor = tensor_of(q.plan, name, computed.keys())
        if tensor:
            rows.append(_row(q, name, tensor, captured[name][1], torch.from_numpy(computed[tensor]), qparams[name]))
        else:
            missing.append(name)
    if not rows:
        because, fix = f"it has {', '.join(sorted(computed)[:4])}", "take the file beside the tables of this plan"
        raise StateError(explain("compare_chip", f"{path.name} has no planned value", because=because, fix=fix))
    return ChipComparison(file=path.name, rows=tuple(rows), missing=tuple(missing))


def tensor_of(plan: Plan, name: str, tensors: Collection[str]) -> str:
    """The name of a quantizer's value in the compiler's file; empty where the file does not have it.

    Args:
      plan: of the quantizer.
      name: of the quantizer.
      tensors: names in the file.
    """
    site = plan.site(name)
    if site.operand >= 0:
        return ""  # what a quantizer before some calls rounds is no tensor of the file
    if site.argument:
        return _first(f"{re.escape(site.value)}.*{CAST}", tensors)
    is_returned = any(edge.target == OUTPUT and name in edge.through for edge in plan.edges)
    # the last call of a group that the file has: a BatchNorm is folded into the layer before it
    calls = [*reversed(site.members or (site.value,)), *([OUTPUT] if is_returned else [])]
    return next(filter(None, (_first(re.escape(call) + OP_TYPE, tensors) for call in calls)), "")


def _first(pattern: str, names: Collection[str]) -> str:
    return next((name for name in names if re.fullmatch(pattern, name)), "")


def _file(folder: str | os.PathLike[str], outputs: str | None) -> Path:
    """The file of values."""
    where = "compare_chip"
    if not isinstance(folder, str | os.PathLike) or not Path(folder).is_dir():
        fix = "the folder in which model_deploy.py ran"
        raise StateError(explain(where, "there is no such folder", got=str(folder), fix=fix))
    here = Path(folder)
    if outputs is not None:
        if not (here / outputs).is_file():
            names = [path.name for path in here.glob("*.npz")]
            raise StateError(explain(where, f"the folder has no {outputs!r}", fix=near(outputs, names) or "see ls"))
        return here / outputs
    found = sorted(path.name for path in here.glob(f"*tpu{ENDING}"))
    if len(found) == 1:
        return here / found[0]
    if found:
        fix = f'outputs="{found[0]}"'
        raise StateError(explain(where, "the folder has several files of values", got=found, fix=fix))
    because = "model_deploy.py writes it where it has an input"
    fix = "model_deploy.py ... --test_input x.npz --debug"
    raise StateError(explain(where, f"the folder has no file *tpu{ENDING}", because=because, fix=fix))


def _read(path: Path) -> dict[str, np.ndarray]:
    """The values in a file, by name."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        sentence, because = f"{path.name} cannot be read", f"{type(error).__name__}: {error}"
        raise StateError(explain("compare_chip", sentence, because=because, fix="run the compiler again")) from error


def _row(q: Quantized, name: str, tensor: str, here: Tensor, there: Tensor, qparams: QParams) -> ChipRow:
    """The figures of one value.

    Args:
      q: the model.
      name: of the quantizer.
      tensor: name of the value in the file.
      here, there: the value as it is computed here and by the chip.
      qparams: of the quantizer.
    """
    if here.numel() != there.numel():
        got, allowed = tuple(there.shape), f"{tuple(here.shape)}, as here"
        fix = "give the x that the compiler ran on"
        raise StateError(explain("compare_chip", f"{tensor} has another shape", got=got, allowed=allowed, fix=fix))
    wide, other = here.double().flatten(), there.double().flatten()
    quantizer = q.engine.running[name]
    if quantizer.fake_quantize.integer and not quantizer.scheme.dynamic:
        grid = quantizer.fake_quantize.grid(qparams, quantizer.scheme)
        step = expand(positive(grid.scale.detach()), here, quantizer.scheme.granularity).double().expand(here.shape)
        apart = ((wide / step.flatten()).round() - (other / step.flatten()).round()).abs()
    else:
        apart = (wide - other).abs()
    within = apart <= 1 if quantizer.fake_quantize.integer else apart == 0
    return ChipRow(
        quantizer=name,
        tensor=tensor,
        grid=short(q.plan[name]),
        elements=here.numel(),
        equal=float((apart == 0).double().mean()),
        within_one=float(within.double().mean()),
        largest=float(apart.amax()),
        cosine=_cosine(wide, other),
    )


def _cosine(x: Tensor, y: Tensor) -> float:
    """The cosine of the angle between two vectors; 1 where both are 0."""
    lengths = x.norm() * y.norm()
    return float((x * y).sum() / lengths) if lengths > 0 else float(torch.equal(x, y))


def _percent(share: float) -> str:
    """A share in percent, which is 100 only where nothing differs.

    Example:
      >>> _percent(1.0), _percent(0.9999999), _percent(0.5)
      ('100.000 %', '99.999 %', '50.000 %')
    """
    shown = f"{100 * share:.3f} %"
    return "99.999 %" if share < 1 and shown.startswith("100") else shown


def _cells(rows: Sequence[ChipRow]) -> Table:
    """The rows under their headings."""
    headings = ("quantizer", "equal", "within one", "largest", "cosine", "grid", "tensor")
    cells = [
        (
            row.quantizer,
            _percent(row.equal),
            _percent(row.within_one),
            f"{row.largest:g}",
            f"{row.cosine:.6f}",
            row.grid,
            row.tensor,
        )
        for row in rows
    ]
    return Table(headings=headings, rows=tuple(cells), right=frozenset(("equal", "within one", "largest", "cosine")))
