"""Model and plan to pure functions of ``(params, state, batch)``: quantizers bound to weights and values, and runs."""

from sophq_func.model import apply as apply
from sophq_func.model import bind as bind
from sophq_func.model import bound as bound
from sophq_func.model import build as build
from sophq_func.model import calibrate as calibrate
from sophq_func.model import cut as cut
from sophq_func.model import engine as engine
from sophq_func.model import finite as finite
from sophq_func.model import flat as flat
from sophq_func.model import loop as loop
from sophq_func.model import no_module as no_module
from sophq_func.model import noise as noise
from sophq_func.model import params as params
from sophq_func.model import quantized as quantized
from sophq_func.model import requantizing as requantizing
from sophq_func.model import runner as runner
from sophq_func.model import schedule as schedule
from sophq_func.model import settings as settings
from sophq_func.model import shapes as shapes
from sophq_func.model import sweep as sweep
from sophq_func.model import tap as tap
from sophq_func.model import trees as trees
from sophq_func.model import value_quantizer as value_quantizer
from sophq_func.model import weight_quantizer as weight_quantizer
