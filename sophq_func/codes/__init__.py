"""The stored form of a quantizer: its grid, its codes, their packing, and back; one answer for whatever stores them."""

from sophq_func.codes.grid import Grid as Grid
from sophq_func.codes.pack import pack as pack
from sophq_func.codes.pack import per_byte as per_byte
from sophq_func.codes.pack import unpack as unpack
from sophq_func.codes.stored import Refusal as Refusal
from sophq_func.codes.stored import Stored as Stored
from sophq_func.codes.stored import stored_form as stored_form
