"""Skeletons without hooks, for runs of chains of torch's own modules."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.capture._torch import innermost_mode
from sophq_func.capture.skeleton import Skeleton

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Mine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Chain(nn.Sequential):
    """A chain with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def is_chain(model: nn.Module) -> bool:
    return Skeleton(model).calls_leaves_alone


def hooked() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


def patched() -> nn.Module:
    chain = nn.Sequential(nn.Linear(3, 3))
    chain.forward = lambda x: x * 3  # type: ignore[method-assign]
    return chain


def test_only_torchs_own_modules_in_sequence_are_a_chain() -> None:
    assert is_chain(nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())))
    assert is_chain(nn.Linear(3, 3))
    for other in (Mine(), hooked(), patched(), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), Chain(nn.ReLU())):
        assert not is_chain(nn.Sequential(nn.ReLU(), other))
    assert not is_chain(nn.TransformerEncoderLayer(4, 2))


def quantized(model: nn.Module) -> tuple[sq.Quantized, dict[str, Tensor], dict[str, sq.QParams]]:
    q = sq.quantize(model, sq.QuantConfig(), example_args=(X,))
    params = sq.params_of(model)
    return q, params, q.calibrate(params, [X], progress=False)


def norms() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)).eval()


def test_a_chain_runs_without_a_mode_and_with_the_same_numbers() -> None:
    model = norms()
    q, params, qparams = quantized(model)
    seen = []

    def looking(name: str, x: Tensor) -> Tensor:
        seen.append((name, innermost_mode()))
        return q.engine.quantizing(qparams)(name, x)

    output, _ = q.engine.run_quantized(params, qparams, looking, (X,), {})
    assert [name for name, _ in seen] == list(dict.fromkeys(name for name, _ in seen))
    assert {name for name, _ in seen} == set(q.engine.running) and {mode for _, mode in seen} == {None}
    # the same model, whose code a run must watch
    other, _, own = quantized(Chain(*copy.deepcopy(model)))
    assert torch.equal(output + 1, other.apply(params, own, X))


def test_norms_in_training_write_into_copies() -> None:
    model = norms()
    q, params, qparams = quantized(model)
    before = {name: tensor.clone() for name, tensor in params.items()}
    _, after = q.train().apply_and_update(params, qparams, X)
    assert not torch.equal(after["1.running_mean"], params["1.running_mean"])
    assert all(torch.equal(params[name], before[name]) for name in before)
    _, same = q.apply_and_update(params, qparams, X)
    assert all(torch.equal(same[name], before[name]) for name in before)


def test_a_model_that_is_called_while_it_runs_finds_its_tensors() -> None:
    """A run inside another one of the same model, here in what happens to a value, takes nothing of the outer one."""
    q, params, qparams = quantized(norms())
    doubled = {name: 2 * tensor if tensor.is_floating_point() else tensor for name, tensor in params.items()}
    inner = []

    def again(name: str, x: Tensor) -> Tensor:
        inner.append(q.engine.run_quantized(doubled, qparams, q.engine.quantizing(qparams), (X,), {})[0])
        return q.engine.quantizing(qparams)(name, x)

    output, _ = q.engine.run_quantized(params, qparams, again, (X,), {})
    assert torch.equal(output, q.apply(params, qparams, X))
    assert all(torch.equal(one, q.apply(doubled, qparams, X)) for one in inner)


def test_skipped_modules_of_a_chain_stay_skipped() -> None:
    q, params, _ = quantized(norms())
    loop = q.engine.altered(["3"], {})
    output, _ = loop.run(params, lambda name, x: x, (X,), {})
    assert output.shape == (4, 5)
