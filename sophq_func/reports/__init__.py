"""How well each quantizer represents what it is there for, what it costs, and which layer to fix: data, text, CSV, HTML."""

from sophq_func.algorithms.sensitivity import Fidelity, Sensitivity, fidelity, sensitivity
from sophq_func.reports._measure import report
from sophq_func.reports._report import Report
from sophq_func.reports._row import ReportRow

__all__ = ["Fidelity", "Report", "ReportRow", "Sensitivity", "fidelity", "report", "sensitivity"]
