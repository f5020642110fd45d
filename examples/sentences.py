"""Real sentences without a download: the first sentences of docstrings of the standard library and of torch."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

MODULES = """argparse calendar cmd configparser contextlib copy datetime difflib fileinput fractions ftplib functools heapq
imaplib inspect ipaddress locale mailbox netrc optparse pprint random sched selectors shelve shutil smtplib socket
statistics string subprocess tarfile tempfile textwrap threading trace uuid warnings weakref zipfile email/* http/* json/*
logging/* unittest/*"""
LAYERS = "functional distributions/* nn/functional nn/modules/* optim/* utils/data/*"
SOURCES = ((Path(sysconfig.get_path("stdlib")), MODULES), (Path(torch.__file__).parent, LAYERS))
"""Folders, and what is read of them: the files with these names, ``.py`` left out."""

CALIBRATE, MEASURE = 64, 256
WORDS = 6, 40
"""A sentence has at least, and at most, so many words."""


class Sentences(NamedTuple):
    """Sentences to calibrate on, and others to measure."""

    calibrate: list[str]
    measure: list[str]


def first_sentence(docstring: str) -> str:
    """The text up to the first full stop that ends a word, on one line; or "" where the first paragraph has none."""
    paragraph = " ".join(inspect.cleandoc(docstring).partition("\n\n")[0].split())
    found = re.match(r".*?\w[)\]`\"']*\.(?= |$)", paragraph)
    return found[0] if found else ""


def docstrings(file: Path) -> Iterator[str]:
    """Docstrings of the module, its classes and functions, in the order of ``ast.walk``; the file is read, not imported."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node, clean=False) or ""


def collected(folder: Path, names: str) -> list[str]:
    """Sentences of some files: none twice, ordered by their SHA-256, which is a shuffle without a seed."""
    files = sorted(file for name in names.split() for file in folder.glob(f"{name}.py"))
    found = {first_sentence(text) for file in files for text in docstrings(file)}
    plain = {s for s in found if WORDS[0] <= len(s.split()) <= WORDS[1] and s.isascii() and s[0].isupper() and "::" not in s}
    return sorted(plain, key=lambda sentence: hashlib.sha256(sentence.encode()).digest())


def chosen() -> Sentences:
    """32 sentences of each source to calibrate on and the next 128 of each to measure; no sentence is in both."""
    halves = [collected(*source) for source in SOURCES]
    own, other = CALIBRATE // len(halves), MEASURE // len(halves)
    calibrate = [sentence for half in halves for sentence in half[:own]]
    measure = [sentence for half in halves for sentence in half[own : own + other] if sentence not in calibrate]
    return Sentences(calibrate, list(dict.fromkeys(measure)))
