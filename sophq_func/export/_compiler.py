"""What a compiler of chips is, to the export of tables: the ends of file names, and what the files hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from sophq_func.core.errors import explain, raise_all
from sophq_func.core.types import Given
from sophq_func.model.quantized import Quantized
from sophq_func.numerics.contracts import QParams


class Job(NamedTuple):
    """What a user asks of the export; attributes as of :func:`sophq_func.export.tables`."""

    q: Quantized
    params: Given
    qparams: Mapping[str, QParams]
    example_args: Any
    name: str
    names: Mapping[str, str]
    work_mode: str
    batches: Any
    chip: str


class Contents(NamedTuple):
    """What the files hold.

    Attributes:
      calibration, q_table, clip_ranges: texts.
      model: the float ONNX file; ``None`` where none is written.
      readme: the commands that read the files; empty where there are none.
    """

    calibration: str
    q_table: str
    clip_ranges: str
    model: bytes | None
    readme: str = ""


class Compiler(NamedTuple):
    """A compiler that reads tables.

    Attributes:
      calibration, q_table, clip_ranges: the ends of the names of the files.
      contents: what they hold.
      needs_example: whether tables cannot be made without a float file.
    """

    calibration: str
    q_table: str
    clip_ranges: str
    contents: Callable[[Job], Contents]
    needs_example: bool = False


def check_words(names: Iterable[str], fix: str) -> None:
    """Check that each name is one word of a line in a table, where spaces lie between words and ``#`` begins a remark.

    Args:
      names: as they stand in the tables.
      fix: what to do about others.

    Raises:
      ConfigError: with all names that are none.
    """
    wrong = [name for name in dict.fromkeys(names) if not name.isprintable() or not name or set(name) & set(" #")]
    because = "their lines are words with spaces between, and # begins a remark"
    sentence = "the tables cannot hold the name"
    raise_all([explain("tables", f"{sentence} {name!r}", because=because, fix=fix) for name in wrong])
