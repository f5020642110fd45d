"""Write ``docs/numerics.md`` and its pictures: every observer, fake quantizer and number format, when to use which.

``python benchmarks/numerics_page.py``; with ``--keep-costs`` the figures of the last run stay, and only text and pictures
are made again. What the docstrings say is rendered from them (:mod:`numerics_text`); here stands what they do not say.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from measure import write
from numerics_costs import ACTIVATION, MATRIX, ROUNDS, SLOW, SLOW_ROUNDS, WEIGHT, observer_costs, quantizer_costs
from numerics_pictures import CASES, pictures
from numerics_text import MAKERS, body, format_rows, grid, link, maker, merges, source, wrap

from sophq_func.core.registry import Factories
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, OBSERVERS

ROOT = Path(__file__).parent.parent
PAGE, PICTURES = ROOT / "docs" / "numerics.md", ROOT / "docs" / "pictures"
FIGURES = Path(__file__).with_suffix(".json")

OBSERVER_USE = {
    "minmax": "weights of 8 bits; activations whose extremes matter",
    "ema_minmax": "activations over many batches, where no single extreme shall decide",
    "mse": "weights, above all of 4 bits and fewer",
    "ema_mse": "activations of 4 bits and fewer",
    "clip_std": "bell-shaped tensors with outliers; cheap",
    "lsq": "the start of a learned step, with `learnable`",
    "lsq_plus": "the start of a learned step and offset, with the fake quantizer `lsq_plus`",
    "percentile": "outliers, where the share to cut is known; data in shards",
    "kld": "8-bit activations, as TensorRT calibrates; data in shards",
    "minmax_floor": "chips that want powers of two: weights, one tensor",
    "pot_mode": "chips that want powers of two: activations, many batches",
    "histogram": "8-bit activations, as PyTorch calibrates",
    "ema_quantile": "activations with rare outliers, over many batches",
    "absmax": "a range symmetric about 0 on any grid",
    "rms": "bell-shaped tensors of low bits, whose outliers do not matter; data in shards",
    "fixed_range": "softmax, sigmoid, tanh, or a range that a chip prescribes",
}
QUANTIZER_USE = {
    "fixed": "calibration without training",
    "learnable": "training with learned steps, above all at 4 bits and fewer; what the chips start with",
    "lsq_plus": "training with learned steps and offsets: activations that are not centred",
    "pact": "training with a learned clipping bound, behind ReLU",
    "tqt": "training for chips that want powers of two",
    "dorefa": "training of weights at very few bits, without calibration",
    "dsq": "training with a gradient that knows the grid",
    "adaround": "weights after training: learn up or down, layer by layer",
    "qdrop": "activations while `adaround` learns; flat minima",
    "e4m3": "8-bit floats: weights and activations, outliers included",
    "e5m2": "8-bit floats with a wider range, one bit less precise",
    "fp16": "values that stay in half precision",
    "bf16": "values that stay in bfloat16, the range of float32",
    "fp4": "4- and 6-bit weights from a table, with calibrated scales",
    "fpxgroup": "4- and 6-bit tensors from a table, with scales from groups of the tensor at hand",
    "nnie": "chips with a logarithmic grid",
    "mxfp8": "hardware with MX: 8-bit weights and activations",
    "mxfp6": "hardware with MX: between 8 and 4 bits",
    "mxfp4": "hardware with MX: 4-bit weights",
    "mxint8": "hardware with MX: integers, more precise near the largest of a block",
    "nvfp4": "hardware with NVFP4: finer blocks and scales than `mxfp4`",
    "gptq": "weights of linear layers after training, from calibration data, without a gradient",
    "gptqfp4": "as `gptq`, onto a 4-bit table",
}
CAPTIONS = {
    "adaround": "`alpha` is what `init` makes of each `x`: soft rounding gives it back, hard takes the nearer code.",
    "qdrop": "A point for each of some random numbers.",
    "dsq": "The output is the same; the smaller `alpha`, the more the gradient knows of the grid.",
    "gptq": "The weight of the second of two inputs that correlate by 0.9, where the first weight was exact, "
    "and where it lost 0.4: the second makes up for it.",
    "gptqfp4": "As for `gptq`.",
    "mxfp6": "With the same largest value the scale of E2M3 is 4, that of E3M2 1.",
}
SOURCES = {
    "mxfp6": "OCP MX v1.0",
    "mxfp4": "OCP MX v1.0",
    "mxint8": "OCP MX v1.0",
    "e5m2": "OCP OFP8",
    "fpxgroup": "as `fp4`",
    "gptqfp4": "as `gptq`",
    "histogram": "PyTorch",
    "kld": "TensorRT, 2017",
}
"""Where the docstring refers to another one, or to no paper."""

Figures = dict[str, Any]


def said(table: dict[str, Any], name: str) -> Any:
    """What a table of this script says of a piece; an error that names the table's purpose where it says nothing."""
    if name not in table:
        raise ValueError(
            f"{name}: say in benchmarks/numerics_page.py when to use it, in numerics_pictures.py how to show it"
        )
    return table[name]


