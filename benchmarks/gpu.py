"""Whether an accelerator computes what the CPU does, without waiting, and how fast: under six minutes on one card.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --device cpu --small      # the same code, to try it

* *pieces*: every observer and fake quantizer, on the CPU and on the device.
* *waits*: calls of a run, updates of observers and fake quantizers alone, under
  ``torch.cuda.set_sync_debug_mode("error")``: none may stop the host. That an observer ends in qparams does.
* *models*: a ResNet-18 and a small GPT on the CPU and on the device, and every transform in bfloat16.
* *graphs*: forward and derivatives captured in a CUDA graph, and replayed.
* *speed*: time and memory as ratios to float in bfloat16, at a batch of 256 images (64 sequences), eager and staged.
* *compiled*: the forward under ``torch.compile``.

A section that fails says so, and the next one runs. The exit status is 1 if anything disagreed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import write
from subjects import ResNet18, tiny
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

import sophq_func as sq
from sophq_func.numerics.registries import FAKE_QUANTIZERS, OBSERVERS

Call = Callable[[], Any]

GRANULARITIES: dict[str, Any] = {"tensor": sq.PerTensor(), "channel": sq.PerChannel(0), "group": sq.PerGroup(16)}

ROUNDING = 1e-5
"""How far scales may differ: devices add up in another order, and divide with another rounding in the last bit."""

NEAR = 2.0**-20
"""By how much scales and inputs are varied on the CPU, relative: eight roundings of float32.

A quotient that is a tie on one device is none on the other, where a maximum was divided by a constant with another last
bit: values that saturate may all lie on one tie, and so may whole blocks of a format whose scale is itself rounded.
"""

TIES = 2e-3
"""Which share of the elements may lie outside of all that the CPU computes from inputs so varied.

