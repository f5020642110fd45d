"""A real sentence encoder, all-MiniLM-L6-v2, quantized in six ways: how near its embeddings stay, and how small it gets.

Writes ``demo_text_out/``: the table as JSON, and a picture.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from embedding_picture import draw
from minilm import Agreement, Batch, Encoder, agreement, batches, embeddings, load
from rich.console import Console
from rich.table import Table
from sentences import chosen
from terminal import bars, contents, write
from torch import Tensor, nn

import sophq_func as sq

OUT = Path("demo_text_out")

MINMAX, MSE = sq.observers.minmax(), sq.observers.mse()
FIXED = sq.fake_quantize.fixed()
INT8 = sq.override(bits=8, granularity=sq.PerChannel(), observer=MINMAX, fake_quantize=FIXED)
INT4 = sq.override(bits=4, granularity=sq.PerChannel(), observer=MSE, fake_quantize=FIXED)
GROUPS = sq.override(bits=4, symmetric=False, granularity=sq.PerGroup(axis=0, size=32), observer=MINMAX, fake_quantize=FIXED)
TOKEN = sq.override(bits=8, symmetric=False, granularity=sq.PerToken(), dynamic=True, fake_quantize=FIXED)
STATIC = sq.override(bits=8, symmetric=False, granularity=sq.PerTensor(), observer=MINMAX, fake_quantize=FIXED)
OUTLIERS = ("encoder.layer.0.output.dense", "encoder.layer.3.intermediate.dense", "encoder.layer.4.intermediate.dense")
"""3 of 36 linear layers: the inputs that cost most, each alone, on sentences to calibrate on (docs/text.md)."""


def layers(weight: Any, activation: Any, left_out: tuple[str, ...] = ()) -> sq.QuantConfig:
    """Weights of linear layers and embeddings, and the inputs of linear layers, except those that are left out."""
    rules = tuple(sq.Rule(name=name, requests=False) for name in left_out)
    return sq.QuantConfig(
        strategy="Layers", weight_layers=(nn.Embedding,), weight=weight, activation=activation, rules=rules
    )


CONFIGS: Mapping[str, sq.QuantConfig] = {
    "W8": layers(INT8, None),
    "W8A8 per token": layers(INT8, TOKEN),
    "W8A8 static": layers(INT8, STATIC),
    "W8A8 static, 3 left out": layers(INT8, STATIC, OUTLIERS),
    "W4A8 per channel": layers(INT4, TOKEN),
    "W4A8 groups of 32": layers(GROUPS, TOKEN),
}


class Outcome(NamedTuple):
    """What one configuration gave."""

    agreement: Agreement
    mib: float


class Subject(NamedTuple):
    """The float model, its parameters, and what it is calibrated on and measured with."""

    model: Encoder
    params: dict[str, Tensor]
    calibration: list[Batch]
    measured: list[Batch]


def float_mib(params: Mapping[str, Tensor]) -> float:
    """Size of the parameters in MiB."""
    return sum(p.numel() * p.element_size() for p in params.values() if p.is_floating_point()) / 2**20


def size_mib(params: Mapping[str, Tensor], plan: sq.Plan, qparams: Mapping[str, sq.QParams]) -> float:
    """The same with planned weights at their width, beside their scales (32 bits) and, if affine, zero points."""
    weights = [(plan.site(name).parameter, name) for name in plan if plan.site(name).role == "weight"]
    planned = {parameter for parameter, _ in weights}
    bits = 0
    for parameter, name in weights:
        scheme = plan[name].scheme
        beside = 32 if scheme.symmetric else 32 + scheme.bits
        bits += params[parameter].numel() * scheme.bits + qparams[name].scale.numel() * beside
    return bits / 8 / 2**20 + float_mib({name: p for name, p in params.items() if name not in planned})


def run(config: sq.QuantConfig, subject: Subject, expected: Tensor, tick: Callable[[], object]) -> Outcome:
    """Plan, calibrate, and compare the embeddings with those of the float model."""
    q = sq.quantize(subject.model, config, example_kwargs=subject.calibration[0])
    qparams = q.calibrate(subject.params, subject.calibration, progress=False)
    frozen, params = q.freeze(subject.params, qparams)
    actual = embeddings(lambda **batch: frozen.apply(params, qparams, **batch), subject.measured, tick)
    return Outcome(agreement(actual, expected), size_mib(subject.params, q.plan, qparams))


def main() -> None:
    """Run every configuration, show the table, write the folder."""
    matplotlib.use("Agg")
    console = Console()
    OUT.mkdir(exist_ok=True)
    outcomes: dict[str, Outcome] = {}
    with bars(console) as progress:
        task = progress.add_task("sentences and model", total=1)
        sentences = chosen()
        model, tokenizer = load()
        calibration, measured = (batches(tokenizer, part) for part in sentences)
        subject = Subject(model, sq.params_of(model), calibration, measured)
        progress.update(task, advance=1)
        for name in ("float", *CONFIGS):
            task = progress.add_task(name, total=len(measured))
            tick = lambda task=task: progress.update(task, advance=1)  # noqa: E731
            if name == "float":
                expected = embeddings(model, measured, tick)
                outcomes[name] = Outcome(agreement(expected, expected), float_mib(subject.params))
            else:
                outcomes[name] = run(CONFIGS[name], subject, expected, tick)
    console.print(table(outcomes, len(sentences.measure)))
    rows = {name: {**outcome.agreement._asdict(), "mib": outcome.mib} for name, outcome in outcomes.items()}
    for row in rows.values():
        del row["cosines"]
    write(OUT / "results.json", lambda path: path.write_text(json.dumps(rows, indent=1)))
    write(OUT / "cosines.png", lambda path: draw({n: (o.agreement.cosines, o.mib) for n, o in outcomes.items()}, path))
    console.print(contents(OUT))


def table(outcomes: Mapping[str, Outcome], count: int) -> Table:
    """Cosine similarity, neighbours and size of each configuration, as a table for the terminal."""
    shown = Table(title=f"{count} sentences: cosine to float, same nearest neighbour, weights")
    for name in ("configuration", "mean", "lowest", "neighbour %", "MiB", "share"):
        shown.add_column(name, justify="left" if name == "configuration" else "right", no_wrap=True)
    whole = outcomes["float"].mib
    for name, (found, mib) in outcomes.items():
        numbers = (
            f"{found.mean:.4f}",
            f"{found.lowest:.4f}",
            f"{100 * found.neighbours:.1f}",
            f"{mib:.1f}",
            f"{mib / whole:.2f}",
        )
        shown.add_row(name, *numbers)
    return shown


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
