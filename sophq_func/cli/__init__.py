"""The command line: ``python -m sophq_func``."""

from sophq_func.cli import commands as commands
