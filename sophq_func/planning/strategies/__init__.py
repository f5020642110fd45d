"""Strategies, which choose where quantizers go. Each is one file, and one entry in ``config.strategies.PLACEMENTS``."""

from sophq_func.planning.strategies import _academic as _academic
from sophq_func.planning.strategies import _layers as _layers
from sophq_func.planning.strategies import _mixed as _mixed
from sophq_func.planning.strategies import _tpu as _tpu
from sophq_func.planning.strategies._base import constants, derived, reached
from sophq_func.planning.strategies._chip import TABLES, on_grid_of, stored
from sophq_func.planning.strategies._dataflow import computed_weights, contracted, moved, moves, source_of

__all__ = [
    "TABLES",
    "computed_weights",
    "constants",
    "contracted",
    "derived",
    "moved",
    "moves",
    "on_grid_of",
    "reached",
    "source_of",
    "stored",
]
