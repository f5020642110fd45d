"""How the library gets on with models that nobody here wrote: placement, share of FLOPs, fidelity, compile, vmap.

``python benchmarks/models.py [NAME ...] [--markdown docs/models.md] [--json FILE]``. Everything is W8A8 by the strategy
Dataflow, calibrated on four batches; the cosine similarity is that of the outputs on a fifth.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from functorch.compile import make_boxed_func
from measure import write
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from zoo import ZOO, Batch, Specimen

import sophq_func as sq
from sophq_func.capture.graph import Node, Operand
from sophq_func.core.operations import CONTRACTIONS
from sophq_func.numerics import eager
from sophq_func.planning.fusing import fuse
from sophq_func.planning.strategies import contracted

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ROUND = torch.ops.aten.round.default


@dataclass
class Row:
    """What was found out about one model; ``yes`` or the reason why not."""

    model: str
    weights: int = 0
    activations: int = 0
    flops: float = 0.0
    cosine: float = 0.0
    acting: str = ""
    compile: str = ""
    vmap: str = ""


class Work:
    """The multiplications of a traced model, counted from its shapes; a check of those that a plan's coverage counts."""

    def __init__(self, graph: sq.Graph, params: dict[str, Tensor]) -> None:
        self.graph, self.params = fuse(graph), params

    def calls(self) -> Iterator[int]:
        """Multiplications of each convolution, linear layer and product."""
        for node in self.graph:
            if node.is_module(*CONVOLUTIONS, nn.Linear):
                yield self._layer(node, self.params[node.parameters["weight"]])
            elif node.function in CONTRACTIONS and node.function != "embedding":
                operands = [operand for operand in node.operands if contracted(node, operand)]
                yield self._product(node, operands)

    def _shape(self, operand: Operand) -> tuple[int, ...]:
        if operand.value:
            return self.graph.values[operand.value].shape
        return tuple(self.params[operand.parameter].shape)

    def _layer(self, node: Node, weight: Tensor) -> int:
        return math.prod(self.graph.values[node.outputs[0]].shape) * weight[0].numel()

    def _product(self, node: Node, operands: list[Operand]) -> int:
        first, second = self._shape(operands[0]), self._shape(operands[1])
        if node.function == "scaled_dot_product_attention":
            return math.prod(first[:-1]) * second[-2] * (first[-1] + self._shape(operands[2])[-1])
        if node.function.startswith("conv"):
            return math.prod(self.graph.values[node.outputs[0]].shape) * math.prod(second[1:])
        return math.prod(self.graph.values[node.outputs[0]].shape) * first[-1]


