"""16 settings of the weights of ResNet-18 at 1x3x32x32: in each, another layer has 4 bits and all others have 8.

By ``q.sweep``; by a loop of ``functional_call`` that quantizes every weight of every setting; by preparing the model anew
with torch.ao FX. All quantize ``W f`` with the BatchNorm's factor ``f``. Outputs agree to about a thousandth of the
largest: extremes of channels are exact ties, and 2 of 187 million codes of the loop fall on the other side.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from measure import medians
from subjects import resnet18
from torch import Tensor, nn
from torch.func import functional_call

import sophq_func as sq

SETTINGS = 16


def layers_of(model: nn.Module) -> dict[str, nn.Module | None]:
    """Each weight layer, and the BatchNorm behind it."""
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if isinstance(module, nn.Conv2d | nn.Linear)]
    return {name: modules.get(norm_of(name)) for name in names}


def norm_of(name: str) -> str:
    """The path of the BatchNorm behind a convolution."""
    return name.replace("conv", "bn") if "conv" in name else name.removesuffix("0") + "1"


def by_library(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """``q.sweep``."""
    weight = sq.QuantizerConfig(
        scheme=sq.QScheme(bits=8, granularity=sq.PerChannel()),
        observer=sq.observers.minmax(),
        fake_quantize=sq.fake_quantize.fixed(),
    )
    config = sq.QuantConfig(strategy="Layers", weight=weight, activation=None)
    q, params = sq.quantize(model, config, example_args=(x,)), sq.params_of(model)
    qparams = q.calibrate(params, [x], progress=False)
    names = [f"{name}.weight_fake_quant" for name in list(layers_of(model))[:SETTINGS]]
    eight = sq.with_bits(qparams, q.plan, 8)
    settings = [sq.with_bits(eight, q.plan, {name: 4}) for name in names]
    return lambda: q.sweep(params, settings, x, progress=False)


def by_functional_call(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Every weight of every setting, one setting after the other."""
    layers, params = layers_of(model), sq.params_of(model)

    def quantized(name: str, bits: int) -> Tensor:
        weight, norm = params[f"{name}.weight"], layers[name]
        shape = [-1] + [1] * (weight.ndim - 1)
        factor = torch.ones(len(weight)) if norm is None else norm.weight / torch.sqrt(norm.running_var + norm.eps)
        folded = weight * factor.reshape(shape)
        scale = folded.abs().amax(tuple(range(1, weight.ndim)), keepdim=True) / (2 ** (bits - 1) - 0.5)
        code = torch.clamp(torch.round(folded * (1 / scale)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return code * scale / factor.reshape(shape)

    @torch.no_grad()
    def run() -> Tensor:
        outputs = []
        for other in list(layers)[:SETTINGS]:
            weights = {f"{name}.weight": quantized(name, 4 if name == other else 8) for name in layers}
            outputs.append(functional_call(model, weights, (x,)))
        return torch.stack(outputs)

    return run


def by_fx(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A model prepared anew for each setting."""
    from torch.ao.quantization import FakeQuantize, NoopObserver, PerChannelMinMaxObserver, QConfig, QConfigMapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    def of(bits: int) -> QConfig:
        grid = {"quant_min": -(2 ** (bits - 1)), "quant_max": 2 ** (bits - 1) - 1, "dtype": torch.qint8, "ch_axis": 0}
        scheme = {"qscheme": torch.per_channel_symmetric, "reduce_range": False, **grid}
        weight = FakeQuantize.with_args(observer=PerChannelMinMaxObserver, **scheme)
        return QConfig(activation=NoopObserver.with_args(dtype=torch.float32), weight=weight)

    @torch.no_grad()
    def run() -> Tensor:
        outputs = []
        for other in list(layers_of(model))[:SETTINGS]:
            mapping = QConfigMapping().set_global(of(8)).set_module_name(other, of(4))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                prepared = prepare_qat_fx(model.train(), mapping, (x,)).eval()
            model.eval()
            outputs.append(prepared(x))
        return torch.stack(outputs)

    return run


def report_sweep(rounds: int) -> dict[str, float]:
    """Print and return seconds, and how far the outputs of the other ways are from those of the library."""
    subject = resnet18(32, 1)
    model, (x,) = subject.make(), subject.args
    ways = {"sophq_func": by_library, "functional_call": by_functional_call, "torch.ao FX": by_fx}
    calls = {name: way(model, x) for name, way in ways.items()}
    expected = calls["sophq_func"]()
    found = medians(calls, max(3, rounds // 3))
    print(f"\nsweep of {SETTINGS} settings")
    rows: dict[str, float] = {}
    for name, seconds in found.items():
        off = float((calls[name]() - expected).abs().max() / expected.abs().max())
        rows |= {name: seconds, f"{name} ratio": seconds / found["sophq_func"], f"{name} difference": off}
        print(
            f"{name:<16} {1000 * seconds:8.0f} ms  {seconds / found['sophq_func']:6.2f} times  outputs differ by {off:.1e}"
        )
    return rows
