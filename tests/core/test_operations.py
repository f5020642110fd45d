"""One canonical name for each operation, for functions that torch has under several names, too."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch

from sophq_func.core import operations

ALIASES = {"spmm": "mm", "dsmm": "mm", "hsmm": "hspmm", "saddmm": "sspaddmm", "ger": "outer"}


@pytest.mark.parametrize("alias", ALIASES)
def test_a_function_is_the_same_under_all_its_names(alias: str) -> None:
    for name in (alias, ALIASES[alias]):
        assert operations.called(getattr(torch, name)) == ALIASES[alias]
        assert operations.canonical(getattr(torch, name)) == ALIASES[alias]


def test_no_function_takes_the_name_of_an_equal_one() -> None:
    """Functions that compare equal share an entry of the table, so that their canonical names must agree."""
    functions: list[Callable[..., object]] = list(operations.BUILTIN)
    functions += [getattr(torch, name) for name in dir(torch) if isinstance(getattr(torch, name), types.BuiltinFunctionType)]
    wrong = {f.__name__ for f in functions if operations.called(f) not in (operations.canonical(f), "")}
    assert wrong == set()


def test_the_keys_that_a_compiler_reads_are_functions_of_c_alone() -> None:
    """Dynamo of torch 2.9 refuses a table with a cached function among its keys, at every call of a compiled model."""
    kinds = {types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType}
    assert {type(function) for function in operations.BUILTIN} == kinds
    assert "get_device_module" not in operations.operations()
