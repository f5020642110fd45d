"""Whole models under transforms, beside the cells of ``tests/composition``: fidelity and training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad

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
