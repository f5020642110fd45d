"""The compiled kernel computes what the composition does, and where it serves nothing else changes."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import sophq_func as sq
from sophq_func.core.registry import Spec
from sophq_func.numerics import kernels, library, pieces
from sophq_func.numerics.contracts import FakeQuantize
from sophq_func.numerics.layout import rows
from tests.contracts import SCHEMES, assert_same, over_schemes, sample
from tests.helpers import DEFAULT, ready

EXTENSIONS = os.environ.get("TORCH_EXTENSIONS_DIR")
"""Where this machine keeps its extensions; the tests of a session see an empty folder instead."""

FAKES = {
    "fixed": sq.fake_quantize.fixed(),
    "learnable": sq.fake_quantize.learnable(),
    "unscaled": sq.fake_quantize.learnable(use_grad_scaling=False),
    "lsq_plus": sq.fake_quantize.lsq_plus(),
}
over_fakes = pytest.mark.parametrize("fake", FAKES.values(), ids=FAKES)

PER_CHANNEL, PER_TENSOR = SCHEMES["affine-PerChannel(axis=0)"], SCHEMES["affine-PerTensor()"]

PER_GROUP = sq.QScheme(bits=4, symmetric=False, granularity=sq.PerGroup(6))

SHARE = 1e-5
"""Of the sum of the absolute terms of a scale's gradient. Each side rounds its terms three times, adds up some hundred of
them in one go at most, and the sums of these in double or pairwise: below 120 roundings of 2 ** -24 in all.
"""


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> library.Library:
    """The library, compiled where this machine has not done so."""
    if EXTENSIONS is None:
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    else:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", EXTENSIONS)
    return library.compiled()


Two = tuple[FakeQuantize, FakeQuantize]


def both(compiled: library.Library, spec: Spec, scheme: sq.QScheme) -> Two:
    """A fake quantizer with the kernel, and the same without."""
    serve = partial(kernels.served, config=config_of(spec, scheme), kernels=compiled)
    return pieces.build(spec, serve), pieces.build(spec)


def config_of(spec: Spec, scheme: sq.QScheme) -> sq.QuantizerConfig:
    return sq.QuantizerConfig(scheme=scheme, observer="minmax", fake_quantize=spec)


def is_of_kernel(y: Tensor) -> bool:
    return y.grad_fn is not None and "CppNode" in y.grad_fn.name()


def assert_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal, the sign of zeros included; NaN equals NaN of any sign."""
    assert_same(actual, expected)
    numbers = ~expected.isnan()
    assert torch.equal(actual.signbit()[numbers], expected.signbit()[numbers])


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_(t.is_floating_point())


def awkward(seed: int, *shape: int) -> Tensor:
    """Numbers beyond the grid on both sides, with ties, zeros, NaN and infinities among them."""
    x = 3 * sample(seed, *shape)
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 0.5, -0.5, 1.5, 1e-38, 3e38])
    x.view(-1)[: len(special)] = special[: x.numel()]
    return x


def qparams_of(fake: FakeQuantize, x: Tensor, scheme: sq.QScheme) -> sq.QParams:
    observer = sq.observer("minmax")
    seen = torch.where(x.abs() < 100, x, 0) / 2  # NaN too: half the range of what is finite
    qparams = observer.qparams(observer.update(observer.init(seen, scheme), seen, scheme), scheme)
    return fake.init(qparams, x, scheme)


def gradients(y: Tensor, leaves: list[Tensor], g: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(y, leaves, g, allow_unused=True)
    return [torch.zeros_like(t) if grad is None else grad for t, grad in zip(leaves, found, strict=True)]


def replaced(
    fake: FakeQuantize, x: Tensor, qparams: sq.QParams, scheme: sq.QScheme, value: Tensor, field: str = "scale"
) -> Tensor:
    return fake.apply(x, qparams._replace(**{field: value}), scheme)


def assert_sums(
    two: tuple[Tensor, Tensor], f: Callable[[Tensor], Tensor], at: Tensor, g: Tensor, sums: Callable[[Tensor], Tensor]
) -> None:
    """Two gradients of ``f`` at one point agree, as sums over elements do; ``sums`` adds up what shares an element of it."""
    with forward_ad.dual_level():  # the derivative of each element
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(at, torch.ones_like(at)))).tangent
    terms = torch.zeros_like(g) if tangent is None else (tangent * g).abs()
    assert ((two[0] - two[1]).abs() <= SHARE * sums(terms)).all()


