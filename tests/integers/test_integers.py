"""A run on integers against ``apply``: equal to within a step of the last quantizer, over strategies, widths and layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.integers._integers import Integers, IntegerTensor, Noted, fitting, rescaled
from tests.golden.models import INPUT_SHAPES, build
from tests.helpers import Digits, accuracy, ready
from tests.ties import check_both

STRATEGIES = {"CNN": "BM1690", "Dataflow": None, "Layers": None}
GRAINS = {"channel": sq.PerChannel(), "tensor": sq.PerTensor()}
ON_OTHER_CPUS = {("CNN", 8, False), ("Dataflow", 4, True), ("Layers", 8, True)}
"""Every strategy, width and symmetry once."""
over_settings = pytest.mark.parametrize(
    ("strategy", "bits", "symmetric"),
    [
        pytest.param(*setting, marks=[pytest.mark.isa] if setting in ON_OTHER_CPUS else [])
        for setting in itertools.product(STRATEGIES, (8, 4), (True, False))
    ],
)


def config(strategy: str, bits: int, symmetric: bool, grain: str = "channel", **activation: Any) -> sq.QuantConfig:
    weight = sq.override(bits=bits, granularity=GRAINS[grain])
    chosen = sq.override(symmetric=symmetric, **activation)
    return sq.QuantConfig(chip=STRATEGIES[strategy], strategy=strategy, weight=weight, activation=chosen)


@over_settings
@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("name", INPUT_SHAPES)
def test_small_networks(name: str, grain: str, strategy: str, bits: int, symmetric: bool) -> None:
    x = torch.randn(4, *INPUT_SHAPES[name][1:])
    r = ready(build(name, 0).eval(), x, config=config(strategy, bits, symmetric, grain))
    check_both(r, x)


def conv(cls: type[nn.Module], *args: Any, norm: type[nn.Module] | None = None, **kwargs: Any) -> nn.Module:
    torch.manual_seed(1)
    layers = [cls(*args, **kwargs), *([norm(args[1])] if norm else []), nn.ReLU()]
    if norm:
        layers[1].weight.data.uniform_(-1.5, 1.5)  # type: ignore[union-attr, operator]
        layers[1].running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
        layers[1].running_mean.normal_()  # type: ignore[union-attr, operator]
        layers[1].bias.data.normal_()  # type: ignore[union-attr, operator]
        layers[1].weight.data[0] = 0  # type: ignore[union-attr, index]
    return nn.Sequential(*layers).eval()


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: conv(nn.Conv1d, 4, 6, 3, norm=nn.BatchNorm1d, padding="same"), (3, 4, 9)),
    "conv2d": (lambda: conv(nn.Conv2d, 4, 6, 3, norm=nn.BatchNorm2d, stride=2, dilation=2), (3, 4, 9, 9)),
    "conv2d without bias": (lambda: conv(nn.Conv2d, 4, 6, 3, norm=nn.BatchNorm2d, bias=False), (3, 4, 7, 7)),
    "conv3d": (lambda: conv(nn.Conv3d, 2, 3, 2, norm=nn.BatchNorm3d), (2, 2, 4, 4, 4)),
    "circular": (lambda: conv(nn.Conv2d, 4, 6, 3, padding=1, padding_mode="circular"), (3, 4, 7, 7)),
    "grouped": (lambda: conv(nn.Conv2d, 4, 6, 3, norm=nn.BatchNorm2d, groups=2), (3, 4, 7, 7)),
    "depthwise": (lambda: conv(nn.Conv2d, 6, 6, 3, norm=nn.BatchNorm2d, groups=6), (3, 6, 7, 7)),
    "transposed": (lambda: conv(nn.ConvTranspose2d, 4, 6, 3, norm=nn.BatchNorm2d, stride=2, output_padding=1), (3, 4, 5, 5)),
    "transposed, grouped": (lambda: conv(nn.ConvTranspose2d, 4, 6, 3, norm=nn.BatchNorm2d, groups=2), (3, 4, 5, 5)),
    "transposed, no norm": (lambda: conv(nn.ConvTranspose2d, 4, 6, 3, groups=2), (3, 4, 5, 5)),
    "transposed 1d": (lambda: conv(nn.ConvTranspose1d, 4, 6, 3, dilation=2), (3, 4, 5)),
    "unbatched": (lambda: conv(nn.Conv2d, 4, 6, 3), (4, 7, 7)),
    "linear, 1 axis": (lambda: conv(nn.Linear, 4, 6), (4,)),
    "linear, 3 axes": (lambda: conv(nn.Linear, 4, 6), (3, 5, 4)),
}


@over_settings
@pytest.mark.parametrize("layer", LAYERS)
def test_single_layers(layer: str, strategy: str, bits: int, symmetric: bool) -> None:
    make, shape = LAYERS[layer]
    x = torch.randn(shape) + 0.3
    r = ready(make(), x, config=config(strategy, bits, symmetric))
    check_both(r, x)
    done = sq.convert(r.q, r.params, r.qparams).computed(x)
    if "0.weight_fake_quant" in r.q.plan and any(site.argument for site in map(r.q.plan.site, r.q.plan)):
        assert sum(done.get(name, 0) for name in done if name.startswith(("conv", "linear"))) == 1


@pytest.mark.slow
@over_settings
def test_digits_over_the_whole_test_set(digits: Digits, strategy: str, bits: int, symmetric: bool) -> None:
    r = ready(digits.model, digits.train[:128], config=config(strategy, bits, symmetric))
    check_both(r, digits.test)
    artifact = sq.convert(r.q, r.params, r.qparams)
    for run in (r, artifact.run):
        assert accuracy(run(digits.test), digits) > 0.9
    kinds = {entry["format"] for entry in artifact.metadata["weights"].values()}
    assert kinds == {f"int{bits}"}
    done = artifact.computed(digits.test[:1])
    assert (done["conv2d"], done["linear"], done.get("add", 0)) == (7, 1, 0 if strategy == "Layers" else 2)


@over_settings
def test_a_small_bert(strategy: str, bits: int, symmetric: bool) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
    bert = transformers.BertModel(transformers.BertConfig(**shape, attn_implementation="eager")).eval()
    for parameter in bert.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    ids = torch.randint(0, 50, (4, 9))
    r = ready(bert, config=config(strategy, bits, symmetric), input_ids=ids)
    check_both(r, input_ids=ids, pick=lambda out: torch.cat([out.last_hidden_state.flatten(), out.pooler_output.flatten()]))
    done = sq.convert(r.q, r.params, r.qparams).computed(input_ids=ids)
    assert done["linear"] == 13
    assert done.get("matmul", 0) == (0 if strategy == "Layers" else 4)
    assert done.get("add", 0) >= (0 if strategy == "Layers" else 5)


def test_tokens_with_scales_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.GELU(), nn.Linear(16, 4)).eval()
    x, tokens = torch.randn(2, 5, 8), sq.override(granularity=sq.PerToken(), dynamic=True, pot_scale=True)
    # with scales that are powers of two the first sums are exact, and what they lead to has one code
    r = ready(model, x, config=sq.QuantConfig(strategy="Layers", weight=sq.override(pot_scale=True), activation=tokens))
    artifact = sq.convert(r.q, r.params, r.qparams)
    assert artifact.computed(x) == {"linear": 2, "quantize": 2}
    torch.testing.assert_close(artifact.run(x), r(x), rtol=1e-5, atol=1e-6)


def test_scales_that_vary_inside_a_sum_are_left_to_float() -> None:
    model, x = nn.Linear(8, 4).eval(), torch.randn(5, 8)
    grouped = sq.QuantConfig(strategy="Layers", weight=sq.override(granularity=sq.PerGroup(size=4)))
    r = ready(model, x, config=grouped)
    artifact = sq.convert(r.q, r.params, r.qparams)
    assert artifact.computed(x) == {"quantize": 1}
    torch.testing.assert_close(artifact.run(x), r(x), rtol=1e-5, atol=1e-6)


def test_weights_alone() -> None:
    model, x = build("ResidualConvNet", 0).eval(), torch.randn(2, 3, 8, 8)
    r = ready(model, x, config=sq.QuantConfig(activation=None, weight=sq.override(bits=4)))
    artifact = sq.convert(r.q, r.params, r.qparams)
    assert artifact.computed(x) == {}
    torch.testing.assert_close(artifact.run(x), r(x), rtol=1e-4, atol=1e-5)


class Writes(nn.Module):
    """Sums and ReLUs in place, on tensors that views look at."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y += self.b(x)
        y = F.relu(y, inplace=True)
        z = y.view(-1, 2)
        y[:, 0] = 0.25
        return self.c(z.view(-1, 6))


