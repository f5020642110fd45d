"""Models, values and comparisons for the tests of the dictionaries' keys.

Plans are compared as data: which quantizers come, which go, and which fields of the others change. Expected sets are worked
out by hand from the rules that the tests' names tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from tests.documented import DocumentedNet

LISTED = {
    "prepare_custom_config_dict": (
        "quant_dict extra_qconfig_dict extra_quantizer_dict extra_fuse_dict preserve_attr concrete_args leaf_module"
    ),
    "quant_dict": "chip quantmode strategy bf16_mix_prec use_tpu_mlir_fwd not_dynamic_update_param model_name",
    "extra_qconfig_dict": (
        "w_observer a_observer w_fakequantize a_fakequantize w_fakeq_params a_fakeq_params w_qscheme a_qscheme "
        "w_observer_extra_args a_observer_extra_args object_type module_name int4_op int8_op f16_op"
    ),
    "extra_quantizer_dict": (
        "exclude_module_name exclude_function_type exclude_node_name additional_node_name additional_function_type "
        "additional_module_type module_only_enable_observer"
    ),
    "extra_fuse_dict": (
        "additional_fuser_method_mapping additional_fusion_pattern additional_qat_module_mapping "
        "additional_qat_module_mappings"
    ),
    "qscheme": "bit symmetry per_channel pot_scale symmetric_range ch_axis reduce_range",
    "entry with mode 'weight'": "mode bit wfakequantize wobserver wperchannel",
    "entry with mode 'activation'": "mode bit afakequantize aobserver",
}
"""The keys of semantics.md 1.1 to 1.5."""

SECTIONS = ("quant_dict", "extra_qconfig_dict", "extra_quantizer_dict", "extra_fuse_dict")
BASE = {"chip": "BM1690", "quantmode": "weight_activation", "strategy": "CNN"}
TRANSFORMER = {**BASE, "strategy": "Transformer"}
BM1688 = {**BASE, "chip": "BM1688"}

ROLES = {"w": "weight", "a": "activation"}
POST, BEFORE, WEIGHT = ".post_act_fake_quantizer", ".input_act_fake_quantizer", ".weight_fake_quant"
LAYERS = ("features.0.0", "layer1.conv1", "layer2.conv1", "layer2.conv2", "layer3.conv3", "head")

MINMAX, EMA, MSE = sq.observers.minmax(), sq.observers.ema_minmax(), sq.observers.mse()
FIXED, LEARNABLE, BF16 = sq.fake_quantize.fixed(), sq.fake_quantize.learnable(), sq.fake_quantize.bf16()
FP16, E4M3 = sq.fake_quantize.fp16(), sq.fake_quantize.e4m3()


class Net(nn.Module):
    """Layers by name, and a forward given as a function of the net and its inputs ``x`` and ``v``."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor, v: Tensor | None = None) -> Any:
        return self.run(self, x) if v is None else self.run(self, x, v)


class Scale(nn.Module):
    """A layer that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class QuantizedScale(Scale):
    """What a user's mapping replaces it by."""


def fuse_nothing(*modules: nn.Module) -> nn.Module:
    """Stands for a function that fuses modules."""
    return modules[0]


def conv(groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1, groups=groups)


def image() -> Tensor:
    return torch.randn(2, 4, 8, 8)


def documented() -> tuple[nn.Module, Tensor]:
    return DocumentedNet().eval(), torch.randn(2, 3, 8, 8)


def plan_of(model: nn.Module, args: Any, **sections: Any) -> sq.Plan:
    return sq.prepare_by_platform(model.eval(), {"quant_dict": BASE, **sections}, example_args=args).plan


def values(plan: sq.Plan, ending: str = POST) -> set[str]:
    """What has a quantizer whose name ends so, without the ending."""
    return {name.removesuffix(ending) for name in plan if name.endswith(ending)}


def watched(plan: sq.Plan) -> set[str]:
    """Values that are observed only."""
    return {name.removesuffix(POST) for name, config in plan.items() if config.observe_only}