@pytest.mark.slow
@over_schemes
@over_fakes
def test_values_and_gradients_are_those_of_the_composition(
    compiled: library.Library, fake: Spec, scheme: sq.QScheme
) -> None:
    kernel, composed = both(compiled, fake, scheme)
    x = awkward(0, 6, 8, 4)
    qparams = qparams_of(composed, x, scheme)
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            assert_bits(kernel.apply(x, qparams, scheme), composed.apply(x, qparams, scheme))
    x = 3 * sample(1, 6, 8, 4)
    qparams = qparams_of(composed, x, scheme)
    g = sample(2, 6, 8, 4)
    found = []
    for one in (kernel, composed):
        leaves = [leaf(x), leaf(qparams.scale), leaf(qparams.zero_point)]
        y = one.apply(leaves[0], sq.QParams(leaves[1], leaves[2], qparams.extras), scheme)
        found.append((y, gradients(y, [t for t in leaves if t.requires_grad], g)))
    (y, (gx, *rest)), (y_composed, (gx_composed, *rest_composed)) = found
    assert_bits(y.detach(), y_composed.detach())
    assert_bits(gx, gx_composed)
    if scheme.dynamic:  # the scale is computed from x
        return
    fields = ("scale", "zero_point")
    for field, *two in zip(fields, rest, rest_composed, strict=False):
        f = partial(replaced, composed, x, qparams, scheme, field=field)
        assert_sums((two[0], two[1]), f, getattr(qparams, field), g, lambda t: rows(t, scheme.granularity).sum(-1))


@pytest.mark.slow
@pytest.mark.parametrize("granularity", [sq.PerTensor(), sq.PerToken(), sq.PerChannel(), sq.PerChannel(1), sq.PerGroup(16)])
def test_it_is_the_kernel_that_computes(compiled: library.Library, granularity: Any) -> None:
    scheme = sq.QScheme(bits=4, granularity=granularity, dynamic=granularity == sq.PerToken())
    kernel, composed = both(compiled, FAKES["learnable"], scheme)
    x = sample(0, 8, 16).requires_grad_()
    qparams = qparams_of(composed, x.detach(), scheme)
    assert is_of_kernel(kernel.apply(x, qparams, scheme))
    assert not is_of_kernel(composed.apply(x, qparams, scheme))


@pytest.mark.slow
def test_inference_mode_is_served(compiled: library.Library) -> None:
    def refuse(*args: Any) -> Tensor:
        raise AssertionError("it is composed")

    alone = pieces.build(FAKES["learnable"])
    config = config_of(FAKES["learnable"], PER_TENSOR)
    kernel = kernels.served(alone._replace(apply=refuse), config, compiled)
    with torch.inference_mode():
        x = sample(0, 40)
        qparams = qparams_of(alone, x, PER_TENSOR)
        assert_same(kernel.apply(x, qparams, PER_TENSOR), alone.apply(x, qparams, PER_TENSOR))
    assert not is_of_kernel(kernels.served(alone, config, compiled).apply(x, qparams, PER_TENSOR))


