"""From dictionaries to a quantized model: the shapes of inputs, as sophgo-mq's scripts give them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq

DICTIONARIES = {"quant_dict": {"chip": "BM1690", "quantmode": "weight_activation", "strategy": "CNN"}}
SHAPE = [1, 3, 8, 8]


class Two(nn.Module):
    """Two inputs of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(5, 4)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        return self.conv(image).mean((2, 3)) + self.linear(vector)


@pytest.mark.parametrize("shapes", [[SHAPE, [1, 5]], (tuple(SHAPE), (1, 5)), {"vector": [1, 5], "image": SHAPE}])
def test_shapes_of_inputs_plan_what_inputs_of_these_shapes_plan(shapes: Any) -> None:
    model = Two().eval()
    by_example = sq.prepare_by_platform(model, DICTIONARIES, example_args=(torch.ones(SHAPE), torch.ones(1, 5)))
    by_shapes = sq.prepare_by_platform(model, DICTIONARIES, input_shape_dict=shapes)
    assert by_shapes.plan == by_example.plan


def test_shapes_of_inputs_leave_the_callers_random_numbers_where_they_are() -> None:
    model, before = Two().eval(), torch.get_rng_state()
    sq.prepare_by_platform(model, DICTIONARIES, input_shape_dict=[SHAPE, [1, 5]])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("shapes", [SHAPE, [], {}, 3, [[1, 0]], [["a"]], {"image": 8}])
def test_what_holds_no_shapes_is_refused(shapes: Any) -> None:
    with pytest.raises(sq.ConfigError, match=r"holds no shapes.*Fix: input_shape_dict=\[\[1, 3, 224, 224\]\]"):
        sq.prepare_by_platform(Two(), DICTIONARIES, input_shape_dict=shapes)


def test_names_of_an_onnx_file_are_refused_with_the_shapes_in_order() -> None:
    with pytest.raises(sq.ConfigError, match=r"got \['data'\], allowed \['image', 'vector'\].*\[\[1, 3, 8, 8\]\]"):
        sq.prepare_by_platform(Two(), DICTIONARIES, input_shape_dict={"data": SHAPE})


@pytest.mark.parametrize("example", [{"example_args": torch.ones(1)}, {"example_kwargs": {}}, {"examples": []}], ids=list)
def test_shapes_and_an_example_are_refused_together(example: dict[str, Any]) -> None:
    with pytest.raises(sq.ConfigError, match="leave input_shape_dict out"):
        sq.prepare_by_platform(Two(), DICTIONARIES, input_shape_dict=[SHAPE], **example)


def test_shapes_inside_the_dictionaries_are_refused_with_the_argument_to_use() -> None:
    with pytest.raises(sq.ConfigError, match="'input_shape_dict' is an argument beside the dictionaries"):
        sq.from_dicts({**DICTIONARIES, "input_shape_dict": {"x": SHAPE}})
