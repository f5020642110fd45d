"""Export a quantized model: one file for each target, which imports the packages that it needs only when it is called."""

from sophq_func.export.onnx import onnx
from sophq_func.export.tables import Tables, tables
from sophq_func.export.torch import torch

__all__ = ["Tables", "onnx", "tables", "torch"]


def __dir__() -> list[str]:
    return __all__