@pytest.mark.slow
def test_long_rows_are_cut_and_sums_do_not_depend_on_threads(compiled: library.Library) -> None:
    scheme = sq.QScheme(bits=8)
    kernel, composed = both(compiled, FAKES["learnable"], scheme)
    x, g = sample(0, 100_003), sample(1, 100_003)
    scale, zero = torch.tensor(0.017), torch.tensor(0)
    found = []
    for one, threads in ((kernel, 1), (kernel, 2), (composed, 1)):
        torch.set_num_threads(threads)
        leaves = [leaf(x), leaf(scale)]
        y = one.apply(leaves[0], sq.QParams(leaves[1], zero, {}), scheme)
        found.append((y.detach(), *gradients(y, leaves, g)))
    assert_same(found[0], found[1])
    for of_kernel, of_composition in zip(found[0][:2], found[2][:2], strict=True):
        assert_bits(of_kernel, of_composition)
    two = found[0][2], found[2][2]
    assert_sums(two, lambda s: composed.apply(x, sq.QParams(s, zero, {}), scheme), scale, g, torch.sum)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0, 1e-9, torch.nan])
@over_fakes
def test_scales_of_any_sign_and_size(compiled: library.Library, fake: Spec, scale: float) -> None:
    kernel, composed = both(compiled, fake, PER_TENSOR)
    x = awkward(0, 40)
    found = []
    for one in (kernel, composed):
        s = torch.tensor(scale, requires_grad=True)
        zero = torch.tensor(3.4) if "zero_point" in composed.learnable else torch.tensor(3, dtype=torch.int32)
        y = one.apply(x, sq.QParams(s, zero, {}), PER_TENSOR)
        found.append((y.detach(), s.new_zeros(()) if y.grad_fn is None else gradients(y, [s], torch.ones_like(x))[0]))
    assert_same(found[0], found[1], rtol=SHARE)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1),
    "strided": lambda x: x[:, :, ::2],
    "expanded": lambda x: x[:1].expand(8, -1, -1, -1),
    "offset": lambda x: x[1:],
    "one row": lambda x: x[:1].contiguous(memory_format=torch.channels_last),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("scheme", [PER_TENSOR, PER_CHANNEL, PER_GROUP], ids=str)
def test_layouts_in_memory(compiled: library.Library, scheme: sq.QScheme, layout: Callable[[Tensor], Tensor]) -> None:
    kernel, composed = both(compiled, FAKES["learnable"], scheme)
    x = layout(sample(0, 8, 4, 6, 6))
    qparams = qparams_of(composed, x, scheme)
    gs = {"alike": torch.empty_like(x).copy_(sample(3, *x.shape)), "expanded": torch.ones(()).expand(x.shape)}
    for g in gs.values():
        found = []
        for one in (kernel, composed):
            leaves = [leaf(qparams.scale)]
            moved = x.detach().requires_grad_()
            y = one.apply(moved, sq.QParams(leaves[0], qparams.zero_point, {}), scheme)
            found.append((y.detach(), *gradients(y, [moved, *leaves], g)))
        assert_same(found[0][:2], found[1][:2])
        assert found[0][0].stride() == found[1][0].stride()
        two = found[0][2], found[1][2]
        f = partial(replaced, composed, x, qparams, scheme)
        assert_sums(two, f, qparams.scale, g, lambda t: rows(t, scheme.granularity).sum(-1))


