"""Which transforms every observer and fake quantizer goes through, each compared with its plain counterpart.

``python benchmarks/transforms.py [--out docs]`` writes ``transforms.md`` there; about ten minutes.
"""

from __future__ import annotations

import argparse
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import write_text
from torch import Tensor
from torch.utils import _pytree

import sophq_func as sq
from sophq_func.core.pytree import sorted_dict
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, OBSERVERS
from sophq_func.numerics.granularity import Granularity

SHAPE = (4, 6)
GRANULARITIES: Mapping[str, Granularity] = {
    "tensor": sq.PerTensor(),
    "channel": sq.PerChannel(0),
    "group": sq.PerGroup(0, 3),
    "block": sq.PerBlock(2, 3),
    "token": sq.PerToken(),
}
AT_WORK: Mapping[str, dict[str, Any]] = {"qdrop": {"prob": 0.5}}
"""Options with which a fake quantizer shows what it does; all others have their defaults."""

HESSIAN = ("gptq", "gptqfp4")
CASTS = ("fp16", "bf16")
"""Their derivatives are themselves cast, which two ways to the same number need not do at the same places."""

Row = dict[str, dict[str, str]]
"""By column, and within a column by granularity or transform: ``"yes"`` or what went wrong."""


class Subject(NamedTuple):
    """A fake quantizer with everything that it is called with."""

    fq: sq.FakeQuantize
    scheme: sq.QScheme
    qparams: sq.QParams
    other: sq.QParams
    tolerance: float

    def apply(self, x: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        """The output, as a function of the tensor and of the leaves that have derivatives."""
        return self.fq.apply(x, put(self.qparams, leaves), self.scheme)

    def loss(self, x: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        """A scalar, curved so that no derivative is a constant."""
        y = self.apply(x, leaves)
        return (y.square() * torch.arange(1, y.numel() + 1, dtype=y.dtype).reshape(y.shape) / y.numel()).sum()

    def gradient(self, x: Tensor, leaves: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """``torch.func.grad`` of it."""
        return torch.func.grad(self.loss, argnums=(0, 1))(x, leaves)


def sample(seed: int, *shape: int) -> Tensor:
    """Normal numbers, skewed so that an affine grid has a zero point."""
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed)) + 0.4


def scheme_of(granularity: Granularity) -> sq.QScheme:
    """Four bits with a zero point."""
    dynamic = isinstance(granularity, sq.PerToken)
    return sq.QScheme(bits=4, symmetric=False, granularity=granularity, dynamic=dynamic)


def floating(qparams: sq.QParams) -> dict[str, Tensor]:
    """The leaves that have derivatives."""
    named = {"scale": qparams.scale, "zero_point": qparams.zero_point} | qparams.extras
    return {name: leaf for name, leaf in named.items() if leaf.is_floating_point() and name not in ("noise", "hessian")}


def put(qparams: sq.QParams, leaves: dict[str, Tensor]) -> sq.QParams:
    """``qparams`` with these leaves."""
    fields = {name: leaf for name, leaf in leaves.items() if name in sq.QParams._fields}
    extras = {name: leaf for name, leaf in leaves.items() if name not in fields}
    return qparams._replace(**fields, extras=sorted_dict(qparams.extras | extras))


def subject(name: str, granularity: Granularity, observed_by: str = "minmax") -> Subject:
    """A fake quantizer calibrated so that it clips a part of ``sample(1)``, if the observer does not widen the range."""
    fq, scheme = sq.fake_quantizer(name, **AT_WORK.get(name, {})), scheme_of(granularity)
    observer = OBSERVERS.build(OBSERVERS.spec(observed_by))

    def ready(seed: int) -> sq.QParams:
        x = 0.7 * sample(seed)
        found = fq.init(observer.qparams(observer.update(observer.init(x, scheme), x, scheme), scheme), x, scheme)
        more = {}
        if fq.noise:
            more["noise"] = torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed))
        if name in HESSIAN:
            more["hessian"] = sq.fake_quantize.hessian_update(torch.zeros(6, 6), 0, sample(seed + 9, 16, 2, 6))[0]
        return found._replace(extras=sorted_dict(found.extras | more))

    return Subject(fq, scheme, ready(0), ready(2), 2e-2 if name in CASTS else 1e-5)


