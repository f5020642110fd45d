"""Plan, qparams, observer states and params in one checked file."""

from sophq_func.checkpoint import compare as compare
from sophq_func.checkpoint import io as io
from sophq_func.checkpoint import sealed as sealed
