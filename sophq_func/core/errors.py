"""The exceptions of the library, and the template that every error message follows."""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import FrameType

import torch

from sophq_func.core.texts import printable, printable_lines


class TeachingError(ValueError):
    """What the errors of the library have in common: no name in their text moves the cursor of a terminal."""

    def __str__(self) -> str:
        # not when the error is made: a compiler traces that, and most errors are caught by nobody who reads them
        return printable_lines(super().__str__())


class ConfigError(TeachingError):
    """The configuration asks for something that does not exist or is not allowed."""


class PlanError(TeachingError):
    """The model, as traced, cannot be quantized the way the plan says."""


class StateError(TeachingError):
    """Parameters, observer state or qparams do not fit the plan, or hold no usable numbers."""


class CheckpointError(StateError):
    """A checkpoint is damaged, is not a checkpoint at all, or does not fit the plan."""


class FileError(StateError, OSError):
    """A path cannot be written or read as a file: its folder does not exist, or something else than a file is there.

    It is an ``OSError``, too: who catches what the system says of full disks and permissions catches it with them.
    """


class FolderNotFoundError(FileError, FileNotFoundError):
    """The folder of a file does not exist."""


class NotAFileError(FileError, IsADirectoryError):
    """A folder is where a file is to be written."""


class PlanWarning(UserWarning):
    """A plan leaves much of a model float, although nobody asked for that; or a glob of a rule fits nothing in the model."""


class UnknownNameError(ConfigError, KeyError):
    """A mapping of the library does not have this name. A ``KeyError``, too, so that ``get`` and ``in`` work."""

    def __str__(self) -> str:
        return str(self.args[0])  # that of a KeyError is the ``repr`` of its text


LONGEST_QUOTE = 200
"""Most characters of an input that a message repeats: it stays readable, and a tensor or a model is not printed whole."""

MOST_ELEMENTS = 16
"""A tensor of more elements is named by its dtype and shape."""


def quoted(value: object) -> str:
    """The ``repr`` of a value, or its beginning where that is long; what is large is not written out first.

    Example:
      >>> len(quoted("x" * 1000)), quoted(torch.zeros(1000, 1000)), quoted([torch.nn.Linear(2, 2)])
      (200, 'a torch.float32 tensor of shape (1000, 1000)', '[a Linear]')
    """
    text = _written(value, LONGEST_QUOTE)
    return text if len(text) <= LONGEST_QUOTE else f"{text[: LONGEST_QUOTE - 3]}..."


def _written(value: object, room: int) -> str:
    """A value in about as many characters as there is room for, or in all that it needs if these are fewer."""
    if isinstance(value, torch.Tensor):
        is_short = value.numel() <= MOST_ELEMENTS and not value.is_meta and value.layout == torch.strided
        return repr(value) if is_short else f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, torch.nn.Module):
        return f"a {type(value).__name__}"
    if isinstance(value, str | bytes):
        return repr(value[: max(room, 1)])  # the end of a longer one is cut off by ``quoted``
    if type(value) in BRACKETS and value:
        return _written_items(value, room)  # type: ignore[arg-type]
    return repr(value)


BRACKETS: Mapping[type, tuple[str, str]] = {
    list: ("[", "]"),
    tuple: ("(", ")"),
    dict: ("{", "}"),
    set: ("{", "}"),
    frozenset: ("frozenset({", "})"),
}
"""How the containers that are looked into are written."""


def _written_items(items: Collection[object], room: int) -> str:
    """The items of a container, up to those for which there is no room."""
    texts: list[str] = []
    for item in items:
        if room < 0:
            texts.append("...")
            break
        text = _written(item, room)
        if isinstance(items, dict):
            text = f"{text}: {_written(items[item], room)}"
        texts.append(text)
        room -= len(text)
    left, right = BRACKETS[type(items)]
    comma = "," if isinstance(items, tuple) and len(texts) == 1 else ""
    return f"{left}{', '.join(texts)}{comma}{right}"


