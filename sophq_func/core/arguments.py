"""Checks of arguments that many functions share: counts with an upper bound, and tensors of real numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sophq_func.core.errors import StateError, explain, raise_all

MOST_REPEATS = 10**7
"""Most steps, bins or samples: more than anybody needs, and so few that a wrong number does not run for ever."""


def is_count(value: object, least: int = 1, most: int = MOST_REPEATS) -> bool:
    """Whether a value is a number of steps, bins or samples: an integer, no bool, between bounds.

    Example:
      >>> is_count(3), is_count(True), is_count(0), is_count(10**30)
      (True, False, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def check_counts(where: str, counts: Mapping[str, object], least: int = 1, most: int = MOST_REPEATS) -> None:
    """Raise a :class:`ConfigError` about the arguments that are to be counts and are not.

    Example:
      >>> check_counts("top_eigenvalue", {"steps": 20})
    """
    sentence, allowed = "must be a positive int" if least == 1 else "must be an int", f"an int from {least} to {most}"
    wrong = {name: count for name, count in counts.items() if not is_count(count, least, most)}
    raise_all([explain(where, f"{name} {sentence}", got=count, allowed=allowed) for name, count in wrong.items()])


def check_reals(where: str, values: Mapping[str, object], floating: bool = False) -> None:
    """Raise a :class:`StateError` about the arguments that are to be dense tensors of real numbers and are not.

    Args:
      where: the function that the user called.
      values: the arguments, by name.
      floating: whether they must be floating, too.

    Example:
      >>> check_reals("rectified_sigmoid", {"alpha": torch.ones(2)})
    """
    problems = [not_real(where, name, value, floating) for name, value in values.items()]
    raise_all([problem for problem in problems if problem], StateError)


def not_real(where: str, name: str, value: object, floating: bool = False) -> str:
    """Why a value is no dense tensor of real, or of floating, numbers; empty if it is one."""
    allowed = "a dense tensor of real numbers"
    if not isinstance(value, Tensor):
        return explain(where, f"{name} is no tensor", got=value, allowed=allowed, fix=f"torch.as_tensor({name})")
    if value.is_complex():
        return explain(where, f"{name} is complex", got=value.dtype, allowed=allowed, fix=f"{name}.real")
    if value.layout is not torch.strided and not value.is_nested:
        return explain(where, f"{name} is sparse", got=value.layout, allowed=allowed, fix=f"{name}.to_dense()")
    if floating and not value.is_floating_point():
        allowed = "a floating dtype"
        return explain(where, f"{name} is not floating", got=value.dtype, allowed=allowed, fix=f"{name}.float()")
    return ""
