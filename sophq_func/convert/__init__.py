"""Leave the simulation: integer weights, biases and grids as an :class:`Artifact`, and a run on these integers."""

from __future__ import annotations

from sophq_func.convert._artifact import Artifact
from sophq_func.convert._convert import convert
from sophq_func.convert._pack import pack, per_byte, unpack

__all__ = ["Artifact", "convert", "pack", "per_byte", "unpack"]
