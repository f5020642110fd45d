"""The tool that draws the rooms: what it counts on small packages, and its sentence for each offence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

import sophq_func as sq
from tools import rooms

SMALL = {
    "__init__.py": "from small.high.walk import walk as walk",
    "low/__init__.py": "from small.low._steps import Step as Step\nfrom small.low import far as far",
    "low/_steps.py": "class Step: ...",
    "low/far.py": "from . import Step\nimport torch",
    "high/__init__.py": "",
    "high/walk.py": (
        "import typing\nif typing.TYPE_CHECKING:\n    import small\nelse:\n    from small.low import far\n"
        "def walk():\n    from small.low import Step"
    ),
}
"""Three rooms: the folder ``high`` on the folder ``low``, and ``__init__``."""


def package(folder: Path, files: Mapping[str, str]) -> Path:
    root = folder / "small"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def told(folder: Path, files: Mapping[str, str], *options: str) -> list[str]:
    """The sentences about ``SMALL`` with further files."""
    graph = rooms.read(package(folder, {**SMALL, **files}))
    found = [*rooms.offences(graph), *(rooms.private_names(graph) if options else ())]
    assert rooms.main([str(folder / "small"), *options]) == bool(found)
    return found


def chain(count: int) -> dict[str, str]:
    """Rooms of which each imports from the one before."""
    return {f"r{i}.py": f"import small.r{i - 1}" if i else "" for i in range(count)}


def test_re_exports_lead_to_the_defining_file_and_imports_for_type_checkers_do_not_count(tmp_path: Path) -> None:
    graph = rooms.read(package(tmp_path, SMALL))
    assert graph.arrows() == {"__init__": {"high"}, "high": {"low"}, "low": set()}
    assert graph.behind() == {
        ("__init__", "high"): [("__init__.py", "high/walk.py")],
        ("high", "low"): [("high/walk.py", "low/_steps.py"), ("high/walk.py", "low/far.py")],
    }
    assert graph.edges["small.low.far"] == {"small.low._steps"}
    assert rooms.floors(graph.arrows()) == {"low": 1, "high": 2, "__init__": 3}


def test_the_graph_is_printed_and_nothing_is_said_where_all_is_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(tmp_path, {}, "--torch") == []
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["3", "__init__", "high", "(1)"], ["2", "high", "low", "(2)"], ["1", "low"]]
    assert last == "3 rooms, 2 arrows between them, 3 imports of files behind these, 3 floors."
    rooms.main([str(tmp_path / "small"), "--files"])
    assert "high/walk.py -> low/_steps.py\n" in capsys.readouterr().out


def test_too_many_rooms(tmp_path: Path) -> None:
    assert told(tmp_path, {f"r{i}.py": "" for i in range(15)}) == []
    assert told(tmp_path, {f"r{i}.py": "" for i in range(16)}) == ["The package has 19 rooms; at most 18 are allowed."]


def test_too_many_floors(tmp_path: Path) -> None:
    assert told(tmp_path, chain(11)) == []
    assert told(tmp_path, chain(12)) == ["The package has 12 floors; at most 11 are allowed."]


def test_too_many_arrows(tmp_path: Path) -> None:
    below = {f"r{i}.py": "\n".join(f"import small.r{j}" for j in range(min(i, 10))) for i in range(14)}
    count = 2 + sum(min(i, 10) for i in range(14))  # two of them in SMALL
    assert count == 87
    above = {"r14.py": "\n".join(f"import small.r{j}" for j in range(4))}
    assert told(tmp_path, {**below, **above}) == ["The package has 91 arrows between rooms; at most 90 are allowed."]
    assert told(tmp_path, {**below, "r14.py": "import small.r0, small.r1, small.r2"}) == []


def test_a_circle_of_rooms(tmp_path: Path) -> None:
    assert told(tmp_path, {"low/back.py": "from small.high import walk"}) == [
        "Rooms import each other in a circle: high -> low -> high."
    ]


def test_a_circle_of_files(tmp_path: Path) -> None:
    assert told(tmp_path, {"high/run.py": "from small.high import walk", "high/walk.py": "import small.high.run"}) == [
        "Files import each other in a circle: small.high.run -> small.high.walk -> small.high.run."
    ]


@pytest.mark.parametrize("spelled", ["from small.low._steps import Step", "from small.low import _steps"])
def test_a_private_file_of_another_room(tmp_path: Path, spelled: str) -> None:
    assert told(tmp_path, {"low/near.py": spelled}) == []
    assert told(tmp_path, {"high/run.py": f"\n{spelled}"}) == [
        "high/run.py:2 imports low/_steps.py, which is private to the room low."
    ]


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("import torch\ntorch._C.active()", "torch._C.active"),
        ("import torch as pytorch\npytorch._C._functorch.level().x", "torch._C._functorch.level"),
        ("from torch.overrides import (\n_pop_mode)", "torch.overrides._pop_mode"),
        ("from torch.autograd import forward_ad\nforward_ad._current_level", "torch.autograd.forward_ad._current_level"),
        ("import torch.nn\ntorch.utils._pytree.tree_map", "torch.utils._pytree.tree_map"),
        ("import torch\ntorch.ops.quantized_decomposed.x", "torch.ops.quantized_decomposed.x"),
        ("\nNAME = 'torch.ao.quantization.fx._decomposed'", "torch.ao.quantization.fx._decomposed"),
        ("\nf(module)._forward_hooks.clear()", "_forward_hooks"),
        ("\nget(module, '_parameters')", "_parameters"),
        ("\ntensor._version", "_version"),
    ],
)
def test_a_private_name_of_torch(tmp_path: Path, spelled: str, name: str) -> None:
    line = 1 if spelled.startswith("from torch.overrides") else 2
    assert told(tmp_path, {"low/near.py": spelled}) == []
    assert told(tmp_path, {"low/near.py": spelled}, "--torch") == [
        f"low/near.py:{line} holds {name}, a private name of torch."
    ]


def test_some_files_may_hold_private_names_of_torch(tmp_path: Path) -> None:
    held = {
        "core/modes.py": "import torch\ntorch._C.x",
        "core/pytree.py": "from torch.utils import _pytree\n_pytree.tree_map",
    }
    assert told(tmp_path, held, "--torch") == []
    assert told(tmp_path, {**held, "core/pytree.py": "import torch\ntorch._C.x"}, "--torch") == [
        "core/pytree.py:2 holds torch._C.x, a private name of torch."
    ]


def test_public_names_of_torch_and_what_a_class_calls_its_own_are_no_private_names_of_torch(tmp_path: Path) -> None:
    text = '"""Speaks of ``torch._C.x``."""\nimport torch\ntorch.__version__\nself._modules\nself.x._y\n_parameters(1)'
    assert told(tmp_path, {"low/near.py": text}, "--torch") == []


PACKAGE = rooms.read(Path(sq.__file__).parent)


def test_the_package_keeps_its_limits() -> None:
    assert [*rooms.offences(PACKAGE)] == []


def test_the_page_names_every_room_and_what_it_imports_from() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", page, flags=re.MULTILINE))
    named = {room: set(text.replace("nothing", "").split(", ")) - {""} for room, text in rows.items()}
    assert named == {room: below for room, below in PACKAGE.arrows().items() if not room.startswith("__")}
