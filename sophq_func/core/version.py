"""The version of the library; that of the package is the same."""

__version__ = "0.1.0"
