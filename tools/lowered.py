"""Reads the text of a network that tpu-mlir has lowered: which operation computes in which type."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

OPERATION = re.compile(r'^\s*%\S+ = "(?:top|tpu)\.(?P<kind>\w+)"\(.*loc\((?P<place>#loc\d*)\)\s*$')
"""A line with an operation that returns one tensor."""

PLACE = re.compile(r'^(#loc\d*) = loc\("([^"]+)"\)', re.MULTILINE)
"""A line that gives a name to a place."""

TENSOR = re.compile(r"tensor<(?:[^<>]|<(?:[^<>]|<[^<>]*>)*>)*>|none")
"""The type of an operand or a result."""

NO_OPERATIONS = frozenset(("None", "Weight", "Return", "Yield"))


class Lowered(NamedTuple):
    """An operation of a lowered network.

    Attributes:
      kind: what it does, in the words of the compiler.
      name: of its result.
      result: type of the result: ``i8``, ``u8``, ``f8E4M3FN``, ``bf16``, ``f32``, ...
      operands: types of the operands that are tensors.
    """

    kind: str
    name: str
    result: str
    operands: tuple[str, ...]

    @property
    def multiplies_in(self) -> str:
        """The type of a product's first operand: that of its result may be another, where a cast is fused into it."""
        return self.operands[0]


def lowered(path: Path) -> list[Lowered]:
    """The operations of a network, in order."""
    text = path.read_text()
    return list(_operations(text, dict(PLACE.findall(text))))


def _operations(text: str, names: dict[str, str]) -> Iterator[Lowered]:
    for line in text.splitlines():
        found = OPERATION.match(line)
        if found is None or found["kind"] in NO_OPERATIONS:
            continue
        signature = line.rsplit("} : (", 1)[-1] if "} : (" in line else line.rsplit(" : (", 1)[-1]
        operands, _, result = signature.rpartition(") -> ")
        types = tuple(element(tensor) for tensor in TENSOR.findall(operands) if tensor != "none")
        (returned, *_) = TENSOR.findall(result)
        yield Lowered(found["kind"], names.get(found["place"], ""), element(returned), types)


def element(tensor: str) -> str:
    """The type of a tensor's elements.

    Example:
      >>> element("tensor<1x2x!quant.uniform<u8:f32, 0.5>>"), element("tensor<2xf32>"), element("tensor<4x3xsi8>")
      ('u8', 'f32', 'i8')
      >>> element("tensor<2x!quant.calibrated<f32<-1.0:1.0>>>")
      'f32'
    """
    inside = re.sub(r"^tensor<(?:\d+x)*", "", tensor).rstrip(">")
    inside = re.sub(r"^!quant\.(?:uniform|calibrated)<", "", inside)
    return re.split(r"[:,<>]", inside)[0].removeprefix("s")
