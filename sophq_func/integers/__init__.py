"""Leave the simulation: integer weights, biases and grids as an :class:`Artifact`, and a run on these integers."""

from __future__ import annotations

from sophq_func.codes import pack, per_byte, unpack
from sophq_func.integers._artifact import Artifact
from sophq_func.integers._convert import convert

__all__ = ["Artifact", "convert", "pack", "per_byte", "unpack"]
