"""Every key of the dictionaries: what a right value does to the plan, and how a wrong one is refused (semantics.md 1, 5).

Plans are compared as data: which quantizers come, which go, and which fields of the others change. Expected sets are worked
out by hand from the rules that the tests' names tell.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.intrinsic.qat as nniqat
import torch.ao.nn.qat as nnqat
import torch.nn.functional as F
from torch import Tensor, nn

import sophq_func as sq
from tests.documented import DocumentedNet, Layer2

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
VALUES = ("x", *LAYERS[:4], "layer3.flip", "layer3.conv3", "sigmoid", "mean", "head")
"""What CNN quantizes in ``DocumentedNet``."""

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


class Pixels(nn.Module):
    """The reference leaves an input of this name out."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        return abs(pixel_values)


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


def weights(**change: Any) -> dict[str, Any]:
    return each(LAYERS, WEIGHT, change)


def activations(**change: Any) -> dict[str, Any]:
    return each(VALUES, POST, change)


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


class Right(NamedTuple):
    """A right value of a key, and what it changes."""

    value: Any
    changed: dict[str, Any]
    base: Mapping[str, Any] = MappingProxyType({})
    model: Callable[[], tuple[nn.Module, Any]] = documented


def scaled() -> tuple[nn.Module, Tensor]:
    return Net(lambda m, x: torch.exp(m.scale(torch.exp(x))), scale=Scale()), image()


def softmaxed() -> tuple[nn.Module, Tensor]:
    return Net(lambda m, x: torch.exp(m.soft(torch.exp(x))), soft=nn.Softmax(1)), image()


HEAD_4 = {"mode": "weight", "bit": 4, "wfakequantize": "FixedFakeQuantize", "wobserver": "MSEObserver"}
HEAD_4_CHANGED = {"bits": 4, "granularity": sq.PerTensor(), "fake_quantize": FIXED, "observer": MSE}
FUSED_SIGMOID = each(["sigmoid"], POST, "gone")
OWN_LAYER = {f"scale{WEIGHT}": "new", f"scale{POST}": "new", f"scale.mul{POST}": "gone"}
PER_TENSOR = sq.PerTensor()

RIGHT: dict[tuple[str, str], list[Right]] = {
    ("prepare_custom_config_dict", "quant_dict"): [Right({**BASE, "chip": "MARS3"}, weights(symmetric_range=True))],
    ("prepare_custom_config_dict", "extra_qconfig_dict"): [
        Right({"a_observer": "MinMaxObserver"}, activations(observer=MINMAX))
    ],
    ("prepare_custom_config_dict", "extra_quantizer_dict"): [
        Right({"exclude_module_name": ["head"]}, dict.fromkeys((f"head{WEIGHT}", f"head{POST}", f"mean{POST}"), "gone"))
    ],
    ("prepare_custom_config_dict", "extra_fuse_dict"): [
        Right({"additional_fuser_method_mapping": {(nn.Conv2d, F.sigmoid): fuse_nothing}}, FUSED_SIGMOID)
    ],
    ("prepare_custom_config_dict", "preserve_attr"): [Right({"": ["head"], "layer1": ["conv1"]}, {})],
    ("prepare_custom_config_dict", "concrete_args"): [Right({"mask": None}, {})],
    ("prepare_custom_config_dict", "leaf_module"): [
        Right(
            [Layer2],
            each(["layer2.conv1", "layer2.conv2"], WEIGHT, "gone") | each(["layer2.conv1", "layer2.conv2"], POST, "gone"),
        )
    ],
    ("quant_dict", "chip"): [
        Right("SG2260", {}),
        *(
            Right(chip, weights(symmetric_range=True))
            for chip in ("MARS3", "CV183X", "CV182X", "CV181X", "CV180X", "CV186X")
        ),
        *(Right(chip, {}) for chip in ("BM1688", "BM1684X", "BM1690")),
        Right("Academic", weights(fake_quantize=E4M3) | each({*VALUES} - {"mean"}, POST, "gone")),
    ],
    ("quant_dict", "quantmode"): [
        Right(
            "weight_only", each({*VALUES} - {"layer2.conv2", "sigmoid", "head"}, POST, "gone"), {"quant_dict": TRANSFORMER}
        )
    ],
    ("quant_dict", "strategy"): [
        Right(
            "Transformer",
            each(["layer2.conv2", "sigmoid", "head"], POST, "gone") | {f"layer3.conv3{POST}": {"observe_only": True}},
        )
    ],
    ("quant_dict", "bf16_mix_prec"): [
        Right(False, {}),
        Right(
            True,
            {f"x{POST}": "gone"}
            | each(["features.0.0", "layer3.flip", "layer3.conv3", "sigmoid", "head"], BEFORE, "new")
            | each(["layer3.flip", "sigmoid", "mean"], POST, {"fake_quantize": BF16}),
        ),
    ],
    ("quant_dict", "use_tpu_mlir_fwd"): [Right(False, {})],
    ("quant_dict", "not_dynamic_update_param"): [Right(True, {}), Right(False, {})],
    ("quant_dict", "model_name"): [Right("resnet", {})],
    ("extra_qconfig_dict", "w_observer"): [
        Right("MSEObserver", weights(observer=MSE)),
        Right("EMAMinMaxObserver", weights(observer=EMA)),
    ],
    ("extra_qconfig_dict", "a_observer"): [Right("MinMaxObserver", activations(observer=MINMAX))],
    ("extra_qconfig_dict", "w_fakequantize"): [
        Right("FixedFakeQuantize", weights(fake_quantize=FIXED)),
        Right("E4M3FakeQuantize", weights(fake_quantize=E4M3)),
    ],
    ("extra_qconfig_dict", "a_fakequantize"): [Right("BF16FakeQuantize", activations(fake_quantize=BF16))],
    ("extra_qconfig_dict", "w_fakeq_params"): [
        Right({"use_grad_scaling": False}, weights(fake_quantize=sq.fake_quantize.learnable(use_grad_scaling=False)))
    ],
    ("extra_qconfig_dict", "a_fakeq_params"): [
        Right({"use_grad_scaling": False}, activations(fake_quantize=sq.fake_quantize.learnable(use_grad_scaling=False)))
    ],
    ("extra_qconfig_dict", "w_qscheme"): [
        Right({"bit": 8, "symmetry": True, "per_channel": True, "pot_scale": False}, {}),
        Right({"bit": 4, "per_channel": True}, weights(bits=4)),
        Right({}, weights(granularity=PER_TENSOR)),
        Right(
            {"p": 1.0, "per_channel": True},
            weights(observer=sq.observers.mse(p=1.0)),
            {"extra_qconfig_dict": {"w_observer": "mse"}},
        ),
    ],
    ("extra_qconfig_dict", "a_qscheme"): [
        Right({"symmetry": False, "pot_scale": True}, activations(symmetric=False, pot_scale=True)),
        Right({"per_channel": True}, activations(granularity=sq.PerChannel(1))),
        Right({"ema_ratio": 0.5}, activations(observer=sq.observers.ema_minmax(decay=0.5))),
    ],
    ("extra_qconfig_dict", "w_observer_extra_args"): [
        Right({"p": 1.0}, weights(observer=sq.observers.mse(p=1.0)), {"extra_qconfig_dict": {"w_observer": "MSEObserver"}})
    ],
    ("extra_qconfig_dict", "a_observer_extra_args"): [
        Right({"ema_ratio": 0.5}, activations(observer=sq.observers.ema_minmax(decay=0.5))),
        Right(
            {"ema_ratio": 0.5},
            activations(observer=sq.observers.ema_minmax(decay=0.5)),
            {"extra_qconfig_dict": {"a_qscheme": {"ema_ratio": 0.7}}},
        ),
    ],
    ("extra_qconfig_dict", "object_type"): [Right({nn.Linear: HEAD_4}, {f"head{WEIGHT}": HEAD_4_CHANGED})],
    ("extra_qconfig_dict", "module_name"): [Right({"head": HEAD_4}, {f"head{WEIGHT}": HEAD_4_CHANGED})],
    ("extra_qconfig_dict", "int4_op"): [
        Right(
            ["head"],
            {f"head{WEIGHT}": {"bits": 4, "granularity": PER_TENSOR}, f"head{POST}": {"bits": 4}, f"head{BEFORE}": "new"},
            {"quant_dict": BM1688},
        )
    ],
    ("extra_qconfig_dict", "int8_op"): [
        Right(
            ["head"],
            {
                f"head{WEIGHT}": {"fake_quantize": LEARNABLE, "granularity": PER_TENSOR},
                f"head{POST}": {"observer": EMA},
            },
            {"extra_qconfig_dict": {"w_fakequantize": "FixedFakeQuantize", "a_observer": "MinMaxObserver"}},
        )
    ],
    ("extra_qconfig_dict", "f16_op"): [
        Right(
            ["head"],
            {
                f"head{WEIGHT}": {"fake_quantize": FP16, "bits": 16, "granularity": PER_TENSOR},
                f"head{POST}": {"fake_quantize": FP16, "bits": 16},
            },
        )
    ],
    ("extra_quantizer_dict", "exclude_module_name"): [
        Right(["layer3.conv3"], {f"layer3.conv3{WEIGHT}": "gone", f"layer3.flip{POST}": "gone"}),
        Right([nn.Linear], dict.fromkeys((f"head{WEIGHT}", f"head{POST}", f"mean{POST}"), "gone")),
    ],
    ("extra_quantizer_dict", "exclude_function_type"): [Right([F.sigmoid], {f"sigmoid{POST}": "gone"})],
    ("extra_quantizer_dict", "exclude_node_name"): [Right(["head"], {f"head{POST}": "gone", f"mean{POST}": "gone"})],
    ("extra_quantizer_dict", "additional_node_name"): [
        Right(["mean"], {f"sigmoid{POST}": "new"}, {"quant_dict": TRANSFORMER})
    ],
    ("extra_quantizer_dict", "additional_function_type"): [
        Right([torch.mean], {f"sigmoid{POST}": "new"}, {"quant_dict": TRANSFORMER}),
        Right(["mean"], {f"sigmoid{POST}": "new"}, {"quant_dict": TRANSFORMER}),
    ],
    ("extra_quantizer_dict", "additional_module_type"): [
        Right((nn.Softmax,), {f"exp{POST}": "new", f"soft{POST}": "new"}, model=softmaxed),
        Right([nn.Softmax], {f"exp{POST}": "new"}, {"quant_dict": TRANSFORMER}, model=softmaxed),
    ],
    ("extra_quantizer_dict", "module_only_enable_observer"): [
        Right(["x_post_act_fake_quantizer"], {f"x{POST}": {"observe_only": True}}),
        Right(["layer1.conv1.weight_fake_quant"], {f"layer1.conv1{WEIGHT}": {"observe_only": True}}),
    ],
    ("extra_fuse_dict", "additional_fuser_method_mapping"): [
        Right({(nn.Conv2d, F.sigmoid): fuse_nothing}, FUSED_SIGMOID),
        Right({(nn.Conv2d, nn.Sigmoid): fuse_nothing}, FUSED_SIGMOID),
        Right({(nn.Conv2d, nn.ReLU): fuse_nothing}, {}),
    ],
    ("extra_fuse_dict", "additional_fusion_pattern"): [
        Right({(F.sigmoid, nn.Conv2d): fuse_nothing}, FUSED_SIGMOID),
        Right({(nn.ReLU, (nn.BatchNorm2d, nn.Conv2d)): fuse_nothing}, {}),
    ],
    ("extra_fuse_dict", "additional_qat_module_mapping"): [Right({Scale: QuantizedScale}, OWN_LAYER, model=scaled)],
    ("extra_fuse_dict", "additional_qat_module_mappings"): [Right({Scale: QuantizedScale}, OWN_LAYER, model=scaled)],
    ("qscheme", "bit"): [
        Right(4, weights(bits=4, granularity=PER_TENSOR)),
        Right("4", weights(bits=4, granularity=PER_TENSOR)),
    ],
    ("qscheme", "symmetry"): [Right(False, weights(symmetric=False, granularity=PER_TENSOR))],
    ("qscheme", "per_channel"): [Right(True, {}), Right(False, weights(granularity=PER_TENSOR))],
    ("qscheme", "pot_scale"): [Right(True, weights(pot_scale=True, granularity=PER_TENSOR))],
    ("qscheme", "symmetric_range"): [Right(True, weights(symmetric_range=True, granularity=PER_TENSOR))],
    ("qscheme", "reduce_range"): [Right(False, weights(granularity=PER_TENSOR))],
    ("qscheme", "ch_axis"): [Right(1, weights(granularity=sq.PerChannel(1))), Right(-1, weights(granularity=PER_TENSOR))],
    ("entry with mode 'weight'", "mode"): [
        Right("weight", {f"head{WEIGHT}": {"fake_quantize": FIXED, "granularity": PER_TENSOR}})
    ],
    ("entry with mode 'weight'", "bit"): [
        Right(bit, {f"head{WEIGHT}": {"bits": 4, "fake_quantize": FIXED, "granularity": PER_TENSOR}}) for bit in (4, "4")
    ],
    ("entry with mode 'weight'", "wfakequantize"): [
        Right("E5M2FakeQuantize", {f"head{WEIGHT}": {"fake_quantize": sq.fake_quantize.e5m2(), "granularity": PER_TENSOR}})
    ],
    ("entry with mode 'weight'", "wobserver"): [
        Right("MSEObserver", {f"head{WEIGHT}": {"observer": MSE, "fake_quantize": FIXED, "granularity": PER_TENSOR}})
    ],
    ("entry with mode 'weight'", "wperchannel"): [
        Right(True, {f"head{WEIGHT}": {"fake_quantize": FIXED}}),
        Right(False, {f"head{WEIGHT}": {"fake_quantize": FIXED, "granularity": PER_TENSOR}}),
    ],
    ("entry with mode 'activation'", "mode"): [
        Right("activation", {f"head{POST}": {"fake_quantize": FIXED, "observer": MINMAX}})
    ],
    ("entry with mode 'activation'", "bit"): [
        Right(4, {f"head{POST}": {"bits": 4, "fake_quantize": FIXED, "observer": MINMAX}}, {"quant_dict": BM1688})
    ],
    ("entry with mode 'activation'", "afakequantize"): [
        Right("BF16FakeQuantize", {f"head{POST}": {"fake_quantize": BF16, "observer": MINMAX}})
    ],
    ("entry with mode 'activation'", "aobserver"): [
        Right("MSEObserver", {f"head{POST}": {"fake_quantize": FIXED, "observer": MSE}})
    ],
}
NEEDLESS = ("preserve_attr", "concrete_args")
"""Keys that are accepted without effect, with a warning that says why."""


