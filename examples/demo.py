"""The main job: quantize a trained network for handwritten digits in eight ways, show what each costs, run one in integers.

Writes ``demo_out/``: the plan of the fine-grained setting, a checkpoint of it, the W8A8 network and the float one as ONNX,
the tables as JSON, and two pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from digits import BATCH, Digits, Params, accuracy, batches, load, trained
from pictures import accuracy_picture, layer_picture
from qat import finetune
from rich.console import Console
from rich.table import Table
from runtime import Deployed, deploy
from terminal import bars, contents, write
from torch import Tensor

import sophq_func as sq

SEEDS = (0, 1, 2)
EPOCHS = 7
CALIBRATION_BATCHES = 4
OUT = Path("demo_out")


class Setting(NamedTuple):
    """One way to quantize: its name, the function that plans it, and whether it is trained, or reconstructed."""

    name: str
    make: Callable[[Digits, Tensor], sq.Quantized]
    trains: bool = False
    reconstructs: bool = False


def uniform(weight_bits: int, activation_bits: int, observer: sq.Spec | None = None) -> Callable[..., sq.Quantized]:
    """Everything quantized alike: symmetric weights per channel, affine activations per tensor."""
    chosen = {} if observer is None else {"observer": observer}

    def make(model: Digits, example: Tensor) -> sq.Quantized:
        config = sq.QuantConfig(
            strategy="CNN",
            weight=sq.override(bits=weight_bits, **chosen),
            activation=sq.override(bits=activation_bits, symmetric=False, **chosen),
        )
        return sq.quantize(model, config, example_args=(example,))

    return make


def fine_grained(model: Digits, example: Tensor) -> sq.Quantized:
    """The three dictionaries: 4 bits but for the first and last layer, one fused type, one module, one quantizer."""
    eight_weight = {"mode": "weight", "bit": "8", "wfakequantize": "LearnableFakeQuantize", "wobserver": "MinMaxObserver"}
    eight_activation = {
        "mode": "activation",
        "bit": "8",
        "afakequantize": "LearnableFakeQuantize",
        "aobserver": "EMAMinMaxObserver",
    }
    four = {"bit": 4, "symmetry": True, "per_channel": True, "pot_scale": False}
    dictionaries: dict[str, Any] = {
        "quant_dict": {"chip": "BM1688", "quantmode": "weight_activation", "strategy": "CNN"},
        "extra_qconfig_dict": {
            "w_qscheme": four,
            "a_qscheme": {**four, "symmetry": False, "per_channel": False},
            "a_observer": "MSEObserver",
            "object_type": {"ConvBn2d_sophgo": eight_activation},
            "module_name": {
                "stem.0": {**eight_weight, "wperchannel": True},
                "x_post_act_fake_quantizer": eight_activation,
                "head": {**eight_weight, "wperchannel": True},
                "head_post_act_fake_quantizer": eight_activation,
            },
        },
        "extra_quantizer_dict": {
            "exclude_module_name": ["layer2.shortcut"],
            "module_only_enable_observer": ["flatten_post_act_fake_quantizer"],
        },
    }
    return sq.prepare_by_platform(model, dictionaries, example_args=(example,))


SETTINGS = (
    Setting("W8A8 PTQ", uniform(8, 8)),
    Setting("W4A4 PTQ (min/max)", uniform(4, 4, sq.observers.minmax())),
    Setting("W4A4 PTQ (MSE)", uniform(4, 4, sq.observers.mse())),
    Setting("W4A4 QAT (LSQ)", uniform(4, 4, sq.observers.mse()), trains=True),
    Setting("W2A4 PTQ (MSE)", uniform(2, 4, sq.observers.mse())),
    Setting("W2A4 PTQ (BRECQ)", uniform(2, 4, sq.observers.mse()), reconstructs=True),
    Setting("W2A4 QAT (LSQ)", uniform(2, 4, sq.observers.mse()), trains=True),
    Setting("fine-grained QAT", fine_grained, trains=True),
)


def size_kib(params: Params, plan: sq.Plan | None) -> float:
    """Size of the parameters in KiB: planned weights at their width, all others at 32 bits."""
    bits = {plan.site(n).parameter: c.scheme.bits for n, c in plan.items() if not c.observe_only} if plan else {}
    return sum(p.numel() * bits.get(name, 32) for name, p in params.items() if p.is_floating_point()) / 8 / 1024


class Outcome(NamedTuple):
    """What one setting gave for one seed."""

    q: sq.Quantized
    params: Params
    qparams: dict[str, sq.QParams]
    accuracy: float


def run(setting: Setting, model: Digits, seed: int, tick: Callable[[], object]) -> Outcome:
    """Plan, calibrate, train or reconstruct if the setting says so, and test."""
    x, y, test_x, test_y = load(seed)
    q, params = setting.make(model, x[:2]), sq.params_of(model)
    calibration = [images for images, _ in batches(x, y, seed)][:CALIBRATION_BATCHES]
    qparams = q.calibrate(params, calibration, progress=False)
    if setting.trains:
        params, qparams = finetune(q, params, qparams, x, y, epochs=EPOCHS, seed=seed, tick=tick)
    else:
        if setting.reconstructs:  # without labels
            params, qparams = sq.algorithms.brecq(q, params, qparams, calibration, progress=False)
        tick()
    return Outcome(q, params, qparams, accuracy(lambda images: q.apply(params, qparams, images), test_x, test_y))


def main() -> None:
    """Run every setting for every seed, show the table, write the folder."""
    matplotlib.use("Agg")
    console = Console()
    OUT.mkdir(exist_ok=True)
    results: dict[str, list[float]] = {"float": []}
    sizes: dict[str, float] = {}
    outcomes: dict[str, Outcome] = {}
    with bars(console) as progress:
        for seed in SEEDS:
            task = progress.add_task(f"seed {seed}: train in float", total=1)
            model = trained(seed)
            params = sq.params_of(model)
            *_, test_x, test_y = load(seed)
            results["float"].append(accuracy(model, test_x, test_y))
            sizes["float"] = size_kib(params, None)
            progress.update(task, advance=1)
            task = progress.add_task(f"seed {seed}: quantize", total=sum(EPOCHS if s.trains else 1 for s in SETTINGS))
            for setting in SETTINGS:
                progress.update(task, description=f"seed {seed}: {setting.name}")
                outcome = run(setting, model, seed, lambda task=task: progress.update(task, advance=1))
                results.setdefault(setting.name, []).append(outcome.accuracy)
                sizes[setting.name] = size_kib(params, outcome.q.plan)
                outcomes[setting.name] = outcome
            progress.update(task, description=f"seed {seed}: done")
        task = progress.add_task("ONNX Runtime: W8A8", total=1)
        torch.set_num_threads(1)  # what is timed takes a millisecond: too short to share
        q, params, qparams, _ = outcomes["W8A8 PTQ"]
        deployed = deploy(model, q, params, qparams, test_x, test_y, OUT / "w8a8.onnx")
        progress.update(task, advance=1)
    console.print(table(results, sizes))
    console.print(runtime_table(deployed))
    rows = {name: {"accuracy": values, "size_kib": sizes[name]} for name, values in results.items()}
    write(OUT / "results.json", lambda path: path.write_text(json.dumps(rows, indent=1)))
    write(OUT / "runtime.json", lambda path: path.write_text(json.dumps(deployed._asdict(), indent=1)))
    write(OUT / "accuracy.png", lambda path: accuracy_picture(results, sizes, path))
    write_setting(outcomes["fine-grained QAT"], test_x)
    console.print(contents(OUT))


def write_setting(outcome: Outcome, x: Tensor) -> None:
    """Plan, checkpoint, and the picture of each quantizer on some images."""
    q, params, qparams, _ = outcome
    write(OUT / "plan.json", lambda path: path.write_text(q.plan.to_json()))
    sq.save(OUT / "fine_grained.safetensors", plan=q.plan, qparams=qparams, params=params)
    found = sq.fidelity(q, params, qparams, x)
    write(OUT / "layers.png", lambda path: layer_picture(q.plan, found, path))


def table(results: dict[str, list[float]], sizes: dict[str, float]) -> Table:
    """Accuracy and size of each setting, as a table for the terminal."""
    shown = Table(title=f"Test accuracy on handwritten digits, {len(SEEDS)} seeds")
    for name in ("setting", "mean %", "lowest", "highest", "vs float", "KiB"):
        shown.add_column(name, justify="left" if name == "setting" else "right", no_wrap=True)
    base = sum(results["float"]) / len(SEEDS)
    for name, values in results.items():
        mean = sum(values) / len(values)
        numbers = (f"{mean:.2f}", f"{min(values):.2f}", f"{max(values):.2f}", f"{mean - base:+.2f}", f"{sizes[name]:.1f}")
        shown.add_row(name, *numbers)
    return shown


def runtime_table(found: Deployed) -> Table:
    """The W8A8 network of the last seed in ONNX Runtime, as a table for the terminal."""
    small, large = found.kib
    shown = Table(title=f"The last seed as ONNX: {small:.0f} KiB, float {large:.0f} KiB")
    for name in ("run by", "accuracy %", f"ms for {BATCH}, one thread"):
        shown.add_column(name, justify="left" if name == "run by" else "right", no_wrap=True)
    for name, milliseconds in found.milliseconds.items():
        shown.add_row(name, f"{found.accuracy[name]:.2f}", f"{milliseconds:.2f}")
    same = f"{found.same} of {found.total} predictions are those of q.apply"
    shown.caption = f"{same},\noutputs at most {found.steps:.2f} steps of their grid apart"
    return shown


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
