"""A real language model, SmolLM2-135M, at 4 and 3 bits: rounded, scaled and clipped (AWQ), and solved (GPTQ).

Writes ``demo_llm_out/results.json``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from smollm import continued, load, perplexity, sequences
from terminal import bars, contents, write
from torch import Tensor

import sophq_func as sq

OUT = Path("demo_llm_out")
START = "The capital of France is Paris, and its most famous museum is"
LENGTH, CALIBRATE, MEASURE = 512, 4, 8
"""Tokens of a sequence, sequences to calibrate on, and others to measure."""

GROUP = 64
"""Inputs that share a scale: a divisor of 576 and 1536, the inputs of the layers."""

WAYS: Mapping[str, tuple[str, ...]] = {"rounding": (), "AWQ + clip": ("awq", "clip"), "GPTQ": ("gptq",)}
"""By name, which of ``sq.algorithms`` are used, in order."""


class Outcome(NamedTuple):
    """What one way gave: perplexity, MiB, seconds, and how it continues a sentence."""

    perplexity: float
    mib: float
    seconds: float
    text: str


class Subject(NamedTuple):
    """The model, its tokenizer, and sequences."""

    model: Any
    tokenizer: Any
    params: dict[str, Tensor]
    calibrate: list[dict[str, Tensor]]
    measure: list[Tensor]


def config(bits: int) -> sq.QuantConfig:
    """Weights of the linear layers in groups; the table of words, which is the head, too, stays as it is."""
    weight = sq.override(
        bits=bits, symmetric=False, granularity=sq.PerGroup(GROUP), observer="minmax", fake_quantize="fixed"
    )
    head = sq.Rule(name="lm_head", weight=None, requests=False)
    return sq.QuantConfig(chip=None, strategy="Layers", weight=weight, activation=None, rules=(head,))


def size_mib(params: Mapping[str, Tensor], plan: sq.Plan) -> float:
    """Weights in MiB: float32, or codes and for each group a scale of 16 bits and a zero point."""
    bits = dict.fromkeys(params, 32.0)
    for name in plan:
        width = plan[name].scheme.bits
        bits[plan.site(name).parameter] = width + (16 + width) / GROUP
    return sum(bits[name] * tensor.numel() for name, tensor in params.items()) / 8 / 2**20


def measured(subject: Subject, logits: Callable[[Tensor], Tensor], mib: float, seconds: float) -> Outcome:
    """Perplexity and continuation of a function from tokens to logits."""
    text = continued(logits, subject.tokenizer, START, 12)
    return Outcome(perplexity(logits, subject.measure), mib, seconds, text)


def run(bits: int, names: tuple[str, ...], subject: Subject) -> Outcome:
    """Plan, calibrate, improve, and measure."""
    began = time.perf_counter()
    q = sq.quantize(subject.model, config(bits), example_kwargs=subject.calibrate[0])
    params, qparams = subject.params, q.qparams(subject.params, q.init(subject.params))  # weights alone: no batches
    for name in names:
        improve = getattr(sq.algorithms, name)
        params, qparams = improve(q, params, qparams, subject.calibrate, progress=False)
    seconds = time.perf_counter() - began
    frozen, baked = q.freeze(params, qparams)
    logits = lambda ids: frozen.apply(baked, qparams, input_ids=ids).logits  # noqa: E731
    return measured(subject, logits, size_mib(subject.params, q.plan), seconds)


def main() -> None:
    """Run every way at 4 and 3 bits, show the table, write the folder."""
    console = Console()
    OUT.mkdir(exist_ok=True)
    outcomes: dict[str, Outcome] = {}
    with bars(console) as progress:
        task = progress.add_task("model and text", total=1)
        model, tokenizer = load()
        calibrate, measure = sequences(tokenizer, LENGTH, CALIBRATE, MEASURE)
        batches = [{"input_ids": ids} for ids in calibrate]
        subject = Subject(model, tokenizer, sq.params_of(model), batches, measure)
        whole = sum(tensor.numel() for tensor in subject.params.values()) * 4 / 2**20
        outcomes["float"] = measured(subject, lambda ids: model(input_ids=ids).logits, whole, 0.0)
        progress.update(task, advance=1)
        for bits in (4, 3):
            for way, names in WAYS.items():
                task = progress.add_task(f"W{bits} {way}", total=1)
                outcomes[f"W{bits} {way}"] = run(bits, names, subject)
                store(outcomes)  # after each, as a run takes minutes and may be stopped
                progress.update(task, advance=1)
    console.print(table(outcomes))
    for name, outcome in outcomes.items():
        console.print(f"[bold]{name}[/bold]: {outcome.text}")
    console.print(contents(OUT))


def store(outcomes: Mapping[str, Outcome]) -> None:
    """Write what there is so far."""
    rows = {name: outcome._asdict() for name, outcome in outcomes.items()}
    write(OUT / "results.json", lambda path: path.write_text(json.dumps(rows, indent=1)))


def table(outcomes: Mapping[str, Outcome]) -> Table:
    """Perplexity, size and time of each way, as a table for the terminal."""
    shown = Table(title=f"SmolLM2-135M, groups of {GROUP}, {MEASURE} sequences of {LENGTH} tokens")
    for name in ("weights", "perplexity", "MiB", "seconds"):
        shown.add_column(name, justify="left" if name == "weights" else "right", no_wrap=True)
    for name, outcome in outcomes.items():
        shown.add_row(name, f"{outcome.perplexity:.2f}", f"{outcome.mib:.0f}", f"{outcome.seconds:.0f}")
    return shown


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
