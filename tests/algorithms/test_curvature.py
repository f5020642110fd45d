"""Traces and eigenvalues of Hessians, against the whole Hessian, its variance formula, and what can be written down."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, vmap
from transformers import BertConfig, BertModel

import sophq_func as sq
from tests.helpers import ready, unchanged

Params = dict[str, Tensor]
NAMES = ["0.weight", "2.weight"]
GENERATOR = torch.Generator()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3))
    return model, torch.randn(6, 3), torch.randint(0, 3, (6,))


def floating() -> tuple[Callable[[Params], Tensor], Params]:
    """Cross entropy of a small network in double precision."""
    model, x, y = network()
    params = {name: p.double() for name, p in sq.params_of(model).items()}
    return lambda params: F.cross_entropy(functional_call(model, params, (x.double(),)), y), params


def quantized() -> tuple[Callable[[Params], Tensor], Params]:
    """The same, with 4-bit weights and activations."""
    model, x, y = network()
    half = sq.override(bits=4, observer=sq.observers.minmax(), fake_quantize=sq.fake_quantize.learnable())
    q, params, qparams = ready(model, x, config=sq.QuantConfig(strategy="CNN", weight=half, activation=half))
    return lambda params: F.cross_entropy(q.apply(params, qparams, x), y), params


LOSSES = pytest.mark.parametrize("made", [floating, quantized], ids=["float", "quantized"])


def block(loss: Callable[[Params], Tensor], params: Params, rows: str, columns: str) -> Tensor:
    """A block of the whole Hessian as a matrix, forward over reverse."""
    found = hessian(loss)(params)[rows][columns]
    return found.reshape(params[rows].numel(), params[columns].numel())


def basis(params: Params, name: str) -> dict[str, Tensor]:
    """All unit vectors of one tensor."""
    size = params[name].numel()
    return {name: torch.eye(size, dtype=params[name].dtype).reshape(size, *params[name].shape)}


def all_signs(params: Params, names: list[str]) -> dict[str, Tensor]:
    """Every vector of signs there is."""
    sizes = [params[name].numel() for name in names]
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=sum(sizes))), dtype=params[names[0]].dtype)
    return {n: part.reshape(-1, *params[n].shape) for n, part in zip(names, signs.split(sizes, 1), strict=True)}


@LOSSES
def test_over_all_unit_vectors_it_is_the_trace_of_the_whole_hessian(made: Any) -> None:
    loss, params = made()
    for name in NAMES:
        found = sq.hessian_trace(loss, params, basis(params, name))[name].trace * params[name].numel()
        torch.testing.assert_close(found, block(loss, params, name, name).trace(), rtol=1e-4, atol=1e-6)


def test_over_all_signs_mean_and_variance_are_those_of_the_formula() -> None:
    loss, params = floating()
    names = ["0.bias", "0.weight", "2.bias"]
    noise = all_signs(params, names)
    count = len(noise[names[0]])
    assert count == 2**11
    for name, found in sq.hessian_trace(loss, params, noise).items():
        own = block(loss, params, name, name)
        others = [block(loss, params, name, other) for other in names if other != name]
        variance = 2 * (own.square().sum() - own.diagonal().square().sum()) + sum(b.square().sum() for b in others)
        torch.testing.assert_close(found.trace, own.trace(), rtol=1e-10, atol=0)
        torch.testing.assert_close(found.error.square() * (count - 1), variance, rtol=1e-10, atol=0)


@LOSSES
def test_drawn_signs_come_as_close_as_their_error_says(made: Any) -> None:
    loss, params = made()
    noise = sq.rademacher(params, NAMES, 400, seeded())
    for name, found in sq.hessian_trace(loss, params, noise, chunk_size=150).items():
        off = (found.trace - block(loss, params, name, name).trace()).abs()
        assert 0 < off < 4 * found.error
        assert found.error < 0.3 * found.trace


def test_one_sample_is_exact_where_the_hessian_is_diagonal() -> None:
    params = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[3.0]])}
    noise = sq.rademacher(params, params, 1, seeded())
    found = sq.hessian_trace(lambda p: (p["a"] ** 4).sum() + (p["b"] ** 3).sum(), params, noise)
    assert found["a"].trace == 12 * (1 + 4)
    assert found["b"].trace == 6 * 3
    assert found["a"].error.isnan()


@LOSSES
def test_the_top_eigenvalue_is_that_of_the_whole_hessian(made: Any) -> None:
    loss, params = made()
    start = {name: signs[0] for name, signs in sq.rademacher(params, NAMES, 1, seeded()).items()}
    for name, found in sq.top_eigenvalue(loss, params, start, steps=200).items():
        values = torch.linalg.eigvalsh(block(loss, params, name, name))
        expected = values[values.abs().argmax()]
        torch.testing.assert_close(found.value, expected, rtol=1e-4, atol=0)
        assert found.residual < 1e-3 * expected.abs()
        torch.testing.assert_close(found.vector.norm(), torch.ones_like(expected))


@pytest.mark.parametrize("sign", [1, -1])
def test_it_is_the_largest_in_magnitude_with_its_sign(sign: int) -> None:
    values = torch.tensor([1.0, -5.0, 2.0]) * sign
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=seeded()))[0]
    matrix = rotation @ values.diag() @ rotation.T
    found = sq.top_eigenvalue(lambda p: p["w"] @ matrix @ p["w"] / 2, {"w": torch.zeros(3)}, {"w": torch.ones(3)}, 40)["w"]
    torch.testing.assert_close(found.value, values[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.vector.abs(), rotation[:, 1].abs(), rtol=1e-4, atol=1e-5)


def test_the_residual_bounds_how_far_the_value_is_off() -> None:
    loss, params = floating()
    start = {"2.weight": torch.ones_like(params["2.weight"])}
    values = torch.linalg.eigvalsh(block(loss, params, "2.weight", "2.weight"))
    found = sq.top_eigenvalue(loss, params, start, steps=1)["2.weight"]
    assert 0 < (values - found.value).abs().min() <= found.residual


def test_iteration_goes_on_from_a_vector() -> None:
    loss, params = floating()
    start = {name: torch.ones_like(params[name]) + params[name] for name in NAMES}
    half = sq.top_eigenvalue(loss, params, start, steps=3)
    again = sq.top_eigenvalue(loss, params, {name: half[name].vector for name in NAMES}, steps=4)
    torch.testing.assert_close(again, sq.top_eigenvalue(loss, params, start, steps=7))


def test_a_loss_without_curvature_has_none() -> None:
    params = {"w": torch.randn(3)}
    found = sq.top_eigenvalue(lambda p: p["w"].sum(), params, {"w": torch.ones(3)})["w"]
    assert found.value == found.residual == 0
    assert found.vector.isfinite().all()
    assert sq.hessian_trace(lambda p: p["w"].sum(), params, basis(params, "w"))["w"] == (0, 0)


def test_the_hessian_in_scales_is_one_of_the_flat_dict() -> None:
    model, x, y = network()
    q, params, qparams = ready(model, x, config=sq.QuantConfig(strategy="CNN", weight=sq.override(bits=3)))
    scales, rest = q.split(qparams)

    def loss(scales: Params) -> Tensor:
        return F.cross_entropy(q.apply(params, sq.merge(scales, rest), x), y)

    name = "2.weight_fake_quant.scale"
    found = sq.hessian_trace(loss, scales, basis(scales, name))[name].trace * scales[name].numel()
    torch.testing.assert_close(found, block(loss, scales, name, name).trace(), rtol=1e-4, atol=1e-5)


def test_traces_of_examples_map_like_a_loop() -> None:
    model, x, y = network()
    params = sq.params_of(model)
    noise = sq.rademacher(params, NAMES, 5, seeded())
    start = {name: signs[0] for name, signs in noise.items()}

    def both(x: Tensor, y: Tensor) -> Any:
        loss = lambda params: F.cross_entropy(functional_call(model, params, (x[None],)), y[None])  # noqa: E731
        return sq.hessian_trace(loss, params, noise), sq.top_eigenvalue(loss, params, start, 3)

    (traces, tops), each = vmap(both)(x, y), [both(*pair) for pair in zip(x, y, strict=True)]
    for name in NAMES:
        expected = torch.stack([trace[name].trace for trace, _ in each])
        torch.testing.assert_close(traces[name].trace, expected, rtol=1e-4, atol=1e-6)
        expected = torch.stack([top[name].value for _, top in each])
        torch.testing.assert_close(tops[name].value, expected, rtol=1e-4, atol=1e-6)


def test_a_trace_has_a_gradient() -> None:
    w = torch.tensor([1.0, 2.0])
    noise = {"w": sq.rademacher({"w": w}, ["w"], 2, seeded())["w"]}
    trace = lambda w: sq.hessian_trace(lambda p: (p["w"] ** 4).sum(), {"w": w}, noise)["w"].trace  # noqa: E731
    torch.testing.assert_close(grad(trace)(w), 24 * w)


@pytest.mark.slow
def test_compiled_in_one_graph_they_are_the_same(fresh_dynamo: None) -> None:
    loss, params = quantized()
    noise = sq.rademacher(params, NAMES[1:], 3, seeded())
    start = {name: signs[0] for name, signs in noise.items()}

    def both(params: Params, noise: Params, start: Params) -> Any:
        return sq.hessian_trace(loss, params, noise), sq.top_eigenvalue(loss, params, start, 1)

    found = torch.compile(both, fullgraph=True, backend="aot_eager")(params, noise, start)
    torch.testing.assert_close(found, both(params, noise, start), rtol=1e-4, atol=1e-6)


def test_attention_by_sdpa_needs_its_math_form() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
    ids, name, traces = torch.randint(0, 9, (2, 4)), "encoder.layer.0.attention.self.query.weight", []
    for attention in ("eager", "sdpa"):
        torch.manual_seed(0)
        q, params, qparams = ready(BertModel(BertConfig(**sizes, attn_implementation=attention)).eval(), input_ids=ids)
        noise = sq.rademacher(params, [name], 2, seeded())

        def loss(params: Params, q: Any = q, qparams: Any = qparams) -> Tensor:
            return 1e3 * q.apply(params, qparams, input_ids=ids).last_hidden_state[..., 0].square().mean()

        if attention == "sdpa":
            with pytest.raises(RuntimeError, match="flash_attention"):
                sq.hessian_trace(loss, params, noise)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            traces.append(sq.hessian_trace(loss, params, noise)[name].trace)
    torch.testing.assert_close(traces[1], traces[0], rtol=1e-2, atol=1e-5)
    assert traces[0] != 0


def test_nothing_of_the_input_changes_and_the_same_noise_gives_the_same_bits() -> None:
    loss, params = quantized()
    noise = sq.rademacher(params, NAMES, 4, seeded())
    start = {name: signs[0] for name, signs in noise.items()}
    with unchanged(params, noise, start):
        found = sq.hessian_trace(loss, params, noise), sq.top_eigenvalue(loss, params, start, 2)
    again = sq.hessian_trace(loss, params, noise), sq.top_eigenvalue(loss, params, start, 2)
    torch.testing.assert_close(found, again, rtol=0, atol=0)
    assert not any(own.trace.requires_grad for own in found[0].values())


def test_signs_are_fair_and_those_of_the_generator() -> None:
    params = {"b": torch.zeros(40, dtype=torch.float64), "a": torch.zeros(3, 50)}
    noise = sq.rademacher(params, ["b", "a"], 100, seeded())
    again = sq.rademacher(params, ["a", "b"], 100, seeded())
    assert list(noise) == list(again) == ["a", "b"]
    for name, signs in noise.items():
        assert torch.equal(signs, again[name])
        assert signs.dtype == params[name].dtype
        assert signs.shape == (100, *params[name].shape)
        assert bool((signs.abs() == 1).all())
        assert signs.mean().abs() < 5 / math.sqrt(signs.numel())
    assert not torch.equal(noise["a"], sq.rademacher(params, ["a"], 100, seeded(1))["a"])


PARAMS = {"w": torch.ones(2), "count": torch.zeros((), dtype=torch.int64)}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("w", 2, GENERATOR), sq.StateError, r"got 'w', allowed a list of names. Fix: \['w'\]"),
        ((["wight", "w"], 2, GENERATOR), sq.StateError, "'wight' is not known. Fix: use one of w"),
        ((["count"], 2, GENERATOR), sq.StateError, "floating tensor 'count' is not known"),
        ((["w"], 0, GENERATOR), sq.ConfigError, "samples must be a positive int: got 0"),
        ((["w"], 2.0, GENERATOR), sq.ConfigError, "samples must be a positive int: got 2.0"),
        ((["w"], 2, 0), sq.StateError, "allowed a torch.Generator"),
    ],
)
def test_signs_that_cannot_be_drawn(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sq.rademacher(PARAMS, *arguments)


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ({}, "these vectors"),
        (torch.ones(1, 2), "these vectors"),
        ({"v": torch.ones(1, 2)}, "'v' is not known"),
        ({"w": torch.ones(2)}, r"allowed .*\('samples', 2\)"),
        ({"w": torch.ones(0, 2)}, "the vector of 'w'"),
        ({"w": torch.ones(3, 2, dtype=torch.float64)}, "got 'torch.float64"),
    ],
)
def test_noise_that_does_not_fit_is_refused(noise: Any, message: str) -> None:
    with pytest.raises(sq.StateError, match=message):
        sq.hessian_trace(lambda p: p["w"].square().sum(), PARAMS, noise)


def test_samples_must_be_as_many_for_all() -> None:
    noise = {"a": torch.ones(2, 1), "b": torch.ones(3, 1)}
    with pytest.raises(sq.StateError, match="the vector of 'b'"):
        sq.hessian_trace(lambda p: p["a"] @ p["b"], {"a": torch.ones(1), "b": torch.ones(1)}, noise)


@pytest.mark.parametrize(
    ("start", "steps", "error", "message"),
    [
        ({"w": torch.ones(2)}, 0, sq.ConfigError, "steps must be a positive int: got 0"),
        ({"w": torch.ones(2)}, True, sq.ConfigError, "steps must be a positive int: got True"),
        ({"w": torch.zeros(2)}, 3, sq.StateError, "a start of 0 for 'w'"),
        ({"w": torch.ones(3)}, 3, sq.StateError, r"got 'torch.float32 \(3,\)', allowed torch.float32 \(2,\)"),
    ],
)
def test_starts_that_lead_nowhere_are_refused(start: Any, steps: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sq.top_eigenvalue(lambda p: p["w"].square().sum(), PARAMS, start, steps)


@pytest.mark.parametrize(("loss", "got"), [(lambda p: p["w"], r"got \(2,\)"), (lambda p: 1.0, "got 'float'")])
def test_a_loss_is_a_scalar(loss: Any, got: str) -> None:
    with pytest.raises(sq.StateError, match=got):
        sq.hessian_trace(loss, PARAMS, {"w": torch.ones(1, 2)})
    with pytest.raises(sq.StateError, match=got):
        sq.top_eigenvalue(loss, PARAMS, {"w": torch.ones(2)})


def test_qparams_are_refused_with_what_to_split_them_by() -> None:
    qparams = {"a": sq.QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), {})}
    for call in (
        lambda: sq.rademacher(qparams, ["a"], 2, torch.Generator()),  # type: ignore[arg-type]
        lambda: sq.hessian_trace(lambda tree: tree["a"].sum(), qparams, {"a": torch.ones(2)}),  # type: ignore[arg-type]
        lambda: sq.top_eigenvalue(lambda tree: tree["a"].sum(), qparams, {"a": torch.ones(())}),  # type: ignore[arg-type]
    ):
        with pytest.raises(sq.StateError, match=r"got 'a dict of QParams'.*q\.split\(qparams\).*sq\.merge\(learned, rest\)"):
            call()
    with pytest.raises(sq.StateError, match="flat dict of tensors: got 'list'"):
        sq.rademacher([torch.ones(1)], ["a"], 2, torch.Generator())  # type: ignore[arg-type]
