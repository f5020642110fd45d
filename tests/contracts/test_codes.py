"""Codes of everything registered: what ``decode`` reads is what ``apply`` makes, and what has no codes says why."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import sophq_func as sq
from sophq_func.core.pytree import sorted_dict
from sophq_func.numerics.contracts import FakeQuantize
from sophq_func.numerics.eager import LARGE
from sophq_func.numerics.granularity import Granularity
from tests.contracts import GRANULARITIES, KINDS, calibrated, observed, sample, unchanged
from tests.contracts.test_fake_quantize_laws import ALL, made

UNCODED = {
    "adaround": "its rounding is soft: while it is learned, values lie between two codes",
    "dorefa": "0 lies between two of its codes",
    "fpxgroup": "its groups run over the ends of rows, with scales that are computed anew from each tensor",
    "fpxgroup_double": "its groups run over the ends of rows, with scales that are computed anew from each tensor",
    "nnie": "its codes stand for logarithms, not for multiples of a scale",
    "qdrop_half": "it rounds at random",
}
"""What has no codes as it is calibrated, and why; all others have."""


def schemes(granularity: Granularity) -> list[sq.QScheme]:
    """Each kind, from statistics and from the tensor at hand."""
    ranges = (True,) if granularity == sq.PerToken() else (False, True)
    pairs = itertools.product(KINDS.values(), ranges)
    return [sq.QScheme(bits=4, granularity=granularity, dynamic=dynamic, **kind) for kind, dynamic in pairs]


over_quantizers = pytest.mark.parametrize("name", ALL)


def reason(fq: FakeQuantize, qparams: sq.QParams, scheme: sq.QScheme) -> str:
    return fq.uncoded(qparams, scheme)


def assert_reads_back(fq: FakeQuantize, x: Tensor, qparams: sq.QParams, scheme: sq.QScheme) -> None:
    assert fq.encode is not None and fq.decode is not None
    with unchanged(x, qparams):
        codes = fq.encode(x, qparams, scheme)
        value = fq.decode(codes, qparams, scheme, x.dtype)
    assert codes.values.shape == x.shape and not codes.values.requires_grad
    assert list(codes.parts) == sorted(codes.parts)
    expected = fq.apply(x, qparams, scheme).detach()
    assert value.dtype == x.dtype and torch.equal(value, expected)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@over_quantizers
def test_decoded_codes_are_what_apply_makes(name: str, granularity: Granularity) -> None:
    fq, x = made(name), sample(1)
    for scheme in schemes(granularity):
        seen = x if name == "adaround_hard" else sample(0) * 0.7  # that one learns for one weight
        qparams = calibrated(fq, seen, scheme)
        why = reason(fq, qparams, scheme)
        middle = name == "dorefa" and scheme.symmetric_range  # an odd number of codes has one for 0
        assert why == ("" if middle else UNCODED.get(name, "")), scheme
        for dtype in () if why else (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            assert_reads_back(fq, x.to(dtype), qparams, scheme)


@over_quantizers
def test_large_tensors_have_the_codes_of_small_ones(name: str) -> None:
    """From so many elements on, eager computes otherwise."""
    fq, x = made(name), sample(1, 4, LARGE // 2)
    for scheme in (sq.QScheme(), sq.QScheme(symmetric=False, granularity=sq.PerChannel(0))):
        qparams = calibrated(fq, x * 0.7, scheme)
        if name != "adaround_hard" and not reason(fq, qparams, scheme):
            assert_reads_back(fq, x, qparams, scheme)


@pytest.mark.parametrize("name", [name for name in ALL if made(name).resizable and made(name).encode])
def test_bounds_that_are_data(name: str) -> None:
    fq, scheme = made(name), sq.QScheme(symmetric=False, granularity=sq.PerChannel(0))
    own = calibrated(fq, sample(0), scheme)
    for low, high in ((0.0, 6.0), (1.0, 12.0)):
        bounds = {"qmin": torch.tensor(low), "qmax": torch.tensor(high)}
        qparams = own._replace(extras=sorted_dict(own.extras | bounds))
        why = reason(fq, qparams, scheme)
        if name not in UNCODED and not why:
            assert_reads_back(fq, sample(1), qparams, scheme)
        if name not in UNCODED and why:
            assert why == "its zero point is not a code: it lies between two, or beyond the outermost"
    between = own._replace(extras=sorted_dict(own.extras | {"qmin": torch.tensor(0.0), "qmax": torch.tensor(6.5)}))
    assert reason(fq, between, scheme) != ""


def test_learned_zero_points() -> None:
    """Whole ones are codes, rounded; LSQ+ has any number, which is one only where it happens to be."""
    scheme = sq.QScheme(symmetric=False, granularity=sq.PerChannel(0))
    for name in ("learnable", "lsq_plus"):
        fq = made(name)
        own = calibrated(fq, sample(0), scheme)
        moved = own._replace(zero_point=own.zero_point + 0.3)
        for qparams in (own, moved):
            assert_reads_back(fq, sample(1), qparams, scheme)
        assert not reason(fq, own, scheme)
        assert bool(reason(fq, moved, scheme)) == (name == "lsq_plus")


def test_rounding_that_was_learned() -> None:
    fq, x, scheme = made("adaround"), sample(1), sq.QScheme(bits=4, granularity=sq.PerChannel(0))
    qparams = fq.init(observed(x, scheme), x, scheme)
    assert reason(fq, qparams, scheme) == UNCODED["adaround"]
    decided = torch.where(qparams.extras["alpha"] > 0, 20.0, -20.0)
    learned = qparams._replace(extras={"alpha": decided})
    assert not reason(fq, learned, scheme)
    assert_reads_back(fq, x, learned, scheme)


@pytest.mark.parametrize("act_order", [False, True])
def test_columns_that_make_up_for_each_other(act_order: bool) -> None:
    x, scheme = sample(1, 6, 8), sq.QScheme(bits=4, granularity=sq.PerChannel(0))
    inputs = sample(2, 40, 8)
    hessian = {"hessian": inputs.T @ inputs}
    fq = made("gptq", group_size=0, act_order=act_order)
    assert_reads_back(fq, x, observed(x, scheme)._replace(extras=hessian), scheme)
    grouped = made("gptq", group_size=4)
    why = reason(grouped, observed(x, scheme)._replace(extras=hessian), scheme)
    assert why == "its scales are computed column by column, and not kept"
