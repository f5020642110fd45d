"""The stored form of a quantizer: its grid, its codes, their packing, and back."""

from sophq_func.codes import codes as codes
from sophq_func.codes import grids as grids
from sophq_func.codes import integer_grids as integer_grids
from sophq_func.codes import pack as pack
