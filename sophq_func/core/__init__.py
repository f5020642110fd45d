"""Errors, names, types, trees, files, tables, logs, progress, and whether a compiler, transform or derivative is active."""

from sophq_func.core import errors as errors
from sophq_func.core import files as files
from sophq_func.core import logs as logs
from sophq_func.core import modes as modes
from sophq_func.core import operations as operations
from sophq_func.core import plain as plain
from sophq_func.core import plugins as plugins
from sophq_func.core import progress as progress
from sophq_func.core import public as public
from sophq_func.core import pytree as pytree
from sophq_func.core import registry as registry
from sophq_func.core import tables as tables
from sophq_func.core import types as types
from sophq_func.core import version as version
