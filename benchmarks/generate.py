"""How fast bound language models generate, and whether they find the tokens of ``q.apply``.

    pip install -c constraints.txt .[test]
    python benchmarks/generate.py --json generate.json

Tiny Llama, Qwen2 and GPT-2 with random weights, 64 tokens, greedy, with a cache, one thread. Each bound model takes turns
with the float model; figures are medians of processor time, as ratios to float. ``equal`` says whether the tokens are those
of ``q.apply`` without a cache.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from measure import medians, write
from torch import Tensor, nn

import sophq_func as sq

FIXED = sq.fake_quantize.fixed()
INT8 = sq.override(bits=8, granularity=sq.PerChannel(), fake_quantize=FIXED)
TOKEN = sq.override(bits=8, symmetric=False, granularity=sq.PerToken(), dynamic=True, fake_quantize=FIXED)
STATIC = sq.override(bits=8, symmetric=False, granularity=sq.PerTensor(), fake_quantize=FIXED)
ACTIVATIONS = {"weights alone": None, "per token": TOKEN, "static": STATIC}

COMMON = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, **HEADS}
MODELS = {
    "Llama": (transformers.LlamaForCausalLM, LLAMA),
    "Qwen2": (transformers.Qwen2ForCausalLM, LLAMA),
    "GPT-2": (transformers.GPT2LMHeadModel, {"n_embd": 64, "n_layer": 2, "n_head": 4}),
}
LENGTH = 64


class Subject(NamedTuple):
    """A quantized language model and what a run takes."""

    q: sq.Quantized
    params: dict[str, Tensor]
    qparams: dict[str, sq.QParams]

    def tokens(self, prompt: Tensor) -> Tensor:
        """The most likely tokens by ``q.apply``, which sees the whole sentence each time."""
        found = prompt
        for _ in range(LENGTH):
            logits = self.q.apply(self.params, self.qparams, input_ids=found, use_cache=False).logits
            found = torch.cat([found, logits[:, -1:].argmax(-1)], dim=1)
        return found


def subject(model: nn.Module, activation: Any, prompt: Tensor) -> Subject:
    """A model with int8 weights, calibrated on the prompt."""
    config = sq.QuantConfig(strategy="Layers", weight=INT8, activation=activation)
    q = sq.quantize(model, config, example_kwargs={"input_ids": prompt})
    params = sq.params_of(model)
    return Subject(q, params, q.calibrate(params, [{"input_ids": prompt}], progress=False))


def generated(model: Any, prompt: Tensor) -> Tensor:
    """The most likely tokens by ``generate``, with a cache."""
    mask = torch.ones_like(prompt)
    tokens: Tensor = model.generate(prompt, attention_mask=mask, max_new_tokens=LENGTH, do_sample=False)
    return tokens


def rows(name: str, rounds: int) -> dict[str, dict[str, float | bool]]:
    """Time and agreement of the bound models of one architecture."""
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    model = kind(kind.config_class(**COMMON, **sizes)).eval()
    prompt = torch.randint(3, 256, (1, 8))
    found: dict[str, dict[str, float | bool]] = {}
    for label, activation in ACTIVATIONS.items():
        case = subject(model, activation, prompt)
        expected = case.tokens(prompt)
        for learn in (None, "params"):
            bound = case.q.bind(case.params, case.qparams, learn)
            equal = torch.equal(generated(bound, prompt), expected)
            key = f"{label}, {'frozen' if learn is None else 'not frozen'}"
            found[key] = {"time": round(ratio(bound, model, prompt, rounds), 2), "equal": equal}
    return found


def ratio(bound: nn.Module, model: nn.Module, prompt: Tensor, rounds: int) -> float:
    """The processor time of a bound model, in that of the float model."""
    calls = {"bound": lambda: generated(bound, prompt), "float": lambda: generated(model, prompt)}
    # the time of the one thread, of which other programs on the machine take nothing
    seconds = medians(calls, rounds, time.process_time)
    return seconds["bound"] / seconds["float"]


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        found = {}
        for name in MODELS:
            found[name] = rows(name, options.rounds)
            for key, figure in found[name].items():
                tokens = "equal" if figure["equal"] else "DIFFER"
                print(f"{name:6} {key:26} {figure['time']:5.2f} x float, tokens {tokens}", flush=True)
    if options.json:
        write(options.json, found)


if __name__ == "__main__":
    main()
