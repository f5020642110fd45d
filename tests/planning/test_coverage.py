"""What a plan says that it leaves float: shares against sums written out, and a reason for each line."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

import sophq_func as sq
from sophq_func.core.operations import MOVES
from sophq_func.planning.coverage import SHOWN, Coverage, Left
from tests.model.test_edges import Net

CHIP = sq.QuantConfig(chip="BM1690", strategy="CNN")
R = torch.randn


class OwnForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1)


def planned(model: nn.Module, config: sq.QuantConfig, *inputs: Tensor) -> sq.Plan:
    return sq.plan(sq.trace(model.eval(), inputs), config)


def silently(model: nn.Module, config: sq.QuantConfig, *inputs: Tensor) -> sq.Plan:
    """The plan, which gives no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return planned(model, config, *inputs)


def reasons(plan: sq.Plan) -> dict[str, str]:
    return {left.name: left.reason for left in plan.coverage.left}


# shares


def test_shares_are_those_of_the_sums_written_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
    config = sq.QuantConfig(rules=(sq.Rule(name="3", weight=None),))
    found = silently(model, config, R(2, 3, 6, 6)).coverage
    conv, linear = 2 * 4 * 16 * 27, 2 * 10 * 64
    parameters = 4 * 27 + 4 + 640 + 10
    assert found.parameters == 4 * 27 / parameters
    assert found.multiplications == conv / (conv + linear)
    assert found.left == (Left("3", "Linear", linear / (conv + linear), "its weight: Rule(name='3', weight=None)"),)


def test_a_whole_plan_has_no_lines() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
    for config in (sq.QuantConfig(), CHIP, sq.QuantConfig(quantmode="weight_only"), sq.QuantConfig(activation=None)):
        found = silently(model, config, R(2, 3, 6, 6)).coverage
        assert (found.multiplications, found.left) == (1.0, ())


def test_statistics_of_norms_are_no_parameters() -> None:
    found = silently(nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)), sq.QuantConfig(), R(2, 3)).coverage
    assert found.parameters == 12 / 20


def test_the_parents_of_a_computed_weight_count_as_quantized() -> None:
    for layer in (parametrizations.weight_norm(nn.Linear(4, 3, bias=False)), parametrizations.orthogonal(nn.Linear(3, 3))):
        sizes = {name: tensor.numel() for name, tensor in layer.named_parameters()}
        found = silently(layer, sq.QuantConfig(), R(2, layer.in_features)).coverage
        of_weight = sum(size for name, size in sizes.items() if name != "bias")
        assert found.parameters == of_weight / sum(sizes.values())
        assert found.multiplications == 1.0
    forward: Callable[[Any, Tensor], Tensor] = lambda m, x: F.linear(x, (m.fc.weight * 2).contiguous())  # noqa: E731
    model = Net(forward, fc=nn.Linear(4, 3, bias=False))
    assert silently(model, sq.QuantConfig(), R(2, 4)).coverage.parameters == 1.0


def test_a_model_without_products_is_covered() -> None:
    found = silently(nn.ReLU(), sq.QuantConfig(), R(2, 3)).coverage
    assert (found.parameters, found.multiplications, found.left) == (1.0, 1.0, ())


def test_several_examples_count_together() -> None:
    model = Net(lambda m, x, wide=False: m.b(x) if wide else m.a(x), a=nn.Linear(4, 2), b=nn.Linear(4, 6))
    rule = sq.Rule(name="b", weight=None)
    examples = [sq.trace(model, (R(1, 4),)), sq.trace(model, (R(1, 4),), {"wide": True})]
    found = sq.plan(examples, sq.QuantConfig(rules=(rule,))).coverage
    assert found.multiplications == 8 / 32
    assert found.parameters == 8 / (8 + 2 + 24 + 6)
    assert [(left.name, left.share) for left in found.left] == [("b", 24 / 32)]


# reasons

