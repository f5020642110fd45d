"""What type checkers accept and refuse; ``make types`` reads it, and nobody runs it.

Of a line that must be refused, the comment names the error. A comment that is not needed is an error itself.
"""

from __future__ import annotations

import torch
from torch import nn

import sophq_func as sq


def accepted() -> None:
    model, x = nn.Linear(64, 3), torch.ones(1, 64)
    half = sq.QuantizerConfig(
        scheme=sq.QScheme(granularity="per_tensor"), observer="minmax", fake_quantize=sq.fake_quantize.lsq()
    )
    mine = sq.register.chip("Mine", sq.ChipSpec(weight=half, activation=half))
    sq.QuantConfig(chip=mine)
    sq.QuantConfig(
        chip="BM1690",
        strategy="CNN",
        quantmode="weight_activation",
        weight=sq.override(bits=4, granularity="per_channel", observer="mse", fake_quantize="lsq"),
        activation=half,
        rules=[
            sq.Rule(name="head", weight=None),
            sq.Rule(type=nn.Linear, weight=sq.override(granularity=sq.PerGroup(0, 4))),
        ],
    )
    groups = [sq.PerGroup(32), sq.PerGroup(32, axis=0), sq.PerGroup(size=32, axis=(0, 2)), sq.PerGroup()]
    q = sq.quantize(model, sq.presets.w4a16(groups[0].size), example_args=(x,))
    bits: int = q.plan["weight_fake_quant"].scheme.bits
    spec: sq.Spec = sq.observers.EMAMinMaxObserver(bits / 16)
    sq.override(observer=spec)
    stored = sq.load("run.safetensors").check(q)
    q.apply(stored.params, stored.qparams, x)
    q.bind(stored.params, stored.qparams).generate(x, max_new_tokens=4)


def refused() -> None:
    sq.override(bit=4)  # type: ignore[call-arg]
    sq.override(bits="four")  # type: ignore[arg-type]
    sq.QuantConfig(chip="BM1864X")  # type: ignore[arg-type]
    sq.QuantConfig(strategy="CNM")  # type: ignore[arg-type]
    sq.QuantConfig(quantmode="weights")  # type: ignore[arg-type]
    sq.QScheme(granularity="per_chanel")  # type: ignore[arg-type]
    sq.PerGroup("32")  # type: ignore[call-overload]
    sq.QuantizerConfig(scheme=sq.QScheme(), obsever="mse", fake_quantize="lsq")  # type: ignore[call-arg]
    sq.fake_quantize.lsqq()  # type: ignore[attr-defined]
    sq.presets.w4a61()  # type: ignore[attr-defined]
    sq.quantise(nn.Linear(2, 2))  # type: ignore[attr-defined]
