"""The loggers of the library, below ``sophq_func``.

They say what was decided when a plan was made, and how far a long loop is; nothing is said of each run of a model. A user
sees them with the configuration of :mod:`logging`::

    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("sophq_func").setLevel(logging.DEBUG)
"""

from __future__ import annotations

import logging

from sophq_func.core.texts import printable


class Printable(logging.Filter):
    """Lets every record pass as one line, in which no name moves the cursor of a terminal."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), None
        return True


ROOT = logging.getLogger("sophq_func")
"""The parent of all."""

# An application that does not configure logging sees nothing; without a handler, Python would write warnings to stderr.
ROOT.addHandler(logging.NullHandler())


def _child(name: str) -> logging.Logger:
    """A logger below :data:`ROOT`. Each has the filter, since that of a parent does not see the records of its children."""
    logger = ROOT.getChild(name)
    logger.addFilter(Printable())
    return logger


PLANNING = _child("planning")
"""What a plan decides: INFO for the whole, DEBUG for each quantizer and for each layer that stays float."""

ALGORITHMS = _child("algorithms")
"""What algorithms of whole models leave as it is, and why: INFO; what they take back as it made the model worse: WARNING."""

KERNELS = _child("kernels")
"""A compiled kernel that is there, and cannot be loaded: WARNING."""

PROGRESS = _child("progress")
"""How far a long loop is, where there is neither a terminal nor a notebook: INFO."""