def warned(key: str) -> AbstractContextManager[Any]:
    """That a key without effect says why it is not needed."""
    text = rf"^{key} has no effect and is not needed: \w.*Fix"
    return pytest.warns(DeprecationWarning, match=text) if key in NEEDLESS else nullcontext()


def ids(table: Mapping[tuple[str, str], list[Any]]) -> list[Any]:
    return [
        pytest.param(section, key, item, id=f"{section}-{key}-{number}")
        for (section, key), items in table.items()
        for number, item in enumerate(items)
    ]


def test_the_keys_are_those_of_the_reference() -> None:
    assert {section: set(keys.split()) for section, keys in LISTED.items()} == {
        section: set(keys) for section, keys in sq.dicts.KEYS.items()
    }


@pytest.mark.parametrize("table", ["right", "wrong"])
def test_every_key_has_a_right_and_a_wrong_value_here(table: str) -> None:
    walked = {"right": RIGHT, "wrong": WRONG}[table]
    assert walked.keys() == {(section, key) for section, keys in LISTED.items() for key in keys.split()}


@pytest.mark.parametrize(("section", "key", "right"), ids(RIGHT))
def test_a_right_value_changes_what_it_says_and_nothing_else(section: str, key: str, right: Right) -> None:
    model, args = right.model()
    without = plan_of(model, args, **right.base)
    given = within(section, key, right.value, right.base)
    with warned(key):
        plan = sq.prepare_by_platform(model, given, example_args=args).plan
    assert changes(without, plan) == right.changed
    assert plan.unused == ()


@pytest.mark.parametrize(("section", "key", "right"), ids(RIGHT))
def test_a_right_value_is_not_changed(section: str, key: str, right: Right) -> None:
    given = within(section, key, right.value, right.base)
    before = repr(given)
    with warned(key):
        sq.from_dicts(given)
    assert repr(given) == before


@pytest.mark.parametrize(
    ("section", "key"),
    [
        (section, key)
        for section in ("prepare_custom_config_dict", *SECTIONS)
        for key in LISTED[section].split()
        if key not in ("chip", "quantmode", "strategy", *SECTIONS)
    ],
)
def test_none_under_an_optional_key_counts_as_left_out(section: str, key: str) -> None:
    assert sq.from_dicts(within(section, key, None)) == sq.from_dicts({"quant_dict": BASE})


class Wrong(NamedTuple):
    """A wrong value of a key, and what the message holds beside the key."""

    value: Any
    words: tuple[str, ...] = ()


A_DICT = (Wrong(5, ("dict",)), Wrong(["head"], ("dict",)))
A_FLAG = (Wrong("yes", ("'yes'", "True or False")), Wrong(1, ("True or False",)))
A_NAME_LIST = (Wrong("head", ("'head'", "list")), Wrong([5], ("5", "list")), Wrong({"head": 1}, ("list",)))
AN_OBSERVER = (Wrong("MinMaxObservr", ("did you mean 'MinMaxObserver'", "EMAMinMaxObserver")), Wrong(5, ("MinMaxObserver",)))
A_QUANTIZER = (Wrong("FixdFakeQuantize", ("'FixedFakeQuantize'",)), Wrong(None.__class__, ("FixedFakeQuantize",)))
BITS = (Wrong(1, ("2..16",)), Wrong(8.0, ("8.0",)), Wrong("eight", ("'eight'",)), Wrong(True, ("True",)))
AN_ENTRY = (
    Wrong({nn.Linear: {**HEAD_4, "mode": "wieght"}}, ("'wieght'", "'weight' or 'activation'")),
    Wrong({nn.Linear: {**HEAD_4, "wobservr": "MSEObserver"}}, ("'wobservr'", "did you mean 'wobserver'")),
)
MAPPINGS = (*A_DICT, Wrong({"Scale": QuantizedScale}, ("class",)), Wrong({Scale: 5}, ("class",)))

WRONG: dict[tuple[str, str], list[Wrong]] = {
    **{("prepare_custom_config_dict", key): list(A_DICT) for key in SECTIONS},
    ("prepare_custom_config_dict", "preserve_attr"): [*A_DICT, Wrong({"": "head"}, ("[attribute names]",))],
    ("prepare_custom_config_dict", "concrete_args"): list(A_DICT),
    ("prepare_custom_config_dict", "leaf_module"): [
        Wrong(nn.Linear, ("list",)),
        Wrong(["Linear"], ("nn.Module classes",)),
        Wrong([nn.Linear(2, 2)], ("nn.Module classes",)),
    ],
    ("quant_dict", "chip"): [Wrong("BM169O", ("did you mean 'BM1690'",)), Wrong(5, ("BM1690",)), Wrong(None, ("BM1690",))],
    ("quant_dict", "quantmode"): [Wrong("weight_onyl", ("did you mean 'weight_only'",)), Wrong(5, ("weight_activation",))],
    ("quant_dict", "strategy"): [Wrong("CNM", ("did you mean 'CNN'",)), Wrong(None, ("Transformer",))],
    ("quant_dict", "bf16_mix_prec"): list(A_FLAG),
    ("quant_dict", "use_tpu_mlir_fwd"): [*A_FLAG, Wrong(True, ("compiler", "False"))],
    ("quant_dict", "not_dynamic_update_param"): list(A_FLAG),
    ("quant_dict", "model_name"): [Wrong(5, ("string",)), Wrong(["net"], ("string",))],
    **{("extra_qconfig_dict", key): list(AN_OBSERVER) for key in ("w_observer", "a_observer")},
    **{("extra_qconfig_dict", key): list(A_QUANTIZER) for key in ("w_fakequantize", "a_fakequantize")},
    **{
        ("extra_qconfig_dict", key): [*A_DICT, Wrong({"use_grad_scalin": True}, ("did you mean 'use_grad_scaling'",))]
        for key in ("w_fakeq_params", "a_fakeq_params")
    },
    **{
        ("extra_qconfig_dict", key): [*A_DICT, Wrong({"bits": 8}, ("did you mean 'bit'",))]
        for key in ("w_qscheme", "a_qscheme")
    },
    ("extra_qconfig_dict", "w_observer_extra_args"): [*A_DICT, Wrong({"p": 1.0}, ("'p'", "minmax", "no options"))],
    ("extra_qconfig_dict", "a_observer_extra_args"): [
        *A_DICT,
        Wrong({"ema_ration": 0.9}, ("did you mean 'ema_ratio'",)),
        Wrong({"ema_ratio": 1.5}, ("1.5",)),
        Wrong({"ema_ratio": "slow"}, ("'slow'",)),
    ],
    ("extra_qconfig_dict", "object_type"): [*A_DICT, Wrong({5: HEAD_4}, ("type",)), *AN_ENTRY],
    ("extra_qconfig_dict", "module_name"): [
        *A_DICT,
        Wrong({nn.Linear: HEAD_4}, ("name",)),
        *(Wrong({"head": w.value[nn.Linear]}, w.words) for w in AN_ENTRY),
    ],
    **{("extra_qconfig_dict", key): list(A_NAME_LIST) for key in ("int4_op", "int8_op", "f16_op")},
    **{
        ("extra_quantizer_dict", key): list(A_NAME_LIST)
        for key in ("exclude_module_name", "exclude_node_name", "additional_node_name", "module_only_enable_observer")
    },
    **{
        ("extra_quantizer_dict", key): [
            Wrong(torch.sigmoid, ("list",)),
            Wrong([5], ("5",)),
            Wrong([nn.Linear(2, 2)], ("Linear",)),
            Wrong("sigmoid", ("list",)),
        ]
        for key in ("exclude_function_type", "additional_function_type", "additional_module_type")
    },
    **{
        ("extra_fuse_dict", key): [
            *A_DICT,
            Wrong({nn.Conv2d: fuse_nothing}, ("(",)),
            Wrong({(nn.Conv2d,): fuse_nothing}, ("(",)),
            Wrong({(nn.Conv2d, 5): fuse_nothing}, ("(",)),
            Wrong({(nn.Conv2d, nn.Sigmoid): 5}, ("5",)),
        ]
        for key in ("additional_fuser_method_mapping", "additional_fusion_pattern")
    },
    ("extra_fuse_dict", "additional_qat_module_mapping"): list(MAPPINGS),
    ("extra_fuse_dict", "additional_qat_module_mappings"): list(MAPPINGS),
    ("qscheme", "bit"): list(BITS),
    ("qscheme", "reduce_range"): [Wrong(True, ("False", "bits and symmetry")), Wrong(0, ("False",))],
    **{("qscheme", key): list(A_FLAG) for key in ("symmetry", "per_channel", "pot_scale", "symmetric_range")},
    ("qscheme", "ch_axis"): [Wrong("0", ("'0'", "int")), Wrong(True, ("int",)), Wrong(0.5, ("0.5",))],
    **{
        (f"entry with mode {mode!r}", "mode"): [
            Wrong("both", ("'both'", "'weight' or 'activation'")),
            Wrong(None, ("None",)),
        ]
        for mode in ("weight", "activation")
    },
    **{(f"entry with mode {mode!r}", "bit"): list(BITS) for mode in ("weight", "activation")},
    ("entry with mode 'weight'", "wfakequantize"): list(A_QUANTIZER),
    ("entry with mode 'weight'", "wobserver"): list(AN_OBSERVER),
    ("entry with mode 'weight'", "wperchannel"): list(A_FLAG),
    ("entry with mode 'activation'", "afakequantize"): list(A_QUANTIZER),
    ("entry with mode 'activation'", "aobserver"): list(AN_OBSERVER),
}


def refusal(sections: Mapping[str, Any], model: nn.Module | None = None, args: Any = None) -> str:
    if model is None:
        model, args = documented()
    with pytest.raises(sq.ConfigError) as caught:
        sq.prepare_by_platform(model, sections, example_args=args)
    return str(caught.value)


