"""Hostile calls: valid calls of the whole public surface with one argument, or one leaf in an argument, spoiled.

``python -m tests.fuzz.calls --count 15000 --seed 0`` prints how they ended, and exits with 1 where one was accepted with a
wrong result, did not end, or where more than :data:`MOST_RAW` of them ended in an error that does not teach.

Each outcome is one of these:

* ``clear``: an error of the library that says what is allowed or how to mend it, and quotes little of the input.
* ``same``: the call was accepted, and its result is that of the valid call: the value means the same, or nobody reads it.
* ``carried``: NaN or infinity came back that the call was given, as in float.
* ``other``: the call was accepted with another result, as befits another valid value.
* ``model``: the user's own model or function said so.
* ``silent``: the call was accepted although the value is invalid, with another result; or numbers that were finite are not.
* ``raw``: any other error.
* ``hang``: more than :data:`SECONDS`, or the process died.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import math
import os
import random
import re
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.core.public import fits
from tests.fuzz.valid_calls import ValidCall, valid_calls

OURS = (sq.ConfigError, sq.PlanError, sq.StateError)

MOST_RAW = 0.05
"""Largest share of raw errors."""

SECONDS = 10.0
"""Longest time of one call, of a processor: others may be busy."""

PATIENCE = 120.0
"""Seconds by the clock after which a process is killed that does not even take the alarm, or waits for something."""

MEMORY = 6 * 2**30
"""Bytes of address space that a process may take beyond what it begins with."""

LONGEST_QUOTE = 400
"""Most characters that a message may repeat of an argument that is one text: quoted twice, at 200 each."""

PER_PROCESS = 100
"""Calls that one process makes. What they leave behind ends with it."""

FAULTS = ("silent", "hang")
"""Outcomes of which there must be none."""


class Hang(BaseException):
    """A call took too long; nothing catches it but :func:`outcome`."""


class Spoiled(NamedTuple):
    """A value that takes the place of a right one.

    Attributes:
      label: what was done.
      value: the new value.
      invalid: nothing could be right about it.
    """

    label: str
    value: Any
    invalid: bool


class Case(NamedTuple):
    """One call, as an index into the valid calls, where in its arguments something is spoiled, and by what."""

    call: int
    where: str
    spoiled: Spoiled
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    is_batch: bool


class Unfit:
    """A value of a type that nothing takes, with a long text."""

    def __repr__(self) -> str:
        return "an unfit value " + "!" * 10_000


def spoiled_values(value: object) -> Iterator[Spoiled]:
    """What may stand in the place of a value."""
    yield Spoiled("Unfit()", Unfit(), True)
    if value is not None:
        yield Spoiled("None", None, False)
    if isinstance(value, Tensor):
        yield from _spoiled_tensor(value)
    elif isinstance(value, bool):
        for wrong in ("no", [], 0.0, 1, torch.tensor(True), np.bool_(True)):
            yield Spoiled(repr(wrong), wrong, isinstance(wrong, str | list))
    elif isinstance(value, int):
        for number in (-1, 0, 10**9, 10**30, 1.5, math.nan, math.inf):
            yield Spoiled(repr(number), number, number != number or number == math.inf)
        for wrong in (True, "x", str(value), [value], torch.tensor(value), complex(value), torch.tensor(1j)):
            yield Spoiled(repr(wrong), wrong, isinstance(wrong, complex))
    elif isinstance(value, float):
        for number in (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e300, 10**400):
            label = "10**400" if isinstance(number, int) else repr(number)
            yield Spoiled(label, number, not abs(number) < math.inf)
        for wrong in ("x", True, [value], complex(value), torch.ones(3)):
            yield Spoiled(repr(wrong), wrong, isinstance(wrong, str | complex))
    elif isinstance(value, str):
        for text in ("", "no such thing", value.upper(), f"{value}x", "*", "[", "\x00", "../x", "x" * 10_000, "\ud800"):
            yield Spoiled(repr(text)[:30], text, False)
        for wrong in (3, value.encode("utf-8", "replace"), [value, 3], {}):
            yield Spoiled(repr(wrong)[:30], wrong, isinstance(wrong, int))
    elif isinstance(value, sq.QParams):
        yield from _spoiled_qparams(value)
    elif isinstance(value, Mapping):
        yield from _spoiled_mapping(value)
    elif isinstance(value, tuple | list):
        for items in ([], [Unfit()], [None], [math.nan], "x", 3, {}, iter(value), [*value, Unfit()], list(value)[:-1]):
            yield Spoiled(_named(items), items, False)
    elif isinstance(value, os.PathLike):
        for wrong in (3, "", "/dev/null/x", "\x00", "/", ["x"], b"\xff", "x" * 10_000):
            yield Spoiled(repr(wrong)[:30], wrong, isinstance(wrong, int | list))
    elif isinstance(value, torch.dtype):
        for wrong in ("float64", 3, torch.int8, torch.complex64, float):
            yield Spoiled(repr(wrong), wrong, not isinstance(wrong, str))
    elif callable(value) and not isinstance(value, nn.Module | type):
        for function in (3, "no such thing", _nothing, _no, _of_three):
            yield Spoiled(_named(function), function, isinstance(function, int | str))
    else:  # a text may be the name of a class or function
        for wrong in (3, "x", [], {}, object, torch.ones(2), math.nan):
            yield Spoiled(_named(wrong), wrong, value is not None and not isinstance(wrong, str))


def _nothing(*_: object, **__: object) -> None:
    return None


def _no(*_: object, **__: object) -> str:
    return "no"


def _of_three(one: object, two: object, three: object, /) -> object:
    return one


def _named(value: object) -> str:
    return getattr(value, "__name__", None) or (type(value).__name__ if isinstance(value, Unfit) else repr(value)[:30])


def _spoiled_tensor(x: Tensor) -> Iterator[Spoiled]:
    """Other dtypes, shapes, devices, layouts, types and numbers."""
    with torch.no_grad():
        yield Spoiled("complex", x.to(torch.complex64), True)
        yield Spoiled("meta", x.to("meta"), False)
        yield Spoiled("sparse", x.to_sparse() if x.ndim else torch.ones(1).to_sparse(), True)
        yield Spoiled("numpy", x.detach().numpy(), False)
        yield Spoiled("list", x.tolist(), False)
        yield Spoiled("text", "x", True)
        yield Spoiled("half", x.half(), False)
        yield Spoiled("double", x.double(), False)
        yield Spoiled("int64", x.long(), False)
        yield Spoiled("bool", x.bool(), False)
        yield Spoiled("one more axis", x[None], False)
        yield Spoiled("five", torch.ones(5, dtype=x.dtype), False)
        yield Spoiled("empty", torch.empty(0, dtype=x.dtype), False)
        yield Spoiled("negative", -x if x.dtype != torch.bool else x, False)
        yield Spoiled("expanded", x[..., None].expand(*x.shape, 2), False)
        if x.ndim:
            yield Spoiled("scalar", x.flatten()[0], False)
            yield Spoiled("half of it", x[: len(x) // 2], False)
        if x.is_floating_point():
            for number in (math.nan, math.inf, 3e38):
                yield Spoiled(f"all {number}", torch.full_like(x, number), False)
            first = x.clone()
            first.view(-1)[:1] = math.nan
            yield Spoiled("one nan", first, False)
        yield Spoiled("parameter", nn.Parameter(x.clone(), requires_grad=False), False)


def _spoiled_qparams(entry: sq.QParams) -> Iterator[Spoiled]:
    yield Spoiled("tuple", tuple(entry), True)
    yield Spoiled("dict", entry._asdict(), True)
    four, three = torch.tensor(4.0), torch.tensor(-3.0)
    yield Spoiled("qmim", entry._replace(extras={"qmim": three, "qmax": four}), True)
    yield Spoiled("only qmin", entry._replace(extras={"qmin": three}), True)
    yield Spoiled("qmin > qmax", entry._replace(extras={"qmin": four, "qmax": three}), True)
    yield Spoiled("qmin NaN", entry._replace(extras={"qmin": three * math.nan, "qmax": four}), True)
    yield Spoiled("enabled text", entry._replace(extras={"enabled": "no"}), True)  # type: ignore[dict-item]
    yield Spoiled("extras None", entry._replace(extras=None), True)  # type: ignore[arg-type]
    yield Spoiled("extras list", entry._replace(extras=[three]), True)  # type: ignore[arg-type]
    yield Spoiled("extras of numbers", entry._replace(extras={3: three}), True)  # type: ignore[dict-item]
    yield Spoiled("scale None", entry._replace(scale=None), True)  # type: ignore[arg-type]
    for field in ("scale", "zero_point"):
        for spoiled in _spoiled_tensor(getattr(entry, field)):
            # a learned scale may be negative; a zero point of zeros is the same with another sign, or as a parameter
            invalid = spoiled.invalid or spoiled.label in WRONG_FIELDS
            yield Spoiled(f"{field} {spoiled.label}", entry._replace(**{field: spoiled.value}), invalid)


SHAPES = ("one more axis", "expanded", "five", "empty", "scalar", "half of it")
"""Labels of tensors of another shape."""

WRONG_FIELDS = ("meta", "all nan", "all inf", "one nan", "bool", *SHAPES)
"""What no scale and no zero point of another tensor can be, by its label."""


def _spoiled_mapping(mapping: Mapping[Any, Any]) -> Iterator[Spoiled]:
    items = dict(mapping)
    for wrong in ({}, [], "x", 3, list(items.items()), list(items)):
        yield Spoiled(_named(wrong), wrong, False)
    if items:
        first = next(iter(items))
        yield Spoiled("a key less", {key: items[key] for key in items if key != first}, False)
        yield Spoiled("a key more", {**items, "no such thing": items[first]}, False)
        yield Spoiled("a number as key", {**items, 3: items[first]}, isinstance(first, str))
        yield Spoiled("None as key", {**items, None: items[first]}, True)
        yield Spoiled("a long key", {**items, "x" * 10_000: items[first]}, False)
        yield Spoiled("an unfit entry", {**items, first: Unfit()}, True)
        yield Spoiled("lists of all", {key: [value] for key, value in items.items()}, False)


# Cases


def cases_of(number: int, call: ValidCall) -> Iterator[Case]:
    """Every way to spoil one argument, or one leaf of one."""
    own = len(call.args) - call.batch
    for i, value in enumerate(call.args):
        for where, spoiled in _spoiled_somewhere(f"args[{i}]", value):
            args = (*call.args[:i], spoiled.value, *call.args[i + 1 :])
            yield Case(number, where, spoiled, args, call.kwargs, i >= own)
    for key, value in call.kwargs.items():
        for where, spoiled in _spoiled_somewhere(key, value):
            yield Case(number, where, spoiled, call.args, {**call.kwargs, key: spoiled.value}, False)
    for key in _other_options(call):
        value = inspect.signature(call.function).parameters[key].default
        for spoiled in spoiled_values(value):
            yield Case(number, key, spoiled, call.args, {**call.kwargs, key: spoiled.value}, False)
    unknown = Spoiled("an unknown keyword", 1, not call.batch and not call.alone)
    yield Case(number, "**", unknown, call.args, {**call.kwargs, "no_such_thing": 1}, bool(call.batch))
    yield Case(number, "*", Spoiled("no arguments", None, False), (), {}, False)
    if own:
        few, many = call.args[: own - 1], (*call.args, 1, 2, 3)
        yield Case(number, "*", Spoiled("an argument less", None, False), few, call.kwargs, False)
        yield Case(number, "*", Spoiled("more arguments", None, not call.batch), many, call.kwargs, bool(call.batch))
    if own > 1:
        swapped = (call.args[1], call.args[0], *call.args[2:])
        yield Case(number, "*", Spoiled("two swapped", None, False), swapped, call.kwargs, False)


def _other_options(call: ValidCall) -> list[str]:
    """Keywords that the valid call leaves at their defaults."""
    try:
        parameters = inspect.signature(call.function).parameters
    except ValueError:
        return []
    names = list(parameters)
    by_keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [
        name
        for name in names[len(call.args) :]
        if parameters[name].kind in by_keyword
        and name not in call.kwargs
        and parameters[name].default is not inspect.Parameter.empty
    ]


MOST_LEAVES = 6
"""Leaves of one argument that are spoiled."""


def _spoiled_somewhere(where: str, value: Any) -> Iterator[tuple[str, Spoiled]]:
    """The value replaced by another one, or with one of its items replaced."""
    for spoiled in spoiled_values(value):
        yield where, spoiled
    if isinstance(value, sq.QParams):
        return
    if isinstance(value, Mapping):
        for key in list(value)[:MOST_LEAVES]:
            for place, spoiled in _spoiled_somewhere(f"{where}[{key!r}]", value[key]):
                yield place, spoiled._replace(value={**value, key: spoiled.value})
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for field in value._fields[:MOST_LEAVES]:
            for place, spoiled in _spoiled_somewhere(f"{where}.{field}", getattr(value, field)):
                yield place, spoiled._replace(value=value._replace(**{field: spoiled.value}))
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value[:MOST_LEAVES]):
            for place, spoiled in _spoiled_somewhere(f"{where}[{i}]", item):
                yield place, spoiled._replace(value=type(value)([*value[:i], spoiled.value, *value[i + 1 :]]))


def sample(calls: Sequence[ValidCall], count: int, seed: int) -> list[Case]:
    """Cases drawn at random, as many of each call as there are, in turn: no call crowds out another."""
    drawn = random.Random(seed)
    piles = []
    for number, call in enumerate(calls):
        pile = list(cases_of(number, call))
        drawn.shuffle(pile)
        piles.append(pile)
    found: list[Case] = []
    while len(found) < count and any(piles):
        for pile in piles:
            # a call of many arguments has more ways to be wrong
            for _ in range(1 + len(pile) // 200):
                if pile and len(found) < count:
                    found.append(pile.pop())
    return sorted(found, key=lambda case: case.call)


# Outcomes


class Outcome(NamedTuple):
    """How a call ended: the kind, and what was said or returned."""

    kind: str
    said: str


def outcome(case: Case, call: ValidCall, expected: Any) -> Outcome:
    """Make one call."""
    signal.signal(signal.SIGPROF, _alarm)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = call.function(*_fresh(case.args), **case.kwargs)
            if isinstance(result, Iterator):
                result = list(result)
    except Hang:
        return Outcome("hang", f"more than {SECONDS:g} s")
    except OURS as error:
        return _of_our_error(error)
    except Exception as error:
        return Outcome(_kind_of_error(error), _line(error))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return _of_result(case, call, result, expected)


def _fresh(args: Sequence[Any]) -> list[Any]:
    """The arguments, with generators as new ones, so that each call draws the same numbers."""
    return [torch.Generator() if isinstance(value, torch.Generator) else value for value in args]


def _alarm(_: int, __: FrameType | None) -> NoReturn:
    raise Hang


def _of_our_error(error: ValueError) -> Outcome:
    text = str(error)
    teaches = any(sign in text for sign in ("Fix:", "allowed", "did you mean", "expected"))
    # the letters that long inputs are made of
    quotes = max(text.count(letter) for letter in "!x")
    if quotes > LONGEST_QUOTE:
        return Outcome("raw", f"{type(error).__name__} quotes {len(text)} characters: {text[:80]}")
    if not teaches:
        return Outcome("raw", f"{type(error).__name__} without a fix: {text[:160]}")
    return Outcome("clear", f"{type(error).__name__}: {text[:160]}")


CALLERS = ("skeleton.py", "recorder.py", "frame.py", "runner.py", "_torch.py", "_capture.py", "_layers.py")
"""Files of the library that call what the user's model calls."""


