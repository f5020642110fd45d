"""Runs any model purely and shows a frame every call that it makes; makes a graph. No quantization here."""

from sophq_func.capture import aliases as aliases
from sophq_func.capture import arguments as arguments
from sophq_func.capture import decompose as decompose
from sophq_func.capture import frame as frame
from sophq_func.capture import graph as graph
from sophq_func.capture import lazy as lazy
from sophq_func.capture import naming as naming
from sophq_func.capture import skeleton as skeleton
from sophq_func.capture import snapshot as snapshot
from sophq_func.capture import trace as trace