@pytest.mark.slow
def test_empty_tensors(compiled: library.Library) -> None:
    kernel, _ = both(compiled, FAKES["learnable"], PER_CHANNEL)
    x, scale = torch.zeros(3, 0, requires_grad=True), torch.ones(3, requires_grad=True)
    y = kernel.apply(x, sq.QParams(scale, torch.zeros(3), {}), PER_CHANNEL)
    assert_same(gradients(y, [x, scale], torch.zeros(3, 0)), [torch.zeros(3, 0), torch.zeros(3)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_composed(compiled: library.Library, dtype: torch.dtype) -> None:
    kernel, composed = both(compiled, FAKES["learnable"], PER_TENSOR)
    x = sample(0, 60, dtype=dtype)
    qparams = qparams_of(composed, x.float(), PER_TENSOR)
    y = kernel.apply(x.clone().requires_grad_(), qparams, PER_TENSOR)
    assert not is_of_kernel(y)
    assert_same(y.detach(), composed.apply(x, qparams, PER_TENSOR))


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("spec", [FAKES["fixed"], FAKES["learnable"]], ids=str)
@pytest.mark.parametrize("is_per_tensor", [False, True])
def test_factors_are_folded_in(compiled: library.Library, spec: Spec, axis: int, is_per_tensor: bool) -> None:
    scheme = sq.QScheme(bits=4, symmetric=False, granularity=sq.PerTensor() if is_per_tensor else sq.PerChannel(axis))
    kernel, composed = both(compiled, spec, scheme)
    x, g = sample(0, 6, 6, 3), sample(1, 6, 6, 3)
    factor = sample(2, 6)
    factor[1], factor[3] = 0, -1.5  # a dead channel, and one that is mirrored
    shape = [6 if i == axis else 1 for i in range(3)]
    qparams = qparams_of(composed, x * factor.view(shape), scheme)

    def folded(fake: FakeQuantize, x: Tensor, factor: Tensor, scale: Tensor) -> Tensor:
        assert fake.prepare is not None
        return fake.prepare(x, factor.view(shape), sq.QParams(scale, qparams.zero_point, {}), scheme)()

    found = []
    for one in (kernel, composed):
        leaves = [leaf(x), leaf(factor), leaf(qparams.scale)]
        y = folded(one, *leaves)
        found.append((y, *gradients(y, leaves, g)))
    assert is_of_kernel(found[0][0]) is not (is_per_tensor and axis == 1)
    assert_same([t.detach() for t in found[0][:2]], [t.detach() for t in found[1][:2]])
    along = [i for i in range(3) if i != axis]
    of_factor, of_scale = ((found[0][i], found[1][i]) for i in (2, 3))
    assert_sums(of_factor, lambda d: folded(composed, x, d, qparams.scale), factor, g, lambda t: t.sum(along))
    sums = torch.sum if is_per_tensor else lambda t: t.sum(along)
    assert_sums(of_scale, lambda s: folded(composed, x, factor, s), qparams.scale, g, sums)


@pytest.mark.slow
def test_qparams_of_another_shape_are_refused(compiled: library.Library) -> None:
    kernel, _ = both(compiled, FAKES["fixed"], PER_CHANNEL)
    wrong = sq.QParams(torch.ones(4), torch.zeros(4, dtype=torch.int32), {})
    with pytest.raises(sq.StateError, match="does not fit the tensor"):
        kernel.apply(torch.ones(8, 3), wrong, PER_CHANNEL)


def transforms(f: Callable[[Tensor, Tensor], Tensor], x: Tensor, s: Tensor) -> dict[str, Callable[[], Any]]:
    """What may look at a quantizer beside a plain backward pass."""
    loss = lambda x, s: f(x, s).square().sum()  # noqa: E731
    grad = torch.func.grad(loss, argnums=(0, 1))

    def second() -> Any:
        leaves = [leaf(x), leaf(s)]
        first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), leaves)

    def batched() -> Any:
        leaves = [leaf(x), leaf(s)]
        return torch.autograd.grad(f(*leaves), leaves, torch.stack([x, 2 * x]), is_grads_batched=True)

    def forward_mode() -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(x, forward_ad.make_dual(s, torch.ones_like(s)))).tangent

    def traced() -> Any:
        from torch.fx.experimental.proxy_tensor import make_fx

        return make_fx(f)(x, s)(2 * x, s)  # a program for other numbers

    def inference() -> Any:
        with torch.inference_mode():
            return f(x.clone(), s).clone()

    return {
        "grad": lambda: grad(x, s),
        "vmap": lambda: torch.func.vmap(f, (0, None))(torch.stack([x, 2 * x]), s),
        "vmap of grad": lambda: torch.func.vmap(grad, (0, None))(torch.stack([x, 2 * x]), s),
        "jvp": lambda: torch.func.jvp(f, (x, s), (x, s)),
        "Hessian": lambda: torch.func.hessian(loss, argnums=1)(x, s),
        "second": second,
        "batched": batched,
        "forward mode": forward_mode,
        "traced": traced,
        "inference": inference,
        "checkpoint": lambda: torch.utils.checkpoint.checkpoint(f, leaf(x), leaf(s), use_reentrant=False).detach(),
    }


