"""Strategies: where quantizers go. Each is one file, and one entry in ``PLACEMENTS``."""

from sophq_func.strategies import _academic as _academic
from sophq_func.strategies import _layers as _layers
from sophq_func.strategies import _mixed as _mixed
from sophq_func.strategies import _tpu as _tpu
from sophq_func.strategies._base import (
    DROPOUTS,
    PLACEMENTS,
    Placement,
    Requests,
    SharedInput,
    Strategy,
    activation_quantizer,
)
from sophq_func.strategies._dataflow import CONTRACTIONS, LAYERS, MOVES, contracted, source_of

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
    "activation_quantizer",
    "contracted",
    "source_of",
]
