"""Functions of whole models: better params and qparams of the same plan, or one number for each quantizer."""

from typing import TYPE_CHECKING

from sophq_func.algorithms import curvature as curvature
from sophq_func.algorithms import sensitivity as sensitivity
from sophq_func.algorithms.adam import adam as adam
from sophq_func.algorithms.biases import correct_biases as correct_biases
from sophq_func.algorithms.norms import reestimate_norms as reestimate_norms
from sophq_func.algorithms.reconstruct import adaround as adaround
from sophq_func.algorithms.reconstruct import brecq as brecq
from sophq_func.algorithms.reconstruct import qdrop as qdrop
from sophq_func.algorithms.reconstruct import reconstruct as reconstruct
from sophq_func.config.algorithms import ALGORITHMS, Run
from sophq_func.core.errors import near

__all__ = ["adam", "adaround", "brecq", "correct_biases", "qdrop", "reconstruct", "reestimate_norms"]


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
