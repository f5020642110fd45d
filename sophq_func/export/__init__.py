"""What a quantized model becomes outside of this library; each target is one file, imported with its needs when called."""

from sophq_func.export.tables import Tables, tables

__all__ = ["Tables", "tables"]