LEFT: dict[str, tuple[nn.Module, tuple[Tensor, ...], sq.QuantConfig, dict[str, str]]] = {
    "a class that the strategy does not list": (
        nn.Conv1d(3, 4, 2),
        (R(2, 3, 5),),
        CHIP,
        {"conv1d": "strategy CNN quantizes no weight of Conv1d"},
    ),
    "a layer with a forward of its own": (
        nn.Sequential(OwnForward(3, 4, 3)),
        (R(2, 3, 5, 5),),
        CHIP,
        {"0.conv2d": "strategy CNN quantizes weights of layers alone, not of functions"},
    ),
    "a product that the strategy does not list": (
        Net(lambda m, a, b: torch.bmm(a.relu(), b.relu())),
        (R(2, 3, 4), R(2, 4, 3)),
        CHIP,
        {"bmm": "strategy CNN does not quantize its input relu"},
    ),
    "a function that no strategy knows": (
        Net(lambda m, a, b: torch.cdist(a, b)),
        (R(2, 3), R(4, 3)),
        sq.QuantConfig(),
        {"cdist": "no strategy knows cdist"},
    ),
    "a rule": (
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        (R(2, 4),),
        sq.QuantConfig(rules=(sq.Rule(name="0", activation=None),)),
        {"1": "its input 0: Rule(name='0', activation=None)"},
    ),
    "a rule about a call": (
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        (R(2, 4),),
        sq.QuantConfig(rules=(sq.Rule(name="1", weight=None, requests=False),)),
        {"1": "its weight: Rule(name='1', weight=None, requests=False)"},
    ),
    "the config": (nn.Linear(4, 4), (R(2, 4),), sq.QuantConfig(weight=None), {"linear": "its weight: config weight=None"}),
    "only observed": (
        nn.Linear(4, 4),
        (R(2, 4),),
        sq.QuantConfig(rules=(sq.Rule(name="weight_fake_quant", observe_only=True),)),
        {"linear": "its weight is only observed: Rule(name='weight_fake_quant', observe_only=True)"},
    ),
    "weights only": (
        Net(lambda m, x: m.fc(x) @ x.mT, fc=nn.Linear(4, 4)),
        (R(2, 4),),
        sq.QuantConfig(quantmode="weight_only"),
        {"matmul": "weights only: it multiplies two values"},
    ),
    "a leaf that the user made": (
        nn.Sequential(Net(lambda m, x: m.fc(x), fc=nn.Linear(4, 4))),
        (R(2, 4),),
        sq.QuantConfig(leaf_module=(Net,)),
        {"0": "Net is one call, whose inside is not seen (leaf_module)"},
    ),
    "an embedding": (
        nn.Embedding(5, 3),
        (torch.tensor([1, 2]),),
        sq.QuantConfig(strategy="Layers"),
        {"embedding": "strategy Layers quantizes no weight of Embedding"},
    ),
    "states": (nn.LSTM(3, 4), (R(5, 2, 3),), sq.QuantConfig(), {"lstm": "it multiplies states that it makes itself"}),
    "inside a fused pattern": (
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        (R(2, 4),),
        sq.QuantConfig(patterns=(sq.patterns.fused("CoveredTwice", nn.Linear, nn.Linear),)),
        {"1": "it is inside a fused CoveredTwice"},
    ),
    "fused, by the strategy Transformer": (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
        (R(2, 3, 4, 4),),
        sq.QuantConfig(chip="BM1690", strategy="Transformer"),
        {"0": "its input input is only observed: strategy Transformer: 0 is fused to a ConvBn2d, which is not on its list"},
    ),
    "not called": (
        Net(lambda m, x: m.a(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4)),
        (R(2, 4),),
        sq.QuantConfig(),
        {"b": "no example calls it"},
    ),
}


@pytest.mark.parametrize("why", LEFT)
def test_what_is_left_has_a_line_with_the_reason(why: str) -> None:
    model, inputs, config, expected = LEFT[why]
    graph = sq.trace(model.eval(), inputs, leaf_module=config.leaves)
    assert reasons(sq.plan(graph, config)) == expected


def test_the_states_of_a_recurrent_layer_are_a_part_of_its_products() -> None:
    found = silently(nn.LSTM(3, 4, num_layers=2), sq.QuantConfig(), R(5, 2, 3)).coverage
    of_input, in_all = 16 * 3, 16 * 3 + 3 * 16 * 4
    assert found.multiplications == pytest.approx(of_input / in_all, rel=1e-12)
    assert silently(nn.LSTM(3, 4), sq.QuantConfig(quantmode="weight_only"), R(5, 2, 3)).coverage.multiplications == 1.0


# warnings