@over_settings
def test_what_is_written_in_place(strategy: str, bits: int, symmetric: bool) -> None:
    x = torch.randn(4, 6)
    r = ready(Writes().eval(), x, config=config(strategy, bits, symmetric))
    check_both(r, x)


@settings(max_examples=200, deadline=None)
@given(level=st.integers(-(2**31), 2**31 - 1), ratio=st.floats(1e-12, 2.0**29))
def test_a_fixed_point_product_is_rounded_once(level: int, ratio: float) -> None:
    found = int(rescaled(torch.tensor([level], dtype=torch.int32), torch.tensor(ratio, dtype=torch.float64)))
    mantissa, exponent = torch.frexp(torch.tensor(ratio, dtype=torch.float64))
    multiplier = Fraction(round(float(mantissa) * 2**31), 2**31) * Fraction(2) ** int(exponent)
    assert found == round(level * multiplier), "Fraction rounds half to even, too"


def test_sums_beyond_32_bits_are_refused() -> None:
    with pytest.raises(sq.StateError, match="linear: the sums do not fit in int32: got 'sums from 0 to 2147483648'"):
        fitting(torch.tensor([0.0, 2.0**31], dtype=torch.float64), "linear")
    model, x = nn.Linear(64, 2, bias=False).eval(), torch.ones(3, 64)
    model.weight.data.fill_(1.0)
    wide = sq.QuantConfig(weight=sq.override(bits=16), activation=sq.override(bits=16))
    r = ready(model, x, config=wide)
    with pytest.raises(sq.StateError, match="the sums do not fit in int32"):
        sq.convert(r.q, r.params, r.qparams).run(x)


