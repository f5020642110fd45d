"""Holds pieces of your own to the laws of the library's: one check for each kind, which reports every law that is broken."""

from sophq_func.testing.algorithms import check_algorithm
from sophq_func.testing.fake_quantizers import check_fake_quantizer
from sophq_func.testing.formats import check_format
from sophq_func.testing.laws import LawError
from sophq_func.testing.observers import check_observer
from sophq_func.testing.plans import check_chip, check_strategy

__all__ = [
    "LawError",
    "check_algorithm",
    "check_chip",
    "check_fake_quantizer",
    "check_format",
    "check_observer",
    "check_strategy",
]


def __dir__() -> list[str]:
    return __all__
