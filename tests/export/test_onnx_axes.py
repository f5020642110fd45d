"""Dynamic axes of exported models: what they may be, and what is said where they cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from tests.helpers import Ready, ready, same
from tests.runtime import computed, kernels, onnx, within_sums

pytestmark = pytest.mark.slow

BOTH = {0: "batch", 1: "length"}
POWERS = sq.override(pot_scale=True)
EXACT = sq.QuantConfig(weight=sq.override(pot_scale=True, bits=within_sums(8)), activation=POWERS)
"""Scales that are powers of two: few products of codes add up in float32 without rounding, and all runs give the same."""


class Joined(nn.Module):
    """A linear layer, and something that is made of its result and a second argument."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.join = nn.Linear(4, 4), join

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.join(self.linear(x), y)


def joined(join: Callable[[Tensor, Tensor], Tensor], *shape: int) -> tuple[Ready, tuple[Tensor, Tensor]]:
    example = torch.randn(*shape or (3, 12), 4), torch.randn(*shape or (3, 12), 4)
    return ready(Joined(join).eval(), *example, config=EXACT), example


def sizes(path: Path) -> dict[str, list[Any]]:
    """Of inputs and outputs: names, or numbers where they are fixed."""
    graph = onnx.load(path).graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*graph.input, *graph.output)}
    return {name: [dim.dim_param or dim.dim_value for dim in shape] for name, shape in shapes.items()}


def written(made: Ready, example: Any, path: Path, axes: Any, **options: Any) -> Path:
    sq.export.onnx(made.q, made.params, made.qparams, example, path, dynamic_axes=axes, **options)
    return path


@pytest.mark.parametrize("shape", [(3, 12), (1, 1), (4, 4)], ids=str)
def test_sizes_have_their_names_and_may_be_any(shape: tuple[int, int], tmp_path: Path) -> None:
    made, example = joined(lambda x, y: torch.cat([x, y], 1), *shape)
    path = written(made, example, tmp_path / "net.onnx", {"x": BOTH, "y": {0: "batch", 1: "N"}})
    found = sizes(path)
    assert found["x"] == ["batch", "length", 4] and found["y"] == ["batch", "N", 4]
    assert found["output"] in (["batch", "N + length", 4], ["batch", "length + N", 4])
    for batch, length, other in ((1, 1, 1), (2, 5, 9), (6, 12, 2)):
        x, y = torch.randn(batch, length, 4), torch.randn(batch, other, 4)
        same(computed(path, {"x": x, "y": y})[0], made(x, y).detach())


def test_they_say_everything(tmp_path: Path) -> None:
    made, example = joined(lambda x, y: x)
    for axes, first in (({}, 3), ({"x": {1: "length"}}, 3), (None, "batch")):
        found = sizes(written(made, example, tmp_path / "net.onnx", axes, dynamic_batch=True))
        assert found["x"] == [first, "length" if axes else 12, 4]
    assert sizes(written(made, example, tmp_path / "net.onnx", {"x": BOTH}, dynamic_batch=False))["x"][0] == "batch"


def test_tensors_in_containers_have_the_names_of_inputs(tmp_path: Path) -> None:
    class Contained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, given: dict[str, Any], scale: int) -> Tensor:
            return self.linear(given["x"]) * scale + given["more"][0]

    example = {"x": torch.randn(3, 5, 4), "more": [torch.randn(5, 4)]}, 2
    made = ready(Contained().eval(), *example, config=EXACT)
    path = written(made, example, tmp_path / "net.onnx", {"given.x": BOTH, "given.more.0": {0: "length"}})
    x, more = torch.randn(2, 9, 4), torch.randn(9, 4)
    names = [value.name for value in onnx.load(path).graph.input]
    feeds = {names[0]: x, names[1]: more}
    same(computed(path, feeds)[0], made({"x": x, "more": [more]}, 2).detach())