A block of a half-precision tensor has a scale of its own, which cannot be varied from outside, and GPTQ hands the error of
one tie on to the rest of its row.
"""

ALIKE = 0.999
"""Least cosine of outputs and gradients of a network on two devices: ties of one layer move what the next one sees."""

EXAMPLES = 32
"""How many examples ``vmap(grad)`` maps over."""


class Block(nn.Module):
    """A layer of a GPT, with fused attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (part.reshape(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A language model of some layers."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def subject(name: str, batch: int, small: bool) -> tuple[nn.Module, Tensor]:
    """A model with random weights and a batch, both on the CPU in float32."""
    torch.manual_seed(0)
    if name == "resnet18":
        model, shape = (tiny(4).make(), (8, 8, 8)) if small else (ResNet18().eval(), (3, 224, 224))
        return model, torch.randn(batch, *shape)
    layers, width, vocabulary, length = (1, 32, 64, 16) if small else (6, 512, 1024, 256)
    return GPT(layers, width, 8, vocabulary, length).eval(), torch.randint(0, vocabulary, (batch, length))


def moved(tree: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A tree with its tensors on a device, and what is floating in a dtype."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype), tree)


def size(y: Tensor) -> Tensor:
    """A loss."""
    return y.float().square().mean()


def plainly(f: Callable[..., Any], *args: Any) -> Any:
    """A call in which attention is not fused: fused attention has no forward mode."""
    with sdpa_kernel(SDPBackend.MATH):
        return f(*args)


class Network:
    """A model on a device, its quantized form, and the calls that are measured; ``float_*`` are those of the model."""

    def __init__(self, name: str, batch: int, device: torch.device, dtype: torch.dtype, small: bool) -> None:
        model, x = subject(name, batch, small)
        kind: dict[str, Any] = {"observer": "minmax", "fake_quantize": "lsq"}
        config = sq.QuantConfig(
            strategy="Layers",
            weight=sq.QuantizerConfig(scheme=sq.QScheme(bits=8, granularity=sq.PerChannel()), **kind),
            activation=sq.QuantizerConfig(scheme=sq.QScheme(bits=8), **kind),
        )
        self.q = sq.quantize(model, config, example_args=(x[:2],))
        params = sq.params_of(model)
        qparams = self.q.calibrate(params, [x[:4]], progress=False)
        self.model, self.params, self.x = model.to(device, dtype), moved(params, device, dtype), moved(x, device, dtype)
        self.qparams = moved(qparams, device, torch.float32)
        self.ostate = self.q.init(self.params)
        self.scales, self.rest = self.q.split(self.qparams)
        names = {name for name, _ in model.named_parameters()}
        self.weights = {name: tensor for name, tensor in self.params.items() if name in names}
        self.buffers = {name: tensor for name, tensor in self.params.items() if name not in names}
        self.learned = (self.weights, self.scales)
        self.leaves = pytree.tree_map(lambda t: t.clone().requires_grad_(), self.learned)

    def loss(self, learned: Any, x: Tensor) -> Tensor:
        """Of weights and scales."""
        weights, scales = learned
        return size(self.q.apply({**weights, **self.buffers}, sq.merge(scales, self.rest), x))

    def float_loss(self, weights: Any, x: Tensor) -> Tensor:
        """Of weights."""
        return size(functional_call(self.model, {**weights, **self.buffers}, (x,)))

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The quantized output."""
        return self.q.apply(self.params, self.qparams, self.x)

    @torch.no_grad()
    def float_forward(self) -> Tensor:
        """The output of the model."""
        return self.model(self.x)

    def step(self) -> tuple[Tensor, ...]:
        """Gradients to weights and scales."""
        return torch.autograd.grad(self.loss(self.leaves, self.x), pytree.tree_leaves(self.leaves))

    def float_step(self) -> tuple[Tensor, ...]:
        """Gradients to weights."""
        leaves = self.leaves[0]
        return torch.autograd.grad(self.float_loss(leaves, self.x), list(leaves.values()))

    def calls(self) -> dict[str, tuple[Call, Call]]:
        """By name, a call and that of the float model."""
        examples = self.x[:EXAMPLES]
        ways, float_ways = (pytree.tree_map(torch.ones_like, tree) for tree in (self.learned, self.weights))
        mapped = vmap(grad(lambda one, x: self.loss(one, x[None])), (None, 0))
        float_mapped = vmap(grad(lambda one, x: self.float_loss(one, x[None])), (None, 0))
        return {
            "forward": (self.forward, self.float_forward),
            "step": (self.step, self.float_step),
            "func.grad": (
                lambda: grad(self.loss)(self.learned, self.x),
                lambda: grad(self.float_loss)(self.weights, self.x),
            ),
            "vmap(grad)": (lambda: mapped(self.learned, examples), lambda: float_mapped(self.weights, examples)),
            "jvp": (
                lambda: plainly(jvp, lambda one: self.loss(one, self.x), (self.learned,), (ways,)),
                lambda: plainly(jvp, lambda one: self.float_loss(one, self.x), (self.weights,), (float_ways,)),
            ),
            "observe": (lambda: self.q.observe(self.params, self.ostate, self.x), self.float_forward),
        }

    def staged(self) -> dict[str, tuple[Call, Call]]:
        """Some of the same, as programs."""
        forward, slope = sq.stage(self.q.apply), sq.stage(grad(self.loss))
        quiet = torch.no_grad()(lambda: forward(self.params, self.qparams, self.x))
        calls = self.calls()
        return {
            "forward, staged": (quiet, calls["forward"][1]),
            "func.grad, staged": (lambda: slope(self.learned, self.x), calls["func.grad"][1]),
        }


class Check:
    """A run of the script: what it was asked for, and what it has found."""

    def __init__(self, device: str, small: bool, budget: float) -> None:
        self.device, self.small, self.budget = torch.device(device), small, budget
        self.is_cuda = self.device.type == "cuda"
        self.start = time.perf_counter()
        self.wrong: list[str] = []
        self.figures: dict[str, Any] = {}

    def say(self, *words: object) -> None:
        """Print a line with the time."""
        print(f"[{time.perf_counter() - self.start:6.1f} s]", *words, flush=True)

    def refuse(self, *words: object) -> None:
        """Print what is wrong, and remember it."""
        self.wrong.append(" ".join(map(str, words)))
        self.say("WRONG", *words)

    def is_late(self) -> bool:
        """Whether the time is used up."""
        return time.perf_counter() - self.start > self.budget

    def wait(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize()

    @contextmanager
    def tried(self, *what: object) -> Iterator[None]:
        """An error inside is one line, and the next thing is tried."""
        try:
            yield
        except Exception as error:
            self.refuse(*what, type(error).__name__, str(error).strip().partition("\n")[0][:140])

    def network(self, name: str, batch: int, dtype: torch.dtype, device: torch.device | None = None) -> Network:
        """A network on the device."""
        return Network(name, batch, device or self.device, dtype, self.small)

    def seconds(self, call: Call) -> float:
        """Median seconds of a call."""
        call()
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        once = time.perf_counter() - start
        repeats = max(1, min(20, int(0.1 / max(once, 1e-5))))
        found = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            self.wait()
            found.append((time.perf_counter() - start) / repeats)
        return statistics.median(found)

    def peak(self, call: Call) -> int:
        """Bytes that a call takes at its peak."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.wait()
        return torch.cuda.max_memory_allocated() - before

    def ratio(self, name: str, ours: Call, plain: Call) -> None:
        """Time and memory of two calls, as ratios."""
        try:
            float_seconds = self.seconds(plain)
        except RuntimeError as error:  # of torch: fused or mixed arithmetic that lacks a derivative
            self.say(f"{name:<28}", "float fails:", str(error).strip().partition("\n")[0][:100])
            return
        with self.tried(name):
            seconds = self.seconds(ours)
            row = {"float ms": 1e3 * float_seconds, "ratio": seconds / float_seconds}
            if self.is_cuda:
                row["memory"] = self.peak(ours) / max(1, self.peak(plain))
            self.figures[name] = row
            self.say(f"{name:<28}", "  ".join(f"{key} {value:.2f}" for key, value in row.items()))


def cosine(one: Any, other: Any) -> float:
    """Of two trees of tensors, each as one vector, on the CPU in float64."""
    vectors = [torch.cat([t.detach().flatten().double().cpu() for t in pytree.tree_leaves(tree)]) for tree in (one, other)]
    return float(F.cosine_similarity(*vectors, 0))


def outside(found: Tensor, expected: list[Tensor]) -> float:
    """The share of elements that lie, by more than rounding, outside of the expected ones; infinite for other shapes."""
    if found.shape != expected[0].shape:
        return math.inf
    value, each = found.detach().double().cpu(), torch.stack([one.detach().double() for one in expected])
    low, high = each.amin(0), each.amax(0)
    slack = 1e-4 * torch.maximum(low.abs(), high.abs()) + 1e-6
    inside = (value >= low - slack) & (value <= high + slack) | (value.isnan() & each.isnan().any(0))
    return float((~inside).double().mean())


def sample(rows: int = 32, columns: int = 1024) -> Tensor:
    """Rows of very different size, with outliers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 1, rows)[:, None]
    x[0, :3] = torch.tensor([0.0, 30.0, -30.0])
    return x


def schemes() -> Iterator[tuple[str, sq.QScheme]]:
    """Granularities with and without a zero point."""
    for name, granularity in GRANULARITIES.items():
        for symmetric in (True, False):
            kind = "symmetric" if symmetric else "affine"
            yield f"per {name}, {kind}", sq.QScheme(bits=8, symmetric=symmetric, granularity=granularity)


def observed(name: str, scheme: sq.QScheme, x: Tensor) -> sq.QParams:
    """The qparams that an observer finds for three tensors."""
    observer = sq.observer(name)
    state = observer.init(x, scheme)
    for factor in (1.0, 0.5, 1.5):
        state = observer.update(state, factor * x, scheme)
    return observer.qparams(state, scheme)


def started(name: str, scheme: sq.QScheme, x: Tensor, factor: float = 1.0) -> sq.QParams:
    """The qparams with which a fake quantizer starts; all that it divides by times a factor."""
    fake = sq.fake_quantizer(name)
    qparams = pytree.tree_map_only(
        Tensor, lambda t: t * factor if t.is_floating_point() else t, fake.init(observed("minmax", scheme, x), x, scheme)
    )
    if "hessian" in fake.needs:
        qparams = qparams._replace(extras={**qparams.extras, "hessian": torch.eye(x.shape[1], device=x.device)})
    return qparams


def rounded(name: str, scheme: sq.QScheme, x: Tensor, qparams: sq.QParams, noise: Tensor) -> tuple[Tensor, ...]:
    """What a fake quantizer makes of a tensor, and the gradient to it."""
    fake = sq.fake_quantizer(name)
    given = x.clone().requires_grad_()
    y = fake.apply(given, qparams, scheme, noise if fake.noise else None)
    if not y.requires_grad:  # what it learns decides the output, and not the tensor
        return (y,)
    return y, torch.autograd.grad(y.float().square().sum(), given)[0]


def pieces(check: Check) -> None:
    """Every observer and fake quantizer on two devices, in float32 and bfloat16."""
    x = sample(4, 32 if check.small else 128)  # a search costs 0.1 s a scale on a CPU, and a group of 16 has one
    compared = 0
    for name in OBSERVERS.names():
        for kind, scheme in schemes():
            with check.tried("observer", name, kind):
                try:
                    expected = observed(name, scheme, x)
                except ValueError:  # refused there, and so here
                    continue
                found = observed(name, scheme, x.to(check.device))
                off = ((found.scale.cpu() - expected.scale).abs() / expected.scale).max()
                zeros = (found.zero_point.cpu() - expected.zero_point).abs().max()
                compared += 1
                if float(off) > ROUNDING or int(zeros) > 1:
                    check.refuse("observer", name, kind, f"scales differ by {float(off):.1e}, zero points by {int(zeros)}")
    x = x if check.small else sample()
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    for name in FAKE_QUANTIZERS.names():
        for kind, scheme in schemes():
            for dtype in (torch.float32, torch.bfloat16):
                with check.tried("fake quantizer", name, kind, dtype):
                    try:
                        given = [x.to(dtype)] if dtype != torch.float32 else [x, x * (1 - NEAR), x * (1 + NEAR)]
                        expected = [
                            rounded(name, scheme, given[0], started(name, scheme, given[0], factor), noise)
                            for factor in (1, 1 - NEAR, 1 + NEAR)
                        ]
                        expected += [rounded(name, scheme, one, started(name, scheme, one), noise) for one in given[1:]]
                    except ValueError:
                        continue
                    moved_x = x.to(check.device, dtype)
                    found = rounded(name, scheme, moved_x, started(name, scheme, moved_x), noise.to(check.device))
                    compared += 1
                    shares = [outside(one, list(others)) for one, *others in zip(found, *expected, strict=True)]
                    if max(shares) > TIES or any(one.dtype != dtype for one in found):
                        check.refuse("fake quantizer", name, kind, dtype, "differs in these shares of elements:", shares)
    check.say("pieces compared:", compared)


def waits(check: Check) -> None:
    """Calls of a run, and each piece alone, where waiting for the device is an error."""
    network = check.network("resnet18", 4, torch.float32)
    calls = {name: ours for name, (ours, _) in network.calls().items()}
    calls |= {name: ours for name, (ours, _) in network.staged().items()}
    calls["with_bits"] = lambda: sq.with_bits(network.qparams, network.q.plan, 4)
    x, scheme = (sample(4, 32) if check.small else sample()).to(check.device), sq.QScheme(bits=4)
    noise = torch.rand_like(x)
    for name in FAKE_QUANTIZERS.names():
        start = started(name, scheme, x)
        calls[f"fake quantizer {name}"] = lambda name=name, start=start: rounded(name, scheme, x, start, noise)
    for name in OBSERVERS.names():
        observer = sq.observer(name)
        calls[f"observer {name}"] = partial(observer.update, observer.init(x, scheme), x, scheme)
    for name, call in calls.items():
        with check.tried(name, "fails even where it may wait"):
            call()  # which makes tables, once for each device
            check.wait()
            with check.tried(name, "waits"):
                if check.is_cuda:
                    torch.cuda.set_sync_debug_mode("error")
                try:
                    call()
                finally:
                    if check.is_cuda:
                        torch.cuda.set_sync_debug_mode("default")
    check.say("calls that must not wait:", len(calls), "" if check.is_cuda else "(not checked: this device cannot wait)")


def models(check: Check) -> None:
    """Whole models on two devices, and every transform in bfloat16."""
    for name in ("resnet18", "gpt"):
        host = check.network(name, 4, torch.float32, torch.device("cpu"))
        device = check.network(name, 4, torch.float32)
        first = pytree.tree_map(lambda slopes: slopes[0], device.calls()["vmap(grad)"][0]())
        alike = {
            "outputs": cosine(host.forward(), device.forward()),
            "gradients": cosine(host.step(), device.step()),
            "vmap(grad) and the loop": cosine(first, grad(device.loss)(device.learned, device.x[:1])),
        }
        check.say(name, "cosines of", ", ".join(f"{what} {value:.6f}" for what, value in alike.items()))
        for what, value in alike.items():
            if value < ALIKE:
                check.refuse(name, what, "differ")
        half = check.network(name, 4, torch.bfloat16)
        for what, (call, _) in half.calls().items():
            with check.tried(name, what, "in bfloat16"):
                found = [t for t in pytree.tree_leaves(call()) if isinstance(t, Tensor)]
                if any(t.device.type != check.device.type for t in found):
                    check.refuse(name, what, "leaves the device")
                if not all(bool(t.isfinite().all()) for t in found if t.is_floating_point() and what != "observe"):
                    check.refuse(name, what, "is not finite in bfloat16")
        for what, (call, _) in half.staged().items():
            with check.tried(name, what):
                plain = half.calls()[what.partition(",")[0]][0]
                if not all(map(torch.equal, pytree.tree_leaves(call()), pytree.tree_leaves(plain()))):
                    check.refuse(name, what, "has other bits")


def graphs(check: Check) -> None:
    """Runs captured in a CUDA graph."""
    if not check.is_cuda:
        check.say("only CUDA has graphs")
        return
    for name in ("resnet18", "gpt"):
        network = check.network(name, 8, torch.bfloat16)
        for what in ("forward", "step", "func.grad"):
            call, _ = network.calls()[what]
            with check.tried(name, what, "is not captured"):
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(3):
                        call()
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    found = call()
                graph.replay()
                check.wait()
                pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(call()), strict=True)
                if not all(torch.allclose(one.float(), other.float(), rtol=1e-2, atol=1e-3) for one, other in pairs):
                    check.refuse(name, what, "is replayed with other numbers")
                check.ratio(f"{name} {what}, replayed", graph.replay, call)


def speed(check: Check) -> None:
    """Ratios to float in bfloat16; two images show what launches cost."""
    for name, batch in (("resnet18", 256), ("gpt", 64)):
        for count in (4,) if check.small else (batch, 2):
            network = check.network(name, count, torch.bfloat16)
            for what, (ours, plain) in {**network.calls(), **network.staged()}.items():
                if check.is_late():
                    check.say("out of time")
                    return
                check.ratio(f"{name} {what} x{count}", ours, plain)


def compiled(check: Check) -> None:
    """The forward under a compiler."""
    for name, batch in (("resnet18", 256), ("gpt", 64)):
        if check.is_late():
            check.say("out of time")
            return
        network = check.network(name, 4 if check.small else batch, torch.bfloat16)
        options = {"guard_filter_fn": sq.skip_guards_on_quantized}
        plain, ours = torch.compile(network.model), torch.compile(network.q.apply, fullgraph=True, options=options)
        staged = sq.stage(network.q.apply, backend="inductor")
        args = (network.params, network.qparams, network.x)
        float_call = torch.no_grad()(lambda plain=plain, args=args: plain(args[2]))
        check.ratio(f"{name} forward, compiled", torch.no_grad()(lambda ours=ours, args=args: ours(*args)), float_call)
        check.ratio(f"{name} forward, inductor", torch.no_grad()(lambda f=staged, args=args: f(*args)), float_call)


SECTIONS: dict[str, Callable[[Check], None]] = {
    "pieces": pieces,
    "waits": waits,
    "models": models,
    "graphs": graphs,
    "speed": speed,
    "compiled": compiled,
}


def main() -> int:
    """Run the sections, and write what ``--json`` asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small networks and batches, to try the script")
    parser.add_argument("--budget", type=float, default=300, help="seconds after which no new figure is begun")
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # as exact as the CPU, whose numbers are the reference
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    check = Check(options.device, options.small, options.budget)
    card = torch.cuda.get_device_name() if check.is_cuda else "CPU"
    check.say(card, "torch", torch.__version__)
    for name in options.sections:
        if check.is_late():
            check.say("out of time before", name)
            break
        check.say("#", name)
        with check.tried(name):
            SECTIONS[name](check)
    check.say("wrong:", len(check.wrong))
    if options.json:
        write(options.json, {"card": card, "wrong": check.wrong, **check.figures})
    return min(1, len(check.wrong))


if __name__ == "__main__":
    sys.exit(main())
