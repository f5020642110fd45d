"""How well each quantizer represents its values, what it costs, and which layer to fix: as data, text, CSV and HTML."""

from sophq_func.algorithms.sensitivity import Fidelity, Sensitivity, fidelity, sensitivity
from sophq_func.reports._chip import ChipComparison, ChipRow, compare_chip
from sophq_func.reports._measure import report
from sophq_func.reports._report import Report
from sophq_func.reports._row import ReportRow

__all__ = [
    "ChipComparison",
    "ChipRow",
    "Fidelity",
    "Report",
    "ReportRow",
    "Sensitivity",
    "compare_chip",
    "fidelity",
    "report",
    "sensitivity",
]