def missing(text: str, *words: str) -> list[str]:
    return [word for word in words if word not in text]


@pytest.mark.parametrize(("section", "key", "wrong"), ids(WRONG))
def test_a_wrong_value_is_refused_with_its_key_and_what_is_allowed(section: str, key: str, wrong: Wrong) -> None:
    text = refusal(within(section, key, wrong.value))
    assert missing(text, key, *wrong.words) == [], text


@pytest.mark.parametrize(
    ("section", "key"), [(section, key) for section, keys in LISTED.items() for key in keys.split() if key != "mode"]
)
def test_a_key_misspelled_by_one_letter_is_refused_with_the_right_one(section: str, key: str) -> None:
    text = refusal(within(section, f"{key}e", RIGHT[section, key][0].value))
    assert missing(text, repr(f"{key}e"), "did you mean", repr(key)) == [], text


ENTRY = {"mode": "activation", "bit": 8, "afakequantize": "FixedFakeQuantize", "aobserver": "MinMaxObserver"}
NEAR = [
    ("extra_qconfig_dict", "module_name", {"hea": ENTRY}, "'head'"),
    ("extra_qconfig_dict", "object_type", {"Conv2d_sofgo": ENTRY}, "'Conv2d"),
    ("extra_qconfig_dict", "int4_op", ["hea"], "'head'"),
    ("extra_qconfig_dict", "int8_op", ["layer1_conv"], "'layer1.conv1'"),
    ("extra_qconfig_dict", "f16_op", ["layer1.conv"], "'layer1.conv1'"),
    ("extra_quantizer_dict", "exclude_module_name", ["hea"], "'head'"),
    ("extra_quantizer_dict", "exclude_function_type", ["sigmod"], "'Sigmoid'"),
    ("extra_quantizer_dict", "exclude_node_name", ["sigmod"], "'sigmoid'"),
    ("extra_quantizer_dict", "additional_node_name", ["sigmod"], "'sigmoid'"),
    ("extra_quantizer_dict", "additional_function_type", ["sigmod"], "'Sigmoid'"),
    ("extra_quantizer_dict", "additional_module_type", ("Softmx",), "'Softmax'"),
    ("extra_quantizer_dict", "module_only_enable_observer", ["head.weight_fake_qant"], "'head.weight_fake_quant'"),
]


@pytest.mark.parametrize(("section", "key", "value", "near"), NEAR, ids=[case[1] for case in NEAR])
def test_a_near_miss_of_a_name_in_the_model_is_refused_with_the_name(section: str, key: str, value: Any, near: str) -> None:
    text = refusal(within(section, key, value))
    assert missing(text, near) == [], text


@pytest.mark.parametrize(("section", "key", "value", "near"), NEAR, ids=[case[1] for case in NEAR])
def test_a_near_miss_of_a_name_in_the_model_is_refused_with_the_key(section: str, key: str, value: Any, near: str) -> None:
    text = refusal(within(section, key, value))
    assert missing(text, key) == [], text


@pytest.mark.parametrize("name", ["layer3.weight_fake_quant", "layer1_weight_fake_quant", ".weight_fake_quant"])
def test_a_quantizer_that_no_module_could_have_is_refused(name: str) -> None:
    text = refusal(within("extra_quantizer_dict", "module_only_enable_observer", [name]))
    assert missing(text, repr(name), "did you mean", ".conv") == [], text


def test_only_names_that_the_model_has_are_suggested() -> None:
    text = refusal(within("extra_quantizer_dict", "module_only_enable_observer", ["head.weight_fake_qant"]))
    suggested = text.partition("did you mean ")[2].partition("?")[0].split(" or ")
    assert "'head.weight_fake_quant'" in suggested
    assert {name.strip("'") for name in suggested} <= {*plan_of(*documented())}


# Lists of operations


def pieces(config: sq.QuantizerConfig) -> tuple[int, str, str, Any]:
    return config.scheme.bits, config.fake_quantize.name, config.observer.name, config.scheme.granularity


OPS = {
    "int4_op": (4, "learnable", "minmax", "ema_minmax"),
    "int8_op": (8, "learnable", "minmax", "ema_minmax"),
    "f16_op": (16, "fp16", "minmax", "ema_minmax"),
}


