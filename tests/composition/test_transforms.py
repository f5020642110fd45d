"""Whole models under transforms, beside the cells of ``tests/composition``: fidelity and training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad

import sophq_func as sq
from tests.composition.subjects import SUBJECTS, Subject


@pytest.fixture(scope="module", params=SUBJECTS)
def any_model(request: pytest.FixtureRequest) -> Iterator[Subject]:
    yield SUBJECTS[request.param]()


def test_quantized_output_is_close_to_the_float_model(any_model: Subject) -> None:
    s = any_model
    out = s.read(s.q.apply(s.params, s.qparams, **s.batch))
    expected = s.read(s.model(**s.batch))
    assert F.cosine_similarity(out.flatten(), expected.flatten(), dim=0) > 0.99
    assert not torch.equal(out, expected)


def test_the_gradient_reaches_every_quantized_weight(any_model: Subject) -> None:
    s = any_model
    gradient = grad(lambda weights: s.loss(s.scales, weights, s.batch))(s.weights)
    weights = {s.q.plan.site(n).parameter for n in s.q.plan if s.q.plan.site(n).role == "weight"} - {""}
    assert all(bool(g.isfinite().all()) for g in gradient.values())
    assert weights
    assert all(bool((gradient[n] != 0).any()) for n in weights)


@pytest.mark.slow
def test_torch_optim_trains_leaf_parameters(any_model: Subject) -> None:
    s = any_model
    weights = {name: nn.Parameter(value.clone()) for name, value in s.weights.items()}
    scales = {name: value.clone().requires_grad_() for name, value in s.scales.items()}
    optimizer = torch.optim.SGD([*weights.values(), *scales.values()], lr=1e-3)
    before = s.loss(scales, weights, s.batch).detach()
    for _ in range(5):
        optimizer.zero_grad()
        s.loss(scales, weights, s.batch).backward()
        optimizer.step()
    assert s.loss(scales, weights, s.batch).detach() < before


class Layouts(nn.Module):
    """Convolutions of three kinds, a BatchNorm to fold."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.c = nn.ConvTranspose2d(16, 8, 3, groups=4), nn.Conv1d(8, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.norm(self.a(x)).relu()).flatten(2))


def turned(weight: Tensor) -> Tensor:
    return weight.transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed", "expanded"])
def test_inductor_reads_weights_of_any_layout(layout: str) -> None:
    """Compiled for use, weights are viewed by strides; see ``compiled.keeping_layout``."""
    torch.manual_seed(0)
    model, x = Layouts().eval(), torch.randn(2, 8, 9, 9)
    model = model.to(memory_format=torch.channels_last) if layout == "channels last" else model
    params = sq.params_of(model)
    if layout == "transposed":
        params |= {name: turned(params[name]) for name in ("a.weight", "b.weight", "c.weight")}
    if layout == "expanded":
        params["a.weight"] = params["a.weight"][:, :1].expand(16, 8, 3, 3)
    q = sq.quantize(model, sq.QuantConfig(strategy="CNN"), example_args=(x,))
    qparams = q.calibrate(params, [x], progress=False)
    torch._dynamo.reset()
    compiled = torch.compile(lambda params, x: q.apply(params, qparams, x), fullgraph=True)
    with torch.no_grad():
        expected = q.apply(params, qparams, x)
        torch.testing.assert_close(compiled(params, x), expected, rtol=1e-4, atol=1e-5)
