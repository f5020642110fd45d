"""What a run needs beside params and qparams: any tree of plain values comes back, anything else is refused by its path."""

from __future__ import annotations

import json
import math
import random
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.checkpoint import extra, sealed
from tests.checkpoint.test_io import bits, says


class Moments(NamedTuple):
    """As functional optimizers have them."""

    mean: Any
    count: Tensor


class Empty(NamedTuple):
    """A stage without a state."""


def same(found: Any, saved: Any) -> None:
    """Trees of the same classes, the same order of keys, and the same bits; a Parameter comes back as a tensor."""
    if isinstance(saved, Tensor):
        assert type(found) is Tensor
        assert bits(found) == bits(saved)
        return
    assert type(found) is type(saved)
    if isinstance(saved, dict):
        assert list(map(repr, found)) == list(map(repr, saved))
        for one, other in zip(found.values(), saved.values(), strict=True):
            same(one, other)
    elif isinstance(saved, list | tuple):
        assert len(found) == len(saved)
        for one, other in zip(found, saved, strict=True):
            same(one, other)
    else:
        assert repr(found) == repr(saved)


def through(tree: Any, path: Path) -> Any:
    """A tree, saved and loaded."""
    sq.save(path / "extra", extra=tree)
    return sq.load(path / "extra").extra


def stepped(optimizer: torch.optim.Optimizer, leaf: Tensor) -> dict[str, Any]:
    leaf.grad = torch.ones_like(leaf)
    optimizer.step()
    return optimizer.state_dict()


def test_states_of_optimizers_schedules_and_generators_come_back(tmp_path: Path) -> None:
    leaf = torch.ones(3, requires_grad=True)
    adam = torch.optim.AdamW([leaf], lr=0.1, amsgrad=True)
    schedules = [
        torch.optim.lr_scheduler.SequentialLR(
            adam,
            [torch.optim.lr_scheduler.LinearLR(adam), torch.optim.lr_scheduler.CosineAnnealingLR(adam, 5)],
            milestones=[2],
        ),
        torch.optim.lr_scheduler.MultiStepLR(adam, [2, 2, 5]),
        torch.optim.lr_scheduler.ReduceLROnPlateau(adam),
        torch.optim.lr_scheduler.OneCycleLR(adam, 0.5, total_steps=9),
    ]
    generator = torch.Generator().manual_seed(3)
    saved = {
        "step": 12,
        "optimizers": [stepped(adam, leaf), stepped(torch.optim.SGD([leaf], lr=0.1, momentum=0.9), leaf)],
        "schedules": [schedule.state_dict() for schedule in schedules],
        "generator": generator.get_state(),
        "python": random.getstate(),
        "model": nn.BatchNorm1d(2).state_dict(),
        "functional": (
            Moments({"w": torch.ones(2)}, torch.tensor(3)),
            Empty(),
            sq.QParams(torch.ones(()), torch.zeros(()), {}),
        ),
    }
    model_state = saved["model"]
    assert isinstance(model_state, OrderedDict)
    found = through(saved, tmp_path)
    same(found, saved)
    adam.load_state_dict(found["optimizers"][0])
    schedules[0].load_state_dict(found["schedules"][0])
    expected = torch.rand(2, generator=generator)
    generator.set_state(found["generator"])
    assert torch.equal(torch.rand(2, generator=generator), expected)


KEYS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4), st.tuples, max_leaves=2
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**100), 2**100)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([torch.bfloat16, torch.bool, torch.device("cuda", 1), torch.Size([2, 0]), Empty()])
    | st.sampled_from([(torch.float32, ()), (torch.float8_e4m3fn, (2,)), (torch.uint8, (0, 3))]).map(
        lambda kind: torch.ones(kind[1]).to(kind[0])
    )
)
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.dictionaries(st.text(max_size=2), inner, max_size=2).map(OrderedDict)
        | st.builds(Moments, inner, inner)
    ),
    max_leaves=12,
)


@given(TREES)
@settings(max_examples=60, deadline=None)
def test_any_tree_comes_back(tree: Any) -> None:
    same(extra.unpack(extra.pack(tree), torch.device("cpu")), tree)


def test_it_stands_beside_the_other_parts_and_is_none_where_it_was_not_saved(tmp_path: Path) -> None:
    path, params = tmp_path / "c", sq.params_of(nn.Linear(2, 2))
    sq.save(path, params=params, extra={"step": 1})
    found = sq.load(path)
    assert found.extra == {"step": 1}
    assert list(found.params or {}) == list(params)
    assert repr(found) == f"Checkpoint('{path}': 2 params, extra)"
    sq.save(path, params=params)
    assert sq.load(path).extra is None
    sq.save(path, extra={})
    assert sq.load(path).extra == {}


def test_tensors_are_named_by_their_path_where_a_file_can_name_them_so() -> None:
    tree = {
        "state": {0: {"step": torch.ones(1)}, "0": {"step": torch.zeros(1)}},
        "": torch.ones(2),
        "tensor_1": torch.ones(3),
    }
    packed = extra.pack(tree)
    assert list(packed.tensors) == ["state.0.step", "tensor_1", "tensor_2", "tensor_3"]
    same(extra.unpack(packed, torch.device("cpu")), tree)
    assert list(extra.pack({"tensor_1": torch.ones(1), "": torch.ones(2)}).tensors) == ["tensor_1", "tensor_1_"]


def test_only_what_was_on_another_device_goes_to_one() -> None:
    packed = extra.pack({"moved": torch.ones(2, device="meta"), "stays": torch.ones(2)})
    as_stored = packed._replace(tensors={name: torch.ones(2) for name in packed.tensors})
    found = extra.unpack(as_stored, torch.device("meta"))
    assert found["moved"].device.type == "meta"
    assert found["stays"].device.type == "cpu"


