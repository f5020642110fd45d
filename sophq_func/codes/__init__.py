"""The stored form of a quantizer: its grid, its codes and their packing; or the reason why it has none.

All exports, artifacts and reports call :func:`stored_form`, and refuse further only what their own format cannot express.
"""

from sophq_func.codes.bias import LIMIT as LIMIT
from sophq_func.codes.bias import BiasCodes as BiasCodes
from sophq_func.codes.bias import bias_codes as bias_codes
from sophq_func.codes.bias import bias_step as bias_step
from sophq_func.codes.grid import Grid as Grid
from sophq_func.codes.grid import is_integer as is_integer
from sophq_func.codes.pack import pack as pack
from sophq_func.codes.pack import per_byte as per_byte
from sophq_func.codes.pack import unpack as unpack
from sophq_func.codes.stored import BY_BLOCKS as BY_BLOCKS
from sophq_func.codes.stored import FROM_THE_TENSOR as FROM_THE_TENSOR
from sophq_func.codes.stored import Refusal as Refusal
from sophq_func.codes.stored import Stored as Stored
from sophq_func.codes.stored import grid_of as grid_of
from sophq_func.codes.stored import integer_grid as integer_grid
from sophq_func.codes.stored import share_on as share_on
from sophq_func.codes.stored import stored_form as stored_form
from sophq_func.codes.widened import beside as beside
from sophq_func.codes.widened import widened as widened
from sophq_func.codes.widened import widened_beside as widened_beside
