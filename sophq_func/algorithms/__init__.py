"""Functions of whole models: better params and qparams of the same plan, or one number for each quantizer."""

from typing import TYPE_CHECKING

from sophq_func.algorithms import curvature as curvature
from sophq_func.algorithms import sensitivity as sensitivity
from sophq_func.algorithms._adam import adam as adam
from sophq_func.algorithms._awq import awq as awq
from sophq_func.algorithms._clip import clip as clip
from sophq_func.algorithms._clip import clip_solve as clip_solve
from sophq_func.algorithms._equalize import equalizable as equalizable
from sophq_func.algorithms._equalize import equalize as equalize
from sophq_func.algorithms._gptq import gptq as gptq
from sophq_func.algorithms._reconstruct import adaround as adaround
from sophq_func.algorithms._reconstruct import brecq as brecq
from sophq_func.algorithms._reconstruct import qdrop as qdrop
from sophq_func.algorithms._reconstruct import reconstruct as reconstruct
from sophq_func.algorithms._rotate import rotate as rotate
from sophq_func.algorithms._smooth import smooth as smooth
from sophq_func.algorithms._solve import gptq_solve as gptq_solve
from sophq_func.algorithms._untie import untie as untie
from sophq_func.algorithms.biases import correct_biases as correct_biases
from sophq_func.algorithms.bits import BitSensitivity as BitSensitivity
from sophq_func.algorithms.bits import at_widths as at_widths
from sophq_func.algorithms.bits import bit_sensitivity as bit_sensitivity
from sophq_func.algorithms.bits import sizes as sizes
from sophq_func.algorithms.bits import trace_sensitivity as trace_sensitivity
from sophq_func.algorithms.choose import Choice as Choice
from sophq_func.algorithms.choose import bit_operations as bit_operations
from sophq_func.algorithms.choose import choose_bits as choose_bits
from sophq_func.algorithms.choose import pareto as pareto
from sophq_func.algorithms.norms import reestimate_norms as reestimate_norms
from sophq_func.algorithms.ptq_config import from_ptq_config as from_ptq_config
from sophq_func.config.algorithms import ALGORITHMS, Run
from sophq_func.core.errors import near

__all__ = [
    "adam",
    "adaround",
    "at_widths",
    "awq",
    "bit_operations",
    "bit_sensitivity",
    "brecq",
    "choose_bits",
    "clip",
    "clip_solve",
    "correct_biases",
    "equalizable",
    "equalize",
    "from_ptq_config",
    "gptq",
    "gptq_solve",
    "pareto",
    "qdrop",
    "reconstruct",
    "reestimate_norms",
    "rotate",
    "sizes",
    "smooth",
    "trace_sensitivity",
    "untie",
]


def __dir__() -> list[str]:
    return sorted({*__all__, *ALGORITHMS.names()})


if not TYPE_CHECKING:  # type checkers see the functions above, and are to refuse other names

    def __getattr__(name: str) -> Run:
        """The function of an algorithm that was registered elsewhere."""
        found = None if name.startswith("_") else ALGORITHMS.find(name)
        if found is None:
            hint = near(name, __dir__())
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}" + (f", {hint}" if hint else ""))
        return ALGORITHMS.get(found).run
