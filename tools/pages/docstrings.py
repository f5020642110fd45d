"""What the reference changes in docstrings: they are written to be read in a terminal, and shown as Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":\w+:`~?(?:[\w.]+\.)?(\w+)`")
"""A reference of Sphinx, of which the last part of the name is shown."""

HEADING = re.compile(r"^( *)Example:$", flags=re.MULTILINE)


def markdown(text: str) -> str:
    """A docstring as Markdown in Google's style.

    Example:
      >>> markdown("Reads a :class:`~sophq_func.config.site.Site`.")
      'Reads a `Site`.'
    """
    return HEADING.sub(r"\1Examples:", ROLE.sub(r"`\1`", text))


class Docstrings(griffe.Extension):
    """Changes every docstring when it is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called with every object that has been read."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
