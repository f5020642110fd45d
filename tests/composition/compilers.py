"""torch.compile as one graph: values, and how often it compiles.

In float64: compiled code adds up in another order than eager does, by CPU, and in float32 a sum that lies near a tie would
then have another code, and with it another gradient: the largest weight of each channel does. Learned scales stay float32,
and with them their gradients, sums of terms that cancel: these are compared to 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._inductor import list_options
from torch.func import grad
from torch.utils import _pytree

import sophq_func as sq
from tests.composition.registry import COMPILED_INSIDE, each, row, same, some
from tests.composition.subjects import Subject, curved

SMALL: Mapping[str, Any] = {"cpp.simdlen": 0, "cpp.max_horizontal_fusion_size": 1, "realize_cpu_opcount_threshold": 10}
"""Options of inductor with which a C++ compiler is done with its kernels three times sooner. Older versions lack one."""


def compiled(f: Callable[..., Any], backend: Any) -> Callable[..., Any]:
    """``f`` as one graph, or an error."""
    torch._dynamo.reset()
    options = {name: SMALL[name] for name in SMALL.keys() & {*list_options()}} if backend == "inductor" else None
    return torch.compile(f, fullgraph=True, backend=backend, options=options)


def gradient(s: Subject) -> Callable[..., Any]:
    """The gradient to every learned scale and parameter."""
    return grad(lambda at, batch: s.loss(*at, batch))


@row("compile, aot_eager", "1e-9; 1e-5")
def check_aot_eager(s: Subject) -> None:
    """eager; so is the gradient of `backward` through it."""
    s = s.wide

    def leaves() -> Any:
        return _pytree.tree_map(lambda leaf: leaf.clone().requires_grad_(), (s.scales, s.weights))

    def forward(at: Any, batch: Any) -> Tensor:
        return s.out({**s.params, **at[1]}, sq.merge(at[0], s.rest), batch)

    at = leaves()
    found, expected = compiled(forward, "aot_eager")(at, s.batch), forward(at, s.batch)
    same(found, expected, 1e-9)
    flat = _pytree.tree_leaves(at)
    options = {"allow_unused": True, "materialize_grads": True}
    pulled = [torch.autograd.grad(curved(out), flat, **options) for out in (found, expected)]
    some(pulled[1])
    same(*pulled, 1e-5)


@row("compile of grad, aot_eager", "1e-5")
def check_aot_eager_grad(s: Subject) -> None:
    """eager, for every parameter and learned scale."""
    s = s.wide
    at = (s.scales, s.weights)
    expected = gradient(s)(at, s.batch)
    some(expected)
    same(compiled(gradient(s), "aot_eager")(at, s.batch), expected, 1e-5)


@row("compile of observe, aot_eager", "1e-6")
def check_aot_eager_observe(s: Subject) -> None:
    """eager: every observer's state."""
    s = s.wide
    ostate = s.q.init(s.params)

    def observe(params: Any, ostate: Any, batch: Any) -> Any:
        return s.q.observe(params, ostate, **batch)[1]

    same(compiled(observe, "aot_eager")(s.params, ostate, s.batch), observe(s.params, ostate, s.batch), 1e-6)


@row("compile of forward and grad, inductor", "1e-9; 1e-5")
def check_inductor(s: Subject) -> None:
    """eager: the output; the gradient, for every parameter and learned scale."""
    s = s.wide

    def both(at: Any, batch: Any) -> tuple[Any, Tensor]:
        def loss(at: Any) -> tuple[Tensor, Tensor]:
            out = s.out({**s.params, **at[1]}, sq.merge(at[0], s.rest), batch)
            return curved(out), out

        return grad(loss, has_aux=True)(at)

    at = (s.scales, s.weights)
    found, expected = compiled(both, "inductor")(at, s.batch), both(at, s.batch)
    same(found[1], expected[1], 1e-9)
    some(expected[0])
    same(found[0], expected[0], 1e-5)


@row("compile, other batch sizes", "1e-9")
def check_batch_sizes(s: Subject) -> None:
    """eager; one compilation more when the size first changes, none for any further one."""
    s = s.wide
    counter = CompileCounter()
    run = compiled(s.out, counter)
    for size, compilations in ((4, 1), (3, 2), (2, 2), (7, 2)):
        batch = each(s.batch, torch.arange(size) % 4)
        same(run(s.params, s.qparams, batch), s.out(s.params, s.qparams, batch), 1e-9)
        assert counter.frame_count == compilations, (size, counter.frame_count)


@row("compile, other qparams, bit widths, masks", "1e-9")
def check_data(s: Subject) -> None:
    """eager; no compilation after the first; without autograd."""
    s, counter, seen = s.wide, CompileCounter(), []
    run = torch.no_grad()(compiled(s.out, counter))
    for bits, on, stretch in ((8, True, 1.0), (8, True, 1.3), (4, True, 1.0), (3, False, 1.0)):
        qparams = sq.merge({name: scale * stretch for name, scale in s.scales.items()}, s.rest)
        mask = {"*": True, "*weight_fake_quant": torch.tensor(on)}
        setting = sq.enabled(sq.with_bits(qparams, s.q.plan, bits), mask)
        seen.append(run(s.params, setting, s.batch))
        same(seen[-1], s.out(s.params, setting, s.batch), 1e-9)
        assert counter.frame_count == 1, (bits, on, stretch)
        assert not any(torch.equal(seen[-1], other) for other in seen[:-1])


@row("grad of compile", "", every=COMPILED_INSIDE)
def check_inside(s: Subject) -> None:
    """nothing: torch refuses it."""
    forward = compiled(s.loss, "aot_eager")
    grad(forward)(s.scales, s.weights, s.batch)
