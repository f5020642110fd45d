"""Packages that register pieces of their own: they are loaded when a name is asked for that nobody has registered.

Such a package names a module, or a function without arguments, under ``sophq_func.plugins``::

    [project.entry-points."sophq_func.plugins"]
    my_pieces = "my_package.pieces"
"""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points

from sophq_func.core.errors import ConfigError, explain

GROUP = "sophq_func.plugins"
"""The group of entry points, as ``pyproject.toml`` names it."""


@functools.cache  # once in a process: what is registered stays so
def load() -> None:
    """Import the module of each plugin, and call it where the entry point names a function.

    Raises:
      ConfigError: a plugin that cannot be loaded, by name.
    """
    for entry in entry_points(group=GROUP):
        _load_one(entry)


def _load_one(entry: EntryPoint) -> None:
    try:
        loaded = entry.load()
        if callable(loaded):
            loaded()
    except Exception as error:  # whatever code of others raises
        sentence, because = "this plugin cannot be loaded", f"{type(error).__name__}: {error}"
        fix = "repair or uninstall the package that declares it"
        raise ConfigError(explain(f"plugin {entry.name!r}", sentence, got=entry.value, because=because, fix=fix)) from error
