"""The table of ``docs/composition.md``, from the registry."""

from __future__ import annotations

from collections.abc import Iterator

from tests.composition import ROWS, SUBJECTS, Limit, Row

START, END = "<!-- made by python benchmarks/composition_page.py -->\n", "<!-- to here -->\n"
ORDER = ("derivatives", "maps", "compilers", "tracers", "machines")
"""The files with checks, as the table has them."""


def rows() -> list[Row]:
    """The rows, in the order of the table."""
    return sorted(ROWS.values(), key=lambda row: ORDER.index(row.check.__module__.rpartition(".")[2]))


def limits() -> list[Limit]:
    """Every limit once, in the order in which the table meets them."""
    met = {limit.key: limit for row in rows() for limit in row.limits.values()}
    return list(met.values())


def cell(row: Row, column: str) -> str:
    """What the table says of a transform and a model."""
    limit = row.limits.get(column)
    if row.needs_cuda:
        return "where there is a device [^cuda]"
    return "yes" if limit is None else f"{limit.cell} [^{limit.key}]"


def table() -> Iterator[str]:
    """The lines of the table, and the footnotes."""
    yield f"| transform | {' | '.join(SUBJECTS)} | compared with | within |"
    yield f"|{'---|' * (len(SUBJECTS) + 3)}"
    for row in rows():
        yield f"| {row.name} | {' | '.join(cell(row, column) for column in SUBJECTS)} | {row.compared} | {row.within} |"
    yield ""
    for limit in limits():
        yield f"[^{limit.key}]: `{limit.error.__name__}: ...{limit.message}...`. {limit.instead}"
    yield "[^cuda]: The test is skipped, and says so, where there is no CUDA device, as where this table was made."


def made() -> str:
    """The part of the page that is made, with its marks."""
    return START + "\n" + "\n".join(table()) + "\n\n" + END


def written(page: str) -> str:
    """``page`` with that part anew."""
    before, found, rest = page.partition(START)
    _, ended, after = rest.partition(END)
    assert found and ended, "the page has lost its marks"
    return before + made() + after
