"""How well each quantizer represents what it is there for, what it costs, and which layer to fix: data, text, CSV, HTML."""

from sophq_func.report._measure import report
from sophq_func.report._report import Report
from sophq_func.report._row import ReportRow
from sophq_func.report._single import Fidelity, Sensitivity, fidelity, sensitivity

__all__ = ["Fidelity", "Report", "ReportRow", "Sensitivity", "fidelity", "report", "sensitivity"]
