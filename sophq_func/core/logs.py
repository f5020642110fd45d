"""The loggers of the library, below ``sophq_func``.

They say what was decided when a plan was made, and how far a long loop is; nothing is said of each run of a model. A user
sees them with the configuration of :mod:`logging`::

    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("sophq_func").setLevel(logging.DEBUG)
"""

from __future__ import annotations

import logging

ROOT = logging.getLogger("sophq_func")
"""The parent of all."""

# An application that does not configure logging sees nothing; without a handler, Python would write warnings to stderr.
ROOT.addHandler(logging.NullHandler())

PLANNING = ROOT.getChild("planning")
"""What a plan decides: INFO for the whole, DEBUG for each quantizer and for each layer that stays float."""

ALGORITHMS = ROOT.getChild("algorithms")
"""What algorithms of whole models leave as it is, and why: INFO; what they take back as it made the model worse: WARNING."""

KERNELS = ROOT.getChild("kernels")
"""A compiled kernel that is there, and cannot be loaded: WARNING."""

PROGRESS = ROOT.getChild("progress")
"""How far a long loop is, where there is neither a terminal nor a notebook: INFO."""
