"""Functions of whole models: better params, or one number for each quantizer."""

from sophq_func.algorithms import curvature as curvature
from sophq_func.algorithms import sensitivity as sensitivity
