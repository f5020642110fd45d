"""Write ``docs/speed.md`` and its picture from what ``speed.py``, ``research_speed.py`` and ``gpu.py`` measured.

``python benchmarks/speed_page.py [--json benchmarks/speed.json] [--research benchmarks/research_speed.json]
[--gpu benchmarks/gpu.json] [--out docs]``
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from measure import write_text

HEAD = """# Speed

Made by `python benchmarks/speed_page.py` from `benchmarks/speed.json`, which `python benchmarks/speed.py` measures with each
peer that is installed (`pip install -c constraints.txt ".[bench]"`); its help says how.

W8A8 with learned scales: int8 weights per channel and int8 activations per tensor at the input of every convolution and
linear layer (strategy `Layers`), or what a peer offers nearest to that. One thread of {machine}, torch {torch}, random
weights; ResNet-18 at 4x3x224x224, a BERT shaped like MiniLM (6 layers, 384 features, fused attention) at 8x128, and *tiny*,
twenty convolutions with BatchNorm and ReLU at 4x8x8x8. Candidates take turns in one process; each figure is the median of
its rounds divided by that of plain float. On this machine the same code measured twice differs by up to a tenth. `-`: the
candidate has no such thing; `fails`: see below the table.

The tables of this part were measured before small networks became faster; [Research](#research) has what they take now.

* *forward*: eval mode, without gradients. *frozen*: the same with weights quantized beforehand by `q.freeze`.
* *step*: training mode, forward and backward to every parameter and learned scale.
* *inner*: the same without the scale of the image, which needs a gradient to the image that a float model never computes.
* *calibrate*: one batch through min/max observers. *empty*: nothing quantized.
* *memory*: peak of making the candidate and two training steps, in a process of its own.

![ratios](speed.png)
"""

TAIL = """
## Where the time goes

A profile of an eager training step of ResNet-18 (`torch.profiler`), in percent of the float step (437 ms): the gradient
to the image, which a float model never computes and the learned scale of the image needs, 9 (*inner* is the step without
it); forward of the quantizers 11; the rest, most of it their backward, 20. A quantizer takes four or five passes over a
tensor in eager, nine or ten in backward, all but the first and last in the cache; the tensor has to come from memory and
another one has to go there, and how fast that is beside arithmetic is what makes figures vary from hour to hour on this
machine: the forward of the ResNet was measured from 1.21 to 1.37, its step from 1.38 to 1.49, and *inner* from 1.26 to
1.33.

Of an eager forward of the ResNet (136 ms in float, 171 quantized, by timers around each part) 23 ms are those passes, over
20 million elements: two and a half copies of them. The other 12 are Python: it runs between convolutions that have emptied
the caches, and takes three to nine times as long there as in a loop of its own. What does not need a layer's input is
therefore done before the run.

In a small network that Python is nearly all there is. So small weights whose channels are equally long are rounded as the
rows of one matrix, and all that depends on scales alone is computed for all values at once. What the modules of the private
copy hold between runs is remembered, and in a chain of torch's own modules (*tiny*) only planned layers report their calls.
What is left there is a call or two of torch for each value, and about fifteen for its gradient: a
[compiled kernel](kernels.md) makes one of each, and [staging](staging.md) takes away the Python of the run itself.

The MLP shows it best, where this library's forward loses to ten lines: of 1.66 ms 0.35 are float's, 0.3 passes over weights
and values (four for each tensor, where the ten lines take seven), and the rest is some 1,360 calls of Python functions in
three layers, none of which takes more than a fiftieth: what is active now (a transform? a compiler? autograd?), whether
tensors and scales fit each other, which call of the model this is. The ten lines ask nothing of that. Tried, and of no use:
blocks of another size, weights of all layers in one call (they leave the cache), and autograd's Function for all sizes.

Under `torch.func` the composition takes ten passes forward and three backward for a tensor, as many in all as the ten lines.
Where tangents are computed, tensors of 2**16 elements and more go through a Function with a rule of its own: the
composition would take some ten passes more for a tangent. In reverse mode that pays from 2**18 on only, since
`torch.func` takes 0.3 ms to enter a Function.

Under inductor a quantizer is one kernel, fused with what stands before it; per-channel numbers are computed once; a
weight is stored in its own order before oneDNN's order is made; and the backward computes masks again instead of keeping
them (a CPU takes 18 copies of a tensor to write a boolean mask): the training step of the ResNet was 1.40 before that.
What is left there is the gradient to the image: without it the step takes what *inner* says. The step is
`torch.autograd.grad` of a compiled loss; `torch.compile(torch.func.grad(loss))` took 1.19 times the compiled float one.

Freed memory stays with the process during the measurement (`MALLOC_TRIM_THRESHOLD_` and `MALLOC_MMAP_THRESHOLD_` of glibc,
set by the script), as it does with jemalloc or tcmalloc; without that, page faults cost float and quantized models alike.
"""

COLUMNS = ("forward", "step", "inner", "calibrate", "frozen", "empty", "memory")


def table(label: str, row: Mapping[str, Any]) -> Iterator[str]:
    """One model in one mode."""
    ratios, notes = row["ratios"], row["notes"]
    columns = [column for column in COLUMNS if column in ratios]
    yield f"\n## {label}\n"
    yield f"| | {' | '.join(columns)} | seconds to make |"
    yield "|---" * (len(columns) + 2) + "|"
    for name, note in notes.items():
        if isinstance(note, str):
            yield f"| {name} | {' | '.join(['fails'] * len(columns))} | |"
        else:
            cells = [f"{ratios[column][name]:.2f}" if name in ratios[column] else "-" for column in columns]
            yield f"| {name} | {' | '.join(cells)} | {note:.1f} |"
    failed = [(name, note) for name, note in notes.items() if isinstance(note, str)]
    yield from ([""] if failed else [])
    yield from (f"* {name}: `{note}`" for name, note in failed)


def sweep(row: Mapping[str, float]) -> Iterator[str]:
    """The settings of one batch."""
    yield "\n## 16 settings of one batch\n"
    yield "ResNet-18 at 1x3x32x32, weights only; in each setting another layer has 4 bits (`benchmarks/sweeps.py`).\n"
    yield "| | ms | times `q.sweep` | outputs differ by |"
    yield "|---|---|---|---|"
    for name in ("sophq_func", "functional_call", "torch.ao FX"):
        yield f"| {name} | {1000 * row[name]:.0f} | {row[f'{name} ratio']:.1f} | {row[f'{name} difference']:.0e} |"


RESEARCH = """
## Research

Made by `python benchmarks/research_speed.py`: an MLP 784-256-256-10 (batch 64), ResNet-20 (32 images of 32 x 32), a GPT of 4
layers and 128 features (8 x 64), and the networks above, in seconds of the processor as ratios to float; *by hand* is LSQ in
ten lines, which folds no BatchNorm, and *kernels* are [compiled](kernels.md). *memory returned*: with the allocator's
defaults, which give freed memory back to the system.

*step* and *autograd.grad* are plain backward passes, of modules and of a function of params; *func.grad* is
`torch.func.grad` of that function: its tape costs more calls, which small networks notice and large ones do not.
*vmap(grad)* is the gradient of each of 32 examples. **Bold**: a row where this library, with and without kernels, loses to
another column. Peers that are missing fail, or have no such thing; those of *minilm* are in the table above.
"""

OURS = ("sophq_func", "sophq_func, kernels")
"""Columns of this library."""


def research(rows: Mapping[str, Any]) -> Iterator[str]:
    """The tables of ``research_speed.json``."""
    yield RESEARCH
    for model, measured in rows.items():
        ratios = measured["ratios"]
        names = list(dict.fromkeys(name for row in ratios.values() for name in row if name != "float"))
        yield f"\n### {model}\n"
        yield f"| | {' | '.join(names)} |"
        yield "|---" * (len(names) + 1) + "|"
        for row, values in ratios.items():
            yield f"| {_marked(row, values)} | {' | '.join(_cell(values, name) for name in names)} |"


def _cell(values: Mapping[str, float], name: str) -> str:
    return f"{values[name]:.2f}" if name in values else "-"


def _marked(row: str, values: Mapping[str, float]) -> str:
    """The name of a row, bold where another candidate is faster."""
    own = min(values[name] for name in OURS if name in values)
    others = [value for name, value in values.items() if name not in (*OURS, "float")]
    return f"**{row}**" if min(others, default=own) < own else row


GPU = """
## On a GPU

`python benchmarks/gpu.py` compares every piece and two networks with the CPU, runs them where waiting for the device is an
error (`torch.cuda.set_sync_debug_mode("error")`), captures forward and gradient in a CUDA graph, and measures time and
memory as ratios to float in bfloat16: in under six minutes on one card. On one {card} with torch {torch}, in a virtual
machine: outputs and gradients of a ResNet-18 and a GPT (6 layers, 512 features) have cosines of 0.9998 and more with those
of the CPU; no call of a run waits, staged ones included; graphs were captured and replayed with the same numbers.
`x256`: of 256 images of 224 x 224, or 64 sequences of 256 tokens; `x2`: of two, which shows what launches cost. *replayed*:
a CUDA graph of the same call for eight, as a ratio to that call.

In eager, quantizers are composed of torch's own operations on a GPU, each of which reads and writes the whole tensor in
float32, and the backward pass keeps the tensor in float32 as it was before it was rounded: two to three times float in the
large ResNet, five and more where launches are all there is, and up to twice float's memory. `torch.compile` and
`sq.stage(..., backend="inductor")` make one kernel of them, and a CUDA graph takes away the launches: use one of these on a
GPU.

| | float, ms | ratio | memory |
|---|---|---|---|
"""


def gpu(data: Mapping[str, Any]) -> str:
    """The figures of ``gpu.json``."""
    rows = dict(data["rows"])
    lines = [GPU.format(card=rows.pop("card"), torch=data["machine"]["torch"].partition("+")[0]).rstrip()]
    for name, row in rows.items():
        memory = f"{row['memory']:.2f}" if "memory" in row else "-"
        # what is replayed is compared with the eager call, not with float
        float_time = "-" if name.endswith("replayed") else f"{row['float ms']:.2f}"
        lines.append(f"| {name} | {float_time} | {row['ratio']:.2f} | {memory} |")
    return "\n".join(lines) + "\n"


def page(data: Mapping[str, Any], of_research: Mapping[str, Any], of_gpu: Mapping[str, Any]) -> str:
    """The page."""
    rows, machine = data["rows"], data["machine"]
    parts = [
        HEAD.format(machine=f"a {machine['cores']}-core {machine['machine']} machine", torch=machine["torch"].split("+")[0])
    ]
    for label, row in rows.items():
        parts += sweep(row) if label == "sweep" else table(label, row)
    return "\n".join([*parts, *research(of_research["rows"]), TAIL, gpu(of_gpu)])


def draw(rows: Mapping[str, Any], path: Path) -> None:
    """A picture of the ratios: a panel a model, a group of bars a row."""
    from matplotlib import pyplot as plt

    panels = {label: row["ratios"] for label, row in rows.items() if "ratios" in row and "memory" in row["ratios"]}
    names = list(dict.fromkeys(n for ratios in panels.values() for values in ratios.values() for n in values))
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 3.1 * len(panels)), squeeze=False)
    for axis, (label, ratios) in zip(axes[:, 0], panels.items(), strict=True):
        shown = ["forward", "step", "calibrate", "memory"]
        width = 0.84 / len(names)
        for i, name in enumerate(names):
            heights = [ratios[row].get(name, 0) for row in shown]
            color = "#d1495b" if name == "sophq_func" else plt.get_cmap("Blues")(0.25 + 0.09 * i)
            axis.bar([k + i * width for k in range(len(shown))], heights, width * 0.92, label=name, color=color)
        axis.axhline(1, color="black", linewidth=0.7)
        axis.set_xticks([k + 0.42 - width / 2 for k in range(len(shown))], shown)
        axis.set_ylabel("times float")
        axis.set_ylim(0, 3.9)
        axis.set_title(label, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(fontsize=8, ncols=4, frameon=False, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Write both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/speed.json"))
    parser.add_argument("--research", type=Path, default=Path("benchmarks/research_speed.json"))
    parser.add_argument("--gpu", type=Path, default=Path("benchmarks/gpu.json"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    data, *others = (json.loads(path.read_text()) for path in (options.json, options.research, options.gpu))
    write_text(options.out / "speed.md", page(data, *others))
    draw(data["rows"], options.out / "speed.png")


if __name__ == "__main__":
    main()