@pytest.mark.parametrize("chip", ["CV183X", "MARS3"])
@pytest.mark.parametrize("key", OPS)
def test_a_list_of_operations_gives_both_halves_and_the_full_range(key: str, chip: str) -> None:
    bits, quantizer, weight, activation = OPS[key]
    plan = plan_of(*documented(), quant_dict={**BASE, "chip": chip}, extra_qconfig_dict={key: ["layer1.conv1"]})
    assert pieces(plan[f"layer1.conv1{WEIGHT}"]) == (bits, quantizer, weight, PER_TENSOR)
    assert pieces(plan[f"layer1.conv1{POST}"]) == (bits, quantizer, activation, PER_TENSOR)
    for name in (f"layer1.conv1{WEIGHT}", f"layer1.conv1{POST}"):
        assert (plan[name].scheme.symmetric, plan[name].scheme.symmetric_range) == (True, False)
        assert (plan[name].scheme.qmin, plan[name].scheme.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert plan[f"head{WEIGHT}"].scheme.symmetric_range


@pytest.mark.parametrize(
    ("lists", "bits"),
    [
        (("int4_op", "int8_op"), 8),
        (("int8_op", "int4_op"), 8),
        (("f16_op", "int4_op"), 16),
        (("f16_op", "int8_op", "int4_op"), 16),
    ],
    ids=told,
)
@pytest.mark.parametrize("spelling", ["layer1.conv1", "layer1_conv1"])
def test_of_several_lists_the_later_kind_wins_however_they_are_written(
    lists: tuple[str, ...], bits: int, spelling: str
) -> None:
    given = {key: [spelling if number else "layer1.conv1"] for number, key in enumerate(lists)}
    plan = plan_of(*documented(), quant_dict=BM1688, extra_qconfig_dict=given)
    assert (plan[f"layer1.conv1{WEIGHT}"].scheme.bits, plan[f"layer1.conv1{POST}"].scheme.bits) == (bits, bits)


@pytest.mark.parametrize("key", OPS)
def test_a_list_of_operations_replaces_an_entry_of_the_same_name(key: str) -> None:
    given = {"module_name": {"head": HEAD_4}, key: ["head"]}
    alone = {key: ["head"]}
    plans = [plan_of(*documented(), quant_dict=BM1688, extra_qconfig_dict=qconfig) for qconfig in (given, alone)]
    assert changes(*plans) == {}


def test_a_list_of_operations_is_held_to_the_bits_of_the_chip() -> None:
    text = refusal(within("extra_qconfig_dict", "int4_op", ["head"]))
    assert missing(text, f"head{POST}", "4 bits", "allowed 8", "BM1690") == []


@pytest.mark.parametrize("half", ["w", "a"])
@pytest.mark.parametrize(
    ("chip", "weight", "activation"),
    [
        ("BM1688", (4, 8), (4, 8)),
        ("BM1684X", None, (8,)),
        ("BM1690", None, (8,)),
        ("SG2260", None, (8,)),
        ("CV183X", None, None),
    ],
)
@pytest.mark.parametrize("bit", [4, 6, 8])
def test_a_chip_takes_the_bits_that_it_has(
    bit: int, chip: str, weight: tuple[int, ...] | None, activation: tuple[int, ...] | None, half: str
) -> None:
    given = {"quant_dict": {**BASE, "chip": chip}, "extra_qconfig_dict": {f"{half}_qscheme": {"bit": bit}}}
    allowed = weight if half == "w" else activation
    if allowed is None or bit in allowed:
        plan = plan_of(*documented(), **given)
        assert {plan[f"head{WEIGHT if half == 'w' else POST}"].scheme.bits} == {bit}
    else:
        text = refusal(given)
        assert missing(text, f"{bit} bits", f"allowed {' or '.join(map(str, allowed))}", f"config {ROLES[half]}") == [], text


# 4-bit layers have an input quantizer of their own (semantics.md 5.6)


def two_linears() -> tuple[nn.Module, Tensor]:
    return Net(lambda m, x: m.b(torch.exp(m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4)), torch.randn(2, 4)


def test_a_4_bit_layer_reads_its_own_quantizer_which_has_4_bits_and_rounds_its_bias() -> None:
    plan = plan_of(*two_linears(), quant_dict=BM1688, extra_qconfig_dict={"int4_op": ["b"]})
    assert list(plan) == [f"x{POST}", f"a{WEIGHT}", f"a{POST}", f"exp{POST}", f"b{WEIGHT}", f"b{BEFORE}", f"b{POST}"]
    assert plan[f"b{BEFORE}"] == plan[f"b{POST}"]
    assert (plan[f"b{BEFORE}"].scheme.qmin, plan[f"b{BEFORE}"].scheme.qmax) == (-8, 7)
    assert plan[f"exp{POST}"].scheme.bits == 8
    assert plan.site(f"b{WEIGHT}").source == f"b{BEFORE}"


@pytest.mark.parametrize(
    "qconfig",
    [
        {"w_qscheme": {"bit": 4}, "a_qscheme": {"bit": 4}},
        {"module_name": {"b": HEAD_4}},
        {"object_type": {nn.Linear: HEAD_4}},
        {"int8_op": ["b"]},
        {"f16_op": ["b"]},
    ],
    ids=["global", "weight by name", "weight by type", "8 bits", "16 bits"],
)
def test_other_layers_have_no_input_quantizer_of_their_own(qconfig: dict[str, Any]) -> None:
    plan = plan_of(*two_linears(), quant_dict=BM1688, extra_qconfig_dict=qconfig)
    assert values(plan, BEFORE) == set()


def test_a_weight_entry_by_type_and_an_activation_entry_by_name_make_a_4_bit_layer() -> None:
    qconfig = {"object_type": {nn.Linear: HEAD_4}, "module_name": {"b": {**ENTRY, "bit": 4}}}
    assert values(plan_of(*two_linears(), quant_dict=BM1688, extra_qconfig_dict=qconfig), BEFORE) == {"b"}


def test_type_entries_for_both_halves_make_4_bit_layers_but_of_grouped_convolutions() -> None:
    model, x = grouped(plain=conv(), own=conv(4))
    entries = {nn.Conv2d: HEAD_4, "Conv2d_sophgo": {**ENTRY, "bit": 4}}
    assert values(plan_of(model, x, quant_dict=BM1688, extra_qconfig_dict={"object_type": entries}), BEFORE) == {"plain"}


def test_only_layers_whose_result_is_quantized_have_one() -> None:
    transformer = {**BM1688, "strategy": "Transformer"}
    plan = plan_of(*two_linears(), quant_dict=transformer, extra_qconfig_dict={"int4_op": ["a", "b"]})
    assert values(plan) == {"x", "exp"}
    assert values(plan, BEFORE) == set()


def test_two_calls_of_a_4_bit_layer_have_one_each_with_counted_names() -> None:
    model = Net(lambda m, x: m.a(torch.exp(m.a(x))), a=nn.Linear(4, 4))
    plan = plan_of(model, torch.randn(2, 4), quant_dict=BM1688, extra_qconfig_dict={"int4_op": ["a"]})
    assert values(plan, BEFORE) == {"a", "a_1"}


# Entries


@pytest.mark.parametrize("section", ["object_type", "module_name"])
@pytest.mark.parametrize("mode", ["weight", "activation"])
def test_an_entry_replaces_the_grid_of_its_half_and_leaves_the_other(section: str, mode: str) -> None:
    qscheme = {"bit": 8, "symmetry": False, "per_channel": True, "pot_scale": True}
    letter = mode[0]
    given = {"mode": mode, "bit": "8", f"{letter}fakequantize": "FixedFakeQuantize", f"{letter}observer": "MSEObserver"}
    qconfig = {"w_qscheme": qscheme, "a_qscheme": qscheme}
    key: Any = nn.Linear if section == "object_type" else "head"
    plan = plan_of(*documented(), extra_qconfig_dict={**qconfig, section: {key: given}})
    changed = {"symmetric": True, "pot_scale": False, "granularity": PER_TENSOR, "fake_quantize": FIXED, "observer": MSE}
    without = plan_of(*documented(), extra_qconfig_dict=qconfig)
    assert changes(without, plan) == {f"head{WEIGHT if mode == 'weight' else POST}": changed}


@pytest.mark.parametrize("section", ["object_type", "module_name"])
@pytest.mark.parametrize(("chip", "narrow"), [("CV186X", True), ("BM1688", False)])
def test_the_weight_range_of_an_entry_is_the_chips(section: str, chip: str, narrow: bool) -> None:
    key: Any = nn.Linear if section == "object_type" else "head"
    plan = plan_of(*documented(), quant_dict={**BASE, "chip": chip}, extra_qconfig_dict={section: {key: HEAD_4}})
    assert plan[f"head{WEIGHT}"].scheme.symmetric_range is narrow


@pytest.mark.parametrize(
    ("given", "narrow"), [({}, True), ({"symmetric_range": False}, False), ({"symmetric_range": True}, True)]
)
def test_the_range_of_a_global_scheme_is_the_chips_unless_it_says_otherwise(given: dict[str, Any], narrow: bool) -> None:
    quant_dict = {**BASE, "chip": "CV183X"}
    plan = plan_of(*documented(), quant_dict=quant_dict, extra_qconfig_dict={"w_qscheme": {"bit": 8, **given}})
    assert {plan[f"{layer}{WEIGHT}"].scheme.symmetric_range for layer in LAYERS} == {narrow}


@pytest.mark.parametrize("half", ["w", "a"])
@pytest.mark.parametrize("key", ["quant_min", "quant_max", "dtype"])
def test_bounds_of_codes_are_said_by_bits_and_symmetry_alone(half: str, key: str) -> None:
    text = refusal(within("extra_qconfig_dict", f"{half}_qscheme", {"bit": 8, key: 100}))
    assert missing(text, f"{half}_qscheme", repr(key), "symmetric_range") == [], text


@pytest.mark.parametrize("key", ["w_fakeq_params", "a_fakeq_params"])
@pytest.mark.parametrize("name", ["scale", "zero_point"])
def test_an_initial_value_that_calibration_replaces_is_said_to_have_no_effect(key: str, name: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"{key}\['{name}'\] has no effect.*calibration"):
        config = sq.from_dicts(within("extra_qconfig_dict", key, {name: [1.0]}))
    assert config == sq.from_dicts({"quant_dict": BASE})


@pytest.mark.parametrize(("axis", "per_channel"), [(1, True), (0, True), (None, False), (None, True)])
def test_a_weight_per_channel_of_a_deconvolution_runs_over_output_channels(axis: int | None, per_channel: bool) -> None:
    given = {"mode": "weight", "bit": 8, "wfakequantize": "FixedFakeQuantize", "wobserver": "MinMaxObserver"}
    qconfig = {"object_type": {nn.ConvTranspose2d: {**given, "wperchannel": per_channel}}}
    if axis is not None:
        qconfig = {"w_qscheme": {"per_channel": per_channel, "ch_axis": axis}}
    model = Net(lambda m, x: m.up(x), up=nn.ConvTranspose2d(4, 6, 2))
    granularity = plan_of(model, image(), extra_qconfig_dict=qconfig)[f"up{WEIGHT}"].scheme.granularity
    assert granularity == (sq.PerChannel(1 if axis is None else axis) if per_channel else PER_TENSOR)


@pytest.mark.parametrize("section", ["object_type", "module_name"])
@pytest.mark.parametrize(
    ("mode", "field"),
    [
        ("weight", "bit"),
        ("weight", "wfakequantize"),
        ("weight", "wobserver"),
        ("activation", "bit"),
        ("activation", "afakequantize"),
        ("activation", "aobserver"),
    ],
)
def test_an_entry_that_leaves_a_field_out_keeps_what_the_broader_level_says(mode: str, field: str, section: str) -> None:
    whole = {"weight": HEAD_4, "activation": ENTRY}[mode]
    key: Any = nn.Linear if section == "object_type" else "head"
    given = {name: value for name, value in whole.items() if name != field}
    config = plan_of(*documented(), quant_dict=BM1688, extra_qconfig_dict={section: {key: given}})
    name, chip = f"head{WEIGHT if mode == 'weight' else POST}", sq.CHIPS.get("BM1688")
    broader = chip.weight if mode == "weight" else chip.activation
    own = field if field == "bit" else field.removeprefix(mode[0])
    kept = {"bit": "bits", "observer": "observer", "fakequantize": "fake_quantize"}[own]
    found = config[name].scheme.bits if kept == "bits" else getattr(config[name], kept)
    assert found == (8 if kept == "bits" else getattr(broader, kept))


@pytest.mark.parametrize(
    "sections", [{"preserve_attr": {"": ["a"]}}, {"extra_qconfig_dict": {"a_fakeq_params": {"scale": 1.0}}}], ids=told
)
def test_a_warning_points_at_the_line_that_called_the_library(sections: dict[str, Any]) -> None:
    model, x = two_linears()
    given = {"quant_dict": BASE, **sections}
    with pytest.warns(DeprecationWarning) as caught:
        sq.from_dicts(given)
        sq.prepare_by_platform(model, given, example_args=x)
    assert [warning.filename for warning in caught] == [__file__, __file__]


# Type keys


class Named(NamedTuple):
    """Keys that all mean one sort of layer, and the layers of the zoo that they reach."""

    keys: tuple[Any, ...]
    layers: set[str]


def zoo() -> tuple[nn.Module, Tensor]:
    """Each sort of layer, named for what fuses with it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.bn(m.conv_bn(m.conv(x)))
        x = F.relu(m.bn2(m.conv_bn_relu(x)))
        x = m.relu(m.conv_relu(x))
        x = m.relu3(m.bn3(m.up_bn_relu(x)))
        x = m.relu4(m.norm(torch.exp(x)))
        return m.linear(torch.relu(m.linear_relu(x)))

    layers: dict[str, nn.Module] = {name: conv() for name in ("conv", "conv_bn", "conv_bn_relu", "conv_relu")}
    layers |= {name: nn.BatchNorm2d(4) for name in ("bn", "bn2", "bn3", "norm")}
    layers |= {name: nn.ReLU() for name in ("relu", "relu3", "relu4")}
    layers |= {"linear": nn.Linear(8, 8), "linear_relu": nn.Linear(8, 8), "up_bn_relu": nn.ConvTranspose2d(4, 4, 1)}
    return Net(forward, **layers), image()


NAMED = {
    "Conv2d": Named(
        (nn.Conv2d, "Conv2d", "nn.Conv2d", "torch.nn.Conv2d", "Conv2d_sophgo", nnqat.Conv2d, F.conv2d, "conv2d"),
        {"conv", "conv_bn", "conv_bn_relu", "conv_relu"},
    ),
    "ConvBn2d": Named(
        (nni.ConvBn2d, nniqat.ConvBn2d, sq.patterns.ConvBn2d, sq.patterns.ConvBn2d_sophgo, "ConvBn2d", "ConvBn2d_sophgo"),
        {"conv_bn"},
    ),
    "ConvBnReLU2d": Named(
        (
            nni.ConvBnReLU2d,
            nniqat.ConvBnReLU2d,
            sq.patterns.ConvBnReLU2d,
            sq.patterns.ConvBnReLU2d_sophgo,
            "ConvBnReLU2d",
            "ConvBnReLU2d_sophgo",
            "torch.ao.nn.intrinsic.ConvBnReLU2d",
        ),
        {"conv_bn_relu"},
    ),
    "ConvReLU2d": Named(
        (nni.ConvReLU2d, nniqat.ConvReLU2d, sq.patterns.ConvReLU2d, "ConvReLU2d", "ConvReLU2d_sophgo"), {"conv_relu"}
    ),
    "Linear": Named((nn.Linear, nnqat.Linear, "Linear", "Linear_sophgo", F.linear), {"linear", "linear_relu"}),
    "LinearReLU": Named((nni.LinearReLU, nniqat.LinearReLU, sq.patterns.LinearReLU, "LinearReLU_sophgo"), {"linear_relu"}),
    "ConvTranspose2d": Named((nn.ConvTranspose2d, "ConvTranspose2d", "ConvTranspose2d_sophgo"), {"up_bn_relu"}),
    "ConvTransposeBnReLU2d": Named((sq.patterns.ConvTransposeBnReLU2d, "ConvTransposeBnReLU2d_sophgo"), {"up_bn_relu"}),
    "BnReLU2d": Named((nni.BNReLU2d, sq.patterns.BnReLU2d, "BnReLU2d_sophgo", "BNReLU2d"), {"norm"}),
}
EVERY_NAME = [
    pytest.param(key, named.layers, id=f"{sort}-{n}") for sort, named in NAMED.items() for n, key in enumerate(named.keys)
]


@pytest.mark.parametrize(("key", "layers"), EVERY_NAME)
def test_an_activation_entry_reaches_each_layer_that_its_type_key_means(key: Any, layers: set[str]) -> None:
    without = plan_of(*zoo())
    plan = plan_of(*zoo(), extra_qconfig_dict={"object_type": {key: ENTRY}})
    assert changes(without, plan) == each(layers, POST, {"fake_quantize": FIXED, "observer": MINMAX})


@pytest.mark.parametrize(("key", "layers"), EVERY_NAME)
def test_a_weight_entry_reaches_each_layer_that_its_type_key_means(key: Any, layers: set[str]) -> None:
    without = plan_of(*zoo())
    plan = plan_of(*zoo(), extra_qconfig_dict={"object_type": {key: HEAD_4}})
    assert changes(without, plan) == each(layers - {"norm"}, WEIGHT, HEAD_4_CHANGED)


def test_later_types_win_over_earlier_ones_and_names_over_types() -> None:
    both = {nn.Conv2d: {**HEAD_4, "bit": 6}, sq.patterns.ConvReLU2d: {**HEAD_4, "bit": 5}}
    named = {"conv_relu": {**HEAD_4, "bit": 7}}
    bits = [
        plan_of(*zoo(), extra_qconfig_dict=qconfig)[f"conv_relu{WEIGHT}"].scheme.bits
        for qconfig in ({"object_type": both}, {"object_type": both, "module_name": named})
    ]
    assert bits == [5, 7]


def grouped(**layers: nn.Module) -> tuple[nn.Module, Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        for layer in m.children():
            x = torch.exp(layer(x))
        return x

    return Net(forward, **layers), image()


@pytest.mark.parametrize(("half", "given"), [(WEIGHT, HEAD_4), (POST, {**ENTRY, "bit": 4})], ids=["weight", "activation"])
@pytest.mark.parametrize("groups", [2, 4])
def test_a_type_entry_leaves_grouped_convolutions_as_they_are(groups: int, half: str, given: dict[str, Any]) -> None:
    model, x = grouped(plain=conv(), own=conv(groups))
    plan = plan_of(model, x, quant_dict=BM1688, extra_qconfig_dict={"object_type": {nn.Conv2d: given}})
    assert (plan[f"plain{half}"].scheme.bits, plan[f"own{half}"].scheme.bits) == (4, 8)


def test_a_name_entry_reaches_grouped_convolutions() -> None:
    model, x = grouped(own=conv(4))
    assert plan_of(model, x, extra_qconfig_dict={"module_name": {"own": HEAD_4}})[f"own{WEIGHT}"].scheme.bits == 4


def test_a_type_entry_reaches_grouped_transposed_convolutions() -> None:
    model, x = grouped(up=nn.ConvTranspose2d(4, 4, 1, groups=2))
    assert (
        plan_of(model, x, extra_qconfig_dict={"object_type": {nn.ConvTranspose2d: HEAD_4}})[f"up{WEIGHT}"].scheme.bits == 4
    )


# Name keys


@pytest.mark.parametrize(
    ("name", "reached"),
    [
        ("layer1.conv1", {"layer1.conv1"}),
        ("layer1_conv1", {"layer1.conv1"}),
        ("layer1", {"layer1.conv1"}),
        ("layer2", {"layer2.conv1", "layer2.conv2"}),
        ("features.0", {"features.0.0"}),
        ("features_0", {"features.0.0"}),
        ("features", {"features.0.0"}),
    ],
)
def test_a_name_may_be_dotted_or_underscored_or_that_of_a_container(name: str, reached: set[str]) -> None:
    without = plan_of(*documented())
    weight = plan_of(*documented(), extra_qconfig_dict={"module_name": {name: HEAD_4}})
    assert changes(without, weight) == each(reached, WEIGHT, HEAD_4_CHANGED)
    activation = plan_of(*documented(), extra_qconfig_dict={"module_name": {name: ENTRY}})
    assert changes(without, activation) == each(reached, POST, {"fake_quantize": FIXED, "observer": MINMAX})


@pytest.mark.parametrize("order", [1, -1], ids=["container first", "container last"])
def test_an_entry_for_a_layer_wins_over_that_of_its_container(order: int) -> None:
    entries = {"layer2": {**HEAD_4, "bit": 4}, "layer2.conv1": {**HEAD_4, "bit": 5}}
    plan = plan_of(*documented(), extra_qconfig_dict={"module_name": dict(list(entries.items())[::order])})
    assert [plan[f"layer2.{layer}{WEIGHT}"].scheme.bits for layer in ("conv1", "conv2")] == [5, 4]


@pytest.mark.parametrize("spellings", [("layer1.conv1", "layer1_conv1"), ("layer1_conv1", "layer1.conv1")], ids=told)
def test_a_weight_and_an_activation_entry_for_one_layer_stand_under_its_two_spellings(spellings: tuple[str, str]) -> None:
    plan = plan_of(*documented(), extra_qconfig_dict={"module_name": dict(zip(spellings, (HEAD_4, ENTRY), strict=True))})
    assert changes(plan_of(*documented()), plan) == {
        f"layer1.conv1{WEIGHT}": HEAD_4_CHANGED,
        f"layer1.conv1{POST}": {"fake_quantize": FIXED, "observer": MINMAX},
    }


def test_an_input_is_named_as_a_layer_is() -> None:
    plan = plan_of(*documented(), extra_qconfig_dict={"module_name": {"x": ENTRY}})
    assert changes(plan_of(*documented()), plan) == {f"x{POST}": {"fake_quantize": FIXED, "observer": MINMAX}}


class Shared(nn.Module):
    """A container with two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.container = nn.ModuleDict({"b": nn.Linear(8, 8)})
        self.x = self.container

    def forward(self, x: Tensor) -> Tensor:
        return self.container["b"](x)


@pytest.mark.parametrize("name", ["container.b", "x.b"])
def test_an_entry_for_a_layer_wins_over_that_of_its_container_by_each_of_its_paths(name: str) -> None:
    entries = {name: {**HEAD_4, "bit": 5}, "container": HEAD_4}
    assert plan_of(Shared(), image(), extra_qconfig_dict={"module_name": entries})[f"container.b{WEIGHT}"].scheme.bits == 5


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_post_act_fake_quantizer", "sigmoid.post_act_fake_quantizer"])
def test_a_function_is_named_as_a_layer_is(name: str) -> None:
    plan = plan_of(*documented(), extra_qconfig_dict={"module_name": {name: ENTRY}})
    assert changes(plan_of(*documented()), plan) == {f"sigmoid{POST}": {"fake_quantize": FIXED, "observer": MINMAX}}


# Exclusions and additions


def fork() -> tuple[nn.Module, Tensor]:
    """``exp`` is read by ``a`` and ``b``."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.exp(x)
        return torch.exp(m.a(y)), torch.exp(m.b(y))

    return Net(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8)), image()


@pytest.mark.parametrize(
    ("given", "left", "layers"),
    [
        ({}, {"x", "exp", "a", "b"}, {"a", "b"}),
        ({"exclude_module_name": ["a"]}, {"x", "exp", "b"}, {"b"}),
        ({"exclude_node_name": ["a"]}, {"x", "exp", "b"}, {"a", "b"}),
        ({"exclude_function_type": [nn.Linear]}, {"x"}, {"a", "b"}),
        ({"exclude_module_name": ["a", "b"]}, {"x"}, set()),
        ({"exclude_node_name": ["a", "b"]}, {"x"}, {"a", "b"}),
        ({"exclude_node_name": ["a", "b", "x"]}, set(), {"a", "b"}),
        ({"exclude_node_name": ["exp"]}, {"x", "exp", "a", "b"}, {"a", "b"}),
    ],
    ids=told,
)
def test_an_exclusion_removes_what_that_call_asks_for_and_no_more(
    given: dict[str, Any], left: set[str], layers: set[str]
) -> None:
    plan = plan_of(*fork(), extra_quantizer_dict=given)
    assert (values(plan), values(plan, WEIGHT)) == (left, layers)


@pytest.mark.parametrize(
    "key", [sq.patterns.ConvBnReLU2d, nni.ConvBnReLU2d, nniqat.ConvBnReLU2d], ids=["pattern", "nni", "nniqat"]
)
def test_the_names_of_excluded_modules_may_be_fused_types(key: Any) -> None:
    plan = plan_of(*documented(), extra_quantizer_dict={"exclude_module_name": [key]})
    gone = each(["features.0.0", "layer1.conv1"], WEIGHT, "gone") | {f"features.0.0{POST}": "gone"}
    assert changes(plan_of(*documented()), plan) == gone


def test_an_input_that_a_convolution_reads_stays_quantized_though_it_is_excluded() -> None:
    model = Net(lambda m, x: m.conv(x), conv=conv())
    assert values(plan_of(model, image(), extra_quantizer_dict={"exclude_node_name": ["x"]})) == {"x", "conv"}


def test_an_excluded_container_keeps_its_subtree_float() -> None:
    plan = plan_of(*documented(), extra_quantizer_dict={"exclude_module_name": ["layer2"]})
    gone = each(["layer2.conv1", "layer2.conv2"], WEIGHT, "gone") | each(["layer2.conv1", "layer2.conv2"], POST, "gone")
    assert changes(plan_of(*documented()), plan) == gone


@pytest.mark.parametrize(
    "exclusion",
    [{"exclude_module_name": ["soft"]}, {"exclude_function_type": [nn.Softmax]}, {"exclude_node_name": ["soft"]}],
    ids=told,
)
@pytest.mark.parametrize(("strategy", "left"), [("CNN", {"x", "exp"}), ("Transformer", {"x", "exp"})])
def test_an_additional_node_asks_for_its_inputs_though_it_is_excluded(
    strategy: str, left: set[str], exclusion: dict[str, Any]
) -> None:
    given = {**exclusion, "additional_node_name": ["soft"]}
    plan = plan_of(*softmaxed(), quant_dict={**BASE, "strategy": strategy}, extra_quantizer_dict=given)
    assert values(plan) == left


@pytest.mark.parametrize(
    ("addition", "exclusion"),
    [
        ({"additional_module_type": (nn.Softmax,)}, {"exclude_module_name": ["soft"]}),
        ({"additional_module_type": (nn.Softmax,)}, {"exclude_node_name": ["soft"]}),
        ({"additional_function_type": [F.softmax]}, {"exclude_node_name": ["soft"]}),
    ],
    ids=told,
)
def test_an_excluded_node_of_an_additional_type_asks_for_nothing(
    addition: dict[str, Any], exclusion: dict[str, Any]
) -> None:
    assert values(plan_of(*softmaxed(), extra_quantizer_dict={**addition, **exclusion})) == {"x"}


def test_a_dropout_with_a_quantizer_of_its_own_gives_the_scale_that_rounds_the_bias() -> None:
    layers = {"table": nn.Embedding(9, 4), "norm": nn.LayerNorm(4), "drop": nn.Dropout(), "a": nn.Linear(4, 4)}
    model = Net(lambda m, x: m.a(m.drop(m.norm(m.table(x)))), **layers).eval()
    config = sq.QuantConfig(chip="BM1690", strategy="CNN")
    q = sq.quantize(model, config, example_args=(torch.arange(6)[None],))
    assert q.plan.site("a.weight_fake_quant").source == "drop.post_act_fake_quantizer"


def test_observing_a_weight_only_leaves_the_bias_unrounded() -> None:
    plan = plan_of(*two_linears(), extra_quantizer_dict={"module_only_enable_observer": ["b.weight_fake_quant"]})
    assert (plan.site(f"a{WEIGHT}").source, plan.site(f"b{WEIGHT}").source) == (f"x{POST}", "")
    assert watched(plan) == {"b.weight_fake_quant"}


def test_what_is_observed_only_passes_its_values() -> None:
    model, x = two_linears()
    everything = [f"{name}{POST}" for name in ("x", "a", "exp", "b")] + [f"{name}{WEIGHT}" for name in "ab"]
    given = {"quant_dict": BASE, "extra_quantizer_dict": {"module_only_enable_observer": everything}}
    q, params = sq.prepare_by_platform(model, given, example_args=x), sq.params_of(model)
    qparams = q.calibrate(params, [x])
    assert qparams.keys() == {*everything}
    torch.testing.assert_close(q.apply(params, qparams, x), model(x), rtol=0, atol=0)


def test_exclusions_and_observers_leave_the_callers_lists_alone() -> None:
    given = {"exclude_module_name": ["drop"]}
    plan_of(Net(lambda m, x: m.drop(m.conv(x)), drop=nn.Dropout(), conv=conv()), image(), extra_quantizer_dict=given)
    assert given == {"exclude_module_name": ["drop"]}


# Contradictions


def against(exclusion: Mapping[str, Any], **qconfig: Any) -> dict[str, Any]:
    return {"extra_qconfig_dict": qconfig, "extra_quantizer_dict": exclusion}


CONTRADICTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "weight_only with CNN": (
        {"quant_dict": {**BASE, "quantmode": "weight_only"}},
        ("quantmode", "weight_only", "CNN", "Transformer"),
    ),
    "weight_only with CNN on Academic": (
        {"quant_dict": {**BASE, "chip": "Academic", "quantmode": "weight_only"}},
        ("weight_only", "CNN"),
    ),
    "mixed bfloat16 on Academic": (
        {"quant_dict": {**BASE, "chip": "Academic", "bf16_mix_prec": True}},
        ("bf16_mix_prec", "Academic"),
    ),
    "mixed bfloat16 with weight_only": (
        {"quant_dict": {**TRANSFORMER, "quantmode": "weight_only", "bf16_mix_prec": True}},
        ("bf16_mix_prec", "weight_only"),
    ),
    "an operation that is excluded": (
        against({"exclude_module_name": ["head"]}, int8_op=["head"]),
        ("int8_op", "'head'", "exclude_module_name"),
    ),
    "an entry for weights that are excluded": (
        against({"exclude_module_name": ["head"]}, module_name={"head": HEAD_4}),
        ("module_name", "'head'", "exclude_module_name"),
    ),
    "an operation that is excluded in another spelling": (
        against({"exclude_module_name": ["layer1_conv1"]}, f16_op=["layer1.conv1"]),
        ("f16_op", "'layer1.conv1'", "exclude_module_name", "'layer1_conv1'"),
    ),
    "an operation that is excluded with its container": (
        against({"exclude_module_name": ["layer1"]}, f16_op=["layer1.conv1"]),
        ("f16_op", "'layer1.conv1'", "exclude_module_name", "'layer1'"),
    ),
    "observing a weight that is excluded": (
        against({"exclude_module_name": ["head"], "module_only_enable_observer": ["head.weight_fake_quant"]}),
        ("module_only_enable_observer", "exclude_module_name", "'head'"),
    ),
    "adding a function that is excluded": (
        against({"exclude_function_type": [F.sigmoid], "additional_function_type": [F.sigmoid]}),
        ("sigmoid", "excluded"),
    ),
    "adding a function that is excluded in another spelling": (
        against({"exclude_function_type": [F.sigmoid], "additional_function_type": [torch.sigmoid]}),
        ("sigmoid", "excluded"),
    ),
    "adding a class whose function is excluded": (
        against({"exclude_function_type": ["sigmoid"], "additional_module_type": (nn.Sigmoid,)}),
        ("Sigmoid", "excluded"),
    ),
    "adding a class that is excluded": (
        against({"exclude_module_name": [nn.Softmax], "additional_module_type": (nn.Softmax,)}),
        ("Softmax", "excluded"),
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_is_both_asked_for_and_forbidden_is_refused(name: str) -> None:
    sections, words = CONTRADICTIONS[name]
    text = refusal({"quant_dict": BASE, **sections})
    assert missing(text, *words) == [], text


def test_an_activation_entry_for_an_excluded_layer_is_no_contradiction() -> None:
    given = {"module_name": {"features.0.0": ENTRY}}
    plan = plan_of(*documented(), extra_qconfig_dict=given, extra_quantizer_dict={"exclude_module_name": ["features.0.0"]})
    assert f"features.0.0{WEIGHT}" not in plan
    assert plan[f"features.0.0{POST}"].fake_quantize == FIXED


# Further keys of the outer dictionary


def test_a_leaf_module_is_one_value_and_its_inside_none() -> None:
    sections = {"leaf_module": [Layer2], "extra_quantizer_dict": {"additional_module_type": (Layer2,)}}
    plan = plan_of(*documented(), **sections)
    assert {name for name in plan if name.startswith("layer2")} == {f"layer2{POST}"}


@pytest.mark.parametrize("key", ["additional_qat_module_mapping", "additional_qat_module_mappings"])
def test_a_mapped_layer_has_its_weight_quantized_and_answers_to_both_of_its_classes(key: str) -> None:
    for name in (Scale, QuantizedScale):
        sections = {"extra_fuse_dict": {key: {Scale: QuantizedScale}}, "extra_qconfig_dict": {"object_type": {name: HEAD_4}}}
        assert plan_of(*scaled(), **sections)[f"scale{WEIGHT}"].scheme.bits == 4


@pytest.mark.parametrize("key", ["additional_qat_module_mapping", "additional_qat_module_mappings"])
def test_a_layer_of_torch_that_the_chip_does_not_quantize_is_quantized_when_it_is_mapped(key: str) -> None:
    model = Net(lambda m, x: m.conv(x), conv=nn.Conv1d(4, 4, 1))
    plans = [
        plan_of(model, torch.randn(2, 4, 8), extra_fuse_dict=given) for given in ({}, {key: {nn.Conv1d: QuantizedScale}})
    ]
    assert [values(plan, WEIGHT) for plan in plans] == [set(), {"conv"}]


@pytest.mark.parametrize("table", ["additional_fuser_method_mapping", "additional_fusion_pattern"])
def test_a_fused_group_is_one_value_behind_its_last_member(table: str) -> None:
    parts: tuple[Any, ...] = (nn.Conv2d, nn.BatchNorm2d, nn.Sigmoid)
    key = parts if table == "additional_fuser_method_mapping" else (nn.Sigmoid, (nn.BatchNorm2d, nn.Conv2d))
    model = Net(lambda m, x: torch.exp(torch.sigmoid(m.bn(m.conv(x)))), conv=conv(), bn=nn.BatchNorm2d(4))
    plan = plan_of(model, image(), extra_fuse_dict={table: {key: fuse_nothing}})
    assert values(plan) == {"x", "conv"}
    assert plan.site(f"conv{POST}").members == ("conv", "bn", "sigmoid")
    assert plan.site(f"conv{WEIGHT}").norm == "bn"


def test_a_fused_group_answers_to_the_class_that_it_is_fused_to() -> None:
    sections = {
        "extra_fuse_dict": {"additional_fuser_method_mapping": {(nn.Conv2d, nn.Sigmoid): QuantizedScale}},
        "extra_qconfig_dict": {"object_type": {QuantizedScale: ENTRY}},
    }
    assert plan_of(*documented(), **sections)[f"layer3.conv3{POST}"].fake_quantize == FIXED


# One operation, however it is spelled


def unary(call: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> tuple[nn.Module, Tensor]:
    """An operation between two that no list holds."""
    return Net(lambda m, x: torch.exp(call(m, torch.exp(x))), **layers), torch.randn(2, 4, 4, 4)


SLOPE = torch.ones(1)
Call1 = Callable[[Any, Tensor], Tensor]
OPERATIONS: dict[str, dict[str, Call1 | nn.Module]] = {
    "sigmoid": {
        "nn": nn.Sigmoid(),
        "F": lambda m, t: F.sigmoid(t),
        "torch": lambda m, t: torch.sigmoid(t),
        "method": lambda m, t: t.sigmoid(),
        "torch_": lambda m, t: torch.sigmoid_(t),
        "method_": lambda m, t: t.sigmoid_(),
        "special": lambda m, t: torch.special.expit(t),
    },
    "tanh": {
        "nn": nn.Tanh(),
        "F": lambda m, t: F.tanh(t),
        "torch": lambda m, t: torch.tanh(t),
        "method": lambda m, t: t.tanh(),
        "method_": lambda m, t: t.tanh_(),
    },
    "add": {
        "operator": lambda m, t: t + t,
        "scalar": lambda m, t: t + 1.0,
        "reflected": lambda m, t: 1.0 + t,
        "torch": lambda m, t: torch.add(t, t),
        "method": lambda m, t: t.add(t),
        "method_": lambda m, t: t.add_(t),
        "iadd": lambda m, t: operator.iadd(t, 1.0),
    },
    "mul": {
        "operator": lambda m, t: t * 2.0,
        "reflected": lambda m, t: 2.0 * t,
        "torch": lambda m, t: torch.mul(t, t),
        "multiply": lambda m, t: torch.multiply(t, t),
        "method": lambda m, t: t.mul(t),
        "imul": lambda m, t: operator.imul(t, 2.0),
    },
    "sub": {
        "operator": lambda m, t: t - 1.0,
        "reflected": lambda m, t: 1.0 - t,
        "torch": lambda m, t: torch.sub(t, t),
        "rsub": lambda m, t: torch.rsub(t, t),
        "method_": lambda m, t: t.sub_(1.0),
    },
    "div": {
        "operator": lambda m, t: t / 2.0,
        "reflected": lambda m, t: 1.0 / t,
        "torch": lambda m, t: torch.div(t, t),
        "true_divide": lambda m, t: torch.true_divide(t, t),
        "method_": lambda m, t: t.div_(2.0),
    },
    "matmul": {
        "operator": lambda m, t: t @ t,
        "torch": lambda m, t: torch.matmul(t, t),
        "method": lambda m, t: t.matmul(t),
        "function": lambda m, t: operator.matmul(t, t),
    },
    "abs": {
        "builtin": lambda m, t: abs(t),
        "torch": lambda m, t: torch.abs(t),
        "absolute": lambda m, t: t.absolute(),
        "method_": lambda m, t: t.abs_(),
    },
    "clamp": {
        "torch": lambda m, t: torch.clamp(t, 0.0, 1.0),
        "clip": lambda m, t: torch.clip(t, 0.0, 1.0),
        "method": lambda m, t: t.clamp(0.0),
        "method_": lambda m, t: t.clamp_(0.0),
    },
    "cat": {
        "torch": lambda m, t: torch.cat([t, t], 1),
        "keyword": lambda m, t: torch.cat(tensors=(t, t), dim=1),
        "concat": lambda m, t: torch.concat([t, t]),
        "concatenate": lambda m, t: torch.concatenate([t, t]),
    },
    "max_pool2d": {
        "nn": nn.MaxPool2d(2),
        "F": lambda m, t: F.max_pool2d(t, 2),
        "torch": lambda m, t: torch.max_pool2d(t, 2),
    },
    "avg_pool2d": {"nn": nn.AvgPool2d(2), "F": lambda m, t: F.avg_pool2d(t, 2)},
    "adaptive_avg_pool2d": {"nn": nn.AdaptiveAvgPool2d(1), "F": lambda m, t: F.adaptive_avg_pool2d(t, 1)},
    "prelu": {
        "nn": nn.PReLU(),
        "F": lambda m, t: F.prelu(t, SLOPE),
        "torch": lambda m, t: torch.prelu(t, SLOPE),
    },
    "interpolate": {
        "nn": nn.Upsample(scale_factor=2),
        "nearest": nn.UpsamplingNearest2d(scale_factor=2),
        "F": lambda m, t: F.interpolate(t, scale_factor=2),
    },
    "hardswish": {"nn": nn.Hardswish(), "F": lambda m, t: F.hardswish(t), "F_": lambda m, t: F.hardswish(t, inplace=True)},
    "silu": {"nn": nn.SiLU(), "F": lambda m, t: F.silu(t), "nn_": nn.SiLU(inplace=True)},
    "selu": {"nn": nn.SELU(), "F": lambda m, t: F.selu(t), "torch_": lambda m, t: torch.selu_(t)},
    "logsigmoid": {"nn": nn.LogSigmoid(), "F": lambda m, t: F.logsigmoid(t)},
    "gelu": {"nn": nn.GELU(), "F": lambda m, t: F.gelu(t, approximate="tanh")},
    "glu": {"nn": nn.GLU(1), "F": lambda m, t: F.glu(t, 1)},
    "mish": {"nn": nn.Mish(), "F": lambda m, t: F.mish(t)},
    "hardsigmoid": {"nn": nn.Hardsigmoid(), "F": lambda m, t: F.hardsigmoid(t)},
    "gumbel_softmax": {"F": lambda m, t: F.gumbel_softmax(t, dim=1)},
    "softshrink": {"nn": nn.Softshrink(), "F": lambda m, t: F.softshrink(t)},
    "softplus": {"nn": nn.Softplus(), "F": lambda m, t: F.softplus(t)},
    "elu": {"nn": nn.ELU(), "F": lambda m, t: F.elu(t), "F_": lambda m, t: F.elu_(t)},
    "celu": {"nn": nn.CELU(), "F": lambda m, t: F.celu(t), "torch": lambda m, t: torch.celu(t)},
    "layer_norm": {
        "nn": nn.LayerNorm(4),
        "F": lambda m, t: F.layer_norm(t, (4,)),
        "torch": lambda m, t: torch.layer_norm(t, (4,)),
    },
}
"""Spellings of the operations of semantics.md 5.4 that are modules or functions."""

PASSED: dict[str, dict[str, Call1 | nn.Module]] = {
    "relu": {
        "nn": nn.ReLU(),
        "nn_": nn.ReLU(inplace=True),
        "F": lambda m, t: F.relu(t),
        "F_": lambda m, t: F.relu(t, inplace=True),
        "torch": lambda m, t: torch.relu(t),
        "torch_": lambda m, t: torch.relu_(t),
        "method": lambda m, t: t.relu(),
        "method_": lambda m, t: t.relu_(),
    },
    "relu6": {"nn": nn.ReLU6(), "F": lambda m, t: F.relu6(t)},
    "flatten": {"nn": nn.Flatten(), "torch": lambda m, t: torch.flatten(t, 1), "method": lambda m, t: t.flatten(1)},
    "dropout": {"nn": nn.Dropout(), "F": lambda m, t: F.dropout(t, training=m.training)},
}
LAYER_TYPES = {
    "Conv2d": lambda: nn.Conv2d(4, 4, 1),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 4, 1),
    "Linear": lambda: nn.Linear(4, 4),
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
}
UNLISTED: dict[str, Call1 | nn.Module] = {
    "softmax": nn.Softmax(1),
    "F.softmax": lambda m, t: F.softmax(t, 1),
    "bmm": lambda m, t: torch.bmm(t[0], t[1]),
    "mean": lambda m, t: t.mean((2, 3)),
    "Identity": nn.Identity(),
    "Conv1d": nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 4, 1)),
    "reshape": lambda m, t: t.reshape(2, -1),
}


def spelled(table: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    return [pytest.param(name, call, id=f"{name}-{how}") for name, calls in table.items() for how, call in calls.items()]


def between(name: str, call: Any) -> tuple[nn.Module, Tensor]:
    """An operation between two that no list holds; a layer has the name that a function would have."""
    return unary(lambda m, t: getattr(m, name)(t), **{name: call}) if isinstance(call, nn.Module) else unary(call)


@pytest.mark.parametrize(("name", "call"), spelled(OPERATIONS))
def test_a_listed_operation_has_input_and_result_quantized_however_it_is_spelled(name: str, call: Any) -> None:
    assert values(plan_of(*between(name, call))) == {"x", "exp", name}


@pytest.mark.parametrize("name", LAYER_TYPES)
def test_a_listed_layer_has_input_and_result_quantized(name: str) -> None:
    assert values(plan_of(*between("layer", LAYER_TYPES[name]()))) == {"x", "exp", "layer"}


@pytest.mark.parametrize(("name", "call"), spelled(PASSED))
def test_a_passed_operation_asks_for_nothing_by_itself(name: str, call: Any) -> None:
    assert values(plan_of(*between(name, call))) == {"x"}


@pytest.mark.parametrize("name", UNLISTED)
def test_an_operation_that_no_list_holds_asks_for_nothing(name: str) -> None:
    assert values(plan_of(*between("own", UNLISTED[name]))) == {"x"}


@pytest.mark.parametrize(("name", "call"), spelled(PASSED))
def test_a_result_is_quantized_behind_the_passed_operation_however_it_is_spelled(name: str, call: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.exp(x)
        y = y + y
        return torch.exp(getattr(m, name)(y) if isinstance(call, nn.Module) else call(m, y))

    assert values(plan_of(Net(forward, **({name: call} if isinstance(call, nn.Module) else {})), image())) == {
        "x",
        "exp",
        name,
    }


KEYS_OF = {
    "sigmoid": (
        nn.Sigmoid,
        F.sigmoid,
        torch.sigmoid,
        Tensor.sigmoid,
        torch.sigmoid_,
        "sigmoid",
        "torch.sigmoid",
        "Sigmoid",
        "sigmoid_",
    ),
    "tanh": (nn.Tanh, F.tanh, torch.tanh, Tensor.tanh_, "tanh", "torch.nn.functional.tanh", "nn.Tanh"),
    "add": (
        operator.add,
        operator.iadd,
        torch.add,
        Tensor.add,
        Tensor.add_,
        "add",
        "add_",
        "__add__",
        "operator.add",
        "iadd",
    ),
    "matmul": (operator.matmul, torch.matmul, Tensor.matmul, "matmul", "torch.matmul"),
    "div": (operator.truediv, torch.div, torch.true_divide, "truediv", "div"),
    "interpolate": (nn.Upsample, F.interpolate, "interpolate", "Upsample"),
    "layer_norm": (nn.LayerNorm, F.layer_norm, torch.layer_norm, "LayerNorm", "layer_norm"),
}
PAIRS = [
    pytest.param(key, name, call, id=f"{name}-{number}-{how}")
    for name, keys in KEYS_OF.items()
    for number, key in enumerate(keys)
    for how, call in OPERATIONS[name].items()
]


@pytest.mark.parametrize(("key", "name", "call"), PAIRS)
def test_every_spelling_of_a_key_excludes_every_spelling_of_the_operation(key: Any, name: str, call: Any) -> None:
    assert values(plan_of(*between(name, call), extra_quantizer_dict={"exclude_function_type": [key]})) == {"x"}


@pytest.mark.parametrize(("key", "name", "call"), PAIRS)
def test_every_spelling_of_a_key_configures_every_spelling_of_the_operation(key: Any, name: str, call: Any) -> None:
    plan = plan_of(*between(name, call), extra_qconfig_dict={"object_type": {key: ENTRY}})
    assert {value for value in values(plan) if plan[f"{value}{POST}"].fake_quantize == FIXED} == {name}


@pytest.mark.parametrize("key", [F.softmax, torch.softmax, Tensor.softmax, nn.Softmax, "softmax", "Softmax"], ids=told)
@pytest.mark.parametrize("section", ["additional_function_type", "additional_module_type"])
@pytest.mark.parametrize(
    "call",
    [nn.Softmax(1), lambda m, t: F.softmax(t, 1), lambda m, t: torch.softmax(t, 1), lambda m, t: t.softmax(1)],
    ids=["nn", "F", "torch", "method"],
)
def test_every_spelling_of_a_key_adds_every_spelling_of_the_operation(section: str, key: Any, call: Any) -> None:
    plan = plan_of(*between("softmax", call), extra_quantizer_dict={section: [key]})
    assert values(plan) == {"x", "exp", "softmax"}


# Placement of CNN and Transformer (semantics.md 5.4)


class Sets(NamedTuple):
    """A forward; what CNN quantizes, what Transformer quantizes or observes, and what of it is quantized."""

    forward: Callable[..., Any]
    cnn: str
    transformer: str
    quantized: str = ""
    layers: Callable[[], dict[str, nn.Module]] = dict
    further: tuple[Tensor, ...] = ()


def linear(*names: str) -> Callable[[], dict[str, nn.Module]]:
    return lambda: {name: nn.Linear(8, 8) for name in names}


def worked_example(m: Any, x: Tensor) -> Tensor:
    y = m.relu(m.bn(m.conv1(x)))
    z = m.bn2(m.conv2(y))
    return m.fc(m.pool(F.relu(z + y)).flatten(1))


def worked_layers() -> dict[str, nn.Module]:
    norms = {"bn": nn.BatchNorm2d(4), "bn2": nn.BatchNorm2d(4), "relu": nn.ReLU()}
    return {"conv1": conv(), "conv2": conv(), **norms, "pool": nn.AdaptiveAvgPool2d(1), "fc": nn.Linear(4, 2)}


def merged(m: Any, x: Tensor) -> Tensor:
    y = torch.exp(x)
    return torch.exp(y * y + y)


def merged_behind_relu(m: Any, x: Tensor) -> Tensor:
    y = torch.exp(x)
    return torch.exp(torch.relu(y * y) + y)


def both_kinds(m: Any, x: Tensor) -> Tensor:
    y = abs(torch.exp(x))
    return torch.exp(torch.relu(y)), torch.exp(y)


def attention(m: Any, x: Tensor) -> Tensor:
    q, k = m.q(x), m.k(x)
    return m.out(torch.matmul(F.softmax(torch.matmul(q, k.transpose(-1, -2)) * 0.5, -1), x) + x)


PLACED = {
    "the worked example": Sets(
        worked_example, "x conv1 conv2 relu_1 flatten fc", "x conv1 conv2 relu_1 flatten", "x conv1 flatten", worked_layers
    ),
    "an operation with a scalar": Sets(lambda m, x: torch.exp(x) * 2.0, "x exp mul", "x exp"),
    "a product that feeds a sum": Sets(merged, "x exp mul add", "x exp"),
    "a product that feeds a sum behind a relu": Sets(merged_behind_relu, "x exp relu add", "x exp relu"),
    "a product that feeds a difference": Sets(lambda m, x: x * x - x, "x mul sub", "x mul"),
    "a value of another's type": Sets(lambda m, x: abs(torch.exp(x).type_as(x)), "x abs", "x"),
    "a remainder": Sets(lambda m, x: abs(torch.exp(x) % 2.0), "x abs", "x"),
    "a floor division": Sets(lambda m, x: abs(torch.exp(x) // 2.0), "x abs", "x"),
    "an input with one axis": Sets(lambda m, x, v: torch.exp(x) * v, "x exp mul", "x exp", further=(torch.ones(8),)),
    "an input of integers": Sets(
        lambda m, x, v: abs(torch.exp(x)[:, v]), "x abs getitem", "x getitem", further=(torch.ones(2, 2).long(),)
    ),
    "sizes": Sets(lambda m, x: torch.exp(x).view(x.shape[0] * x.size(1), -1), "x", "x"),
    "a product with a size": Sets(lambda m, x: torch.exp(x) * x.shape[0], "x exp mul", "x exp"),
    "an input that nobody asks for": Sets(lambda m, x: torch.exp(x), "x", "x"),
    "a result that is returned": Sets(lambda m, x: abs(torch.exp(x)), "x exp abs", "x exp"),
    "a sum behind which is a relu": Sets(lambda m, x: torch.exp(F.relu(torch.exp(x) + x)), "x exp relu", "x exp"),
    "a relu and a flatten": Sets(
        lambda m, x: m.a(torch.flatten(F.relu(torch.exp(x) + x), 1)[:, :8]),
        "x exp relu getitem a",
        "x exp getitem",
        "getitem",
        linear("a"),
    ),
    "a relu, a flatten and a layer": Sets(
        lambda m, x: m.a(torch.flatten(F.relu(torch.exp(x) + x), 2)),
        "x exp relu flatten a",
        "x exp flatten",
        "flatten",
        lambda: {"a": nn.Linear(64, 2)},
    ),
    "a value with a passed user and another": Sets(both_kinds, "x exp relu abs", "x exp"),
    "a dropout between layers": Sets(
        lambda m, x: m.b(m.drop(m.a(x))),
        "x drop b",
        "x drop",
        "x drop",
        lambda: {**linear("a", "b")(), "drop": nn.Dropout()},
    ),
    "a dropout of channels": Sets(
        lambda m, x: torch.exp(m.drop(m.a(x))), "x a", "x", "x", lambda: {**linear("a")(), "drop": nn.Dropout2d()}
    ),
    "values called squeeze and qa_outputs": Sets(
        lambda m, x: (m.qa_outputs(x).squeeze(), m.qa_outputs(x).squeeze()),
        "x qa_outputs qa_outputs_1",
        "x",
        "x",
        linear("qa_outputs"),
    ),
    "layers and a product of matrices": Sets(
        attention,
        "x q k transpose matmul mul softmax matmul_1 add out",
        "x q transpose matmul softmax matmul_1 add",
        "x q transpose softmax add",
        linear("q", "k", "out"),
    ),
    "a fused linear layer": Sets(
        lambda m, x: torch.exp(torch.relu(m.a(torch.exp(x)))), "x exp a", "x exp", "exp", linear("a")
    ),
    "a fused convolution": Sets(
        lambda m, x: torch.exp(torch.relu(m.a(torch.exp(x)))), "x exp a", "x exp", "exp", lambda: {"a": conv()}
    ),
    "a deconvolution": Sets(
        lambda m, x: torch.exp(m.a(torch.exp(x))), "x exp a", "x exp", "", lambda: {"a": nn.ConvTranspose2d(4, 4, 1)}
    ),
    "a module called twice": Sets(lambda m, x: m.a(torch.exp(m.a(x))), "x a exp a_1", "x exp", "x exp", linear("a")),
    "a list of tensors": Sets(lambda m, x: torch.cat([torch.exp(x), x.exp(), x]), "x exp exp_1 cat", "x exp exp_1"),
    "a batchnorm that nothing is fused with": Sets(
        lambda m, x: torch.relu(m.a(torch.exp(x))), "x exp a", "x exp", "", lambda: {"a": nn.BatchNorm2d(4)}
    ),
}


@pytest.mark.parametrize("name", PLACED)
def test_cnn_quantizes_inputs_and_results_of_what_it_lists(name: str) -> None:
    case = PLACED[name]
    plan = plan_of(Net(case.forward, **case.layers()), (image(), *case.further))
    assert values(plan) == set(case.cnn.split())
    assert watched(plan) == set()


@pytest.mark.parametrize("name", PLACED)
def test_transformer_quantizes_inputs_of_contractions_and_observes_those_of_the_rest(name: str) -> None:
    case = PLACED[name]
    plan = plan_of(Net(case.forward, **case.layers()), (image(), *case.further), quant_dict=TRANSFORMER)
    assert values(plan) == set(case.transformer.split())
    assert values(plan) - watched(plan) == set(case.quantized.split())


@pytest.mark.parametrize("key", ["additional_function_type", "additional_module_type"])
def test_transformer_quantizes_inputs_of_an_additional_type_and_does_not_only_observe_them(key: str) -> None:
    plan = plan_of(*softmaxed(), quant_dict=TRANSFORMER, extra_quantizer_dict={key: (nn.Softmax,)})
    assert (values(plan), watched(plan)) == ({"x", "exp"}, {"x"})


class Inner(nn.Module):
    """Functions inside a module."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(torch.exp(x) + 1.0)


@pytest.mark.parametrize("name", ["inner.0.add", "inner_0_add"])
@pytest.mark.parametrize("strategy", ["CNN", "Transformer"])
def test_a_function_inside_a_module_is_excluded_by_its_path(strategy: str, name: str) -> None:
    model, quant_dict = Net(lambda m, x: m.inner(x), inner=nn.Sequential(Inner())), {**BASE, "strategy": strategy}
    plans = [
        plan_of(model, image(), quant_dict=quant_dict, extra_quantizer_dict=g) for g in ({}, {"exclude_node_name": [name]})
    ]
    asked = {"CNN": {"inner.0.exp", "inner.0.add"}, "Transformer": {"inner.0.exp"}}[strategy]
    assert [values(plan) for plan in plans] == [{"x"} | asked, {"x"}]


@pytest.mark.parametrize("strategy", ["CNN", "Transformer"])
def test_no_name_of_an_input_is_special(strategy: str) -> None:
    assert "pixel_values" in values(plan_of(Pixels(), image(), quant_dict={**BASE, "strategy": strategy}))


@pytest.mark.parametrize("name", PLACED)
def test_weight_only_quantizes_no_value(name: str) -> None:
    case = PLACED[name]
    quant_dict = {**TRANSFORMER, "quantmode": "weight_only"}
    plan = plan_of(Net(case.forward, **case.layers()), (image(), *case.further), quant_dict=quant_dict)
    assert all(name.endswith(WEIGHT) for name in plan)


# Placement of Academic (semantics.md 5.5)

ACADEMIC = {**BASE, "chip": "Academic"}


def research(m: Any, x: Tensor) -> Tensor:
    y = torch.matmul(m.a(torch.exp(m.conv(x))), torch.exp(x))
    return m.b(torch.sigmoid(y) + y)


def academic(strategy: str = "CNN", **sections: Any) -> sq.Plan:
    model = Net(research, conv=conv(), **linear("a", "b")())
    return plan_of(model, image(), **{"quant_dict": {**ACADEMIC, "strategy": strategy}, **sections})


@pytest.mark.parametrize("strategy", ["CNN", "Transformer"])
def test_academic_quantizes_inputs_of_linear_layers_and_both_sides_of_products(strategy: str) -> None:
    plan = academic(strategy)
    assert values(plan) == {"exp", "a", "exp_1", "matmul", "add"}
    assert values(plan, WEIGHT) == {"conv", "a", "b"}
    assert {plan[f"{name}{WEIGHT}"].fake_quantize for name in ("conv", "a", "b")} == {E4M3}
    assert {plan[f"{name}{WEIGHT}"].scheme.granularity for name in ("conv", "a", "b")} == {sq.PerChannel(0)}
    assert watched(plan) == set()
    assert {plan.site(f"{name}{WEIGHT}").source for name in ("conv", "a", "b")} == {""}


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({"exclude_function_type": [torch.matmul]}, {"exp", "matmul", "add"}),
        ({"exclude_node_name": ["matmul"]}, {"exp", "matmul", "add"}),
        ({"exclude_module_name": ["b"]}, {"exp", "a", "exp_1", "matmul"}),
        ({"exclude_node_name": ["b"]}, {"exp", "a", "exp_1", "matmul"}),
        ({"additional_function_type": [torch.sigmoid]}, {"exp", "a", "exp_1", "matmul", "add"}),
        ({"additional_function_type": [torch.add]}, {"exp", "a", "exp_1", "matmul", "sigmoid", "add"}),
        ({"additional_node_name": ["conv"]}, {"x", "exp", "a", "exp_1", "matmul", "add"}),
        ({"additional_module_type": (nn.Conv2d,)}, {"x", "exp", "a", "exp_1", "matmul", "add"}),
    ],
    ids=told,
)
def test_in_academic_exclusions_and_additions_speak_of_inputs(given: dict[str, Any], left: set[str]) -> None:
    assert values(academic(extra_quantizer_dict=given)) == left