def test_nan_has_no_code() -> None:
    model, x = nn.Linear(4, 2).eval(), torch.randn(3, 4)
    r = ready(model, x)
    with pytest.raises(sq.StateError, match=r"input\.post_act_fake_quantizer: NaN has no code"):
        sq.convert(r.q, r.params, r.qparams).run(x * torch.nan)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(INPUT_SHAPES)),
    strategy=st.sampled_from(sorted(STRATEGIES)),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    pot=st.booleans(),
    grain=st.sampled_from(sorted(GRAINS)),
    seed=st.integers(0, 100),
)
def test_what_is_said_to_be_integers_is(
    name: str, strategy: str, bits: int, symmetric: bool, pot: bool, grain: str, seed: int
) -> None:
    """Every operand of an integer sum is int32, inside its quantizer's grid, and what the float tensor beside it holds."""
    x = torch.randn(2, *INPUT_SHAPES[name][1:], generator=torch.Generator().manual_seed(seed))
    r = ready(build(name, seed).eval(), x, config=config(strategy, bits, symmetric, grain, pot_scale=pot))
    artifact = sq.convert(r.q, r.params, r.qparams)
    noted: list[Noted] = []

    class Watched(Integers):
        def _note(self, tensor: Tensor, whole: IntegerTensor) -> None:
            noted.append(Noted(tensor.clone(), 0, whole))
            super()._note(tensor, whole)

    with torch.no_grad():
        facts = artifact._given()
        artifact._q.engine.loop.run(artifact._parameters(facts), facts.other, (x,), {}, watch=lambda s: Watched(s, facts))
    assert noted
    for tensor, _, whole in noted:
        assert whole.level.dtype == torch.int32
        assert torch.equal(tensor, (whole.level * whole.scale).to(tensor.dtype))
        if whole.largest:
            assert int(whole.level.abs().max()) <= whole.largest < 2 ** (9 if whole.origin.endswith("quantizer") else bits)