def fields(config: sq.QuantizerConfig) -> dict[str, Any]:
    scheme = {name: getattr(config.scheme, name) for name in config.scheme.__dataclass_fields__}
    pieces = {name: getattr(config, name) for name in ("observer", "fake_quantize", "observe_only", "optional")}
    return {**pieces, **scheme}


def changes(before: sq.Plan, after: sq.Plan) -> dict[str, Any]:
    """For each quantizer ``"gone"``, ``"new"`` or the fields that have other values."""
    found: dict[str, Any] = {name: "gone" for name in before if name not in after}
    for name, config in after.items():
        if name not in before:
            found[name] = "new"
        elif config != before[name]:
            old = fields(before[name])
            found[name] = {field: value for field, value in fields(config).items() if value != old[field]}
    return found


def told(value: Any) -> str:
    """An id that is the same in every process."""
    if isinstance(value, dict):
        return " ".join(f"{key} {told(item)}" for key, item in value.items()).strip()
    if isinstance(value, list | tuple | set):
        return str(len(value)) if isinstance(value, set) else " ".join(map(told, value))
    return str(getattr(value, "__name__", value))


def each(names: Iterable[str], ending: str, change: Any) -> dict[str, Any]:
    return {f"{name}{ending}": change for name in names}


def within(section: str, key: str, value: Any, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The dictionaries of ``base`` with one more key."""
    whole = {"quant_dict": BASE, **(base or {})}
    places: dict[str, Callable[[Any], dict[str, Any]]] = {
        "prepare_custom_config_dict": lambda item: {key: item},
        "qscheme": lambda item: {"extra_qconfig_dict": {"w_qscheme": {key: item}}},
        "entry with mode 'weight'": lambda item: entry("weight", **{key: item}),
        "entry with mode 'activation'": lambda item: entry("activation", **{key: item}),
    }
    place = places.get(section, lambda item: {section: {**whole.get(section, {}), key: item}})
    return {**whole, **place(value)}


def entry(half: str, **given: Any) -> dict[str, Any]:
    """An entry for the head, with all that an entry has unless it is given."""
    letter = half[0]
    usual = {"mode": half, "bit": 8, f"{letter}fakequantize": "FixedFakeQuantize", f"{letter}observer": "MinMaxObserver"}
    return {"extra_qconfig_dict": {"module_name": {"head": {**usual, **given}}}}


def scaled() -> tuple[nn.Module, Tensor]:
    return Net(lambda m, x: torch.exp(m.scale(torch.exp(x))), scale=Scale()), image()


def softmaxed() -> tuple[nn.Module, Tensor]:
    return Net(lambda m, x: torch.exp(m.soft(torch.exp(x))), soft=nn.Softmax(1)), image()


HEAD_4 = {"mode": "weight", "bit": 4, "wfakequantize": "FixedFakeQuantize", "wobserver": "MSEObserver"}
HEAD_4_CHANGED = {"bits": 4, "granularity": sq.PerTensor(), "fake_quantize": FIXED, "observer": MSE}
PER_TENSOR = sq.PerTensor()


def ids(table: Mapping[tuple[str, str], list[Any]]) -> list[Any]:
    return [
        pytest.param(section, key, item, id=f"{section}-{key}-{number}")
        for (section, key), items in table.items()
        for number, item in enumerate(items)
    ]


def refusal(sections: Mapping[str, Any], model: nn.Module | None = None, args: Any = None) -> str:
    if model is None:
        model, args = documented()
    with pytest.raises(sq.ConfigError) as caught:
        sq.prepare_by_platform(model, sections, example_args=args)
    return str(caught.value)


def missing(text: str, *words: str) -> list[str]:
    return [word for word in words if word not in text]


ENTRY = {"mode": "activation", "bit": 8, "afakequantize": "FixedFakeQuantize", "aobserver": "MinMaxObserver"}


def pieces(config: sq.QuantizerConfig) -> tuple[int, str, str, Any]:
    return config.scheme.bits, config.fake_quantize.name, config.observer.name, config.scheme.granularity


def two_linears() -> tuple[nn.Module, Tensor]:
    return Net(lambda m, x: m.b(torch.exp(m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4)), torch.randn(2, 4)