@pytest.mark.parametrize("name", ["sigmoid_post_act_fake_quantizer", "sigmoid.post_act_fake_quantizer"])
def test_in_academic_an_entry_for_a_quantizer_adds_it(name: str) -> None:
    plan = academic(extra_qconfig_dict={"module_name": {name: {**ENTRY, "bit": 4}}})
    assert changes(academic(), plan) == {f"sigmoid{POST}": "new"}
    assert pieces(plan[f"sigmoid{POST}"]) == (4, "fixed", "minmax", PER_TENSOR)


@pytest.mark.parametrize("key", [nn.Linear, torch.matmul, "matmul"], ids=told)
def test_in_academic_a_type_entry_reaches_the_activations_that_are_quantized(key: Any) -> None:
    changed = changes(academic(), academic(extra_qconfig_dict={"object_type": {key: ENTRY}}))
    assert {name.endswith(POST) for name in changed} <= {True}
    assert changed


def test_in_academic_what_ought_to_be_observed_only_is() -> None:
    given = {"module_only_enable_observer": ["matmul_post_act_fake_quantizer"]}
    changed = changes(academic(), academic(extra_quantizer_dict=given))
    assert changed == {f"matmul{POST}": {"observe_only": True}}


LOW = {"w_fakequantize": "FixedFakeQuantize", "w_qscheme": {"bit": 4, "per_channel": True}, "a_qscheme": {"bit": 4}}


