"""GPTQ over whole models: what it walks through, what it sees on the way, and what it refuses."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.algorithms import _walk
from sophq_func.algorithms._walk import Walk, by_input, units_of
from sophq_func.algorithms.resume import Resumed
from sophq_func.testing.models import Language, mixed
from tests.helpers import NEEDS_GROUPED_MM, Inplace, same

WEIGHT = sq.override(bits=3, granularity="per_channel", fake_quantize="fixed")
CONFIG = sq.QuantConfig(chip=None, strategy="Layers", weight=WEIGHT, activation=None)
HEAD = sq.Rule(name="head", weight=None, requests=False)


def language(blocks: int = 3, **fields: Any) -> tuple[sq.Quantized, dict[str, Tensor], dict[str, sq.QParams], list[Tensor]]:
    torch.manual_seed(0)
    model, ids = Language(blocks=blocks).eval(), torch.randint(0, 16, (6, 9))
    model.embed.weight.data = mixed(model.embed.weight.data)
    for layer in model.layers.parameters():
        layer.data *= 2  # so that what the blocks add is not small beside what they are given
    q = sq.quantize(
        model, sq.QuantConfig(chip=None, strategy="Layers", weight=WEIGHT, rules=(HEAD,), **fields), example_args=(ids,)
    )
    params, batches = sq.params_of(model), list(ids.split(2))
    return q, params, q.calibrate(params, batches, progress=False), batches


def distance(q: sq.Quantized, params: Any, qparams: Any, given: Any, batches: list[Tensor]) -> float:
    return float(sq.algorithms.contract.output_distance(q, given, params, qparams, batches))


def test_a_block_reads_what_was_written_into_after_the_block_before() -> None:
    torch.manual_seed(0)
    model, batches = Inplace().eval(), list(torch.randn(32, 4).split(8))
    q = sq.quantize(model, CONFIG, example_args=(batches[0],))
    params = sq.params_of(model)
    first, second = units_of(q, list(q.plan), None)
    walk = Walk(q, params, batches, [first, second], None)
    walk.moments(first, first.names)
    walk.leave(first)
    expected = sq.statistics(q, params, batches, progress=False)
    torch.testing.assert_close(
        walk.moments(second, second.names)["two.inner.weight_fake_quant"].mean, expected["two.inner.weight_fake_quant"].mean
    )


def test_units_are_blocks_and_weights_outside_of_them_by_what_they_read() -> None:
    q, *_ = language()
    names = [name for name in q.plan if q.plan.site(name).role == "weight"]
    units = units_of(q, names, None)
    assert [unit.path for unit in units] == ["layers.0", "layers.1", "layers.2"]
    assert [[name.split(".")[2][0] for name in group] for group in by_input(q, units[0])] == [
        ["q", "k", "v"],
        ["o"],
        ["g", "u"],
        ["d"],
    ]
    outside = units_of(q, names, "layers.1")
    assert [unit.path for unit in outside] == [""] * 4 + ["layers.1"] + [""] * 4
    assert sorted(name for unit in outside for name in unit.names) == sorted(names)
    part = q.part("layers.0")
    inner = [name for name in part.plan if part.plan.site(name).role == "weight"]
    assert [unit.path for unit in units_of(part, inner, None)] == [""] * 4


def test_a_chain_of_blocks_shows_what_runs_of_the_model_show(monkeypatch: pytest.MonkeyPatch) -> None:
    q, params, qparams, batches = language()
    chained, _ = sq.algorithms.gptq(q, params, qparams, batches, progress=False)
    taps = []
    real = Walk._tapped
    monkeypatch.setattr(Walk, "_tapped", lambda self, *args: taps.append(args[0]) or real(self, *args))
    again, _ = sq.algorithms.gptq(q, params, qparams, batches, progress=False)
    assert set(taps) == {"layers.0"}  # the others are called with what the block before returned
    monkeypatch.setattr(_walk, "_source", lambda *args: None)
    tapped, _ = sq.algorithms.gptq(q, params, qparams, batches, progress=False)
    assert set(taps) == {"layers.0", "layers.1", "layers.2"}
    same(chained, again)
    same(chained, tapped)


@pytest.mark.parametrize(
    "options", [{}, {"sweeps": 2}, {"true_sequential": True}, {"inputs": "float"}, {"order": "storage"}], ids=str
)
def test_the_model_comes_nearer_to_float_than_rounded(options: dict[str, Any]) -> None:
    q, params, qparams, batches = language()
    solved, same_qparams = sq.algorithms.gptq(q, params, qparams, batches, damping=0.01, progress=False, **options)
    same(same_qparams, qparams)
    assert distance(q, solved, qparams, params, batches) < 0.9 * distance(q, params, qparams, params, batches)


def test_each_block_sees_the_quantized_ones_before_it_and_the_float_inputs_where_asked() -> None:
    q, params, qparams, batches = language(blocks=2)
    first, _ = sq.algorithms.gptq(q, params, qparams, batches, where="layers.0", progress=False)
    both, _ = sq.algorithms.gptq(q, params, qparams, batches, progress=False)
    later, _ = sq.algorithms.gptq(q, first, qparams, batches, where="layers.1", progress=False)
    same(later, both)
    alone, _ = sq.algorithms.gptq(q, params, qparams, batches, where="layers.1", inputs="float", progress=False)
    floating, _ = sq.algorithms.gptq(q, params, qparams, batches, inputs="float", progress=False)
    names = [name for name in params if name.startswith("layers.1.")]
    same([alone[name] for name in names], [floating[name] for name in names])
    assert any(not torch.equal(alone[name], both[name]) for name in names)


def test_activations_are_quantized_as_the_plan_says() -> None:
    q, params, qparams, batches = language(activation=sq.override(bits=4))
    solved, _ = sq.algorithms.gptq(q, params, qparams, batches, progress=False)
    floating, _ = sq.algorithms.gptq(q, params, qparams, batches, inputs="float", progress=False)
    assert any(not torch.equal(solved[name], floating[name]) for name in params)


def test_a_layer_that_multiplies_nothing_is_rounded_and_one_that_is_off_stays(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4)).eval(), torch.randint(0, 9, (3, 5))
    config = sq.QuantConfig(chip=None, strategy="Layers", weight=WEIGHT, activation=None, weight_layers=(nn.Embedding,))
    q = sq.quantize(model, config, example_args=(ids,))
    params = sq.params_of(model)
    qparams = q.calibrate(params, [ids], progress=False)
    with caplog.at_level(logging.INFO, "sophq_func.algorithms"):
        solved, _ = sq.algorithms.gptq(q, params, qparams, [ids], progress=False)
    same(solved["0.weight"], q.freeze(params, qparams)[1]["0.weight"])
    assert "0.weight_fake_quant is rounded to the nearest" in caplog.text
    off = sq.enabled(qparams, {"1.weight_fake_quant": False})
    solved, _ = sq.algorithms.gptq(q, params, off, [ids], progress=False)
    same(solved["1.weight"], params["1.weight"])


def test_blocks_of_the_float_model_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, params, qparams, batches = language(activation=None)
    expected = sq.algorithms.clip(q, params, qparams, batches, progress=False)
    runs: list[object] = []
    monkeypatch.setattr(Walk, "_run", lambda self, *args: runs.append(args))
    same(sq.algorithms.clip(q, params, qparams, batches, progress=False), expected)
    assert not runs


class Products(nn.Module):
    """Heads and experts, in products that no layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.experts = nn.Parameter(torch.randn(3, 8, 8)), nn.Parameter(torch.randn(2, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("bthd,hdo->bto", x.unflatten(-1, (3, 8)), self.heads).flatten(0, 1)
        return F.grouped_mm(x, self.experts, offs=torch.tensor([len(x) // 4, len(x)], dtype=torch.int32))


@NEEDS_GROUPED_MM
def test_weights_of_einsum_and_of_experts_are_solved_for(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = Products().eval(), mixed(torch.randn(4, 16, 24))
    q = sq.quantize(model, sq.QuantConfig(chip=None, weight=WEIGHT, activation=None), example_args=(x,))
    params = sq.params_of(model)
    qparams = q.calibrate(params, [x], progress=False)
    with caplog.at_level(logging.INFO, "sophq_func.algorithms"):
        solved, _ = sq.algorithms.gptq(q, params, qparams, [x], progress=False)
    assert "rounded to the nearest" not in caplog.text
    assert distance(q, solved, qparams, params, [x]) < 0.7 * distance(q, params, qparams, params, [x])


@pytest.mark.parametrize("kind", ["fixed", "learnable", "lsq_plus", "tqt"])
def test_quantizers_that_round_to_the_nearest_are_solved_for(kind: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(16, 4).eval(), mixed(torch.randn(40, 16))
    weight = sq.override(bits=3, granularity="per_channel", fake_quantize=kind)
    q = sq.quantize(model, sq.QuantConfig(chip=None, weight=weight, activation=None), example_args=(x,))
    params = sq.params_of(model)
    qparams = q.calibrate(params, [x], progress=False)
    solved, _ = sq.algorithms.gptq(q, params, qparams, [x], progress=False)
    same(q.freeze(solved, qparams)[1]["weight"], solved["weight"])
    assert distance(q, solved, qparams, params, [x]) < distance(q, params, qparams, params, [x])


@pytest.mark.parametrize(
    "kind, match",
    [("e4m3", "cannot be solved for"), ("dorefa", "moves solved codes|cannot be solved"), ("mxfp4", "cannot be solved for")],
)
def test_others_are_refused_by_name(kind: str, match: str) -> None:
    model, x = nn.Linear(32, 4).eval(), torch.randn(8, 32)
    weight = sq.override(fake_quantize=kind)
    q = sq.quantize(model, sq.QuantConfig(chip=None, weight=weight, activation=None), example_args=(x,))
    params = sq.params_of(model)
    with pytest.raises(sq.ConfigError, match=rf"weight_fake_quant(.|\n)*({match})"):
        sq.algorithms.gptq(q, params, q.calibrate(params, [x], progress=False), [x])


@pytest.mark.parametrize("cache", [True, False])
def test_a_model_of_transformers_is_walked_block_by_block(cache: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.config.use_cache = cache
    ids = torch.randint(0, 32, (4, 7))
    head = sq.Rule(name="lm_head", weight=None, requests=False)
    q = sq.quantize(
        model,
        sq.QuantConfig(chip=None, strategy="Layers", weight=WEIGHT, activation=None, rules=(head,)),
        example_kwargs={"input_ids": ids},
    )
    params, batches = sq.params_of(model), [{"input_ids": part} for part in ids.split(2)]
    start = q.calibrate(params, batches, progress=False)
    scaled, qparams = sq.algorithms.awq(q, params, start, batches, alpha=0.5, progress=False)
    changed = {name for name in params if not torch.equal(params[name], scaled[name])}
    assert {"model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.v_proj.weight"} <= changed
    before, after = (torch.func.functional_call(model, p, (), {"input_ids": ids}).logits for p in (params, scaled))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4 * float(before.abs().max()))
    solved, _ = sq.algorithms.gptq(q, scaled, qparams, batches, progress=False)
    same(q.freeze(solved, qparams)[1], solved)


@pytest.mark.parametrize(
    "batches, match", [([], "no batches"), (torch.ones(1, 2), "cannot be used"), (None, "cannot be used")]
)
def test_data_that_is_none_is_refused(batches: Any, match: str) -> None:
    model, x = nn.Linear(2, 3).eval(), torch.ones(1, 2)
    q = sq.quantize(model, CONFIG, example_args=(x,))
    params = sq.params_of(model)
    with pytest.raises(sq.StateError, match=match):
        sq.algorithms.gptq(q, params, q.calibrate(params, [x], progress=False), batches)


def test_a_killed_run_on_float_inputs_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q, params, qparams, batches = language()
    expected, _ = sq.algorithms.gptq(q, params, qparams, batches, inputs="float", progress=False)
    path = tmp_path / "run.steps"
    keep = Resumed.keep

    def killed(self: Resumed, made: Any) -> None:
        keep(self, made)
        raise KeyboardInterrupt

    monkeypatch.setattr(Resumed, "keep", killed)
    with pytest.raises(KeyboardInterrupt):
        sq.algorithms.gptq(q, params, qparams, batches, inputs="float", checkpoint=path, progress=False)
    monkeypatch.undo()
    again, _ = sq.algorithms.gptq(q, params, qparams, batches, inputs="float", checkpoint=path, progress=False)
    same(again, expected)


def test_inputs_that_are_not_finite_are_named() -> None:
    q, params, qparams, batches = language(activation=None)
    params = {**params, "layers.1.before_mlp.weight": torch.full((8,), torch.inf)}
    with pytest.raises(sq.StateError, match=r"layers\.1\.gate_proj\.weight_fake_quant: what it multiplies is not finite"):
        sq.algorithms.gptq(q, params, qparams, batches, progress=False)
