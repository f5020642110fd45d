"""A valid call of everything that users call: where :mod:`tests.fuzz.calls` begins.

Functions and constructors come from :mod:`tests.house.test_calls`; methods, pieces used alone, and what takes all of its
options stand here.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sophq_func as sq
from tests.house import test_calls


@dataclasses.dataclass(frozen=True)
class ValidCall:
    """A call that succeeds.

    Attributes:
      name: what is called, dotted.
      function: the same.
      args, kwargs: valid ones.
      batch: how many of the last positional arguments belong to the model, which says itself what is wrong with them.
      alone: it changes what others see, as a registration does, so that it runs in a process of its own.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch: int = 0
    alone: bool = False


class Net(nn.Module):
    """A convolution with a norm, and a layer behind it: weights of two ranks, a folded bias, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = self.relu(self.bn(self.conv(x)))
        return self.head(y.mean((2, 3))) * scale  # type: ignore[no-any-return]


ELSEWHERE = frozenset({"compare_chip", "export.onnx", "export.torch", "load", "report", "statistics"})
"""Functions whose calls there are refused, for they take a model in training mode, or lack a file; others stand below."""

SLOW = frozenset({"algorithm", "chip", "fake_quantizer", "format", "observer", "strategy"})
"""The checks of :mod:`sophq_func.testing` take seconds where their arguments are right; a name is all that they take."""


def valid_calls(folder: Path) -> list[ValidCall]:
    """The calls; files are written below ``folder``."""
    torch.manual_seed(0)
    found = []
    for name, (args, kwargs) in test_calls.calls(folder).items():
        room, _, last = name.rpartition(".")
        if room == "testing" and last.removeprefix("check_") in SLOW:
            continue
        if name in ELSEWHERE:
            continue
        alone = room == "register"
        found.append(ValidCall(name, test_calls.PUBLIC[name], args, kwargs, alone=alone))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found += [*_methods(folder), *_pieces(), *_configs()]
    return found


@functools.cache
def _net() -> tuple[Net, Tensor, sq.Quantized, dict[str, Tensor], dict[str, Any], dict[str, sq.QParams]]:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(4, 3, 6, 6)
    q = sq.quantize(model, sq.QuantConfig(), example_args=(x,), kernels="off")
    params = sq.params_of(model)
    _, ostate = q.observe(params, q.init(params), x)
    return model, x, q, params, ostate, q.qparams(params, ostate)


def _methods(folder: Path) -> list[ValidCall]:
    model, x, q, params, ostate, qparams = _net()
    narrow = sq.with_bits(qparams, q.plan, 4)
    weight, value = "conv.weight_fake_quant", "x.post_act_fake_quantizer"
    artifact = sq.convert(q, params, qparams, example_args=(x,))
    report = sq.report(q, params, qparams, [x], progress=False)
    gains = sq.sensitivity(q, params, qparams, x, torch.sum, progress=False)
    saved = folder / "saved.safetensors"
    sq.save(saved, plan=q.plan, qparams=qparams, ostate=ostate, params=params)
    stored = sq.load(saved)
    bound = q.bind(params, qparams)
    run = (params, qparams, x)
    generator = torch.Generator()
    settings = [qparams, narrow]
    config = sq.QuantConfig(rules=(sq.Rule(name="head", weight=None),))
    return [
        ValidCall("q.init", q.init, (params, ostate)),
        ValidCall("q.observe", q.observe, (params, ostate, x), batch=1),
        ValidCall("q.observe_quantized", q.observe_quantized, (params, ostate, qparams, x), batch=1),
        ValidCall("q.qparams", q.qparams, (params, ostate), {"bits": {weight: 4}}),
        ValidCall("q.calibrate", q.calibrate, (params, [x]), {"inputs": _same, "progress": False}),
        ValidCall("q.apply", q.apply, run, batch=1),
        ValidCall("q.apply of extras", q.apply, (params, narrow, x), batch=1),
        ValidCall("q.apply in training", q.train().apply, run, batch=1),
        ValidCall("q.apply_and_update", q.apply_and_update, run, batch=1),
        ValidCall("q.capture", q.capture, run, batch=1),
        ValidCall("q.tap", q.tap, (["conv", "head"],), {"stop": True}),
        ValidCall("q.tap(...)", q.tap("conv"), run, batch=1),
        ValidCall("q.part", q.part, ("conv",), {"call": 0}),
        ValidCall("q.part(...).apply", q.part("conv").apply, run, batch=1),
        ValidCall("q.blocks", q.blocks, ("*",)),
        ValidCall("q.with_noise", q.with_noise, (params, qparams, generator, x), batch=1),
        ValidCall("q.split", q.split, (qparams,)),
        ValidCall("q.train", q.train, (), {"mode": True}),
        ValidCall("q.freeze", q.freeze, (params, qparams)),
        ValidCall("q.bind", q.bind, (params, qparams), {"learn": "params"}),
        ValidCall("q.bind(...)", bound, (x,), batch=1),
        ValidCall("q.tree", q.tree, (params,)),
        ValidCall("q.sweep", q.sweep, (params, settings, x), {"reduce": torch.sum, "how": "loop", "progress": False}),
        ValidCall("q.weights_seen", q.weights_seen, (params,)),
        ValidCall("q.quantize_value", q.quantize_value, (value, x, qparams[value])),
        ValidCall("plan.diff", q.plan.diff, (q.plan,)),
        ValidCall("plan.explain", q.plan.explain, (weight,)),
        ValidCall("plan.find", q.plan.find, (weight,)),
        ValidCall("plan.from_json", sq.Plan.from_json, (q.plan.to_json(),)),
        ValidCall("plan.override", q.plan.override, (sq.Rule(name="head", weight=None),)),
        ValidCall("plan.reasons", q.plan.reasons, (weight,)),
        ValidCall("plan.site", q.plan.site, (weight,)),
        ValidCall("plan.table", q.plan.table, (), {"columns": None, "width": 100}),
        ValidCall("plan.with_bits", q.plan.with_bits, ({weight: 4},)),
        ValidCall("config.from_json", sq.QuantConfig.from_json, (config.to_json(),)),
        ValidCall("config.from_dict", sq.QuantConfig.from_dict, ({"chip": "BM1690", "strategy": "CNN"},)),
        ValidCall("artifact.run", artifact.run, (x,), batch=1),
        ValidCall("artifact.codes", artifact.codes, ("conv.weight",)),
        ValidCall("artifact.weight", artifact.weight, ("conv.weight",)),
        ValidCall("report.table", report.table, (), {"columns": None, "width": 100}),
        ValidCall("report.to_csv", report.to_csv, (folder / "report.csv",)),
        ValidCall("report.to_html", report.to_html, (folder / "report.html",)),
        ValidCall("sensitivities.ranked", gains.ranked, (), {"by": "added"}),
        ValidCall("sensitivities.table", gains.table, (), {"columns": None, "width": 100, "by": "added"}),
        ValidCall("checkpoint.check", stored.check, (q,)),
        ValidCall("load", sq.load, (saved,)),
        ValidCall("save", sq.save, (folder / "all.safetensors",), {"plan": q.plan, "qparams": qparams, "ostate": ostate}),
        ValidCall("load_into", sq.load_into, (model, params), alone=True),
        ValidCall("convert", sq.convert, (q, params, qparams), {"example_args": (x,)}),
        ValidCall("statistics", sq.statistics, (q, params, [x], qparams), {"where": weight, "progress": False}),
        ValidCall("export.torch", sq.export.torch, (q, params, qparams, (x,))),
        ValidCall("report", sq.report, (q, params, qparams, [x]), {"how": "auto", "progress": False}),
        ValidCall("cast", sq.cast, (qparams, torch.float64)),
        ValidCall("merge", sq.merge, q.split(narrow)),
        ValidCall("stack", sq.stack, ([narrow, narrow],)),
        ValidCall("unstack", sq.unstack, (sq.stack([narrow, narrow]),)),
        ValidCall("with_bits", sq.with_bits, (narrow, q.plan, {weight: 4, value: 6})),
        ValidCall("enabled", sq.enabled, (qparams, {weight: False, value: 0.5})),
        ValidCall("export.onnx", sq.export.onnx, (q, params, qparams, (x,), folder / "net.onnx"),
                  {"signed": False, "simulate": False, "pack": False}),
    ]  # fmt: skip


def _same(batch: Tensor) -> Tensor:
    return batch


def _pieces() -> list[ValidCall]:
    """Observers and fake quantizers used alone."""
    scheme = sq.QScheme(granularity=sq.PerChannel(0))
    x = torch.randn(3, 4)
    found = []
    for name in ("minmax", "ema_minmax", "mse", "quantile", "histogram"):
        try:
            observer = sq.observer(name)
        except sq.ConfigError:
            continue
        whole = sq.QScheme()
        one = observer.init(x, whole)
        seen = observer.update(one, x, whole)
        found += [
            ValidCall(f"observer({name}).init", observer.init, (x, whole)),
            ValidCall(f"observer({name}).update", observer.update, (one, x, whole)),
            ValidCall(f"observer({name}).qparams", observer.qparams, (seen, whole)),
        ]
        if name == "minmax":
            found.append(ValidCall(f"observer({name}).merge", observer.merge, (seen, seen)))
    minmax = sq.observer("minmax")
    given = minmax.qparams(minmax.update(minmax.init(x, scheme), x, scheme), scheme)
    for name in ("fixed", "lsq", "pact", "dsq", "adaround", "e4m3"):
        try:
            fake = sq.fake_quantizer(name)
        except sq.ConfigError:
            continue
        ready = fake.init(given, x, scheme)
        found += [
            ValidCall(f"fake_quantizer({name}).init", fake.init, (given, x, scheme)),
            ValidCall(f"fake_quantizer({name}).apply", fake.apply, (x, ready, scheme), {"noise": None}),
        ]
    return found


def _configs() -> list[ValidCall]:
    """Constructors with all that they take."""
    half = sq.override(bits=4, granularity="per_channel", observer="mse", fake_quantize="lsq")
    return [
        ValidCall("formats.int_", sq.formats.int_, (8,)),
        ValidCall("formats.float_", sq.formats.float_, (4, 3)),
        ValidCall("formats.value_table", sq.formats.value_table, (sq.formats.E4M3,)),
        ValidCall("patterns.fused", sq.patterns.fused, ("FuzzedLinearTanh", nn.Linear, nn.Tanh), alone=True),
        ValidCall("QuantConfig", sq.QuantConfig, (), {
            "chip": "BM1690", "strategy": "CNN", "quantmode": "weight_activation", "weight": half,
            "rules": (sq.Rule(name="head", weight=None), sq.Rule(type=nn.Linear, weight=half)),
        }),
        ValidCall("Rule", sq.Rule, (), {
            "name": "head", "type": nn.Linear, "where": _always, "weight": half, "optional": True, "share": False,
        }),
        ValidCall("override", sq.override, (), {"bits": 4, "symmetric": True, "symmetric_range": False, "dynamic": False}),
        ValidCall("QScheme", sq.QScheme, (), {"bits": 8, "symmetric": True, "symmetric_range": False, "dynamic": False}),
        ValidCall("PerGroup", sq.PerGroup, (), {"size": 4, "axis": (0, 1)}),
        ValidCall("PerBlock", sq.PerBlock, (), {"rows": 4, "columns": 2}),
        ValidCall("from_dicts", sq.from_dicts, ({
            "quant_dict": {"chip": "BM1690", "quantmode": "weight_activation", "strategy": "CNN"},
            "extra_qconfig_dict": {"w_observer": "MinMaxObserver", "a_observer": "EMAMinMaxObserver",
                                   "w_fakequantize": "LearnableFakeQuantize", "a_fakequantize": "LearnableFakeQuantize",
                                   "w_qscheme": {"bit": 8, "symmetry": True, "per_channel": True, "pot_scale": False}},
            "extra_quantizer_dict": {"exclude_module_name": ["head"]},
        },)),
    ]  # fmt: skip


def _always(site: sq.Site) -> bool:
    return True
