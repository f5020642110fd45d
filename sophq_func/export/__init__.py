"""What a quantized model becomes outside of this library; each target is one file, imported with what it needs when called."""

from sophq_func.export.onnx import onnx

__all__ = ["onnx"]