_NOT_GIVEN = object()
"""Default of ``got``: ``None`` is a value that a user may have given."""


def explain(
    where: str,
    sentence: str,
    *,
    got: object = _NOT_GIVEN,
    allowed: object = None,
    because: str = "",
    fix: str = "",
) -> str:
    """Build ``<where>: <sentence>: got <value>, allowed <values> (because <why>). Fix: <how>.``

    Args:
      where: the site, function or key that is at fault.
      sentence: what is wrong, without a full stop: ``"weights cannot have 3 bits"``, ``"alpha must be positive"``.
      got: the offending value; left out when not given.
      allowed: what would have been accepted; left out when ``None``.
      because: the chip, op or scheme that forbids it.
      fix: one line of code or configuration.

    Example:
      >>> explain("conv1 weight", "it cannot have 3 bits", got=3, allowed="4 or 8", because="chip BM1688", fix="bits=4")
      'conv1 weight: it cannot have 3 bits: got 3, allowed 4 or 8 (because chip BM1688). Fix: bits=4.'
    """
    details = []
    if got is not _NOT_GIVEN:
        details.append(f"got {quoted(got)}")
    if allowed is not None:
        details.append(f"allowed {allowed}")
    # names of the input are quoted in these two; reasons and fixes may have several lines
    text = f"{printable(_cut(where))}: {printable(_cut(sentence))}"
    if details:
        text += ": " + ", ".join(details)
    if because:
        text += f" (because {because})"
    text += "."
    if fix:
        fix = _cut(fix)
        text += f" Fix: {fix}" + ("" if fix.endswith("?") else ".")
    return text


LONGEST_PART = LONGEST_QUOTE + 120
"""Most characters of a part of a message that may quote a name: the quotation, and the words around it."""


def _cut(text: str) -> str:
    """A part of a message without the middle of a name that is too long."""
    if len(text) <= LONGEST_PART:
        return text
    half = LONGEST_PART // 2
    return f"{text[:half]}...{text[-half:]}"


def deprecated(text: str) -> None:
    """:func:`warn` of something that will be gone in a later version."""
    warn(text, DeprecationWarning)


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning that points at the user's line, however deep inside the library it arises."""
    level = 1  # of ``warnings.warn``: 1 is the line that calls it, 2 that of its caller, and so on
    frame = sys._getframe()
    while frame.f_back is not None and _is_of_this_library(frame):
        level += 1
        frame = frame.f_back
    warnings.warn(printable_lines(text), category, level)


def _is_of_this_library(frame: FrameType) -> bool:
    """Whether a stack frame runs code of this package."""
    module: str = frame.f_globals.get("__name__", "")
    return module.partition(".")[0] == __name__.partition(".")[0]


SIMILARITY = 0.5
"""Least similarity of a suggestion, as ``difflib`` counts it.

An abbreviation has little in common with its word: ``sym`` and ``symmetric`` have 0.5, and ``difflib`` wants 0.6.
"""


def near(name: object, known: Iterable[str], count: int = 3) -> str:
    """A question that suggests the names of ``known`` most like ``name``; empty where none is similar, or it is no text.

    Example:
      >>> near("minmx", ["minmax", "mse"])
      "did you mean 'minmax'?"
    """
    found = matches(name, known, count) if isinstance(name, str) else []
    suggestions = " or ".join(map(repr, found))
    return f"did you mean {suggestions}?" if found else ""