def ordered(table: dict[str, str], registry: Factories) -> list[str]:
    """All names of a registry, in the order of a table of this script."""
    for name in registry:
        said(table, name)
    return sorted(registry, key=list(table).index)


def ratio(value: float) -> str:
    """A number of copies, in two digits."""
    if value < 0.95:
        return "< 1"
    return f"{value:.1f}" if value < 9.95 else f"{float(f'{value:.2g}'):,.0f}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table."""
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows), ""]


def observer_row(name: str, costs: Figures) -> list[str]:
    """What to know about an observer at a glance."""
    found = [ratio(costs[name][f"{step} per {where}"]) for step in ("update", "qparams") for where in ("tensor", "channel")]
    origin = SOURCES.get(name) or source(name, "observer")
    return [link(name, "observer"), said(OBSERVER_USE, name), "yes" if merges(name) else "no", origin, *found]


def quantizer_row(name: str, costs: Figures) -> list[str]:
    """What to know about a fake quantizer at a glance."""
    learned = ", ".join(f"`{leaf}`" for leaf in FAKE_QUANTIZERS.get(name).build().learnable)
    origin = SOURCES.get(name) or source(name, "fake quantizer")
    return [
        link(name, "fake quantizer"),
        said(QUANTIZER_USE, name),
        learned,
        origin,
        *(ratio(costs[name][step]) for step in ("forward", "both")),
    ]


def introduction(figures: Figures) -> list[str]:
    """What this page is, and how its costs were measured."""
    host = figures["machine"]
    version = host["torch"].partition("+")[0]
    costs = (
        f"*Costs* are in copies (`clone`) of the tensor: medians of {ROUNDS} interleaved rounds, {SLOW_ROUNDS} of what",
        f"takes more than {SLOW:g} s, on one thread of a {host['cores']}-core {host['machine']} machine, torch {version}.",
        f"Default options, 8 bits, symmetric, float32; per tensor {shown(ACTIVATION)}, per channel {shown(WEIGHT)},",
        f"`gptq` and `gptqfp4` {shown(MATRIX)}.",
    )
    return [
        "# Observers, fake quantizers and number formats",
        "",
        "Made by `python benchmarks/numerics_page.py`: texts are those of the docstrings, options come from the registries,",
        "pictures from running the code. Sections: [observers](#observers), [fake quantizers](#fake-quantizers),",
        "[number formats](#number-formats), and [the integer grid](#the-integer-grid) that most of them share.",
        "",
        "`x` is the tensor, `s` the scale, `z` the zero point, `n` and `p` (`qmin` and `qmax`) the smallest and the largest",
        "code, `bits` their width: see `sq.QScheme`. A piece is chosen by its name or one of its other names, in a config",
        "as `sq.observers.mse(p=2.4)` and `sq.fake_quantize.learnable()`, alone as `sq.observer(\"mse\", p=2.4)`.",
        "",
        wrap(" ".join(costs)),
        "",
    ]  # fmt: skip


def shown(size: tuple[int, ...]) -> str:
    """A shape in words."""
    return " x ".join(map(str, size))


