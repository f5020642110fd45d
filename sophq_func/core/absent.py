"""What modules say of names that they do not have: which are near, and what is written in the place of an old one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NoReturn

from sophq_func.core.errors import ConfigError, explain, near


class AbsentNameError(ConfigError, AttributeError):
    """A module does not have this name. An ``AttributeError``, too, so that ``hasattr`` works."""


def refuse_name(module: str, name: str, known: Sequence[str], former: Mapping[str, str] = MappingProxyType({})) -> NoReturn:
    """Raise the error for a name that a module does not have.

    Args:
      module: what messages call it.
      name: of the attribute.
      known: the public names of the module.
      former: names that have another one here, and how that is written.

    Raises:
      AbsentNameError: always.

    Example:
      >>> refuse_name("presets", "w4a4", ["w4a4_lsq"])
      Traceback (most recent call last):
      sophq_func.core.absent.AbsentNameError: presets: it has no 'w4a4'. Fix: did you mean 'w4a4_lsq'?
    """
    if name.startswith("__"):  # Python and its tools ask modules for such names, and expect its own words
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    fix = former.get(name) or near(name, known) or f"dir({module}) lists its names"
    raise AbsentNameError(explain(module, f"it has no {name!r}", fix=fix))
