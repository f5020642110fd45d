"""From a traced graph and a config to a plan: which quantizers there are, where each sits, and why.

Nothing here computes with tensors.
"""

from sophq_func.planning import biases as biases
from sophq_func.planning import checks as checks
from sophq_func.planning import deciding as deciding
from sophq_func.planning import diff as diff
from sophq_func.planning import draft as draft
from sophq_func.planning import fusing as fusing
from sophq_func.planning import inputs as inputs
from sophq_func.planning import make as make
from sophq_func.planning import parts as parts
from sophq_func.planning import picture as picture
from sophq_func.planning import placing as placing
from sophq_func.planning import plan as plan
from sophq_func.planning import plot as plot
from sophq_func.planning import runs as runs
from sophq_func.planning import stored as stored
from sophq_func.planning import strategies as strategies
from sophq_func.planning import text as text
from sophq_func.planning import unite as unite
from sophq_func.planning import values as values
from sophq_func.planning import weights as weights
