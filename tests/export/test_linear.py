"""Channels along several axes in exported programs and files: rows of a matrix, put back into the layout of the weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from tests.helpers import Ready, ready
from tests.runtime import computed, onnx

pytestmark = pytest.mark.slow

FIXED = sq.fake_quantize.fixed()


class Experts(nn.Module):
    """Experts whose weights are one tensor."""

    def __init__(self, f: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f
        self.w = nn.Parameter(torch.randn(3, 8, 4) * torch.tensor([1.0, 30.0, 1000.0])[:, None, None])
        self.s = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x, self.w, self.s)


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "a parameter": lambda x, w, s: torch.bmm(x, w),
    "an equation": lambda x, w, s: torch.einsum("eio,eni->noe", w, x),
    "transposed": lambda x, w, s: x @ w.mT.contiguous().mT,
    "computed": lambda x, w, s: torch.bmm(x, w * s),
}


def made(form: str, **changes: object) -> tuple[Ready, Tensor]:
    x = torch.randn(3, 5, 8)
    change = sq.override(**{"granularity": sq.PerChannel(), "fake_quantize": FIXED, **changes})
    rules = (sq.Rule(type="mul", activation=None),)
    return ready(Experts(FORMS[form]).eval(), x, config=sq.QuantConfig(weight=change, activation=None, rules=rules)), x


over_forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.replace(" ", "_"))


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("a parameter", {"bits": 8}),
        ("a parameter", {"bits": 4}),
        ("an equation", {"bits": 8, "symmetric": False}),
        ("transposed", {"bits": 4, "symmetric": False}),
        # Rounded in the run, where the extreme of a symmetric channel is a tie; codes must fill their type.
        ("computed", {"bits": 8, "symmetric": False}),
    ],
    ids=str,
)
def test_onnx_computes_the_same(form: str, changes: dict[str, object], tmp_path: Path) -> None:
    got, x = made(form, **changes)
    path = tmp_path / "experts.onnx"
    sq.export.onnx(got.q, got.params, got.qparams, x, path, dynamic_batch=False)
    (found,) = computed(path, {"x": x})
    torch.testing.assert_close(found, got(x))
    assert any(node.op_type == "DequantizeLinear" for node in onnx.load(path).graph.node)


def test_onnx_has_groups_of_experts(tmp_path: Path) -> None:
    got, x = made("a parameter", bits=4, granularity=sq.PerGroup(size=4))
    path = tmp_path / "experts.onnx"
    sq.export.onnx(got.q, got.params, got.qparams, x, path, dynamic_batch=False)
    (found,) = computed(path, {"x": x})
    torch.testing.assert_close(found, got(x))


@over_forms
def test_programs_for_inductor_compute_the_same(form: str) -> None:
    got, x = made(form, bits=8)
    torch.testing.assert_close(sq.export.torch(got.q, got.params, got.qparams, x).module()(x), got(x))


@over_forms
@pytest.mark.parametrize("name", ["fixed", "mxfp4", "nvfp4", "e4m3"])
def test_converted_experts_compute_the_same(form: str, name: str) -> None:
    got, x = made(form, bits=8, symmetric=form != "computed", fake_quantize=getattr(sq.fake_quantize, name)())
    artifact = sq.convert(got.q, got.params, got.qparams)
    torch.testing.assert_close(artifact.run(x), got(x))
    if form != "computed":
        frozen, params = got.q.freeze(got.params, got.qparams)
        torch.testing.assert_close(sq.convert(frozen, params, got.qparams).run(x), got(x))


def test_checkpoints_hold_them(tmp_path: Path) -> None:
    got, x = made("a parameter", bits=8)
    path = tmp_path / "experts.safetensors"
    sq.save(path, plan=got.q.plan, qparams=got.qparams, params=got.params)
    again = sq.load(path)
    again.check(got.q)
    assert again.qparams is not None
    assert torch.equal(got.q.apply(again.params, again.qparams, x), got(x))


def test_tables_of_chips_refuse_them(tmp_path: Path) -> None:
    got, _ = made("a parameter", bits=8)
    names = {"w_fake_quant": "y_MatMul"}
    with pytest.raises(sq.ConfigError, match=r"w_fake_quant: the tables cannot hold channels along several axes"):
        sq.export.tables(got.q, got.params, got.qparams, tmp_path, names=names, compiler="sophgo-mq")
