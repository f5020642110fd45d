"""Pictures of observers, fake quantizers and number formats: what range is picked, what comes out, what gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numerics_text import FORMATS
from PIL import Image
from torch import Tensor

import sophq_func as sq
from sophq_func.numerics.codebooks import CODEBOOKS
from sophq_func.numerics.contracts import OBSERVERS
from sophq_func.numerics.formats import Format
from sophq_func.numerics.ranges import range_to_qparams

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red")
GREY = "0.65"
POINTS = 800
SPARSE = 6
"""Of points that are drawn at random only every so many is shown."""

DASHES = ("-", (0, (4, 3)), (0, (1, 2)))
"""Of curves that may lie on each other."""

DPI = 100
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.color": "0.92", "lines.linewidth": 1.4, "legend.fontsize": 8, "legend.frameon": False}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """One line of a picture: options of the fake quantizer, and what stands before the point in its tensor."""

    label: str = ""
    choices: dict[str, Any] = field(default_factory=dict)
    before: tuple[float, ...] = ()


@dataclass(frozen=True)
class Case:
    """How a fake quantizer is shown.

    Attributes:
      span: from where to where.
      said: what the title says of the setting.
      seen: the range that the observer saw; three bits and this one give the step 1.
      zero: the learned zero point, where it is no integer.
      after: what stands behind the point in its tensor.
      hessian: of the inputs, for GPTQ.
    """

    span: tuple[float, float] = (-6.0, 6.0)
    said: str = "3 bits, s = 1"
    seen: tuple[float, float] = (-3.5, 3.5)
    symmetric: bool = True
    zero: float | None = None
    after: tuple[float, ...] = ()
    curves: tuple[Curve, ...] = (Curve(),)
    hessian: tuple[tuple[float, ...], ...] = ()


AFFINE = "3 bits, s = 1, z = 2"
PLAIN = {"use_grad_scaling": False}
CASES: dict[str, Case] = {
    "fixed": Case(),
    "learnable": Case((-5, 8), f"{AFFINE}, g = 1", (-2.0, 5.0), symmetric=False, curves=(Curve(choices=PLAIN),)),
    "lsq_plus": Case(
        (-5, 8), "3 bits, s = 1, z = 2.25, g = 1", (-2.0, 5.0), symmetric=False, zero=2.25, curves=(Curve(choices=PLAIN),)
    ),
    "pact": Case((-5, 5), "3 bits, bounds 3 and -3", (-3.0, 3.0), symmetric=False, curves=(Curve(choices={"alpha": 3.0}),)),
    "tqt": Case(said="3 bits, log2_t = 1.8", seen=(-3.5, 3.5)),
    "dsq": Case(curves=tuple(Curve(f"alpha = {a}", {"alpha": a}) for a in (0.4, 0.2, 0.8))),
    "dorefa": Case(
        (-1.95, 1.95),
        "3 bits, max |x| = 2",
        after=(-2.0, 2.0),
        curves=(Curve("paper"), Curve("tanh", {"mapping": "tanh"})),
    ),
    "adaround": Case(curves=tuple(Curve(r, {"rounding": r}) for r in ("soft", "hard"))),
    "qdrop": Case(curves=(Curve("prob = 0.5", {"prob": 0.5}), Curve("prob = 1"))),
    "e4m3": Case((0, 560), "s = 1", curves=(Curve(choices={"scaling": "none"}),)),
    "e5m2": Case((0, 72000), "s = 1"),
    "fp16": Case((1 - 2**-8, 1 + 2**-8), "around 1"),
    "bf16": Case((1 - 2**-5, 1 + 2**-5), "around 1"),
    "fp4": Case((-7.5, 7.5), "E2M1, s = 1", (-6.0, 6.0)),
    "fpxgroup": Case((0, 28), "E3M2, largest of the group 28", after=(28.0,)),
    "nnie": Case((0, 1.25), "M = 1", (-1.0, 1.0)),
    "mxfp8": Case((0, 500), "E4M3, largest of the block 500", after=(500.0,)),
    "mxfp6": Case(
        (0, 31),
        "largest of the block 31",
        after=(31.0,),
        curves=(Curve("e3m2"), Curve("e2m3", {"element": "e2m3"})),
    ),
    "mxfp4": Case((-7.5, 7.5), "largest of the block 7.5", after=(7.5,)),
    "mxint8": Case((-0.12, 0.12), "largest of the block 1", after=(1.0,)),
    "nvfp4": Case((-6.3, 6.3), "s = 1, largest of the block 6.3", (-2688.0, 2688.0), after=(6.3,)),
    "gptq": Case(
        (-3.0, 3.0),
        "second of two columns",
        after=(7.0,),
        curves=(Curve("first rounded by 0", {}, (1.0,)), Curve("first rounded down by 0.4", {}, (1.4,))),
        hessian=((1.0, 0.9, 0.0), (0.9, 1.0, 0.0), (0.0, 0.0, 1.0)),
    ),
    "gptqfp4": Case(
        (-1.0, 1.0),
        "NF4, second of two columns",
        after=(1.0,),
        curves=(Curve("first rounded by 0", {}, (-1.0,)), Curve("first rounded down by 0.13", {}, (-0.87,))),
        hessian=((1.0, 0.9, 0.0), (0.9, 1.0, 0.0), (0.0, 0.0, 1.0)),
    ),
}


def save(figure: Figure, path: Path) -> None:
    """Write a picture of few colors, first to a temporary name."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]
    image = Image.fromarray(pixels).convert("RGB").quantize(64)
    partial = path.with_name(f".{path.name}.partial")
    image.save(partial, "PNG", optimize=True)
    partial.replace(path)
    plt.close(figure)


