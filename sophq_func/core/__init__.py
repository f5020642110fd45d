"""Errors, names, trees, files, progress, and who is looking (compiler, transform, derivative): no quantization here."""

from sophq_func.core import errors as errors
from sophq_func.core import files as files
from sophq_func.core import modes as modes
from sophq_func.core import operations as operations
from sophq_func.core import progress as progress
from sophq_func.core import pytree as pytree
from sophq_func.core import registry as registry
from sophq_func.core import version as version
