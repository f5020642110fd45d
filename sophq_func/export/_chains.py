"""Table entries for calls that only move values: copies of the entry of a neighbour, whose range they share.

A chip's compiler looks up an entry for every op; sophgo-mq fills in these copies, and the tables here have the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sophq_func.export._names import OP_TYPES, FileNames, call_op, operation
from sophq_func.export._records import Record
from sophq_func.planning.plan import Plan

MOVES = frozenset(("Flatten", "Resize", "Reshape", "Transpose"))
"""Op types whose results have the range of their inputs."""

LAYERS = frozenset(("Conv", "Gemm"))
"""Op types whose copies get the ending ``_4`` as soon as one activation is 4-bit, as sophgo-mq names them."""


def propagated(plan: Plan, records: Sequence[Record], file: FileNames | None = None) -> list[Record]:
    """Copies of records for calls without one in chains of moves: of the nearest call before, else of the nearest behind.

    The call right before a chain belongs to it. In a file, several calls may have the same tensor: it gets one entry.

    Args:
      plan: of the quantizers.
      records: those of the quantizers.
      file: names of the ONNX file, if there is one.
    """
    chains = _Chains.of(plan, records, file)
    has_four_bits = any(record.bits == 4 for record in records if not record.is_weight)
    copies = {copy.entry: copy for copy in chains.copies(has_four_bits)}
    taken = {record.entry for record in records}
    return [copy for entry, copy in copies.items() if entry not in taken]


@dataclass(frozen=True)
class _Chains:
    """The traced calls; every attribute is by the name of a call.

    Attributes:
      op_types: of ONNX; empty where none is known.
      ops: names in the tables.
      owners: records of quantizers of results.
      before: the calls whose results it takes.
      behind: the calls that take its result.
    """

    op_types: Mapping[str, str]
    ops: Mapping[str, str]
    owners: Mapping[str, Record]
    before: Mapping[str, list[str]]
    behind: Mapping[str, list[str]]

    @staticmethod
    def of(plan: Plan, records: Sequence[Record], file: FileNames | None) -> _Chains:
        before: dict[str, list[str]] = {}
        behind: dict[str, list[str]] = {}
        for edge in plan.edges:
            before.setdefault(edge.target, []).append(edge.source)
            behind.setdefault(edge.source, []).append(edge.target)
        activations = [record for record in records if not record.is_weight]
        results = [record for record in activations if plan.site(record.quantizer).operand < 0]
        return _Chains(
            {call.name: OP_TYPES.get(operation(call.does), "") for call in plan.calls},
            {call.name: call_op(plan, call.name, file) for call in plan.calls},
            {plan.site(record.quantizer).value: record for record in results},
            before,
            behind,
        )

    def copies(self, has_four_bits: bool) -> Iterator[Record]:
        """A copy for each call of a chain that has no record."""
        for call, op_type in self.op_types.items():
            has_name = op_type and self.ops[call]
            if call in self.owners or not has_name:
                continue
            is_move = op_type in MOVES
            leads_a_chain = any(self.op_types.get(user) in MOVES for user in self.behind.get(call, ()))
            if not is_move and not leads_a_chain:
                continue
            source = self._nearest(call, self.before) if is_move else None
            source = source or self._nearest(call, self.behind)
            if source is not None:
                ending = "_4" if has_four_bits and op_type in LAYERS else "_8"
                yield replace(source, op=self.ops[call], ending=ending)

    def _nearest(self, call: str, neighbours: Mapping[str, list[str]]) -> Record | None:
        """The first record on a path from a call that goes through moves only.

        Args:
          neighbours: the calls before or behind each call; the path takes the first of them.
        """
        current = call
        while neighbours.get(current):
            current = neighbours[current][0]
            if current in self.owners or self.op_types.get(current) not in MOVES:
                return self.owners.get(current)
        return None