def bits(plan: sq.Plan) -> dict[str, int]:
    return {name: config.scheme.bits for name, config in plan.items()}


def test_in_academic_layers_that_read_an_input_or_make_the_result_have_8_bits() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(torch.exp(m.middle(torch.exp(m.first(x)))))

    model = Net(forward, **linear("first", "middle", "last")())
    assert bits(plan_of(model, image(), quant_dict=ACADEMIC, extra_qconfig_dict=LOW)) == {
        f"x{POST}": 8,
        f"first{WEIGHT}": 8,
        f"exp{POST}": 4,
        f"middle{WEIGHT}": 4,
        f"exp_1{POST}": 8,
        f"last{WEIGHT}": 8,
    }


def test_in_academic_a_first_convolution_has_8_bits_and_a_layer_behind_a_function_not() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.exp(m.b(torch.exp(m.conv(x)))) + m.a(torch.exp(x))

    plan = plan_of(Net(forward, conv=conv(), **linear("a", "b")()), image(), quant_dict=ACADEMIC, extra_qconfig_dict=LOW)
    assert bits(plan) == {f"conv{WEIGHT}": 8, f"exp{POST}": 4, f"b{WEIGHT}": 4, f"exp_2{POST}": 4, f"a{WEIGHT}": 4}


def test_in_academic_a_rule_for_a_first_layer_wins_over_its_8_bits() -> None:
    qconfig = {**LOW, "module_name": {"a": HEAD_4}}
    model = Net(lambda m, x: torch.exp(m.a(x)), **linear("a")())
    assert bits(plan_of(model, image(), quant_dict=ACADEMIC, extra_qconfig_dict=qconfig)) == {f"x{POST}": 8, f"a{WEIGHT}": 4}


