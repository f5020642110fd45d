"""``q.tap`` shows what a run calls; ``q.part`` and ``q.blocks`` are pieces of the model that compute the same alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from tests.helpers import Digits

CNN = sq.QuantConfig(chip="BM1690", strategy="CNN")


class Block(nn.Module):
    """A residual block that writes into its input, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.relu(self.norm(self.conv(x)) * scale + x)


class Net(nn.Module):
    """Two residual blocks, a layer that is called twice, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.twice = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = block(x, scale=0.5)
        x = x.mean((2, 3))
        return self.head(self.twice(self.twice(x)))


class Case:
    """A model in eval mode, quantized and calibrated."""

    def __init__(self, model: nn.Module, config: sq.QuantConfig, *args: Any, **kwargs: Any) -> None:
        self.model, self.args, self.kwargs = model.eval(), args, kwargs
        self.q = sq.quantize(model, config, example_args=args, example_kwargs=kwargs)
        self.params = sq.params_of(model)
        self.qparams = self.q.calibrate(self.params, [args or kwargs], progress=False)

    def tapped(self, at: Any, *, stop: bool = False, quantized: bool = True) -> tuple[Any, dict[str, Any]]:
        qparams = self.qparams if quantized else None
        return self.q.tap(at, stop=stop)(self.params, qparams, *self.args, **self.kwargs)


def net(config: sq.QuantConfig = CNN) -> Case:
    torch.manual_seed(0)
    return Case(Net(), config, torch.randn(2, 3, 6, 6))


def hugging_face_resnet(config: sq.QuantConfig) -> Case:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"}
    return Case(transformers.ResNetModel(transformers.ResNetConfig(**sizes)), config, torch.randn(2, 3, 32, 32))


def llama(config: sq.QuantConfig) -> Case:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    made = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return Case(transformers.LlamaForCausalLM(made), config, input_ids=torch.randint(0, 64, (2, 8)))


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
        return
    a, b = (list(x.values()) if hasattr(x, "values") else x for x in (a, b))
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a is b


def assert_blocks_agree(case: Case, pattern: str | None, expected: list[str]) -> None:
    """Each block, given what the tap saw it called with, computes what the tap saw it return, bit for bit."""
    parts = case.q.blocks(pattern)
    roots = [part.path for part in parts]
    assert roots == expected
    for path, part in zip(roots, parts, strict=True):
        output, seen = case.tapped(path, stop=True)
        assert output is None
        (call,) = seen[path]
        assert_same(part.apply(case.params, case.qparams, *call.args, **call.kwargs), call.output)


CONFIGS = {
    "dataflow": sq.QuantConfig(),
    "CNN": CNN,
    "weights only": sq.QuantConfig(quantmode="weight_only"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_of_a_network_with_writes_in_place_compute_what_the_tap_saw(name: str) -> None:
    case = net(CONFIGS[name])
    assert_blocks_agree(case, "blocks.*", ["blocks.0", "blocks.1"])
    assert [part.path for part in case.q.blocks()] == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_of_a_resnet_compute_what_the_tap_saw(name: str) -> None:
    expected = [f"encoder.stages.{stage}.layers.{layer}" for stage in (0, 1) for layer in (0, 1)]
    assert_blocks_agree(hugging_face_resnet(CONFIGS[name]), None, expected)


@pytest.mark.parametrize("name", ["dataflow", "weights only"])
@pytest.mark.parametrize("pattern", ["model.layers.*", None])
def test_blocks_of_a_llama_compute_what_the_tap_saw(name: str, pattern: str | None) -> None:
    assert_blocks_agree(llama(CONFIGS[name]), pattern, [f"model.layers.{i}" for i in range(4)])


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_of_the_trained_digits_network_compute_what_the_tap_saw(name: str, digits: Digits) -> None:
    case = Case(digits.model, CONFIGS[name], digits.test[:64])
    assert_blocks_agree(case, None, ["layer1", "layer2"])
    assert_blocks_agree(case, "[sl]*", ["stem", "layer1", "layer2"])


def test_every_leaf_and_every_function_is_shown_where_no_quantizer_sits() -> None:
    case = net(sq.QuantConfig(weight=None, activation=None))
    output, seen = case.tapped("*")
    assert torch.equal(output, case.model(*case.args))
    assert list(seen) == [
        "x",
        "stem",
        "relu",
        "blocks.0.conv",
        "blocks.0.norm",
        "blocks.0.mul",
        "blocks.0.add",
        "blocks.0.relu",
        "blocks.0",
        "blocks.1.conv",
        "blocks.1.norm",
        "blocks.1.mul",
        "blocks.1.add",
        "blocks.1.relu",
        "blocks.1",
        "mean",
        "twice.0",
        "twice.1",
        "twice",
        "head",
    ]
    assert [len(seen[name]) for name in ("twice", "twice.0", "head")] == [2, 2, 1]
    (call,) = seen["blocks.0"]
    assert call.kwargs == {"scale": 0.5}
    assert torch.equal(call.args[0], seen["relu"][0].output), "not what the block wrote into it"


def test_the_float_model_is_tapped_without_qparams() -> None:
    case = net()
    _, seen = case.tapped(["stem", "head"], quantized=False)
    assert torch.equal(seen["stem"][0].output, case.model.stem(*case.args))
    assert torch.equal(seen["head"][0].output, case.model(*case.args))


def test_a_run_ends_behind_the_last_call_that_is_wanted() -> None:
    case = net()
    reached: list[str] = []

    class Noted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            reached.append("head")
            return super().forward(x)

    case.model.head = Noted(4, 2)
    case = Case(case.model, CNN, *case.args)
    reached.clear()
    output, seen = case.tapped("twice", stop=True)
    assert (output, len(seen["twice"]), reached) == (None, 2, [])
    case.q.apply(case.params, case.qparams, *case.args)
    assert reached == ["head"]


def test_a_model_that_catches_every_exception_does_not_catch_the_end_of_a_run() -> None:
    class Catching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self.first(x)
            except Exception:
                x = x + 1
            return self.second(x)

    torch.manual_seed(0)
    case = Case(Catching(), sq.QuantConfig(), torch.randn(3, 2))
    _, seen = case.tapped("first", stop=True)
    assert len(seen["first"]) == 1
    assert_same(case.q.apply(case.params, case.qparams, *case.args), case.tapped("second")[0])


def test_each_call_of_a_module_is_a_part_of_its_own() -> None:
    case = net(sq.QuantConfig(rules=(sq.Rule(name="twice", requests=True),)))
    _, seen = case.tapped("twice")
    for number, call in enumerate(seen["twice"]):
        part = case.q.part("twice", call=number)
        assert torch.equal(part.apply(case.params, case.qparams, *call.args), call.output)
    names = [set(case.q.part("twice", call=number).plan) for number in (0, 1)]
    assert "twice.0.weight_fake_quant" in names[0] & names[1]
    assert names[0] != names[1], "activations have a quantizer for each call"
    with pytest.raises(sq.PlanError, match="the examples call it 2 times"):
        case.q.part("twice", call=2)


def test_a_part_is_a_quantized_model() -> None:
    case = net()
    part = case.q.part("blocks.1")
    assert set(part.plan) < set(case.q.plan)
    assert all(part.plan[name] == case.q.plan[name] for name in part.plan)
    (call,) = case.tapped("blocks.1")[1]["blocks.1"]
    own = part.calibrate(case.params, [call.args], progress=False)
    assert set(own) == set(part.plan)
    for copied in (copy.deepcopy(part), pickle.loads(pickle.dumps(part)), part.eval()):
        assert torch.equal(copied.apply(case.params, case.qparams, *call.args, **call.kwargs), call.output)
    scales, rest = part.split(case.qparams)
    assert {leaf.rpartition(".")[0] for leaf in scales} <= set(part.plan)
    assert_same(sq.merge(scales, rest), {name: case.qparams[name] for name in sorted(case.qparams)})
    frozen, params = part.freeze(case.params, case.qparams)
    assert torch.equal(frozen.apply(params, case.qparams, *call.args, **call.kwargs), call.output)


def test_a_part_needs_its_own_params_and_the_scales_that_round_its_biases() -> None:
    case = net()
    part, (call,) = case.q.part("blocks.0"), case.tapped("blocks.0")[1]["blocks.0"]
    source = case.q.plan.site("blocks.0.conv.weight_fake_quant").source
    assert source and source not in part.plan
    own = {name: value for name, value in case.params.items() if name.startswith("blocks.0.")}
    needed = {name: case.qparams[name] for name in (*part.plan, source)}
    assert torch.equal(part.apply(own, needed, *call.args, **call.kwargs), call.output)
    with pytest.raises(sq.StateError, match=r"params lack 'blocks.0.norm.weight'"):
        part.apply({n: v for n, v in own.items() if n != "blocks.0.norm.weight"}, needed, *call.args)
    with pytest.raises(sq.StateError, match="qparams lacks"):
        part.apply(own, {name: case.qparams[name] for name in part.plan}, *call.args)
    with pytest.raises(sq.StateError, match="which is not in the plan"):
        part.apply(own, {**needed, "other": needed[source]}, *call.args)


def test_a_layer_whose_normalization_lies_outside_is_folded_all_the_same() -> None:
    case = net()
    (call,) = case.tapped("blocks.0.conv", quantized=True)[1]["blocks.0.conv"]
    part = case.q.part("blocks.0.conv")
    assert torch.equal(part.apply(case.params, case.qparams, *call.args), call.output)
    with pytest.raises(sq.StateError, match=r"params lack 'blocks.0.norm"):
        part.apply({n: v for n, v in case.params.items() if "norm" not in n}, case.qparams, *call.args)


def test_an_input_that_a_part_writes_into_is_not_changed() -> None:
    class Writing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    case = Case(nn.Sequential(nn.Linear(2, 2), Writing()), sq.QuantConfig(), torch.randn(3, 2))
    x = torch.ones(3, 2)
    assert torch.equal(case.q.part("1").apply(case.params, case.qparams, x), x * 2)
    assert torch.equal(x, torch.ones(3, 2))


@pytest.mark.usefixtures("in_float64")
def test_tap_and_part_go_through_transforms() -> None:
    case = net(sq.QuantConfig())
    (x,) = case.args

    weights = {name: value for name, value in case.params.items() if value.is_floating_point()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        _, seen = case.q.tap("blocks.0", stop=True)({**case.params, **weights}, case.qparams, x)
        return seen["blocks.0"][0].output.square().mean()

    gradient = torch.func.grad(loss)(weights)
    assert float(gradient["stem.weight"].abs().sum()) > 0
    assert float(gradient["head.weight"].abs().sum()) == 0
    part, (call,) = case.q.part("blocks.1"), case.tapped("blocks.1")[1]["blocks.1"]

    def one(x: Tensor) -> Tensor:
        return part.apply(case.params, case.qparams, x.unsqueeze(0), **call.kwargs)[0]

    assert torch.allclose(torch.vmap(one)(call.args[0]), call.output)


@pytest.mark.slow
@pytest.mark.usefixtures("in_float64")
def test_a_compiled_part_computes_the_same() -> None:
    case = net(sq.QuantConfig())
    part, (call,) = case.q.part("blocks.1"), case.tapped("blocks.1")[1]["blocks.1"]
    compiled = torch.compile(part.apply, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(case.params, case.qparams, *call.args, **call.kwargs), call.output)


def test_parts_survive_json() -> None:
    case = net()
    q = sq.build(case.model, sq.Plan.from_json(case.q.plan.to_json()))
    (call,) = case.tapped("blocks.0")[1]["blocks.0"]
    (again,) = [part for part in q.blocks() if part.path == "blocks.0"]
    assert torch.equal(again.apply(case.params, case.qparams, *call.args, **call.kwargs), call.output)


def test_the_cache_of_keys_and_values_is_shown_as_it_was_when_the_call_began() -> None:
    class Cache:
        def __init__(self) -> None:
            self.keys: list[Tensor] = []

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: Tensor, cache: Cache) -> Tensor:
            cache.keys.append(self.linear(x))
            return torch.cat(cache.keys)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

        def forward(self, x: Tensor) -> Tensor:
            cache = Cache()
            cache.keys.append(x)
            return self.layer(x, cache)

    case = Case(Model(), sq.QuantConfig(), torch.randn(3, 2))
    (call,) = case.tapped("layer")[1]["layer"]
    assert len(call.args[1].keys) == 1
    assert torch.equal(case.q.part("layer").apply(case.params, case.qparams, *call.args), call.output)


def test_names_are_checked_all_at_once() -> None:
    case = net()
    with pytest.raises(sq.ConfigError, match="stemm") as caught:
        case.q.tap(["stemm", "blocks.0", "haed"])
    assert "haed" in str(caught.value)
    assert "'stem'" in str(caught.value)
    with pytest.raises(sq.PlanError, match=r"blocks\.2"):
        case.q.part("blocks.2")
    with pytest.raises(sq.ConfigError, match="layers"):
        case.q.blocks("layers.*")
    with pytest.raises(sq.PlanError, match="a part of a part"):
        case.q.part("blocks.0").part("blocks.0.conv")


def test_spellings_with_underscores_and_second_paths_name_the_same_module() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    case = Case(Shared(), sq.QuantConfig(), torch.randn(3, 2))
    _, seen = case.tapped(["second"])
    assert len(seen["second"]) == 2
    assert case.q.part("second").plan == case.q.part("first").plan
    other = net()
    assert len(other.tapped("blocks_0_conv")[1]["blocks_0_conv"]) == 1
