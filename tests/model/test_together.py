"""Quantizers that act together give what each gives alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

import sophq_func as sq

X = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
Setting = tuple[sq.Quantized, dict[str, Tensor], dict[str, sq.QParams]]


def chain(layers: int = 3) -> nn.Module:
    torch.manual_seed(0)
    blocks = [(nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(layers)]
    model = nn.Sequential(*[part for block in blocks for part in block], nn.Flatten(), nn.Linear(100, 6), nn.Linear(6, 100))
    for norm in (part for part in model if isinstance(part, nn.BatchNorm2d)):
        norm.weight.data.uniform_(-1, 1)  # some factors are negative
        norm.weight.data[0] = 0
        norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model.eval()


def config(fake_quantize: str = "learnable", symmetric: bool = True) -> sq.QuantConfig:
    fq = sq.fake_quantize.learnable() if fake_quantize == "learnable" else sq.fake_quantize.fixed()
    return sq.QuantConfig(
        weight=sq.override(bits=4, granularity=sq.PerChannel(), fake_quantize=fq),
        activation=sq.override(bits=4, symmetric=symmetric, fake_quantize=fq),
    )


def made(fake_quantize: str = "learnable", symmetric: bool = True) -> Setting:
    model = chain()
    q = sq.quantize(model, config(fake_quantize, symmetric), example_args=(X,))
    params = sq.params_of(model)
    return q, params, q.calibrate(params, [X], progress=False)


def alone(setting: Setting) -> dict[str, sq.QParams]:
    """The same qparams, with a mask that is on: those quantizers are prepared one by one."""
    _, _, qparams = setting
    return {name: one._replace(extras={**one.extras, "enabled": torch.tensor(True)}) for name, one in qparams.items()}


def test_layers_with_equal_rows_are_one_group() -> None:
    q, _, _ = made()
    (group,) = q.engine._weights_together
    assert [weight.site.parameter for weight in group.quantizers] == ["0.weight", "3.weight", "6.weight"]
    assert group.length == 2 * 9
    (values,) = q.engine._values_together
    assert set(values.names) == set(q.engine.running)


KINDS = [("learnable", True), ("learnable", False), ("fixed", True), ("fixed", False)]


@pytest.mark.parametrize(("fake_quantize", "symmetric"), KINDS)
def test_outputs_are_those_of_each_quantizer_alone(fake_quantize: str, symmetric: bool) -> None:
    setting = q, params, qparams = made(fake_quantize, symmetric)
    expected = q.apply(params, alone(setting), X)
    assert torch.equal(q.apply(params, qparams, X), expected)
    with torch.no_grad():
        assert torch.equal(q.apply(params, qparams, X), expected)
    frozen, rounded = q.freeze(params, qparams)
    assert torch.equal(frozen.apply(rounded, qparams, X), expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_derivatives_are_those_of_each_quantizer_alone(symmetric: bool) -> None:
    setting = q, params, qparams = made("learnable", symmetric)
    trained = {name: params[name] for name in ("0.weight", "1.weight", "3.weight", "10.weight")}

    def loss(which: dict[str, sq.QParams]) -> Callable[..., Tensor]:
        learned, rest = q.split(which)

        def of(scales: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
            return q.apply({**params, **weights}, sq.merge({**learned, **scales}, rest), X).square().sum()

        return of

    scales = {name: leaf for name, leaf in q.split(qparams)[0].items() if not name.endswith("enabled")}
    together, one_by_one = loss(qparams), loss(alone(setting))
    for transform in (grad, lambda f, argnums: lambda *primals: jvp(grad(f, argnums), primals, primals)[1]):
        found, expected = (transform(f, argnums=(0, 1))(scales, trained) for f in (together, one_by_one))
        size = max(float(leaf.abs().max()) for tree in expected for leaf in tree.values())
        for tree, other in zip(found, expected, strict=True):
            for name in other:  # sums in another order
                torch.testing.assert_close(tree[name], other[name], rtol=1e-4, atol=1e-5 * size)


def test_members_of_a_vmap_are_prepared_together() -> None:
    q, params, qparams = made()
    settings = [qparams, {name: one._replace(scale=2 * one.scale) for name, one in qparams.items()}]
    mapped = vmap(lambda one: q.apply(params, one, X))(sq.stack(settings))
    for output, one in zip(mapped, settings, strict=True):
        torch.testing.assert_close(output, q.apply(params, one, X))


def test_a_quantizer_that_is_switched_off_leaves_its_group_alone() -> None:
    q, params, qparams = made()
    name = "3.weight_fake_quant"
    off = {**qparams, name: qparams[name]._replace(extras={"enabled": torch.tensor(False)})}
    exact, rounded = q.freeze(params, off)[1], q.freeze(params, qparams)[1]
    frozen = q.freeze(params, off)[0]
    assert torch.equal(exact["3.weight"], params["3.weight"])
    assert torch.equal(exact["0.weight"], rounded["0.weight"])
    assert torch.equal(q.apply(params, off, X), frozen.apply(exact, off, X))


def test_weights_of_two_dtypes_are_not_one_matrix() -> None:
    q, params, qparams = made()
    mixed = {**params, "3.weight": params["3.weight"].double()}
    with pytest.raises(RuntimeError, match="type"):  # the convolution's own error
        q.apply(mixed, qparams, X)


class Waits(nn.Module):
    """A model that takes a derivative in its forward, in a run that takes none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.b(torch.tanh(self.a(x))).sum()
            (force,) = torch.autograd.grad(energy, x)
        return force


def test_a_derivative_that_the_model_takes_passes_through_rounding_where_the_run_takes_none() -> None:
    torch.manual_seed(0)
    model, x = Waits(), torch.randn(3, 4)
    q = sq.quantize(model, config(), example_args=(x,))
    params = sq.params_of(model)
    qparams = q.calibrate(params, [x], progress=False)
    with torch.no_grad():
        forces = q.apply(params, qparams, x)
        expected = q.apply(params, alone((q, params, qparams)), x)
    assert forces.abs().sum() > 0
    assert torch.equal(forces, expected)