def qparams_for(fq: sq.FakeQuantize, case: Case, x: Tensor, scheme: sq.QScheme) -> sq.QParams:
    """What ``init`` makes of the range of the case."""
    found = fq.init(range_to_qparams(*map(torch.tensor, case.seen), scheme), x, scheme)
    if case.zero is not None:
        found = found._replace(zero_point=torch.tensor(case.zero))
    return found._replace(extras={**found.extras, "hessian": torch.tensor(case.hessian)}) if case.hessian else found


def slopes(fq: sq.FakeQuantize, case: Case, curve: Curve, point: float, noise: float) -> dict[str, float]:
    """Output and gradients at one point, the other elements of its tensor standing still."""
    scheme, place = sq.QScheme(bits=3, symmetric=case.symmetric), len(curve.before)
    x = torch.tensor([*curve.before, point, *case.after]).requires_grad_()
    weight = x.reshape(1, -1) if case.hessian else x
    found = qparams_for(fq, case, weight.detach(), scheme)
    tensors = {"scale": found.scale, "zero_point": found.zero_point, **found.extras}
    learned = {key: tensors[key] for key in fq.learnable if key in tensors}
    leaves = {key: value.detach().requires_grad_() for key, value in learned.items() if value.is_floating_point()}
    own = tensors | leaves
    qparams = sq.QParams(own.pop("scale"), own.pop("zero_point"), own)
    drawn = torch.full_like(weight, noise) if fq.noise else None
    y = fq.apply(weight, qparams, scheme, drawn).reshape(-1)[place]
    grads = [torch.zeros_like(value) for value in (x, *leaves.values())]
    if y.requires_grad:
        grads = list(torch.autograd.grad(y, (x, *leaves.values()), allow_unused=True, materialize_grads=True))
    to_leaves = {key: grad.sum().item() for key, grad in zip(leaves, grads[1:], strict=True)}
    return {"y": y.item(), "x": grads[0][place].item(), **to_leaves}


class Line(NamedTuple):
    """What is drawn of a curve: its label, whether it is drawn at random, and values by what they are."""

    label: str
    random: bool
    values: dict[str, list[float]]


def trace(name: str, case: Case, points: list[float]) -> list[Line]:
    """Output and gradients of each curve at all points."""
    noise = torch.rand(POINTS, generator=torch.Generator().manual_seed(0)).tolist()
    lines = []
    for curve in case.curves:
        fq = sq.fake_quantizer(name, **curve.choices)
        rows = [slopes(fq, case, curve, point, u) for point, u in zip(points, noise, strict=True)]
        lines.append(Line(curve.label, fq.noise, {key: [row[key] for row in rows] for key in rows[0]}))
    return lines


def quantizer_picture(name: str, folder: Path) -> Path:
    """Output, gradient to the input, gradient to each learned leaf."""
    case = CASES[name]
    points = torch.linspace(*case.span, POINTS).tolist()
    lines = trace(name, case, points)
    leaves = [key for key in lines[0].values if key not in ("x", "y")]
    width, columns = (9.6, 3) if leaves else (6.6, 2)
    figure, axes = plt.subplots(1, columns, figsize=(width, 2.5), layout="constrained")
    axes[0].plot(case.span, case.span, color=GREY, linewidth=0.8, linestyle="--", label="y = x")
    for i, (label, random, values) in enumerate(lines):
        dots = {"linestyle": "", "marker": ".", "markersize": 4, "markevery": SPARSE} if random else {}
        dashes = dots or {"linestyle": DASHES[i]}
        axes[0].plot(points, values["y"], color=COLORS[i], label=label, **dots)
        axes[1].plot(points, values["x"], color=COLORS[i], label=label, **dashes)
        for j, leaf in enumerate(leaves):
            axes[2].plot(points, values[leaf], color=COLORS[max(i, j)], label=leaf, **dashes)
    _label(axes, f"{name}: {case.said}", leaves, several=len(lines) > 1)
    path = folder / f"{name}-quantizer.png"
    save(figure, path)
    return path


def _label(axes: Any, title: str, leaves: list[str], several: bool) -> None:
    """Titles, axes and legends."""
    titles = (title, "dy/dx", f"dy/d {leaves[0]}" if len(leaves) == 1 else "dy/d learned")
    for ax, text in zip(axes, titles, strict=False):
        ax.set_title(text, loc="left")
        ax.set_xlabel("x")
        ax.ticklabel_format(useOffset=False, style="plain")
        ax.locator_params(nbins=7, steps=[1, 2, 5, 10])
    axes[0].set_ylabel("y")
    low, high = axes[1].get_ylim()
    axes[1].set_ylim(min(low, -0.1), max(high, 1.2))
    if several:
        axes[0].legend(loc="best")
    if len(leaves) > 1:
        axes[2].legend(loc="best")