def matches(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The names of ``known`` most like ``name``, the likest first; upper and lower case are the same where else none is.

    Example:
      >>> matches("minmx", ["minmax", "mse"]), matches("MINMX", ["minmax", "mse"])
      (['minmax'], ['minmax'])
    """
    written = {candidate: candidate for candidate in sorted(set(known))}
    folded = {candidate.casefold(): candidate for candidate in written}
    found = difflib.get_close_matches(name, written, n=count, cutoff=SIMILARITY)
    return found or [folded[key] for key in difflib.get_close_matches(name.casefold(), folded, n=count, cutoff=SIMILARITY)]


def other_prefix(given: Collection[str], wanted: Collection[str], known: Collection[str]) -> str:
    """How the names that are given differ from those that are wanted, if one step of the path is all; else empty.

    A wrapper around a model, or around a part of it, puts a step before every name inside, such as ``module.``.

    Args:
      given: names.
      wanted: names that must be among them.
      known: names that may be.

    Example:
      >>> other_prefix(["_orig_mod.0.weight"], ["0.weight"], ["0.weight"])
      "have '_orig_mod.' in their names, which the model has not"
      >>> other_prefix(["0.weight"], ["module.0.weight"], ["module.0.weight"])
      "lack 'module.' in their names, which the model has"
    """
    extra = _prefix(given, wanted, known)
    if extra:
        return f"have {extra!r} in their names, which the model has not"
    lacking = _prefix(wanted, given, given)
    return f"lack {lacking!r} in their names, which the model has" if lacking else ""


def _prefix(longer: Collection[str], wanted: Collection[str], known: Collection[str]) -> str:
    """What, taken away from the names in ``longer`` where it occurs, leaves ``wanted`` and maybe others of ``known``."""
    names = [name for name in longer if isinstance(name, str)]
    if len(names) < len(longer) or not names:
        return ""
    leading = [names[0][: end + 1] for end, letter in enumerate(names[0]) if letter == "."]
    # inside a model, around one of its parts, a prefix is a step of the path
    steps = dict.fromkeys(f"{step}." for name in names for step in name.split(".")[:-1])
    for prefix in leading:
        if not all(name.startswith(prefix) for name in names):
            break
        if set(wanted) <= {name[len(prefix) :] for name in names} <= set(known):
            return prefix
    for prefix in steps:
        shorter = {".".join(step for step in name.split(".") if f"{step}." != prefix) for name in names}
        if set(wanted) <= shorter <= set(known):
            return prefix
    return ""


def unknown(where: str, kind: str, name: object, known: Sequence[str], fix: str = "") -> str:
    """Message for a name that is not among ``known``, with suggestions; ``fix`` says how what it means is written here.

    Example:
      >>> unknown("quant_dict", "chip", "BM169", ["BM1690"])
      "quant_dict: chip 'BM169' is not known, did you mean 'BM1690'? Fix: use one of BM1690."
    """
    hint = near(name, known)
    middle = f", {hint}" if hint else "."
    first = f"{fix}, or " if fix else ""
    allowed = ", ".join(map(printable, known))
    return f"{_cut(where)}: {kind} {quoted(name)} is not known{middle} Fix: {first}use one of {allowed}."


def check_flags(where: str, flags: Mapping[str, object]) -> None:
    """Raise a :class:`ConfigError` about the arguments that are to be ``True`` or ``False`` and are not.

    Example:
      >>> check_flags("report", {"progress": True})
    """
    wrong = {name: flag for name, flag in flags.items() if not isinstance(flag, bool)}
    sentence, allowed = "has the wrong type", "True or False"
    raise_all([explain(where, f"{name} {sentence}", got=flag, allowed=allowed) for name, flag in wrong.items()])


def raise_all(problems: Sequence[str], error: type[ValueError] = ConfigError) -> None:
    """Raise one ``error`` that reports every problem, or return when there is none."""
    if len(problems) == 1:
        raise error(problems[0])
    if problems:
        lines = "".join(f"\n  {i}. {problem}" for i, problem in enumerate(problems, 1))
        raise error(f"{len(problems)} problems:{lines}")


def problems_of(error: ValueError) -> list[str]:
    """The problems that :func:`raise_all` put into one error; of any other, its message.

    Example:
      >>> try:
      ...     raise_all(["bits: wrong.", "axis: wrong."])
      ... except ConfigError as error:
      ...     problems_of(error)
      ['bits: wrong.', 'axis: wrong.']
    """
    head, *problems = re.split(r"\n  \d+\. ", str(error))
    return problems if re.fullmatch(r"\d+ problems:", head) else [str(error)]
