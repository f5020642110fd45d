"""A plan for people: rows, a table, a tree, an explanation, a difference, and a graph in the DOT language."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sophq_func.config.site import Site, WeightSite
from sophq_func.numerics.contracts import FAKE_QUANTIZERS
from sophq_func.numerics.scheme import SCHEME_FIELDS, PerTensor, QuantizerConfig

COLUMNS = ("quantizer", "grid", "granularity", "observer", "fake quantizer", "where", "why")
FIELDS = (*SCHEME_FIELDS, "observer", "fake_quantize", "observe_only", "optional")


def setting(config: QuantizerConfig, name: str) -> Any:
    """One field of a config or of its scheme."""
    return getattr(config.scheme if name in SCHEME_FIELDS else config, name)


def grid(config: QuantizerConfig) -> str:
    """The integer grid in a word: ``int8``, ``uint4 pot``."""
    name = f"{'int' if config.scheme.symmetric else 'uint'}{config.scheme.bits}"
    return name + " narrow" * config.scheme.symmetric_range + " pot" * config.scheme.pot_scale


def place(site: Site) -> str:
    """Where a quantizer sits, in words."""
    remark = f", {site.note}" if site.note else ""
    if isinstance(site, WeightSite):
        return f"weight {site.parameter}{remark}"
    if site.operand >= 0:
        return f"before {site.note}"
    return f"after {site.members[-1] if site.members else site.value}{remark}"


def why(reasons: Mapping[str, str]) -> list[str]:
    """Why a quantizer is there, the fields that a rule or strategy decided, and who decided all the rest."""
    because: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if name != "placed":
            because.setdefault(reason, []).append(name)
    most = max(because, key=lambda reason: len(because[reason]), default="")
    rest = "all" if len(because) == 1 else "all else"
    lines = [f"{', '.join(names)}: {reason}" for reason, names in because.items() if reason != most]
    return [text for text in (reasons.get("placed", ""), *lines, f"{rest}: {most}" if most else "") if text]


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
    """Rows in columns, and remarks below: with lines between them where rich is installed, else plain."""
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

    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        made.add_column(column, no_wrap=True)
    for entry in rows:
        made.add_row(*(Text(entry[c].replace("; ", ";\n") if c == "why" else entry[c]) for c in COLUMNS))
    width = sum(max(len(c), *(len(line) for entry in rows for line in entry[c].split("; "))) + 3 for c in COLUMNS)
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    with console.capture() as text:
        console.print(made)
    return "\n".join(line.rstrip() for line in text.get().strip("\n").splitlines())


def explain(config: QuantizerConfig, site: Site, reasons: Mapping[str, str]) -> str:
    """Everything about one quantizer: where it sits, and each field with who decided it."""
    lines = [site.quantizer, f"  {place(site)}"]
    if site.pattern:
        lines.append(f"  fused {site.pattern}: {' + '.join(site.members)}")
    if site.norm:
        lines.append(f"  {site.norm} is folded into the weight")
    if site.source:
        lines.append(f"  rounds the bias with the scale of {site.source}")
    lines.append(f"  placed because: {reasons.get('placed', 'the plan was made by hand')}")
    width = max(map(len, FIELDS))
    lines += [f"  {f.ljust(width)}  {setting(config, f)!r}  <- {reasons.get(f, 'default')}" for f in FIELDS]
    return "\n".join(lines)


class Tree(dict[str, Any]):
    """Configs nested by the parts of their quantizers' names; as text, a drawing."""

    def __str__(self) -> str:
        return "\n".join(self._lines(""))

    def _lines(self, indent: str) -> Iterable[str]:
        for i, (name, branch) in enumerate(self.items()):
            last = i == len(self) - 1
            while isinstance(branch, Tree) and len(branch) == 1:
                ((part, branch),) = branch.items()
                name = f"{name}.{part}"
            text = "" if isinstance(branch, Tree) else f"  {grid(branch)} {branch.scheme.granularity}"
            yield f"{indent}{'└─ ' if last else '├─ '}{name}{text}"
            if isinstance(branch, Tree):
                yield from branch._lines(indent + ("   " if last else "│  "))


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
    """A quantizer in one word: its grid, or its format where that is no integer one."""
    fake = config.fake_quantize.name
    return grid(config) if FAKE_QUANTIZERS.build(config.fake_quantize).integer else fake
