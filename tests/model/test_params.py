"""Params taken out of a model in two halves, and put back in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from tests.helpers import ready, unchanged


class Tied(nn.Module):
    """An embedding whose weight the head shares, a frozen layer, a BatchNorm and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(5, 3), nn.BatchNorm1d(3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.frozen(self.norm(self.embed(x))))


def other(model: nn.Module) -> dict[str, Tensor]:
    """Params with other numbers."""
    return {name: ~t if t.dtype == torch.bool else t + 1 for name, t in sq.params_of(model).items()}


def says(model: object, params: object, *words: str) -> None:
    """Loading raises an error with all these words, and writes nothing."""
    with unchanged(*([model] if isinstance(model, nn.Module) else [])), pytest.raises(sq.StateError) as caught:
        sq.load_into(model, params)  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)


def test_the_halves_are_the_params_and_what_requires_gradients_is_trained() -> None:
    model = Tied()
    trainable, rest = sq.split_params(model)
    assert list(trainable) == ["embed.weight", "norm.bias", "norm.weight"]
    assert list(rest) == [
        "frozen.bias",
        "frozen.weight",
        "mask",
        "norm.num_batches_tracked",
        "norm.running_mean",
        "norm.running_var",
    ]
    params = sq.params_of(model)
    assert {**trainable, **rest}.keys() == params.keys()
    for name, tensor in {**trainable, **rest}.items():
        assert tensor.data_ptr() == params[name].data_ptr()
        assert not tensor.requires_grad


@pytest.mark.parametrize("call", [sq.split_params, lambda tree: sq.load_into(tree, {})], ids=["split", "load"])
def test_only_a_module_has_halves(call: Callable[[object], object]) -> None:
    with pytest.raises(sq.PlanError, match=r"got 'dict', allowed an nn.Module"):
        call({"w": torch.ones(2)})


def test_a_model_gets_every_number_and_keeps_its_tensors_and_ties() -> None:
    model = Tied()
    tensors = {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    params = other(model)
    with unchanged(params):
        assert sq.load_into(model, params) is None  # type: ignore[func-returns-value]
    assert {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]} == tensors
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.requires_grad
    for name, tensor in sq.params_of(model).items():
        assert torch.equal(tensor, params[name])


def test_what_was_trained_runs_in_the_model() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(), torch.randn(6, 3)
    r = ready(model, x)
    frozen, params = r.q.freeze(r.params, r.qparams)
    expected = frozen.apply(params, sq.enabled(r.qparams, False), x)
    trained = {name: nn.Parameter(t) if t.is_floating_point() else t for name, t in params.items()}
    sq.load_into(model, trained)
    assert torch.equal(model(x), expected)


def test_every_problem_is_said_before_anything_is_written() -> None:
    model = Tied()
    params = other(model)
    del params["mask"]
    says(model, {**params, "maks": torch.ones(3)}, "params lack 'mask'", "params hold 'maks'", "did you mean 'mask'?")
    wrong = {**other(model), "norm.bias": torch.ones(4), "frozen.bias": torch.ones(3, dtype=torch.float16), "mask": 1}
    says(model, wrong, "norm.bias: the tensor has another shape: got (4,), allowed (3,)", "torch.float16", "got 'int'")
    says(model, {f"module.{name}": t for name, t in other(model).items()}, "have 'module.' in their names")
    says(model, [1], "params must be a dict of tensors: got 'list'")
    says(model, {**other(model), "norm.bias": torch.empty(3, device="meta")}, "norm.bias: a tensor on the meta device")


def test_a_tensor_inside_a_transform_is_refused() -> None:
    model = nn.Linear(2, 2, bias=False)

    def load(weight: Tensor) -> Tensor:
        sq.load_into(model, {"weight": weight})
        return weight

    with unchanged(model), pytest.raises(sq.StateError, match=r"belongs to a transform of torch.func"):
        torch.vmap(load)(torch.zeros(3, 2, 2))


def test_weights_of_the_model_itself_can_be_exchanged() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    params = sq.params_of(model)
    before = {name: t.clone() for name, t in params.items()}
    sq.load_into(model, {**params, "0.weight": params["1.weight"], "1.weight": params["0.weight"]})
    assert torch.equal(model[0].weight, before["1.weight"])
    assert torch.equal(model[1].weight, before["0.weight"])


def test_tensors_side_by_side_in_one_memory_are_written_and_overlapping_ones_are_compared() -> None:
    model, memory = nn.Module(), torch.zeros(4)
    model.register_buffer("first", memory[:2])
    model.register_buffer("second", memory[2:])
    sq.load_into(model, {"first": torch.tensor([1.0, 2.0]), "second": torch.tensor([3.0, float("nan")])})
    assert memory[:3].tolist() == [1.0, 2.0, 3.0]
    model.register_buffer("third", memory[:3])
    sq.load_into(model, {name: torch.full_like(t, 5) for name, t in sq.params_of(model).items()})
    assert memory.tolist() == [5.0] * 4
    params = {"first": torch.zeros(2), "second": torch.ones(2), "third": torch.ones(3)}
    says(model, params, "load_into: first: its numbers would be overwritten (because it shares memory with second, third)")


def test_a_repeated_tensor_cannot_be_written_but_may_stay_as_it_is() -> None:
    model = nn.Linear(1, 1)
    model.register_buffer("mask", torch.ones(1).expand(3))
    sq.load_into(model, other(model) | {"mask": torch.ones(3)})
    with pytest.raises(sq.StateError, match=r"load_into: mask: .* itself, by a stride of 0"):
        sq.load_into(model, other(model))
