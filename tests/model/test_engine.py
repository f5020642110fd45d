"""What conversions and exports ask an engine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import sophq_func as sq


class Tied(nn.Module):
    """Two layers with one weight, and a layer with a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.conv, self.norm = nn.Conv1d(1, 2, 1), nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.second(self.first(x))[:, None]))


def made() -> tuple[sq.Quantized, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    model, x = Tied().eval(), torch.randn(3, 4)
    return sq.quantize(model, sq.QuantConfig(), example_args=(x,)), sq.params_of(model), x


def test_holders_are_every_module_that_has_a_parameter() -> None:
    q, _, _ = made()
    assert q.engine.holders("first.weight") == [("first", "weight"), ("second", "weight")]
    assert q.engine.holders("second.bias") == [("second", "bias")]
    assert q.engine.holders("nothing") == []
    assert q.engine.tensors_of("second") == {"weight": "first.weight", "bias": "second.bias"}
    assert q.engine.tensors_of("nothing") == {}


def test_empty_params_are_those_of_the_whole_model_without_numbers() -> None:
    q, params, _ = made()
    for engine in (q.engine, q.part("second").engine):
        empty = engine.empty_params()
        assert list(empty) == list(params)
        assert all(tensor.is_meta for tensor in empty.values())
        assert {n: (t.shape, t.dtype) for n, t in empty.items()} == {n: (t.shape, t.dtype) for n, t in params.items()}


def test_a_retraced_graph_is_that_of_the_model() -> None:
    q, params, x = made()
    model = Tied().eval()
    assert [node.name for node in q.engine.retrace(params, (x,), {})] == [node.name for node in sq.trace(model, (x,))]


def test_an_altered_loop_runs_without_some_modules_and_with_other_biases() -> None:
    q, params, x = made()
    bias = torch.tensor([5.0, -5.0])
    loop = q.engine.altered(["norm"], {"conv": ("conv.bias", bias)})
    output, _ = loop.run({**params, "conv.bias": bias}, lambda name, value: value, (x,), {})
    hidden = nn.functional.linear(x, params["first.weight"], params["first.bias"])
    hidden = nn.functional.linear(hidden, params["first.weight"], params["second.bias"])
    expected = nn.functional.conv1d(hidden[:, None], params["conv.weight"], bias)
    torch.testing.assert_close(output, expected)
    assert q.engine.loop.skeleton is q.engine.skeleton, "the engine's own loop stays as it is"


def test_a_frozen_engine_uses_weights_as_they_are_given() -> None:
    q, params, x = made()
    qparams = q.calibrate(params, [x], progress=False)
    frozen = q.engine.as_frozen()
    assert not frozen.acting
    weights = q.engine.quantized_params(params, qparams)
    run, _ = frozen.run_quantized(weights, qparams, frozen.quantizing(qparams), (x,), {})
    assert torch.equal(run, q.apply(params, qparams, x))
