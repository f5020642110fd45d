"""Strategies: where quantizers go. Each is one file, and one entry in ``PLACEMENTS``."""

from sophq_func.strategies import _academic as _academic
from sophq_func.strategies import _tpu as _tpu
from sophq_func.strategies._base import PLACEMENTS, Asks, Placement, Strategy
from sophq_func.strategies._dataflow import CONTRACTIONS, LAYERS, contracted, source_of

__all__ = ["CONTRACTIONS", "LAYERS", "PLACEMENTS", "Asks", "Placement", "Strategy", "contracted", "source_of"]
