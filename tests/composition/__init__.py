"""Whole models through every transform: a registry of checks, which tests run and from which a page is written."""

from tests.composition import compilers, derivatives, machines, maps, tracers  # noqa: F401  (they register rows)
from tests.composition.registry import ROWS, Check, Limit, Row
from tests.composition.subjects import SUBJECTS, Subject

__all__ = ["ROWS", "SUBJECTS", "Check", "Limit", "Row", "Subject"]