def test_a_linear_layer_with_two_unknown_sizes_is_one_kernel(tmp_path: Path) -> None:
    x = torch.randn(3, 12, 4)
    made = ready(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), x, config=EXACT)
    path = written(made, x, tmp_path / "net.onnx", {"input": BOTH})
    assert kernels(path, tmp_path)["QGemm"] == 2
    x = torch.randn(5, 40, 4)
    same(computed(path, {"input": x})[0], made(x).detach())


WRONG = {
    "argument": ({"z": BOTH}, r"argument of dynamic_axes 'z' is not known.*use one of x, y"),
    "axis": ({"x": {3: "length"}}, r"'x' has no such axis: got 3, allowed 0 to 2"),
    "negative axis": ({"x": {-1: "length"}}, r"'x' has no such axis: got -1, allowed 0 to 2"),
    "lengths": (
        {"x": {0: "n"}, "y": {1: "n"}},
        r"'n' cannot name two sizes.*axis 0 of 'x' has 3 in the example, axis 1 of 'y' has 12",
    ),
    "name": ({"x": {0: "a b"}}, r"axis 0 of 'x' cannot have this name: got 'a b', allowed an identifier"),
    "no mapping": ({"x": ["batch"]}, r"dynamic_axes must name sizes by argument and axis.*dynamic_axes=\{'x': \{0: 'batch'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    axes, message = WRONG[name]
    made, example = joined(lambda x, y: x)
    with pytest.raises(sq.ConfigError, match=message):
        written(made, example, tmp_path / "net.onnx", axes)
    assert not list(tmp_path.iterdir())


FIXED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Any, str]] = {
    "number": (
        lambda x, y: x + torch.ones(12, 4),
        {"x": BOTH, "y": BOTH},
        r"any size of 'length' \(axis 1 of 'x', axis 1 of 'y'\) \(because torch.export says: .*"
        r"specialized it to be a constant \(12\); it suggests length = 12\)",
    ),
    "equal": (lambda x, y: x + y, {"x": BOTH, "y": {0: "batch", 1: "other"}}, r"must always be equal.*other = length"),
    "even": (lambda x, y: x.reshape(x.shape[0], -1, 2, 4), {"x": BOTH}, r"it suggests length = 2\*_length"),
}


@pytest.mark.parametrize("name", FIXED)
def test_a_model_that_takes_one_size_says_which_and_why(name: str, tmp_path: Path) -> None:
    join, axes, message = FIXED[name]
    made, example = joined(join)
    with pytest.raises(sq.ConfigError, match=message):
        written(made, example, tmp_path / "net.onnx", axes)


def test_a_range_is_in_the_file(tmp_path: Path) -> None:
    made, example = joined(lambda x, y: x if x.shape[1] > 5 else x + torch.ones(99, 4)[: x.shape[1]])
    path = written(made, example, tmp_path / "net.onnx", {"x": BOTH})
    assert [(entry.key, entry.value) for entry in onnx.load(path).metadata_props] == [("length", "at least 6")]
    made, example = joined(lambda x, y: x + torch.arange(99.0)[: x.shape[1], None])
    path = written(made, example, tmp_path / "net.onnx", {"x": BOTH})
    assert [(entry.key, entry.value) for entry in onnx.load(path).metadata_props] == [("length", "at most 99")]
    x = torch.randn(2, 99, 4)
    same(computed(path, {"x": x, "y": example[1]})[0], made(x, x).detach())


def test_a_program_of_torch_has_dynamic_axes_too() -> None:
    made, example = joined(lambda x, y: torch.cat([x, y], 1))
    axes = {"x": BOTH, "y": {0: "batch", 1: "other"}}
    module = sq.export.torch(made.q, made.params, made.qparams, example, dynamic_axes=axes).module()
    x, y = torch.randn(2, 5, 4), torch.randn(2, 9, 4)
    same(module(x, y), made(x, y).detach())