def nested(levels: int) -> Any:
    tree: Any = 0
    for _ in range(levels):
        tree = [tree]
    return tree


def circle() -> Any:
    tree: dict[str, Any] = {}
    tree["x"], tree["y"] = tree, [tree]
    return tree


class Inner:
    """What is defined in here is found by its dotted name."""

    class Nested(NamedTuple):
        """A state."""

        x: int


def test_a_class_inside_a_class_is_found_and_one_inside_a_function_is_not(tmp_path: Path) -> None:
    class Local(NamedTuple):
        x: int

    assert through(Inner.Nested(1), tmp_path) == Inner.Nested(1)
    says(sq.CheckpointError, lambda: through({"a": Local(1)}, tmp_path), "extra.a", "define the class at the top level")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (nn.Linear(1, 1), "its state_dict()"),
        (torch.optim.SGD([torch.ones(1)]), "its state_dict()"),
        (torch.Generator(), "generator.get_state()"),
        (torch.ones(1).numpy(), "torch.from_numpy(array)"),
        (torch.ones(1, dtype=torch.float64).numpy()[0], "got numpy.float64"),
        (defaultdict(int), "a plain dict(...)"),
        ({1, 2}, "sorted list"),
        (b"bytes", "got bytes"),
        (1j, "got complex"),
        (len, "got builtin_function_or_method"),
        (1 << 5000, "hex(number)"),
        ("\ud83d\ude00", "no Unicode"),
        ({sq: 1}, "the key <module"),
        (torch.ones(1).to_sparse(), "cannot be stored"),
        (torch.ones(1, dtype=torch.complex128), "cannot be stored"),
        (nested(200), "below 100 levels"),
        (circle(), "contains itself"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_stored_is_named_by_its_path(value: Any, words: str, tmp_path: Path) -> None:
    says(sq.CheckpointError, lambda: through({"state": [value]}, tmp_path), "extra.state.0", words)
    assert not (tmp_path / "extra").exists()


def test_every_problem_is_in_one_message(tmp_path: Path) -> None:
    text = says(sq.CheckpointError, lambda: through({"a": b"", "b": {"c": 1j}}, tmp_path), "extra.a", "extra.b.c")
    assert "2 problems" in text


def test_a_module_that_is_not_imported_is_named_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("elsewhere")
    State = NamedTuple("State", [("x", int)])  # noqa: UP014
    State.__module__, module.State = "elsewhere", State  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    path = tmp_path / "c"
    sq.save(path, extra=State(1))
    assert type(sq.load(path).extra) is State
    monkeypatch.delitem(sys.modules, "elsewhere")
    says(sq.CheckpointError, lambda: sq.load(path), "holds a 'State'", "Fix: import elsewhere before sq.load")
    assert "elsewhere" not in sys.modules
    monkeypatch.setitem(sys.modules, "elsewhere", ModuleType("elsewhere"))
    says(sq.CheckpointError, lambda: sq.load(path), "has no such class", "use the version of the package")


FORGED: dict[str, Any] = {
    "an unknown kind": {"pickle": "x"},
    "two kinds": {"tuple": [], "dict": []},
    "a missing tensor": {"tensor": "nowhere"},
    "no name": {"tensor": ["t"]},
    "no list": {"tuple": {"tuple": []}},
    "no pairs": {"dict": [[1]]},
    "no entries": {"dict": 7},
    "no class": {"namedtuple": ["os"]},
    "no fields": {"namedtuple": [__name__, "Empty", [["x"]]]},
    "a key twice": {"dict": [["a", 1], ["a", 2]]},
    "a list as a key": {"dict": [[[1], 2]]},
    "no float": {"float": "1.5"},
    "no dtype": {"dtype": "Tensor"},
    "no device": {"device": "mars"},
    "no size": {"Size": ["1"]},
    "a function": {"namedtuple": ["os", "system", [["x", 1]]]},
    "a class that is no named tuple": {"namedtuple": ["pathlib", "Path", [["x", 1]]]},
    "other fields": {"namedtuple": [__name__, "Moments", [["mean", 1]]]},
    "too many levels": nested(150),
}


@pytest.mark.parametrize("data", FORGED.values(), ids=FORGED)
def test_a_forged_tree_is_refused(data: Any) -> None:
    tree = json.dumps({"tree": data})
    with pytest.raises(ValueError, match=r"extra|levels"):
        extra.unpack(extra.Packed(tree, {}), torch.device("cpu"))


@pytest.mark.parametrize(
    ("text", "tensors"),
    [
        ('{"tree":0}', {"t": torch.ones(1)}),
        ('{"tree":[{"tensor":"t"},{"tensor":"t"}]}', {"t": torch.ones(1)}),
        ('{"a":0}', {}),
    ],
    ids=["left over", "twice", "no tree"],
)
def test_tensors_and_text_belong_together(text: str, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="extra"):
        extra.unpack(extra.Packed(text, tensors), torch.device("cpu"))


def edited(path: Path, change: Callable[[dict[str, str]], object]) -> None:
    """The file with a changed text that has the right checksums."""
    tensors, text = sealed.read(path)
    change(text)
    sealed.write(path, tensors, text)


def test_a_file_whose_text_lacks_the_tree_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    sq.save(path, extra={"x": 1, "nan": math.nan})
    edited(path, lambda text: text.pop("extra"))
    says(sq.CheckpointError, lambda: sq.load(path), "entries of its text are missing or unknown: ['extra']")


def test_the_counts_of_a_counter_come_back(tmp_path: Path) -> None:
    assert through(Counter("abca"), tmp_path) == Counter("abca")