def _kind_of_error(error: Exception) -> str:
    """``"model"`` where the user's own function or layer said it, ``"clear"`` what Python says of a call."""
    if isinstance(error, TypeError) and ("unexpected keyword" in str(error) or "positional argument" in str(error)):
        return "clear"
    frames = traceback.extract_tb(error.__traceback__)
    mine = Path(__file__).parent
    below = [frame for frame in frames if Path(frame.filename).parent == mine and frame.name not in ("outcome",)]
    if below:
        return "model"
    innermost = [frame for frame in frames if "torch/" not in frame.filename][-1]
    return "model" if Path(innermost.filename).name in CALLERS and "sophq_func/" in innermost.filename else "raw"


def _line(error: Exception) -> str:
    """An error with the last place in the library that it came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "sophq_func/" in frame.filename]
    place = f"{frames[-1].filename.rpartition('sophq_func/')[2]}:{frames[-1].lineno}" if frames else "outside"
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__} at {place}: {text[:120]}"


def _of_result(case: Case, call: ValidCall, result: Any, expected: Any) -> Outcome:
    if same(result, expected):
        return Outcome("same", "")
    if case.is_batch:
        return Outcome("model", "another batch")
    if call.name.startswith(STRUCTURAL) and case.spoiled.label.endswith((*NOT_FINITE, *NUMBERS)):
        return Outcome("carried", "")
    if call.name in ("lerp", "merge") and isinstance(case.spoiled.value, Mapping):
        return Outcome("carried", "")  # a step of training merges; what takes the result looks at it
    if finite(expected) and not finite(result):
        return Outcome("carried", "") if is_carried(case, call) else Outcome("silent", "not finite")
    if case.spoiled.invalid or not _is_of_type(case, call):
        return Outcome("silent", "accepted")
    return Outcome("other", "")


NOT_FINITE = ("all nan", "all inf", "all 3e+38", "one nan")
"""Labels of tensors whose numbers are not finite, or not after the next product."""

NUMBERS = ("qmax", "NaN")
"""Last words of labels of bounds with wrong numbers."""

STORING = ("artifact", "compare_chip", "convert", "export", "report", "save")
"""Functions that store or report numbers: they refuse those that are not finite."""

STRUCTURAL = ("algorithms.at_widths", "cast", "enabled", "lerp", "merge", "q.split", "stack", "unstack", "with_bits")
"""Functions that put leaves in another order, and look at no number."""


def is_carried(case: Case, call: ValidCall) -> bool:
    """Whether NaN or infinity that a call was given rightly comes back: from data that it was given, as in float."""
    label = case.spoiled.label
    is_data = label in NOT_FINITE or label == "negative"  # the root of a negative variance
    is_qparams = "scale" in case.where or "zero_point" in case.where
    if case.spoiled.label.endswith("3e+38"):
        return True  # finite, and so large that a product is not
    if case.spoiled.label in ("empty", "an argument less", "None") and call.name.startswith(("observer(", "q.init")):
        return True  # nothing was seen
    is_batch = call.name == "report" and case.where.startswith("args[3]")
    return is_data and not is_qparams and (is_batch or not call.name.startswith(STORING))


def _is_of_type(case: Case, call: ValidCall) -> bool:
    """Whether a whole argument that was replaced has the type of the annotation, where there is one that can be read."""
    try:
        signature = inspect.signature(call.function, eval_str=True)
        arguments = signature.bind(*case.args, **case.kwargs).arguments
    except Exception:  # annotations that only type checkers can read
        return True
    by_position, names = re.fullmatch(r"args\[(\d+)\]", case.where), list(signature.parameters)
    name = names[min(int(by_position[1]), len(names) - 1)] if by_position else case.where
    if name in names and signature.parameters[name].kind in (
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    ):
        return True
    if name not in arguments or name not in signature.parameters:
        return True
    return fits(arguments[name], signature.parameters[name].annotation)


def same(one: Any, other: Any) -> bool:
    """Whether two results have the same numbers, bit for bit."""
    return _flat(one) == _flat(other)


def finite(result: Any) -> bool:
    """Whether all numbers are."""
    return all(part[0] != "number" or part[2] for part in _flat(result))


MOST_DEPTH = 8


def _flat(value: Any, depth: int = 0) -> list[tuple[Any, ...]]:
    """A result as a list of its parts, which can be compared."""
    if isinstance(value, Tensor):
        if value.is_meta or value.layout != torch.strided:
            return [("tensor", str(value.dtype), tuple(value.shape), str(value.device), str(value.layout))]
        wide = value.detach()
        is_finite = bool(wide.isfinite().all()) if wide.is_floating_point() or wide.is_complex() else True
        return [("number", (str(wide.dtype), tuple(wide.shape), wide.flatten().tolist().__repr__()), is_finite)]
    if isinstance(value, float):
        return [("number", repr(value), math.isfinite(value))]
    if value is None or isinstance(value, int | str | bytes | os.PathLike):
        return [("value", repr(value))]
    if depth > MOST_DEPTH or isinstance(value, nn.Module | sq.Quantized):
        return [("object", type(value).__name__)]
    if isinstance(value, Mapping):
        return [part for key in value for part in (("key", repr(key)), *_flat(value[key], depth + 1))]
    if isinstance(value, tuple | list):
        return [("items", len(value)), *(part for item in value for part in _flat(item, depth + 1))]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return [("class", type(value).__name__), *_flat({n: getattr(value, n, None) for n in names}, depth + 1)]
    return [("object", type(value).__name__)]


# Processes


def run(calls: Sequence[ValidCall], cases: Sequence[Case], expected: Mapping[int, Any]) -> list[Outcome]:
    """The outcomes of the cases, made in processes that are forked from this one."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(cases):
        first = len(outcomes)
        is_alone = calls[cases[first].call].alone
        chunk = cases[first : first + (1 if is_alone else PER_PROCESS)]
        ended = _in_child(calls, chunk, expected)
        outcomes += ended
        if len(ended) < len(chunk):
            outcomes.append(Outcome("hang", "the process died or took no alarm"))
    return outcomes