def batches() -> list[Tensor]:
    """Eight batches of a skewed distribution, in half of which there are outliers."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(8):
        normal, skew = torch.randn(2, 4096, generator=generator)
        x = 0.6 * normal + 1.5 * skew.abs() - 0.4
        if i % 2 == 0:
            x[:4] = torch.tensor([9.0 + 0.5 * i, 8.0, 7.5, -4.0])
        found.append(x)
    return found


def observed(name: str, data: list[Tensor], scheme: sq.QScheme) -> tuple[float, float, float]:
    """Both ends of the grid that an observer picks, and the signal to noise ratio on all data, in dB."""
    observer = sq.observer(name)
    state = observer.init(data[0], scheme)
    for x in data:
        state = observer.update(state, x, scheme)
    found, x = observer.qparams(state, scheme), torch.cat(data)
    error = sq.fake_quantizer("fixed").apply(x, found, scheme) - x
    ends = [(code - float(found.zero_point)) * float(found.scale) for code in (scheme.qmin, scheme.qmax)]
    return ends[0], ends[1], float(10 * torch.log10(x.square().mean() / error.square().mean()))


def observer_picture(folder: Path) -> Path:
    """The data, and below it the grid that each observer picks."""
    data, names = batches(), list(OBSERVERS)
    figure, (top, axes) = plt.subplots(
        2, 1, figsize=(9.6, 8.2), sharex=True, layout="constrained", gridspec_kw={"height_ratios": [1, 3.6]}
    )
    top.hist(torch.cat(data).numpy(), bins=160, color=GREY, log=True)
    top.set_ylabel("count")
    top.set_title("The data: eight batches of 4096 numbers, skewed, outliers in every other batch", loc="left")
    for i, name in enumerate(names):
        for j, symmetric in enumerate((True, False)):
            lo, hi, ratio = observed(name, data, sq.QScheme(bits=4, symmetric=symmetric))
            label = ("symmetric", "affine")[j] if i == 0 else None
            axes.barh(i + 0.4 * j - 0.2, hi - lo, left=lo, height=0.34, color=COLORS[j], label=label)
            axes.text(1.01 + 0.06 * j, i, f"{ratio:.1f}", transform=axes.get_yaxis_transform(), color=COLORS[j], va="center")
    axes.text(1.01, -0.95, "dB", transform=axes.get_yaxis_transform(), va="center")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(-14, 13)
    axes.set_axisbelow(True)
    top.set_axisbelow(True)
    axes.set_xlabel("x")
    axes.set_title("The 4-bit grid that each observer picks, and its signal to noise ratio", loc="left")
    axes.legend(loc="lower right", frameon=True)
    path = folder / "observers.png"
    save(figure, path)
    return path


def formats_picture(title: str, formats: dict[str, Format], columns: int, folder: Path) -> Path:
    """What each format makes of a number, and its relative error."""
    height = -(-len(formats) // columns)
    figure, axes = plt.subplots(2 * height, columns, figsize=(9.6, 4.0 * height), layout="constrained", squeeze=False)
    for i, (name, value) in enumerate(formats.items()):
        row, column = 2 * (i // columns), i % columns
        _transfer(axes[row, column], name, value)
        _error(axes[row + 1, column], value)
    path = folder / f"{title}.png"
    save(figure, path)
    return path


def _transfer(axes: Axes, name: str, value: Format) -> None:
    reach = 1.15 * value.largest
    x = torch.linspace(-reach, reach, 4 * POINTS, dtype=torch.float64)
    axes.plot(x, value.round(x), color=COLORS[0], linewidth=1)
    values = value.values()
    axes.plot(values, torch.full_like(values, -reach), "|", color="black", markersize=6, markeredgewidth=0.6)
    axes.set_title(name, loc="left")
    axes.set_ylabel("y")
    axes.locator_params(nbins=5)


def _error(axes: Axes, value: Format) -> None:
    smallest = float(value.values()[value.values() > 0].min())
    x = torch.exp2(torch.linspace(torch.tensor(smallest / 4).log2(), torch.tensor(1.5 * value.largest).log2(), 4 * POINTS))
    axes.semilogx(x, 100 * (value.round(x) / x - 1).abs(), color=COLORS[1], linewidth=0.7)
    axes.set_ylim(0, 40)
    axes.set_ylabel("error, % of x")
    axes.set_xlabel("x")


def pictures(folder: Path, names: list[str]) -> Iterator[Path]:
    """All pictures, one after the other."""
    folder.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        yield observer_picture(folder)
        yield formats_picture("formats", FORMATS, 3, folder)
        yield formats_picture("codebooks", {k: v for k, v in CODEBOOKS.items() if k != "fp4_e2m1_bnb"}, 4, folder)
        for name in names:
            yield quantizer_picture(name, folder)