class RoundCounter(TorchDispatchMode):
    """Counts roundings: one for each quantizer that acts, one more for each zero point and each rounded bias."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is ROUND
        return func(*args, **(kwargs or {}))


def compiled(f: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """``f`` compiled as one graph without kernels, and a list that gets the roundings in that graph."""
    found: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        found.append(sum(node.target is ROUND for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    return torch.compile(f, fullgraph=True, backend=aot_autograd(fw_compiler=count)), found


def attempt(call: Callable[[], str]) -> str:
    """What ``call`` says, or the first line of its error."""
    try:
        return call()
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"no: {type(error).__name__}: {lines[0] if lines else ''}"[:200]


def check_flops(specimen: Specimen, batch: Batch, work: Work) -> None:
    """The multiplications that are counted are those that torch counts."""
    torch.backends.mha.set_fastpath_enabled(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        specimen.model(**batch)
    own, total = 2 * sum(work.calls()), counter.get_total_flops()
    if abs(own - total) > 0.01 * total:
        raise ValueError(f"counted {own} FLOPs, torch {total}")


def examine(name: str) -> Row:
    """Everything about one model."""
    torch.manual_seed(0)
    specimen = ZOO[name]()
    batches, batch = [specimen.batch(4) for _ in range(4)], specimen.batch(4)
    with torch.no_grad():
        expected = specimen.output(specimen.model(**batch))
    graph = sq.trace(specimen.model, (), batches[0])
    plan = sq.plan(graph, sq.QuantConfig())
    q, params = sq.build(specimen.model, plan), sq.params_of(specimen.model)
    qparams = q.calibrate(params, batches, progress=False)
    check_flops(specimen, batches[0], Work(graph, params))
    roles = [plan.site(quantizer).role for quantizer in plan]

    def apply(**inputs: Tensor) -> Tensor:
        return specimen.output(q.apply(params, qparams, **inputs))

    def everything(**inputs: Tensor) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(q.apply(params, qparams, **inputs)) if isinstance(leaf, Tensor)]

    with torch.no_grad(), RoundCounter() as counter:
        out = apply(**batch)

    def acts() -> str:
        missing = plan.keys() - q.capture(params, qparams, **batch).keys()
        return f"no: {sorted(missing)}" if missing else "yes"

    def compiles() -> str:
        f, rounds = compiled(everything)
        with torch.no_grad():
            for actual, expected in zip(f(**batch), everything(**batch), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        return "yes" if rounds == [counter.count] else f"no: {rounds} roundings, {counter.count} in eager"

    def one(inputs: Batch) -> Tensor:
        return apply(**{key: value[None] for key, value in inputs.items()})[0]

    def maps() -> str:
        with torch.no_grad():
            mapped = torch.vmap(one, randomness="different")(batch)
        similar = torch.cosine_similarity(mapped.flatten(), out.flatten(), dim=0)
        return "yes" if similar > 0.999 else f"no: another result, cosine {float(similar):.4f}"

    return Row(
        model=name,
        weights=roles.count("weight"),
        activations=roles.count("activation"),
        flops=100 * plan.coverage.multiplications,
        cosine=float(torch.cosine_similarity(expected.flatten(), out.flatten(), dim=0)),
        acting=attempt(acts),
        compile=attempt(compiles),
        vmap=attempt(maps),
    )


ACCUMULATES = (
    "no quantizer stands out, each keeps 0.9998 of the direction of what it sees; with random weights their noise adds up "
    "from layer to layer instead of dying out"
)

ZEROS = "the model multiplies zeros that it makes itself, and zeros have no range"

HEAD = ("model", "weight quantizers", "activation quantizers", "FLOPs quantized %", "cosine", "all act", "compile", "vmap")


def cells(row: Row) -> list[str]:
    """A row as text."""
    return [
        row.model,
        str(row.weights),
        str(row.activations),
        f"{row.flops:.1f}",
        f"{row.cosine:.4f}",
        *(text.partition(":")[0] for text in (row.acting, row.compile, row.vmap)),
    ]


def markdown(rows: list[Row]) -> str:
    """The page of the documentation."""
    lines = [
        "# Models that nobody here wrote",
        "",
        "Made by `python benchmarks/models.py --markdown docs/models.md`, which says how each model is made: architectures",
        "of `transformers` and `torch.nn`, small, with random weights, W8A8 by `sq.QuantConfig()` (strategy `Dataflow`),",
        "calibrated on four batches of the same distribution as the one that is compared.",
        "",
        "*FLOPs quantized*: share of the multiplications of convolutions, linear layers and products all of whose operands",
        "are quantized. *cosine*: of the quantized model's output and the float model's. *all act*: every planned",
        "quantizer acts in a run. *compile*: `torch.compile(fullgraph=True)` gives the same output with the same number of",
        "roundings in its graph as in eager. *vmap*: over examples.",
        "",
        f"| {' | '.join(HEAD)} |",
        f"|{'---|' * len(HEAD)}",
        *(f"| {' | '.join(cells(row))} |" for row in rows),
        "",
    ]
    reasons = [(row.model, text) for row in rows for text in (row.acting, row.compile, row.vmap) if text != "yes"]
    reasons += [(row.model, f"cosine {row.cosine:.4f}: {ACCUMULATES}") for row in rows if row.cosine < 0.99]
    reasons += [(row.model, f"FLOPs {row.flops:.1f} %: {ZEROS}") for row in rows if f"{row.flops:.1f}" != "100.0"]
    if reasons:
        lines += ["What falls short, and why:", "", *(f"* {model}: {text}" for model, text in reasons), ""]
    return "\n".join(lines)


def main() -> None:
    """Examine and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(ZOO))
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    eager.LARGE = sys.maxsize  # roundings are counted in the composition, as they are when compiled
    warnings.simplefilter("ignore")
    rows = []
    for name in options.names:
        rows.append(examine(name))
        print("  ".join(cell.ljust(22 if i == 0 else 6) for i, cell in enumerate(cells(rows[-1]))), flush=True)
    if options.markdown:
        options.markdown.write_text(markdown(rows))
    if options.json:
        write(options.json, {row.model: asdict(row) for row in rows})


if __name__ == "__main__":
    main()