def _in_child(calls: Sequence[ValidCall], cases: Sequence[Case], expected: Mapping[int, Any]) -> list[Outcome]:
    """The outcomes of the first cases: all of them, or those before the one that ended the process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _work(calls, cases, expected, writing)
    os.close(writing)
    text = b""
    while text.count(b"\n") < len(cases):
        ready, _, _ = select.select([reading], [], [], PATIENCE)
        piece = os.read(reading, 2**16) if ready else b""
        if not piece:
            break
        text += piece
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    return [Outcome(*json.loads(line)) for line in text.split(b"\n")[: text.count(b"\n")]]


def _work(calls: Sequence[ValidCall], cases: Sequence[Case], expected: Mapping[int, Any], writing: int) -> NoReturn:
    """Make the calls in this process, and end it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    for case in cases:
        found = outcome(case, calls[case.call], expected.get(case.call))
        os.write(writing, json.dumps(found).encode() + b"\n")
    os._exit(0)


def results_of(calls: Sequence[ValidCall]) -> dict[int, Any]:
    """What the valid calls return, by number; not of those that change what others see."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            number: call.function(*_fresh(call.args), **call.kwargs) for number, call in enumerate(calls) if not call.alone
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=15_000, help="how many calls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="calls whose name begins so")
    parser.add_argument("--show", type=int, default=20, help="how many kinds of faults are shown")
    parser.add_argument("--log", type=Path, help="a file for all outcomes, one a line")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a process that is forked has no other threads
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        calls = [call for call in valid_calls(Path(folder)) if call.name.startswith(options.only)]
        expected = results_of(calls)
        cases = sample(calls, options.count, options.seed)
        outcomes = run(calls, cases, expected)
        os.chdir("/")
    counts = Counter(found.kind for found in outcomes)
    sys.stdout.write(table(counts, len(calls), time.monotonic() - began))
    sys.stdout.write(faults(calls, cases, outcomes, options.show))
    if options.log:
        options.log.write_text("".join(f"{_described(calls, *pair)}\n" for pair in zip(cases, outcomes, strict=True)))
    return int(is_fault(counts))


def is_fault(counts: Mapping[str, int]) -> bool:
    """Whether a campaign found what must not be."""
    total = sum(counts.values())
    return any(counts.get(kind, 0) for kind in FAULTS) or counts.get("raw", 0) > MOST_RAW * total


def table(counts: Mapping[str, int], calls: int, seconds: float) -> str:
    """The shares of all outcomes."""
    total = sum(counts.values())
    lines = [f"{total} spoiled calls of {calls} valid ones, {seconds:.0f} s"]
    for kind in ("clear", "same", "carried", "other", "model", "silent", "raw", "hang"):
        lines.append(f"  {kind:8s}{counts.get(kind, 0):7d}{counts.get(kind, 0) / max(total, 1):8.2%}")
    return "\n".join(lines) + "\n"


def faults(calls: Sequence[ValidCall], cases: Sequence[Case], outcomes: Sequence[Outcome], most: int) -> str:
    """The faults by what was said, the most frequent first, each with an example."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for case, found in zip(cases, outcomes, strict=True):
        if found.kind in (*FAULTS, "raw"):
            kinds.setdefault((found.kind, found.said[:100]), []).append(_described(calls, case, found))
    frequent = sorted(kinds.items(), key=lambda item: (item[0][0] == "raw", -len(item[1])))
    return "".join(f"{len(examples):5d} {examples[0]}\n" for _, examples in frequent[:most])


def _described(calls: Sequence[ValidCall], case: Case, found: Outcome) -> str:
    return f"{found.kind:8s}{calls[case.call].name}: {case.where} = {case.spoiled.label}: {found.said}"


if __name__ == "__main__":
    sys.exit(main())