# Placement of mixed bfloat16 (semantics.md 5.7)

MIXED = {**BASE, "bf16_mix_prec": True}


class Mixed(NamedTuple):
    """A forward with its layers, and what has integer and bfloat16 quantizers behind it (``y``) or before it (``>y``)."""

    forward: Callable[..., Any]
    integer: str
    bfloat: str
    layers: Callable[[], dict[str, nn.Module]]


def shared_inputs(m: Any, x: Tensor) -> Any:
    return m.a(x), m.b(x), torch.exp(x), torch.sigmoid(x)


def shared_results(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.b(y), torch.exp(y), torch.sigmoid(y)


def shared_functions(m: Any, x: Tensor) -> Any:
    y = torch.exp(x)
    return m.a(y), m.b(y), torch.sigmoid(y)


def with_layers(*names: str, **further: Callable[[], nn.Module]) -> Callable[[], dict[str, nn.Module]]:
    return lambda: {**linear(*names)(), **{name: make() for name, make in further.items()}}


MIXES = {
    "calls of a kind share a quantizer on an input": Mixed(shared_inputs, ">a a b", ">exp exp sigmoid", linear("a", "b")),
    "calls of a kind share a quantizer on a result of a layer": Mixed(
        shared_results, ">a a b", ">exp exp sigmoid", linear("a", "b")
    ),
    "calls of a kind share a quantizer on a result of a function": Mixed(
        shared_functions, ">a a b", ">exp exp sigmoid", linear("a", "b")
    ),
    "between layers there is one": Mixed(lambda m, x: m.b(m.a(x)), ">a a b", "", linear("a", "b")),
    "between functions there is one": Mixed(lambda m, x: torch.exp(torch.sigmoid(x)), "", ">sigmoid sigmoid exp", dict),
    "a relu that is fused has none before it": Mixed(
        lambda m, x: torch.exp(m.relu(m.a(x))), ">a a", ">exp exp", with_layers("a", relu=nn.ReLU)
    ),
    "a relu behind what it cannot be fused with has one before it": Mixed(
        lambda m, x: m.relu(m.pool(x)), "", ">pool pool relu", with_layers(pool=lambda: nn.MaxPool2d(2), relu=nn.ReLU)
    ),
    "a relu on an input has one before it": Mixed(lambda m, x: m.relu(x), "", ">relu relu", with_layers(relu=nn.ReLU)),
    "a dropout is looked through": Mixed(
        lambda m, x: m.b(m.drop(m.a(m.drop(x)))), ">a a b", "", with_layers("a", "b", drop=nn.Dropout)
    ),
    "a dropout beside another call is looked through": Mixed(
        lambda m, x: (m.b(m.drop(torch.exp(x))), torch.sigmoid(m.drop(x))),
        ">b b",
        ">exp exp sigmoid",
        with_layers("b", drop=nn.Dropout),
    ),
    "a value that is returned alone has no further one": Mixed(lambda m, x: (m.a(x), x), ">a a", "", linear("a")),
}


def described(plan: sq.Plan, bfloat: bool) -> set[str]:
    chosen = [name for name, config in plan.items() if (config.fake_quantize == BF16) is bfloat]
    after = {name.removesuffix(POST) for name in chosen if name.endswith(POST)}
    return after | {f">{name.removesuffix(BEFORE)}" for name in chosen if name.endswith(BEFORE)}


@pytest.mark.parametrize("name", MIXES)
def test_mixed_bfloat16(name: str) -> None:
    case = MIXES[name]
    plan = plan_of(Net(case.forward, **case.layers()), image(), quant_dict=MIXED)
    assert described(plan, False) == set(case.integer.split())
    assert described(plan, True) == set(case.bfloat.split())
    assert {config.fake_quantize for key, config in plan.items() if key.endswith(WEIGHT)} <= {LEARNABLE}


def test_mixed_bfloat16_takes_no_notice_of_the_strategy() -> None:
    sections = [{"quant_dict": {**MIXED, "strategy": strategy}} for strategy in ("CNN", "Transformer")]
    assert changes(*(plan_of(*documented(), **given) for given in sections)) == {}


def test_a_shared_quantizer_is_configured_as_the_first_of_its_layers_and_sits_before_all() -> None:
    qconfig = {"module_name": {"a": ENTRY, "b": {**ENTRY, "aobserver": "MSEObserver"}}}
    model = Net(shared_inputs, **linear("a", "b")())
    plan = plan_of(model, image(), quant_dict=MIXED, extra_qconfig_dict=qconfig)
    assert pieces(plan[f"a{BEFORE}"]) == (8, "fixed", "minmax", PER_TENSOR)
    assert [place[0] for place in plan.site(f"a{BEFORE}").places()] == ["a", "b"]
    assert {plan.site(f"{layer}{WEIGHT}").source for layer in ("a", "b")} == {f"a{BEFORE}"}


def test_a_layer_whose_own_result_is_bfloat16_is_followed_by_an_integer_quantizer_before_a_layer() -> None:
    qconfig = {"module_name": {"a": {**ENTRY, "afakequantize": "BF16FakeQuantize"}}}
    model = Net(lambda m, x: m.b(m.a(x)), **linear("a", "b")())
    plan = plan_of(model, image(), quant_dict=MIXED, extra_qconfig_dict=qconfig)
    assert plan[f"a{POST}"].fake_quantize == BF16
    assert plan[f"b{BEFORE}"].fake_quantize == LEARNABLE


def test_a_layer_whose_own_result_is_bfloat16_needs_no_second_one_before_a_function() -> None:
    qconfig = {"module_name": {"a": {**ENTRY, "afakequantize": "BF16FakeQuantize"}}}
    model = Net(lambda m, x: torch.exp(m.a(x)), **linear("a")())
    plan = plan_of(model, image(), quant_dict=MIXED, extra_qconfig_dict=qconfig)
    assert values(plan) == {"a", "exp"}
    assert values(plan, BEFORE) == {"a"}