def same(actual: Any, expected: Any, tolerance: float) -> None:
    """Two trees of tensors agree."""
    for a, e in zip(_pytree.tree_leaves(actual), _pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance, equal_nan=True)


def stack(*trees: Any) -> Any:
    """Trees as one of batches."""
    return _pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)


def pick(tree: Any, i: int) -> Any:
    """The ``i``-th of a batch."""
    return _pytree.tree_map(lambda leaf: leaf[i], tree)


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f`` as one graph, or an error."""
    torch.compiler.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager")


def check_grad(s: Subject) -> None:
    """Against ``Tensor.backward``."""
    point = _pytree.tree_map(lambda leaf: leaf.clone().requires_grad_(), (sample(1), floating(s.qparams)))
    leaves = _pytree.tree_leaves(point)
    nothing = torch.stack([0 * leaf.sum() for leaf in leaves]).sum()  # so that each leaf has a gradient
    (s.loss(*point) + nothing).backward()
    same(s.gradient(sample(1), floating(s.qparams)), tuple(leaf.grad for leaf in leaves), s.tolerance)


def check_vmap(s: Subject) -> None:
    """Over tensors, against the loop."""
    xs = torch.stack([sample(1), sample(3)])
    mapped = torch.vmap(lambda x: s.fq.apply(x, s.qparams, s.scheme))(xs)
    for i in range(2):
        same(mapped[i], s.fq.apply(xs[i], s.qparams, s.scheme), 1e-6)


def check_vmap_qparams(s: Subject) -> None:
    """Over qparams, against the loop."""
    x = sample(1)
    mapped = torch.vmap(lambda qp: s.fq.apply(x, qp, s.scheme))(stack(s.qparams, s.other))
    for i, qparams in enumerate((s.qparams, s.other)):
        same(mapped[i], s.fq.apply(x, qparams, s.scheme), 1e-6)


def check_vmap_grad(s: Subject) -> None:
    """Of the gradient, over tensors and over leaves together, against the loop."""
    xs, leaves = torch.stack([sample(1), sample(3)]), stack(floating(s.qparams), floating(s.other))
    mapped = torch.vmap(s.gradient)(xs, leaves)
    for i in range(2):
        same(pick(mapped, i), s.gradient(xs[i], pick(leaves, i)), s.tolerance)


def check_jvp(s: Subject) -> None:
    """Against the vjp: both give the same product with a tangent and a cotangent."""
    point = (sample(1), floating(s.qparams))
    tangent = _pytree.tree_map(lambda leaf: (8 * torch.sin(9 * leaf)).round() / 8, point)
    cotangent = (8 * sample(5)).round() / 8
    y, pushed = torch.func.jvp(s.apply, point, tangent)
    pulled = torch.func.vjp(s.apply, *point)[1](cotangent)
    same(y, s.apply(*point), 1e-6)
    pairs = zip(_pytree.tree_leaves(pulled), _pytree.tree_leaves(tangent), strict=True)
    same((pushed * cotangent).sum(), torch.stack([(a * b).sum() for a, b in pairs]).sum(), 1e-4)


def check_hvp(s: Subject) -> None:
    """Against the whole Hessian, by two reverse modes."""
    point = (sample(1), floating(s.qparams))
    flat, spec = _pytree.tree_flatten(point)
    sizes = [leaf.numel() for leaf in flat]

    def gradient(vector: Tensor) -> Tensor:
        parts = [part.reshape(leaf.shape) for part, leaf in zip(vector.split(sizes), flat, strict=True)]
        return torch.cat([g.reshape(-1) for g in _pytree.tree_leaves(s.gradient(*_pytree.tree_unflatten(parts, spec)))])

    at = torch.cat([leaf.reshape(-1) for leaf in flat])
    direction = torch.sin(9 * at)
    product = torch.func.jvp(gradient, (at,), (direction,))[1]
    plain = torch.stack([torch.func.vjp(gradient, at)[1](row)[0] @ direction for row in torch.eye(len(at))])
    same(product, plain, max(1e-4, s.tolerance))


def check_compile(s: Subject) -> None:
    """The forward, against eager."""
    point = (sample(1), floating(s.qparams))
    same(compiled(s.apply)(*point), s.apply(*point), 1e-6)


def check_compile_grad(s: Subject) -> None:
    """The gradient, against eager."""
    point = (sample(1), floating(s.qparams))
    same(compiled(s.gradient)(*point), s.gradient(*point), s.tolerance)


QUANTIZER_CHECKS: Mapping[str, Callable[[Subject], None]] = {
    "grad": check_grad,
    "vmap over x": check_vmap,
    "vmap over qparams": check_vmap_qparams,
    "vmap of grad": check_vmap_grad,
    "jvp": check_jvp,
    "hvp": check_hvp,
    "compile": check_compile,
    "compile of grad": check_compile_grad,
}


def states_of(observer: sq.Observer, scheme: sq.QScheme) -> Any:
    """Two states, as one batch."""
    return stack(*(observer.update(observer.init(sample(i), scheme), sample(i), scheme) for i in range(2)))


def check_observer_vmap(observer: sq.Observer, scheme: sq.QScheme) -> None:
    """Update and qparams over states and tensors, against the loop."""
    states, xs = states_of(observer, scheme), torch.stack([sample(2), sample(3)])
    mapped = torch.vmap(lambda state, x: observer.qparams(observer.update(state, x, scheme), scheme))(states, xs)
    for i in range(2):
        same(pick(mapped, i), observer.qparams(observer.update(pick(states, i), xs[i], scheme), scheme), 1e-6)


def check_observer_update(observer: sq.Observer, scheme: sq.QScheme) -> None:
    """A compiled update, against eager."""
    state = pick(states_of(observer, scheme), 0)
    found = compiled(lambda state, x: observer.update(state, x, scheme))(state, sample(2))
    same(found, observer.update(state, sample(2), scheme), 1e-6)


def check_observer_qparams(observer: sq.Observer, scheme: sq.QScheme) -> None:
    """Compiled qparams, against eager."""
    state = pick(states_of(observer, scheme), 0)
    same(compiled(lambda state: observer.qparams(state, scheme))(state), observer.qparams(state, scheme), 1e-6)


OBSERVER_CHECKS: Mapping[str, Callable[[sq.Observer, sq.QScheme], None]] = {
    "vmap of update and qparams": check_observer_vmap,
    "compile of update": check_observer_update,
    "compile of qparams": check_observer_qparams,
}


def attempt(where: str, check: Callable[[], None]) -> str:
    """``"yes"``, or the first line of what went wrong, whose traceback is printed."""
    try:
        check()
    except Exception as error:
        print(f"--- {where}")
        traceback.print_exc(limit=-3)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
    return "yes"


def quantizer_row(name: str) -> Row:
    """Every transform of one fake quantizer, on every granularity."""
    subjects = {key: subject(name, granularity) for key, granularity in GRANULARITIES.items()}
    return {
        label: {key: attempt(f"{name}, {label}, {key}", lambda c=check, s=s: c(s)) for key, s in subjects.items()}
        for label, check in QUANTIZER_CHECKS.items()
    }


def pair_row(name: str) -> Row:
    """Every transform of one fake quantizer, per tensor, with the qparams of every observer."""
    subjects = {observer: subject(name, sq.PerTensor(), observer) for observer in OBSERVERS.names()}
    return {
        observer: {
            label: attempt(f"{name}, {observer}, {label}", lambda c=check, s=s: c(s))
            for label, check in QUANTIZER_CHECKS.items()
        }
        for observer, s in subjects.items()
    }


def observer_row(name: str) -> Row:
    """Every transform of one observer, on every granularity."""
    made = OBSERVERS.build(OBSERVERS.spec(name))
    schemes = {key: scheme_of(granularity) for key, granularity in GRANULARITIES.items()}
    return {
        label: {key: attempt(f"{name}, {label}, {key}", lambda c=check, s=s: c(made, s)) for key, s in schemes.items()}
        for label, check in OBSERVER_CHECKS.items()
    }


def cell(found: dict[str, str]) -> str:
    """``yes`` everywhere, or where not."""
    bad = [key for key, text in found.items() if text != "yes"]
    if not bad:
        return "yes"
    return "**no**" if len(bad) == len(found) else f"**no**: {', '.join(bad)}"


def table(kind: str, rows: Mapping[str, Row]) -> Iterator[str]:
    """A table with a line for each name, and the reasons of every ``no``."""
    head = list(next(iter(rows.values())))
    yield f"| {kind} | {' | '.join(head)} |"
    yield f"|{'---|' * (len(head) + 1)}"
    for name, row in rows.items():
        yield f"| `{name}` | {' | '.join(cell(row[label]) for label in head)} |"
    yield ""
    for name, row in rows.items():
        for label, found in row.items():
            for text in sorted({text for text in found.values() if text != "yes"}):
                where = ", ".join(key for key in found if found[key] == text)
                yield f"* `{name}`, {label}, {where}: {text}"
                yield ""


def page(quantizers: Mapping[str, Row], observers: Mapping[str, Row], pairs: Mapping[str, Row]) -> str:
    """The page."""
    lines = [
        "# What goes through which transform",
        "",
        "Made by `python benchmarks/transforms.py`, which runs every registered fake quantizer and observer through the",
        'transforms of `torch.func` and through `torch.compile(fullgraph=True, backend="aot_eager")`, and compares each',
        f"result with its plain counterpart; torch {torch.__version__.partition('+')[0]}. *yes*: no error and the same",
        "numbers on every granularity: per tensor, channel, group and block with static scales, per token with dynamic",
        "ones; four bits with a zero point, options as in [numerics.md](numerics.md) except `qdrop(prob=0.5)`, and a",
        "Hessian for `gptq` and `gptqfp4`. [composition.md](composition.md) is the page for whole models.",
        "",
        "| transform | compared with | within |",
        "|---|---|---|",
        "| grad of a loss, to `x` and every floating leaf of the qparams | `Tensor.backward` | 1e-5 |",
        "| vmap over `x`, or over qparams | the loop | 1e-6 |",
        "| vmap of grad, over both together | the loop | 1e-5 |",
        "| jvp | the vjp, multiplied with a tangent and a cotangent | 1e-4 |",
        "| hvp: jvp of grad | the whole Hessian, reverse over reverse, times the direction | 1e-4 |",
        "| compile of the forward, compile of grad | eager | 1e-6, 1e-5 |",
        "",
        "The casts `fp16` and `bf16` cast derivatives, too; theirs are compared within 2e-2.",
        "",
        "## Fake quantizers",
        "",
        *table("fake quantizer", quantizers),
        "## Observers",
        "",
        *table("observer", observers),
        "## Pairs",
        "",
        "All eight transforms of each fake quantizer, per tensor, with the scale that each observer finds.",
        "",
        *table("fake quantizer", pairs),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start, rows = time.perf_counter(), []
    quantizers, observers = FAKE_QUANTIZERS.names(), OBSERVERS.names()
    for names, row_of in ((quantizers, quantizer_row), (observers, observer_row), (quantizers, pair_row)):
        rows.append({})
        for name in names:
            rows[-1][name] = row_of(name)
            cells = "  ".join(cell(found) for found in rows[-1][name].values())
            print(f"{time.perf_counter() - start:6.1f} s  {name:<14} {cells}", flush=True)
    write_text(options.out / "transforms.md", page(*rows))


if __name__ == "__main__":
    main()
