"""What a user asks for: rules, chips, patterns, the three dictionaries; and the sites of quantizers that rules match."""

from sophq_func.config import chips as chips
from sophq_func.config import dicts as dicts
from sophq_func.config import matching as matching
from sophq_func.config import names as names
from sophq_func.config import paths as paths
from sophq_func.config import patterns as patterns
from sophq_func.config import presets as presets
from sophq_func.config import register as register
from sophq_func.config import resolving as resolving
from sophq_func.config import rules as rules
from sophq_func.config import site as site
from sophq_func.config import stored as stored
from sophq_func.config import strategies as strategies
