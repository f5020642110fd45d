"""Plan, qparams, observer states, params and what else a run needs in one checked file."""

from sophq_func.checkpoint import compare as compare
from sophq_func.checkpoint import extra as extra
from sophq_func.checkpoint import io as io
from sophq_func.checkpoint import safe as safe
from sophq_func.checkpoint import sealed as sealed
