"""Tutorials: Python files of cells (``# %%`` and ``# %% [markdown]``), run, and made into pages and into notebooks.

A file is small to compare between versions, and what its page shows was computed when the page was made.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import pprint
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MARK = "# %%"


class Cell(NamedTuple):
    """A piece of text or of code."""

    text: str
    is_code: bool


class Result(NamedTuple):
    """What a cell of code printed, what its last expression is, and the pictures that it drew, as PNG files."""

    printed: str = ""
    value: str = ""
    pictures: tuple[bytes, ...] = ()


def read(source: str) -> list[Cell]:
    """The cells of a file, in order.

    Example:
      >>> read("# %% [markdown]\\n# # Title\\n\\n# %%\\n1 + 1\\n")
      [Cell(text='# Title', is_code=False), Cell(text='1 + 1', is_code=True)]
    """
    return [_cell(part) for part in f"\n{source}".split(f"\n{MARK}")[1:]]


def _cell(part: str) -> Cell:
    head, _, body = part.partition("\n")
    if "[markdown]" not in head:
        return Cell(body.strip("\n"), True)
    lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip("\n").split("\n")]
    return Cell("\n".join(lines), False)


def run(cells: Sequence[Cell], names: dict[str, Any]) -> Iterator[Result]:
    """Run the cells in order and say what each one shows. ``names`` holds afterwards what they defined."""
    names.setdefault("__name__", "__main__")
    for number, cell in enumerate(cells):
        yield _run(cell.text, f"cell {number}", names) if cell.is_code else Result()


def _run(code: str, file: str, names: dict[str, Any]) -> Result:
    tree = ast.parse(code, file)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, file, "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), file, "eval"), names)  # type: ignore[attr-defined]
    return Result(printed.getvalue().rstrip("\n"), "" if value is None else pprint.pformat(value, width=88), tuple(_drawn()))


def _drawn() -> Iterator[bytes]:
    """The figures that pyplot holds, which are closed."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:
        return
    for number in pyplot.get_fignums():
        png = io.BytesIO()
        pyplot.figure(number).savefig(png, format="png", dpi=150, bbox_inches="tight")
        pyplot.close(number)
        yield png.getvalue()


def page(name: str, cells: Sequence[Cell], results: Sequence[Result]) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a tutorial, and its pictures by file name."""
    parts, pictures = [], dict[str, bytes]()
    for cell, result in zip(cells, results, strict=True):
        parts.append(f"```python\n{cell.text}\n```" if cell.is_code else cell.text)
        shown = "\n".join(filter(None, (result.printed, result.value)))
        if shown:
            parts.append(f"```{{ .text .output }}\n{shown}\n```")
        for png in result.pictures:
            file = f"{name}-{len(pictures) + 1}.png"
            pictures[file] = png
            parts.append(f"![What the cell above draws]({file})")
    parts.append(f"This page as a notebook: [{name}.ipynb]({name}.ipynb)")
    return "\n\n".join(parts) + "\n", pictures


def notebook(cells: Sequence[Cell], results: Sequence[Result]) -> str:
    """A Jupyter notebook (format 4.5) of the cells, with what they show."""
    made = [_notebook_cell(f"cell-{i}", *pair) for i, pair in enumerate(zip(cells, results, strict=True))]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return json.dumps({"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}, indent=1)


def _notebook_cell(name: str, cell: Cell, result: Result) -> dict[str, Any]:
    common = {"id": name, "metadata": {}, "source": cell.text.splitlines(keepends=True)}
    if not cell.is_code:
        return {"cell_type": "markdown", **common}
    return {"cell_type": "code", "execution_count": None, "outputs": list(_outputs(result)), **common}


def _outputs(result: Result) -> Iterator[dict[str, Any]]:
    if result.printed:
        yield {"output_type": "stream", "name": "stdout", "text": result.printed}
    if result.value:
        data = {"text/plain": result.value}
        yield {"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": data}
    for png in result.pictures:
        data = {"image/png": base64.b64encode(png).decode()}
        yield {"output_type": "display_data", "metadata": {}, "data": data}


def make(path: Path) -> tuple[str, dict[str, bytes], str]:
    """Run a tutorial; its page, its pictures by file name, and its notebook."""
    cells = read(path.read_text())
    results = list(run(cells, {}))
    return *page(path.stem, cells, results), notebook(cells, results)
