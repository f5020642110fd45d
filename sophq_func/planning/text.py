"""A plan as text: rows, a table, a tree, and the explanation of one quantizer."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sophq_func.config.site import Site, WeightSite
from sophq_func.numerics.contracts import FAKE_QUANTIZERS
from sophq_func.numerics.scheme import SCHEME_FIELDS, PerTensor, QuantizerConfig

COLUMNS = ("quantizer", "grid", "granularity", "observer", "fake quantizer", "where", "why")
"""Headings of the table."""

FIELDS = (*SCHEME_FIELDS, "observer", "fake_quantize", "observe_only", "optional")
"""Fields of a config, with those of its scheme, in the order in which they are explained."""


def setting(config: QuantizerConfig, name: str) -> object:
    """One field of a config or of its scheme."""
    return getattr(config.scheme if name in SCHEME_FIELDS else config, name)


def grid(config: QuantizerConfig) -> str:
    """The integer grid in short, as ``int8`` or ``uint4``.

    With ``narrow`` behind, it lacks the most negative code; with ``pot``, its scales are powers of two.
    """
    scheme = config.scheme
    words = [f"int{scheme.bits}" if scheme.symmetric else f"uint{scheme.bits}"]
    if scheme.symmetric_range:
        words.append("narrow")
    if scheme.pot_scale:
        words.append("pot")
    return " ".join(words)


def place(site: Site) -> str:
    """Where a quantizer sits, in words."""
    remark = f", {site.note}" if site.note else ""
    if isinstance(site, WeightSite):
        return f"weight {site.parameter}{remark}"
    if site.operand >= 0:
        return f"before {site.note}"
    return f"after {site.members[-1] if site.members else site.value}{remark}"


def why(reasons: Mapping[str, str]) -> list[str]:
    """Why there is a quantizer, and what decided the fields of its config.

    The reason that most fields have in common comes last, as "all else".
    """
    names_by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if name != "placed":
            names_by_reason.setdefault(reason, []).append(name)
    commonest = max(names_by_reason, key=lambda reason: len(names_by_reason[reason]), default="")
    lines = [reasons["placed"]] if reasons.get("placed") else []
    lines += [f"{', '.join(names)}: {reason}" for reason, names in names_by_reason.items() if reason != commonest]
    if commonest:
        rest = "all" if len(names_by_reason) == 1 else "all else"
        lines.append(f"{rest}: {commonest}")
    return lines


def row(config: QuantizerConfig, site: Site, reasons: Mapping[str, str]) -> dict[str, str]:
    """One quantizer as text by column."""
    granularity = config.scheme.granularity
    values = (
        site.quantizer,
        grid(config),
        "tensor" if granularity == PerTensor() else str(granularity),
        repr(config.observer),
        repr(config.fake_quantize) + (", observes only" if config.observe_only else ""),
        place(site),
        "; ".join(why(reasons)),
    )
    return dict(zip(COLUMNS, values, strict=True))


def table(rows: Sequence[Mapping[str, str]], remarks: Iterable[str]) -> str:
    """Rows in columns, and remarks below. Columns are aligned by rich where that is installed, else by spaces."""
    if not rows:
        return "\n".join(["nothing is quantized", *remarks])
    body = _rich_table(rows) if importlib.util.find_spec("rich") else _plain_table(rows)
    return "\n".join([body, *remarks])


def _plain_table(rows: Sequence[Mapping[str, str]]) -> str:
    widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in COLUMNS[:-1]}
    lines = [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]
    return "\n".join("  ".join(line[c].ljust(widths.get(c, 0)) for c in COLUMNS).rstrip() for line in lines)


def _rich_table(rows: Sequence[Mapping[str, str]]) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rich_table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        rich_table.add_column(column, no_wrap=True)
    for row in rows:
        # Reasons are long: each has a line of its own.
        texts = {**row, "why": row["why"].replace("; ", ";\n")}
        rich_table.add_row(*(Text(texts[column]) for column in COLUMNS))
    # As wide as the text, and not as the terminal, so that the table is the same everywhere.
    widths = [max(len(column), *(len(line) for row in rows for line in row[column].split("; "))) for column in COLUMNS]
    # SIMPLE_HEAD puts a space on both sides of a column and one between columns.
    width = sum(width + 3 for width in widths)
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    with console.capture() as text:
        console.print(rich_table)
    return "\n".join(line.rstrip() for line in text.get().strip("\n").splitlines())


def explain(config: QuantizerConfig, site: Site, reasons: Mapping[str, str]) -> str:
    """Everything about one quantizer: where it sits, and each field of its config with what decided it."""
    lines = [site.quantizer, f"  {place(site)}"]
    if site.pattern:
        lines.append(f"  fused {site.pattern}: {' + '.join(site.members)}")
    if site.norm:
        lines.append(f"  {site.norm} is folded into the weight")
    if site.source:
        lines.append(f"  rounds the bias with the scale of {site.source}")
    lines.append(f"  placed because: {reasons.get('placed', 'the plan was made by hand')}")
    width = max(map(len, FIELDS))
    for name in FIELDS:
        lines.append(f"  {name.ljust(width)}  {setting(config, name)!r}  <- {reasons.get(name, 'default')}")
    return "\n".join(lines)


class Tree(dict[str, Any]):
    """Configs nested by the parts of their quantizers' names; ``str`` draws the tree."""

    def __str__(self) -> str:
        return "\n".join(self._lines(""))

    def _lines(self, indent: str) -> Iterable[str]:
        for i, (name, branch) in enumerate(self.items()):
            is_last = i == len(self) - 1
            # A branch with a single item is written on one line with it.
            while isinstance(branch, Tree) and len(branch) == 1:
                ((part, branch),) = branch.items()
                name = f"{name}.{part}"
            text = "" if isinstance(branch, Tree) else f"  {grid(branch)} {branch.scheme.granularity}"
            yield f"{indent}{'└─ ' if is_last else '├─ '}{name}{text}"
            if isinstance(branch, Tree):
                yield from branch._lines(indent + ("   " if is_last else "│  "))


def tree(configs: Mapping[str, QuantizerConfig]) -> Tree:
    """Configs by name, nested at the dots."""
    root = Tree()
    for name, config in configs.items():
        *path, leaf = name.split(".")
        branch = root
        for part in path:
            branch = branch.setdefault(part, Tree())
        branch[leaf] = config
    return root


def short(config: QuantizerConfig) -> str:
    """A quantizer in short: its integer grid, or the name of its fake quantizer where its codes are no integers."""
    if FAKE_QUANTIZERS.build(config.fake_quantize).integer:
        return grid(config)
    return config.fake_quantize.name
