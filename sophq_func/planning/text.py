"""A plan as text: rows, a table, a tree, and the explanation of one quantizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sophq_func.config.site import Site, WeightSite
from sophq_func.core.tables import Table
from sophq_func.core.texts import printable
from sophq_func.numerics.contracts import FAKE_QUANTIZERS
from sophq_func.numerics.granularity import PerTensor
from sophq_func.numerics.scheme import SCHEME_FIELDS, QuantizerConfig

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


def table(rows: Sequence[Mapping[str, str]]) -> Table:
    """Rows, as :func:`row` makes them, under their headings."""
    return Table(headings=COLUMNS, rows=tuple(tuple(row[column] for column in COLUMNS) for row in rows))


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
    return "\n".join(map(printable, lines))


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
            yield f"{indent}{'└─ ' if is_last else '├─ '}{printable(name)}{text}"
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