def test_a_convolution_that_nobody_excluded_is_warned_of() -> None:
    model = nn.Sequential(OwnForward(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(200, 10))
    with pytest.warns(sq.PlanWarning, match=r"strategy CNN only 27.0 % .* 1 convolutions .* 0\.conv2d \(conv2d\)") as caught:
        planned(model, CHIP, R(2, 3, 5, 5))
    assert [warning.filename for warning in caught] == [__file__]
    excluded = sq.Rule(type=OwnForward, weight=None, requests=False)
    silently(model, sq.QuantConfig(chip="BM1690", strategy="CNN", rules=(excluded,)), R(2, 3, 5, 5))


WARNED: dict[str, tuple[nn.Module, tuple[Tensor, ...], str]] = {
    "Conv1d": (nn.Sequential(nn.Linear(8, 64), nn.Conv1d(4, 4, 1)), (R(2, 4, 8),), "1 convolutions .* 1 .Conv1d"),
    "LSTM": (nn.LSTM(3, 4), (R(5, 2, 3),), "only 0.0 % of the multiplications"),
    "attention of torch": (nn.MultiheadAttention(4, 2), (R(3, 2, 4),) * 3, "linear"),
    "products of batches": (
        Net(lambda m, a, b: torch.bmm(a.tanh(), b.softmax(0).transpose(1, 2))),
        (R(2, 3, 4), R(2, 3, 4)),
        "only 0.0 %",
    ),
}


@pytest.mark.parametrize("kind", WARNED)
def test_what_a_chip_leaves_float_is_warned_of(kind: str) -> None:
    model, inputs, words = WARNED[kind]
    with pytest.warns(sq.PlanWarning, match=words):
        planned(model, CHIP, *inputs)


def test_nothing_is_warned_of_where_the_config_asks_for_nothing() -> None:
    for config in (sq.QuantConfig(weight=None), sq.QuantConfig(weight=None, activation=None)):
        silently(nn.Linear(4, 4), config, R(2, 4))
    silently(nn.LSTM(3, 4), sq.QuantConfig(), R(5, 2, 3))


def test_a_plan_that_is_made_again_warns_again() -> None:
    plan = silently(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), sq.QuantConfig(), R(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan.override(sq.Rule(name="1", weight=None, requests=False)).coverage.multiplications == 0.5


# as text, as data


def test_the_table_ends_with_it() -> None:
    rule = sq.Rule(name="1", weight=None, activation=None)
    plan = silently(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), sq.QuantConfig(rules=(rule,)), R(2, 4))
    assert plan.table().endswith(str(plan.coverage))
    assert str(plan.coverage).splitlines()[1] == f"float: 1 (Linear, 50.0 %): its weight: {rule!r}"


def test_of_many_lines_the_text_has_the_first() -> None:
    left = tuple(Left(f"{i}", "Linear", 0.01, "why") for i in range(SHOWN + 10))
    lines = str(Coverage((0.0, 0.0), left)).splitlines()
    assert len(lines) == SHOWN + 2
    assert lines[-1] == "float: 10 more, 10.0 % of multiplications, see plan.coverage.left"


def test_it_is_stored_with_the_plan_and_has_no_part_in_the_digest() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plan = silently(model, sq.QuantConfig(rules=(sq.Rule(name="1", weight=None),)), R(3, 4))
    read = sq.Plan.from_json(plan.to_json())
    assert read.coverage == plan.coverage
    assert read.to_json() == plan.to_json()
    assert "coverage" not in plan._identity()


def of_version_3(plan: sq.Plan) -> str:
    """The text that version 3 had for a plan of weights that are used once."""
    data = json.loads(plan.to_json())
    del data["coverage"], data["excluded"]
    data["runs"] = [[[made[:4] for made in calls], scopes] for calls, scopes in data["runs"]]
    for entry in data["quantizers"]:
        if entry["site"]["kind"] == "computed weight":
            assert entry["site"].pop("more") == []
    return json.dumps({**data, "version": 3})


def test_the_coverage_of_an_older_plan_is_unknown() -> None:
    plan = silently(parametrizations.weight_norm(nn.Linear(4, 4)), sq.QuantConfig(), R(2, 4))
    old = sq.Plan.from_json(of_version_3(plan))
    assert old == plan
    assert old.digest() == plan.digest()
    assert str(old.coverage).startswith("coverage: unknown, because the plan was written by an older version")
    assert "coverage" not in old.table()
    for ask in (lambda: old.coverage.parameters, lambda: old.coverage.multiplications):
        with pytest.raises(sq.PlanError, match=r"coverage of this plan is unknown.*older version"):
            ask()
    assert sq.Plan.from_json(old.to_json()).coverage == old.coverage


def test_the_coverage_of_a_part_is_unknown() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU())
    part = sq.quantize(model, sq.QuantConfig(), example_args=R(2, 4)).part("0")
    with pytest.raises(sq.PlanError, match="part"):
        _ = part.plan.coverage.parameters


@pytest.mark.parametrize("wrong", [{"shares": [1.0]}, {"shares": [1.0, 1.0], "left": [["a", "b", 0.5, 3]]}, 7, {"left": []}])
def test_wrong_data_is_no_plan(wrong: object) -> None:
    data = json.loads(silently(nn.Linear(4, 4), sq.QuantConfig(), R(2, 4)).to_json())
    with pytest.raises(sq.ConfigError, match="holds no plan"):
        sq.Plan.from_json(json.dumps({**data, "coverage": wrong}))


# models of others


