"""Functions of whole models: better params and qparams of the same plan, or one number for each quantizer."""

from typing import TYPE_CHECKING

from sophq_func.algorithms import curvature as curvature
from sophq_func.algorithms import sensitivity as sensitivity
from sophq_func.algorithms._awq import awq as awq
from sophq_func.algorithms._clip import clip as clip
from sophq_func.algorithms._clip import clip_solve as clip_solve
from sophq_func.algorithms._gptq import gptq as gptq
from sophq_func.algorithms._rotate import rotate as rotate
from sophq_func.algorithms._smooth import smooth as smooth
from sophq_func.algorithms._solve import gptq_solve as gptq_solve
from sophq_func.config.algorithms import ALGORITHMS, Run
from sophq_func.core.errors import near

__all__ = [
    "awq",
    "clip",
    "clip_solve",
    "gptq",
    "gptq_solve",
    "rotate",
    "smooth",
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
