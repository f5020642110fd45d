"""The command line: ``sophq``, which is ``python -m sophq_func``."""

from sophq_func.cli import commands as commands