def mixtral(hf: Any, text: dict[str, int]) -> tuple[nn.Module, dict[str, Any]]:
    config = hf.MixtralConfig(**text, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    return hf.MixtralForCausalLM(config), tokens()


def gpt_oss(hf: Any, text: dict[str, int]) -> tuple[nn.Module, dict[str, Any]]:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = hf.GptOssConfig(**text, **experts, num_key_value_heads=2, head_dim=16, sliding_window=4)
    return hf.GptOssForCausalLM(config), tokens()


def qwen_moe(hf: Any, text: dict[str, int]) -> tuple[nn.Module, dict[str, Any]]:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = hf.Qwen2MoeConfig(**text, **experts, num_key_value_heads=2, shared_expert_intermediate_size=32)
    return hf.Qwen2MoeForCausalLM(config), tokens()


def mamba(hf: Any, text: dict[str, int]) -> tuple[nn.Module, dict[str, Any]]:
    config = hf.MambaConfig(vocab_size=99, hidden_size=32, state_size=8, num_hidden_layers=2)
    return hf.MambaForCausalLM(config), tokens()


def rwkv(hf: Any, text: dict[str, int]) -> tuple[nn.Module, dict[str, Any]]:
    config = hf.RwkvConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, context_length=16)
    return hf.RwkvForCausalLM(config), tokens()


def vit_mae(hf: Any, text: dict[str, int]) -> tuple[nn.Module, dict[str, Any]]:
    encoder = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = hf.ViTMAEConfig(**encoder, **decoder, intermediate_size=128, decoder_intermediate_size=64)
    return hf.ViTMAEForPreTraining(config), {"pixel_values": R(2, 3, 32, 32), "noise": torch.rand(2, 16)}


def sam(hf: Any, text: dict[str, int]) -> tuple[nn.Module, dict[str, Any]]:
    image = {"image_size": 64, "patch_size": 16}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = hf.SamVisionConfig(
        **image,
        **layers,
        hidden_size=32,
        output_channels=16,
        window_size=2,
        global_attn_indexes=[1],
        mlp_dim=64,
        num_pos_feats=8,
    )
    prompt = hf.SamPromptEncoderConfig(**image, hidden_size=16, mask_input_channels=4, num_point_embeddings=4)
    mask = hf.SamMaskDecoderConfig(**layers, hidden_size=16, mlp_dim=32, iou_head_hidden_dim=16)
    config = hf.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask)
    return hf.SamModel(config), {"pixel_values": R(1, 3, 64, 64), "input_points": 64 * torch.rand(1, 1, 2, 2)}


def unet(hf: Any, text: dict[str, int]) -> tuple[nn.Module, dict[str, Any]]:
    diffusers = pytest.importorskip("diffusers")
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    sizes = {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32, "attention_head_dim": 8}
    model = diffusers.UNet2DConditionModel(sample_size=16, norm_num_groups=8, **blocks, **sizes)
    return model, {"sample": R(2, 4, 16, 16), "timestep": torch.tensor(7), "encoder_hidden_states": R(2, 6, 32)}


def tokens() -> dict[str, Any]:
    return {"input_ids": torch.randint(5, 90, (2, 8)), "use_cache": False}


MODELS = (mixtral, gpt_oss, qwen_moe, mamba, rwkv, vit_mae, sam, unet)
TEXT = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


@pytest.mark.slow
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_every_contraction_of_a_large_model_is_quantized_or_has_its_line(make: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model, batch = make(pytest.importorskip("transformers"), TEXT)
    graph = sq.trace(model.eval(), (), batch)
    # RWKV reads what it wrote in place under an old name
    plan = sq.plan(graph, sq.QuantConfig(rules=(sq.Rule(name="*setitem*", activation=None),)))
    contractions = {node.name: node.multiplications for node in graph if node.multiplications}
    total = sum(contractions.values())
    left = {line.name: line.share for line in plan.coverage.left}
    assert plan.coverage.multiplications + sum(left.values()) == pytest.approx(1.0, abs=1e-9)
    for name, share in left.items():
        assert share == contractions.get(name, 0) / total
    calls = {call.name: call for call in plan.calls}

    def reads_a_grid(name: str) -> bool:
        """Whether one of the tensors that a call takes comes from a quantizer, and was only moved since."""
        edges = [edge for edge in plan.edges if edge.target == name]
        return any(
            edge.through or (calls[edge.source].does in {*MOVES, "Dropout"} and reads_a_grid(edge.source)) for edge in edges
        )

    for name in contractions.keys() - left.keys():
        # an embedding of positions multiplies what depends on no input
        assert reads_a_grid(name) or len(calls[name].weights) == 2
        assert calls[name].weights or calls[name].does != "Linear"
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**batch)
    unknown_to_torch = sum(n for name, n in contractions.items() if "grouped_mm" in name)
    assert 2 * (total - unknown_to_torch) == counter.get_total_flops()
