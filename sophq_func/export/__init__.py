"""What a quantized model becomes outside of this library; each target is one file that imports its packages when called."""

from sophq_func.export.onnx import onnx
from sophq_func.export.tables import Tables, tables
from sophq_func.export.torch import torch

__all__ = ["Tables", "onnx", "tables", "torch"]