def choice(figures: Figures) -> list[str]:
    """Which to use when."""
    observers, quantizers = figures["rows"]["observers"], figures["rows"]["fake quantizers"]
    heads = ["observer", "for", "merges", "source", "update, tensor", "channel", "qparams, tensor", "channel"]
    others = ["fake quantizer", "for", "learned", "source", "forward", "with backward"]
    return [
        "## When to use which",
        "",
        "An observer says which range a grid covers:",
        "",
        *table(heads, [observer_row(name, observers) for name in ordered(OBSERVER_USE, OBSERVERS)]),
        "A fake quantizer says how values get onto the grid, and which gradient comes back:",
        "",
        *table(others, [quantizer_row(name, quantizers) for name in ordered(QUANTIZER_USE, FAKE_QUANTIZERS)]),
    ]


def observer_sections(costs: Figures) -> list[str]:
    """All observers."""
    lines = [
        "## Observers",
        "",
        "What each one, with its default options, makes of the same data. With 4096 values in a batch the default",
        "`threshold` of `ema_quantile` cuts nothing; power-of-two steps have the zero point 0, and an affine grid then",
        "nothing below it.",
        "",
        "![The range that each observer picks](pictures/observers.png)",
        "",
    ]
    for name in ordered(OBSERVER_USE, OBSERVERS):
        found = {key: ratio(value) for key, value in costs[name].items()}
        per = [f"{step} {found[f'{step} per tensor']} and {found[f'{step} per channel']}" for step in ("update", "qparams")]
        cost = f"**Cost** per tensor and per channel, in copies: {', '.join(per)}."
        lines += [body(name, "observer"), "", f"**Use**: {said(OBSERVER_USE, name)}.", "", cost, ""]
    return lines


def quantizer_sections(costs: Figures) -> list[str]:
    """All fake quantizers."""
    lines = [
        "## Fake quantizers",
        "",
        "Pictures: the output, its gradient to the same element of the input, and to what is learned.",
        "",
    ]
    for name in ordered(QUANTIZER_USE, FAKE_QUANTIZERS):
        forward, both = (ratio(costs[name][step]) for step in ("forward", "both"))
        cost = f"**Cost** in copies: forward {forward}, with backward {both}."
        picture = f"![Output and gradient of {name}](pictures/{name}-quantizer.png)"
        lines += [body(name, "fake quantizer"), "", f"**Use**: {said(QUANTIZER_USE, name)}.", "", cost, "", picture, ""]
        lines += [wrap(CAPTIONS[name]), ""] if name in CAPTIONS else []
    return lines


def format_sections() -> list[str]:
    """All number formats."""
    lines = [
        "## Number formats",
        "",
        "`sophq_func.numerics.formats` holds formats as values, with `largest`, `values()` and `round(x, noise=None)`: half",
        "to even except in codebooks, stochastic where uniform noise is given",
        "([arXiv:1502.02551](https://arxiv.org/abs/1502.02551)),",
        "and without a gradient: fake quantizers add theirs. The constants are those of OCP OFP8 and MX v1.0; the tables",
        "are the `data_type` of [`fp4`](#fp4-fake-quantizer), `fpxgroup` and `gptq`; four of them also that of `gptqfp4`.",
        "",
        *table(["format", "values", "largest", "smallest above 0", "made by"], format_rows()),
        "Below each staircase, the values; the error is that of rounding, relative to `x`.",
        "",
        "![Rounding and relative error of the constants](pictures/formats.png)",
        "",
        "The tables (`fp4_e2m1_bnb` is `fp4`):",
        "",
        "![Rounding and relative error of the tables](pictures/codebooks.png)",
        "",
    ]
    for name in MAKERS:
        lines += [maker(name), ""]
    return lines


def page(figures: Figures) -> str:
    """The page of the documentation."""
    rows = figures["rows"]
    lines = [
        *introduction(figures),
        *choice(figures),
        *observer_sections(rows["observers"]),
        *quantizer_sections(rows["fake quantizers"]),
        *format_sections(),
        grid(),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep-costs", action="store_true", help="take the costs from the last run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    names = [name for name in ordered(QUANTIZER_USE, FAKE_QUANTIZERS) if said(CASES, name)]
    if not options.keep_costs:
        write(FIGURES, {"observers": observer_costs(), "fake quantizers": quantizer_costs()})
    for path in pictures(PICTURES, names):
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size // 1000} kB", flush=True)
    partial = PAGE.with_name(f".{PAGE.name}.partial")
    partial.write_text(page(json.loads(FIGURES.read_text())))
    partial.replace(PAGE)
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
