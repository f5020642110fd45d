"""Calls that only move values have the range of what they move: their entries are copies (semantics.md 10.2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sophq_func.export._names import OP_TYPES, FileNames, call_op, operation
from sophq_func.export._records import Record
from sophq_func.planning.plan import Plan

MOVES = frozenset(("Flatten", "Resize", "Reshape", "Transpose"))
"""Op types whose result has the range of what they take."""

LAYERS = frozenset(("Conv", "Gemm"))
"""Op types whose copies are 4-bit ones where any activation is."""


def propagated(plan: Plan, found: Sequence[Record], file: FileNames | None = None) -> list[Record]:
    """Records for calls in chains of moves that have none: that of the nearest call before, else of the nearest behind.

    The call right before a chain takes part in it. In a file, several calls may have one tensor: it has one entry.
    """
    chains = _Chains.of(plan, found, file)
    four = any(record.bits == 4 for record in found if not record.is_weight)
    copies = {record.entry: record for record in chains.copies(four)}
    return [record for entry, record in copies.items() if entry not in {own.entry for own in found}]


@dataclass(frozen=True)
class _Chains:
    """By call: op types, names in the tables, records, and who feeds whom."""

    kinds: Mapping[str, str]
    ops: Mapping[str, str]
    owners: Mapping[str, Record]
    before: Mapping[str, list[str]]
    behind: Mapping[str, list[str]]

    @staticmethod
    def of(plan: Plan, found: Sequence[Record], file: FileNames | None) -> _Chains:
        before: dict[str, list[str]] = {}
        behind: dict[str, list[str]] = {}
        for edge in plan.edges:
            before.setdefault(edge.target, []).append(edge.source)
            behind.setdefault(edge.source, []).append(edge.target)
        results = (record for record in found if not record.is_weight and plan.site(record.quantizer).operand < 0)
        return _Chains(
            {call.name: OP_TYPES.get(operation(call.does), "") for call in plan.calls},
            {call.name: call_op(plan, call.name, file) for call in plan.calls},
            {plan.site(record.quantizer).value: record for record in results},
            before,
            behind,
        )

    def copies(self, four: bool) -> Iterator[Record]:
        """A copy for each call that lacks a record."""
        for call, kind in self.kinds.items():
            leads = any(self.kinds.get(user) in MOVES for user in self.behind.get(call, ()))
            if call in self.owners or not kind or not self.ops[call] or not (kind in MOVES or leads):
                continue
            source = self._nearest(call, self.before) if kind in MOVES else None
            source = source or self._nearest(call, self.behind)
            if source is not None:
                yield replace(source, op=self.ops[call], ending="_4" if four and kind in LAYERS else "_8")

    def _nearest(self, call: str, steps: Mapping[str, list[str]]) -> Record | None:
        """The first record on the way, which goes through moves only."""
        at = call
        while steps.get(at):
            at = steps[at][0]
            if at in self.owners or self.kinds.get(at) not in MOVES:
                return self.owners.get(at)
        return None
