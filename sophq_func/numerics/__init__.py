"""Quantization of one tensor: schemes, contracts and number formats, and the arithmetic, eager and compiled."""

from sophq_func.numerics import affine as affine
from sophq_func.numerics import blocks as blocks
from sophq_func.numerics import codebooks as codebooks
from sophq_func.numerics import compiled as compiled
from sophq_func.numerics import contracts as contracts
from sophq_func.numerics import eager as eager
from sophq_func.numerics import eager_forward as eager_forward
from sophq_func.numerics import eager_gradients as eager_gradients
from sophq_func.numerics import formats as formats
from sophq_func.numerics import granularity as granularity
from sophq_func.numerics import kernels as kernels
from sophq_func.numerics import layout as layout
from sophq_func.numerics import library as library
from sophq_func.numerics import pieces as pieces
from sophq_func.numerics import ranges as ranges
from sophq_func.numerics import registries as registries
from sophq_func.numerics import scheme as scheme
