"""Runs of any model as a pure function, with a frame that sees each call, and the graph of these calls."""

from sophq_func.capture import aliases as aliases
from sophq_func.capture import arguments as arguments
from sophq_func.capture import contents as contents
from sophq_func.capture import decompose as decompose
from sophq_func.capture import frame as frame
from sophq_func.capture import graph as graph
from sophq_func.capture import lazy as lazy
from sophq_func.capture import live as live
from sophq_func.capture import naming as naming
from sophq_func.capture import skeleton as skeleton
from sophq_func.capture import snapshot as snapshot
from sophq_func.capture import trace as trace
from sophq_func.capture._torch import LOGGER_OF_ONNX as LOGGER_OF_ONNX
from sophq_func.capture._torch import drop_unread as drop_unread
from sophq_func.capture._torch import imagined as imagined
from sophq_func.capture._torch import operator_name as operator_name
from sophq_func.capture._torch import quantized_operators as quantized_operators
from sophq_func.capture._torch import reasons_of_refusal as reasons_of_refusal
from sophq_func.capture._torch import refusals_of_export as refusals_of_export
from sophq_func.capture._torch import suggested_fixes as suggested_fixes
from sophq_func.capture._torch import suggested_range as suggested_range
