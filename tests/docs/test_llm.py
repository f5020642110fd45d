"""The demo of the language model: whole, on a small stand-in for the model."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import sophq_func as sq
from tests.docs.pages import ROOT

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")

MODULES = ("llm", "smollm", "terminal")


class Letters:
    """A tokenizer of characters."""

    def __call__(self, text: str, verbose: bool = True) -> Any:
        return SimpleNamespace(input_ids=[3 + ord(letter) % 61 for letter in text])

    def decode(self, ids: Any) -> str:
        return "".join(chr(64 + int(i) % 61) for i in ids)


def small() -> tuple[nn.Module, Letters]:
    """A random Llama whose layers have the inputs that a group of the demo divides."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.config.use_cache = False
    return model, Letters()


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The demo, which can be imported, and is forgotten."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    yield importlib.import_module("llm")
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_the_demo_shows_each_way_and_writes_them(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "load", small)
    monkeypatch.setattr(demo, "LENGTH", 32)
    demo.main()
    rows = json.loads(Path("demo_llm_out/results.json").read_text())
    assert list(rows) == ["float", *(f"W{bits} {way}" for bits in (4, 3) for way in demo.WAYS)]
    shown = capsys.readouterr().out
    assert all(name in shown and f"{row['perplexity']:.2f}" in shown for name, row in rows.items())
    assert rows["W3 GPTQ"]["mib"] < rows["W4 GPTQ"]["mib"] < rows["float"]["mib"]
    assert all(row["perplexity"] > 1 and row["text"] for row in rows.values())


def test_scaling_at_random_leaves_the_model_as_it_is(demo: ModuleType) -> None:
    model, _ = small()
    ids = torch.randint(0, 64, (2, 9))
    before, weights = model(input_ids=ids).logits.detach(), sq.params_of(model)
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    importlib.import_module("smollm").off_grid(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=1e-4 * float(before.abs().max()))
    assert all(not torch.equal(weights[name], tensor) for name, tensor in sq.params_of(model).items() if "_proj" in name)


def test_sizes_are_those_of_codes_scales_and_zero_points(demo: ModuleType) -> None:
    model, _ = small()
    q = sq.quantize(model, demo.config(3), example_kwargs={"input_ids": torch.zeros(1, 4, dtype=torch.long)})
    params = sq.params_of(model)
    planned = sum(tensor.numel() for name, tensor in params.items() if "_proj" in name)
    others = sum(tensor.numel() for tensor in params.values()) - planned
    expected = (planned * (3 + (16 + 3) / 64) + 32 * others) / 8 / 2**20
    assert demo.size_mib(params, q.plan) == pytest.approx(expected)