def with_scale(fake: FakeQuantize, qparams: sq.QParams) -> Callable[[Tensor, Tensor], Tensor]:
    def f(x: Tensor, s: Tensor) -> Tensor:
        return fake.apply(x, qparams._replace(scale=s), PER_CHANNEL)

    return f


@pytest.mark.slow
@pytest.mark.parametrize("name", transforms(lambda x, s: x, torch.zeros(1), torch.zeros(1)))
def test_whoever_else_looks_sees_the_composition(compiled: library.Library, name: str) -> None:
    x = 3 * sample(0, 8, 5)
    two = both(compiled, FAKES["learnable"], PER_CHANNEL)
    qparams = qparams_of(two[1], x, PER_CHANNEL)
    found = []
    for one in two:
        found.append(torch.utils._pytree.tree_leaves(transforms(with_scale(one, qparams), x, qparams.scale)[name]()))
    # the last pass of a second derivative is plain: its sums have five terms of some hundred at most, each rounded thrice
    assert_same(found[0], found[1], atol=1e-4 if name == "second" else 0.0)


@pytest.mark.slow
def test_a_graph_may_be_walked_twice(compiled: library.Library) -> None:
    kernel, _ = both(compiled, FAKES["learnable"], PER_TENSOR)
    x, s = leaf(sample(0, 40)), torch.tensor(0.2, requires_grad=True)
    y = kernel.apply(x, sq.QParams(s, torch.tensor(1.0), {}), PER_TENSOR).sum()
    once, again = (torch.autograd.grad(y, (x, s), retain_graph=True) for _ in range(2))
    assert_same(once, again)


def network() -> tuple[nn.Module, Tensor]:
    layers = (
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.Linear(128, 4),
    )
    model = nn.Sequential(*layers).eval()
    return model, sample(0, 2, 3, 8, 8)


@pytest.mark.slow
def test_models_compute_the_same(compiled: library.Library) -> None:
    model, x = network()
    fast = sq.quantize(model, DEFAULT, example_args=(x,), kernels="compiled")
    q, params, qparams = ready(model, x)
    assert (fast.kernels, q.kernels) == ("compiled", "auto")
    assert_same(fast.apply(params, qparams, x), q.apply(params, qparams, x))
    same = fast.train().eval(), copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), fast.part("")
    assert all(one.kernels == "compiled" for one in same)
    assert_same(fast.bind(params, qparams)(x), q.apply(params, qparams, x))


@pytest.mark.slow
def test_auto_uses_what_has_been_compiled(compiled: library.Library) -> None:
    assert kernels.find("auto") is kernels.find("compiled")
    assert kernels.find("off") is None


def test_without_a_compiler_everything_is_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    model, x = network()
    q, params, qparams = ready(model, x)
    off = sq.build(model, q.plan, kernels="off")
    assert_same(q.apply(params, qparams, x), off.apply(params, qparams, x))
    with pytest.raises(sq.ConfigError, match=r"build: there is no C\+\+ compiler.*got '/nowhere/c\+\+'.*kernels='auto'"):
        sq.build(model, q.plan, kernels="compiled")


@pytest.mark.skipif(shutil.which("false") is None, reason="needs a command that fails")
def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(sq.ConfigError, match=r"the C\+\+ compiler fails: got 'exit status 1'"):
        library.compiled()


def test_a_library_that_cannot_be_loaded_is_logged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    library.place().parent.mkdir(parents=True)
    library.place().write_bytes(b"no library")
    with caplog.at_level(logging.WARNING, "sophq_func.kernels"):
        assert kernels.find("auto") is None
    assert "cannot be loaded" in caplog.text


def test_only_three_options_are_known() -> None:
    model, x = network()
    with pytest.raises(sq.ConfigError, match="got 'fast', allowed 'auto', 'off', 'compiled'"):
        sq.quantize(model, DEFAULT, example_args=(x,), kernels="fast")  # type: ignore[arg-type]
