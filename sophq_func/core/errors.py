"""The errors of the library and the one sentence that all of them speak."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable, Sequence


class ConfigError(ValueError):
    """The configuration asks for something that does not exist or is not allowed."""


class PlanError(ValueError):
    """The model, as traced, cannot be quantized the way the plan says."""


class StateError(ValueError):
    """Parameters, observer state or qparams do not fit the plan, or hold no usable numbers."""


class CheckpointError(StateError):
    """A file with states is damaged, is no such file, or does not fit the plan: a :class:`StateError` of what is stored."""


_NOTHING = object()


def explain(
    where: str,
    sentence: str,
    *,
    got: object = _NOTHING,
    allowed: object = None,
    because: str = "",
    fix: str = "",
) -> str:
    """Build ``<where>: <sentence>: got <value>, allowed <values> (because <why>). Fix: <how>.``

    Args:
      where: the site, function or key that is at fault.
      sentence: what is wrong, without a full stop: ``"3 bits is not possible"``, ``"these batches cannot be observed"``.
      got: the offending value; left out when not given.
      allowed: what would have been accepted; left out when ``None``.
      because: the chip, op or scheme that forbids it.
      fix: one line of code or configuration.

    Example:
      >>> explain("conv1 weight", "3 bits is not possible", got=3, allowed="4 or 8", because="chip BM1688", fix="bits=4")
      'conv1 weight: 3 bits is not possible: got 3, allowed 4 or 8 (because chip BM1688). Fix: bits=4.'
    """
    details = [f"got {got!r}" if got is not _NOTHING else "", f"allowed {allowed}" if allowed is not None else ""]
    text = f"{where}: {sentence}"
    if any(details):
        text += ": " + ", ".join(filter(None, details))
    if because:
        text += f" (because {because})"
    return f"{text}. Fix: {fix}." if fix else f"{text}."


def deprecated(text: str) -> None:
    """Warn that something has no effect, at the line that called the library."""
    library, level, frame = __name__.partition(".")[0], 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == library:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, DeprecationWarning, level)


def near(name: str, known: Iterable[str], count: int = 3) -> str:
    """Text that suggests the names of ``known`` which look most like ``name``; empty when none does.

    Example:
      >>> near("minmx", ["minmax", "mse"])
      "did you mean 'minmax'?"
    """
    candidates = sorted(set(known))
    matches = difflib.get_close_matches(name, candidates, n=count, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, matches))}?" if matches else ""


def unknown(where: str, kind: str, name: object, known: Sequence[str]) -> str:
    """Message for a name that is not among ``known``, with near matches.

    Example:
      >>> unknown("quant_dict", "chip", "BM169", ["BM1690"])
      "quant_dict: chip 'BM169' is not known, did you mean 'BM1690'? Fix: use one of BM1690."
    """
    hint = near(name, known) if isinstance(name, str) else ""
    middle = f", {hint}" if hint else "."
    return f"{where}: {kind} {name!r} is not known{middle} Fix: use one of {', '.join(known)}."


def raise_all(problems: Sequence[str], error: type[ValueError] = ConfigError) -> None:
    """Raise one ``error`` that reports every problem, or return when there is none."""
    if len(problems) == 1:
        raise error(problems[0])
    if problems:
        lines = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(problems, 1))
        raise error(f"{len(problems)} problems:\n{lines}")
