"""Runs programs as a fresh interpreter would, without importing torch anew for each: a server that forks.

It is given to an interpreter as text (``python -c``), so that no folder of the repository is on its path. What it imports
before it forks, each program finds imported, as after an import of its own. A request is a line of JSON on stdin: the folder
to run in, and blocks ``(file, line, code)`` that share a namespace. The answer is a line of JSON on stdout: what went wrong,
or "". The first answer lists what is installed.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import io
import json
import os
import re
import sys
import tempfile
import tokenize
import traceback
import types
import warnings
from pathlib import Path
from typing import IO, TypedDict

import torch._dynamo  # noqa: F401  importing this takes three seconds, which all forks share

# An editable installation puts the repository on the path, with folders that no other installation has.
sys.path[:] = [folder for folder in sys.path if not Path(folder, "pyproject.toml").exists()]

for extra in ("sophq_func", "onnxruntime", "onnxscript", "sklearn.datasets", "transformers"):
    with contextlib.suppress(ImportError):
        importlib.import_module(extra)  # the same


class Request(TypedDict):
    """A program: where it runs, and its blocks, ``(file, line, code)``."""

    folder: str
    blocks: list[tuple[str, int, str]]


NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
ABOUT = "about "
ROUNDED = 0.05
"""How far a figure behind ``# about`` may lie from what is printed, as a share of it. Such a figure comes from a short
training, from another random start each time or from sums in another order; it shows a size, and half of a second digit
changes nothing that a reader concludes from it.
"""
SHOWN = r"(__main__|sophq_func|torch)(\.|$)"
"""Modules whose warnings a page may not cause; what other libraries warn of is theirs."""


def remarks(code: str) -> dict[int, str]:
    """``{line: comment}``, without the mark of a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}


def prints(statement: ast.stmt) -> bool:
    """Whether a statement is a call of ``print``."""
    value = getattr(statement, "value", None)
    return isinstance(statement, ast.Expr) and isinstance(value, ast.Call) and getattr(value.func, "id", "") == "print"


def agrees(printed: str, stated: str) -> bool:
    """Whether a comment states the line that was printed, up to white space; behind "about" its numbers are rounded.

    Of several lines, such as a table, it can only say what they are.
    """
    if printed.count("\n") > 1:
        return True
    printed, stated = (" ".join(text.split()) for text in (printed, stated))
    if not stated.startswith(ABOUT):
        return printed == stated
    stated = stated.removeprefix(ABOUT)
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(stated), strict=False)  # their count is part of the text
    near = all(abs(float(a) - float(b)) <= ROUNDED * abs(float(a)) for a, b in pairs)
    return near and NUMBER.sub("0", printed) == NUMBER.sub("0", stated)


def run(file: str, line: int, code: str, names: dict[str, object]) -> None:
    """Run a block statement by statement; a comment behind a ``print`` must state the line that it prints."""
    code = "\n" * (line - 1) + code
    stated = remarks(code)
    for statement in ast.parse(code, file).body:
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            exec(compile(ast.Module([statement], []), file, "exec", dont_inherit=True), names)
        remark = stated.get(statement.end_lineno)
        if remark and prints(statement) and not agrees(shown.getvalue(), remark):
            raise AssertionError(f"{file}:{statement.lineno} prints {shown.getvalue()!r}, and says {remark!r}")


def child(request: Request, report: IO[str]) -> None:
    """Run one program in this process; what went wrong goes into the file ``report``."""
    os.chdir(request["folder"])
    warnings.filterwarnings("error", module=SHOWN)
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=r"torch\.")  # what torch says to itself
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.argv = [""]
    try:
        for block in request["blocks"]:
            run(*block, vars(main))
    except BaseException:
        report.write(traceback.format_exc())
        report.flush()


def forked(request: Request) -> str:
    """Run one program in a fork; returns what went wrong."""
    with tempfile.TemporaryFile("w+") as report:
        process = os.fork()
        if not process:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the next request is not for the program
            os.dup2(2, 1)  # nor is what it writes, or a library in C, an answer
            child(request, report)
            os._exit(0)
        _, status = os.waitpid(process, 0)
        report.seek(0)
        return report.read() or (f"the process ended with status {status}" if status else "")


def answer(value: object) -> None:
    """Write a line of JSON."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def serve() -> None:
    """Answer requests until stdin ends."""
    installed = sorted({found.metadata["Name"].lower() for found in importlib.metadata.distributions()})
    answer(installed)
    for request in sys.stdin:
        answer(forked(json.loads(request)))
    os._exit(0)  # nothing to clean up, which torch takes seconds to find out


serve()
