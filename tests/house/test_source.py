"""Rules of the source itself: what is never written, what is always said, and who may import what."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sophq_func as sq
from tests.each import each

ROOT = Path(sq.__file__).parent
FILES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
over_files = each("file", {file: file for file in FILES})
EXPORTED = frozenset(sq.__all__)
NAMESPACES = (sq.observers, sq.fake_quantize, sq.export, sq.presets, sq.register)
"""Modules whose functions users call."""
HEAVY = frozenset(("rich", "matplotlib", "onnx", "onnxruntime", "onnxscript", "sklearn", "transformers"))


def exported() -> dict[str, object]:
    """What the package and its modules of pieces offer, by dotted name."""
    found = {name: getattr(sq, name) for name in EXPORTED}
    for module in NAMESPACES:
        found |= {f"{module.__name__.rpartition('.')[2]}.{name}": getattr(module, name) for name in module.__all__}
    return found


CLASSES = {name for name, value in exported().items() if isinstance(value, type)}
FUNCTIONS = {name for name, value in exported().items() if callable(value)} - CLASSES


def mentions(tree: ast.Module) -> Iterator[str]:
    """Every dotted module or name that a file imports, and every attribute and name that it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id


def owners(*words: str) -> set[str]:
    """The files that mention one of ``words`` as a part of a dotted name."""
    return {file for file, tree in FILES.items() if any(set(name.split(".")) & set(words) for name in mentions(tree))}


@over_files
def test_nothing_is_printed_nothing_global_and_no_exception_caught_blindly(file: str) -> None:
    for node in ast.walk(FILES[file]):
        assert not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"), node.lineno
        assert not isinstance(node, ast.Global), node.lineno
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), node.lineno


@over_files
def test_every_file_says_what_it_is(file: str) -> None:
    assert ast.get_docstring(FILES[file])


@over_files
def test_every_public_definition_has_a_docstring(file: str) -> None:
    for node in FILES[file].body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_the_exported_names_are_all_that_the_package_has() -> None:
    assert {name for name in vars(sq) if not name.startswith("_")} - submodules() == EXPORTED
    assert len(sq.__all__) == len(EXPORTED)


def test_completion_shows_what_is_public_and_nothing_else() -> None:
    assert dir(sq) == sorted([*sq.__all__, "__version__"])
    for module in NAMESPACES:
        assert set(module.__all__) <= set(dir(module))
        assert all(callable(getattr(module, name)) for name in dir(module)), module


def submodules() -> set[str]:
    """Modules become attributes of the package when they are imported; those meant for users are in ``EXPORTED``."""
    return {Path(file).parts[0].removesuffix(".py") for file in FILES} - EXPORTED


@each("name", {name: name for name in sorted(CLASSES | FUNCTIONS)})
def test_everything_exported_has_a_docstring(name: str) -> None:
    documentation = exported()[name].__doc__
    assert documentation
    assert not documentation.startswith(f"{name}("), "the text that a NamedTuple or dataclass makes up"


@each("name", {name: name for name in sorted(FUNCTIONS)})
def test_every_exported_function_shows_an_example(name: str) -> None:
    assert "Example:" in str(exported()[name].__doc__)
    assert ">>> " in str(exported()[name].__doc__)


@pytest.mark.slow
def test_the_package_imports_nothing_of_its_extras() -> None:
    code = "import sys, sophq_func; sys.stdout.write(' '.join({name.partition('.')[0] for name in sys.modules}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    loaded = set(found.stdout.split())
    assert "torch" in loaded
    assert not HEAVY & loaded


def test_one_file_knows_the_tree_libraries() -> None:
    assert owners("optree", "_pytree") == {"core/pytree.py"}


def test_one_file_calls_modules_functionally() -> None:
    assert owners("functional_call") == {"capture/skeleton.py"}


def test_no_piece_of_arithmetic_knows_modules_or_names() -> None:
    below = {"core", "numerics", "observers", "fake_quantize"}
    for file in (f for f in FILES if f.startswith(("numerics/", "observers/", "fake_quantize/"))):
        for name in mentions(FILES[file]):
            assert not name.startswith("sophq_func.") or name.split(".")[1] in below, (file, name)
            assert not name.startswith("torch.nn"), (file, name)
