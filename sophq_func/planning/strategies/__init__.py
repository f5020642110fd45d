"""Strategies: where quantizers go. Each is one file, and one entry in ``PLACEMENTS``."""

from sophq_func.config.strategies import PLACEMENTS, Placement, Requests, SharedInput, Strategy
from sophq_func.core.operations import CONTRACTIONS, DROPOUTS, LAYERS, MOVES
from sophq_func.planning.strategies import _academic as _academic
from sophq_func.planning.strategies import _layers as _layers
from sophq_func.planning.strategies import _mixed as _mixed
from sophq_func.planning.strategies import _tpu as _tpu
from sophq_func.planning.strategies._dataflow import contracted, moved, source_of

__all__ = [
    "CONTRACTIONS",
    "DROPOUTS",
    "LAYERS",
    "MOVES",
    "PLACEMENTS",
    "Placement",
    "Requests",
    "SharedInput",
    "Strategy",
    "contracted",
    "moved",
    "source_of",
]
