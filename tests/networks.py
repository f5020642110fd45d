"""Random small networks, and an interpreter that computes with them as a plan's sites say, without the library's own runs.

A network is a list of steps. A step is written once, in terms of a *machine*: :class:`Plain` just calls modules and
functions, as a model's ``forward`` does; :class:`Interpreter` counts calls by itself, looks at each for a site of the plan,
and rounds there with its own formula. So the two agree if, and only if, every quantizer acts on the value that its site
names.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import sophq_func as sq
from sophq_func.config.site import ComputedSite, Site, WeightSite

BATCH, TIME, WIDTH = 4, 3, 6
"""Every value of a network has this shape."""

EXPERTS = 3


class Step(NamedTuple):
    """What happens, on which of the values so far (from the end), with which number of its own."""

    kind: str
    reads: tuple[int, int]
    number: int


class Plain:
    """Calls what it is told to call."""

    def call(self, scope: str, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function of torch; ``scope`` is the path of the network around, ``name`` its canonical name."""
        return function(*args)

    def module(self, scope: str, attribute: str, module: nn.Module, x: Tensor) -> Tensor:
        """Call a leaf module of the network at ``scope``."""
        return module(x)  # type: ignore[no-any-return]

    def network(self, scope: str, module: Network, x: Tensor, pick: Tensor) -> Tensor:
        """Call a network inside another."""
        return module(x, pick)  # type: ignore[no-any-return]

    def parameter(self, scope: str, owner: nn.Module, attribute: str) -> Tensor:
        """A parameter that functions read."""
        return getattr(owner, attribute)  # type: ignore[no-any-return]

    def item(self, scope: str, attribute: str, stacked: Tensor, index: int) -> Tensor:
        """An item of such a parameter, by its number."""
        return stacked[index]


Machine = Plain


class OfTree(Plain):
    """Reads parameters from a tree, as a function of params does."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.params = params

    def parameter(self, scope: str, owner: nn.Module, attribute: str) -> Tensor:
        held: Tensor = self.params["of"][attribute][0]
        return held


class Network(nn.Module):
    """A network of some steps; each value has the shape ``(BATCH, TIME, WIDTH)``."""

    def __init__(self, steps: Sequence[Step], depth: int = 0) -> None:
        super().__init__()
        self.steps = tuple(steps)
        self.scope = ""
        for step in self.steps:
            MAKE.get(step.kind, _nothing)(self, step)
        self.depth = depth

    def forward(self, x: Tensor, pick: Tensor) -> Tensor:
        return self.run(Plain(), "", x, pick)

    def run(self, machine: Machine, scope: str, x: Tensor, pick: Tensor) -> Tensor:
        """The last value, computed by a machine."""
        values = [x]
        for step in self.steps:
            one, other = (values[-1 - read % len(values)] for read in step.reads)
            values.append(RUN[step.kind](_Here(machine, scope, self, step, pick), one, other))
        return values[-1]


class _Here(NamedTuple):
    """A machine at one step of a network."""

    machine: Machine
    scope: str
    network: Network
    step: Step
    pick: Tensor

    def call(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        return self.machine.call(self.scope, name, function, *args)

    def module(self, prefix: str, x: Tensor, number: int | None = None) -> Tensor:
        attribute = f"{prefix}{self.step.number if number is None else number}"
        return self.machine.module(self.scope, attribute, self.network.get_submodule(attribute), x)

    def parameter(self, prefix: str = "w") -> Tensor:
        return self.machine.parameter(self.scope, self.network, f"{prefix}{self.step.number}")


def _nothing(network: Network, step: Step) -> None:
    """Make nothing."""


MAKE: dict[str, Callable[[Network, Step], None]] = {}
"""By kind of step, what makes its modules and parameters."""

RUN: dict[str, Callable[[_Here, Tensor, Tensor], Tensor]] = {}
"""By kind of step, what computes its value."""


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / WIDTH**0.5)


def makes_weight(*shape: int) -> Callable[[Network, Step], None]:
    """Makes a parameter of a shape."""

    def make(network: Network, step: Step) -> None:
        network.register_parameter(f"w{step.number}", weight(*shape))

    return make


SQUARE = makes_weight(WIDTH, WIDTH)


def step(make: Callable[[Network, Step], None] | None = None) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a kind of step by the name of the function that computes it."""

    def register(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        RUN[run.__name__] = run
        if make is not None:
            MAKE[run.__name__] = make
        return run

    return register


# Layers


def _make_linear(network: Network, step: Step) -> None:
    network.add_module(f"l{step.number}", nn.Linear(WIDTH, WIDTH, bias=bool(step.number % 2)))


@step(_make_linear)
def linear(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    return here.module("l", x)


@step(_make_linear)
def linear_twice(here: _Here, x: Tensor, y: Tensor) -> Tensor:
    return here.call("add", torch.add, here.module("l", x), here.module("l", y))


def _make_tied(network: Network, step: Step) -> None:
    _make_linear(network, step)
    twin = nn.Linear(WIDTH, WIDTH, bias=False)
    twin.weight = network.get_submodule(f"l{step.number}").weight  # type: ignore[assignment]
    network.add_module(f"t{step.number}", twin)


@step(_make_tied)
def tied(here: _Here, x: Tensor, y: Tensor) -> Tensor:
    return here.call("sub", torch.sub, here.module("l", x), here.module("t", y))


def _make_derived_layer(network: Network, step: Step) -> None:
    network.add_module(f"l{step.number}", parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH, bias=False)))


@step(_make_derived_layer)
def weight_norm(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    return here.module("l", x)


def _make_hooked(network: Network, step: Step) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch announces that the old hooks will go
        network.add_module(f"l{step.number}", nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH, bias=False)))


@step(_make_hooked)
def hooked(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    return here.module("l", x)


def _make_conv(network: Network, step: Step) -> None:
    network.add_module(f"c{step.number}", nn.Conv1d(WIDTH, WIDTH, 3, padding=1, bias=bool(step.number % 2)))
    norm = nn.BatchNorm1d(WIDTH)
    norm.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr]
    norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    nn.init.uniform_(norm.weight, 0.5, 2)
    network.add_module(f"n{step.number}", norm)
    network.add_module(f"r{step.number}", nn.ReLU())


@step(_make_conv)
def conv(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    turned = here.call("transpose", torch.transpose, x, 1, 2)
    return here.call("transpose", torch.transpose, here.module("c", turned), 1, 2)


@step(_make_conv)
def conv_norm_relu(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    turned = here.call("transpose", torch.transpose, x, 1, 2)
    y = here.module("r", here.module("n", here.module("c", turned)))
    return here.call("transpose", torch.transpose, y, 1, 2)


def _make_norm(network: Network, step: Step) -> None:
    network.add_module(f"n{step.number}", nn.LayerNorm(WIDTH))


@step(_make_norm)
def layer_norm(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    return here.module("n", x)


# Products of functions, in many spellings


@step(SQUARE)
def f_linear(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    return here.call("linear", F.linear, x, here.parameter())


@step(SQUARE)
def f_linear_turned(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    return here.call("linear", F.linear, x, here.call("transpose", torch.transpose, here.parameter(), 0, 1))


@step(SQUARE)
def at(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    return here.call("matmul", lambda a, b: a @ b, x, here.parameter())


@step(SQUARE)
def at_turned(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    return here.call("matmul", torch.matmul, x, here.call("t", torch.t, here.parameter()))


@step(SQUARE)
def at_permuted(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    return here.call("matmul", torch.matmul, x, here.call("permute", torch.permute, here.parameter(), (1, 0)))


@step(SQUARE)
def einsum_io(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    return here.call("einsum", lambda a, b: torch.einsum("btd,de->bte", a, b), x, here.parameter())


@step(SQUARE)
def einsum_oi(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    return here.call("einsum", lambda a, b: torch.einsum("btd,ed->bte", a, b), x, here.parameter())


@step(SQUARE)
def einsum_first(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    return here.call("einsum", lambda b, a: torch.einsum("de,btd->bte", b, a), here.parameter(), x)


@step(SQUARE)
def tensordot(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    return here.call("tensordot", lambda a, b: torch.tensordot(a, b, dims=([2], [0])), x, here.parameter())


@step(SQUARE)
def inner(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    return here.call("inner", torch.inner, x, here.parameter())


@step(SQUARE)
def mm(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    flat = here.call("reshape", torch.reshape, x, (-1, WIDTH))
    return here.call("reshape", torch.reshape, here.call("mm", torch.mm, flat, here.parameter()), x.shape)


@step(SQUARE)
def mapped(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    # what a transform maps over is seen whole, so that the calls are those of the function without it
    weight = here.parameter()
    return (
        torch.vmap(lambda row: F.linear(row, weight))(x)
        if type(here.machine) is Plain
        else here.call("linear", F.linear, x, weight)
    )


@step(makes_weight(TIME, WIDTH, WIDTH))
def bmm(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    turned = here.call("transpose", torch.transpose, x, 0, 1)
    return here.call("transpose", torch.transpose, here.call("bmm", torch.bmm, turned, here.parameter()), 0, 1)


@step(makes_weight(TIME, WIDTH, WIDTH))
def items(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    stacked, parts = here.parameter(), []
    for t in range(TIME):
        row = here.call("select", torch.select, x, 1, t)
        item = here.machine.item(here.scope, f"w{here.step.number}", stacked, t)
        parts.append(here.call("linear", F.linear, row, item))
    return here.call("stack", lambda *rows: torch.stack(rows, 1), *parts)


def _make_scaled(network: Network, step: Step) -> None:
    SQUARE(network, step)
    network.register_parameter(f"s{step.number}", nn.Parameter(torch.rand(WIDTH, 1) + 0.5))


@step(_make_scaled)
def scaled_weight(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    derived = here.call("mul", torch.mul, here.parameter("w"), here.parameter("s"))
    return here.call("linear", F.linear, x, derived)


@step()
def attention(here: _Here, x: Tensor, y: Tensor) -> Tensor:
    scores = here.call("matmul", torch.matmul, x, here.call("transpose", torch.transpose, y, 1, 2))
    return here.call("matmul", torch.matmul, here.call("softmax", lambda s: torch.softmax(s, -1), scores), y)


@step()
def sdpa(here: _Here, x: Tensor, y: Tensor) -> Tensor:
    return here.call("scaled_dot_product_attention", F.scaled_dot_product_attention, x, y, x)


# Elementwise, in place, views, constants


@step()
def add(here: _Here, x: Tensor, y: Tensor) -> Tensor:
    return here.call("add", lambda a, b: a + b, x, y)


@step()
def mul(here: _Here, x: Tensor, y: Tensor) -> Tensor:
    return here.call("mul", torch.mul, x, here.call("tanh", torch.tanh, y))


@step()
def tanh(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    return here.call("tanh", Tensor.tanh, x)


@step()
def gelu(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    return here.call("gelu", F.gelu, x)


@step()
def sigmoid(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    return here.call("sigmoid", torch.sigmoid, x)


@step()
def in_place(here: _Here, x: Tensor, y: Tensor) -> Tensor:
    fresh = here.call("tanh", torch.tanh, x)
    return here.call("add", Tensor.add_, fresh, y)


@step()
def relu_in_place(here: _Here, x: Tensor, y: Tensor) -> Tensor:
    return here.call("relu", Tensor.relu_, here.call("sub", torch.sub, x, y))


@step()
def relu_in_place_of_torch(here: _Here, x: Tensor, y: Tensor) -> Tensor:
    return here.call("relu", torch.relu_, here.call("sub", torch.sub, x, y))


@step()
def flip(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    return here.call("flip", lambda a: torch.flip(a, (1,)), x)


@step()
def cat_and_cut(here: _Here, x: Tensor, y: Tensor) -> Tensor:
    return here.call("narrow", torch.narrow, here.call("cat", lambda a, b: torch.cat([a, b], 1), x, y), 1, 1, TIME)


@step()
def chunk_and_cat(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    one, other = here.call("chunk", torch.chunk, x, 2, 2)
    return here.call("cat", lambda a, b: torch.cat([a, b], 2), other, one)


@step()
def plus_constant(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    return here.call("add", torch.add, x, here.call("ones_like", torch.ones_like, x))


@step()
def through_containers(here: _Here, x: Tensor, y: Tensor) -> Tensor:
    held = {"pair": (x, [y]), "name": "held"}
    pair: Any = held["pair"]
    return here.call("sub", torch.sub, pair[1][0], pair[0])


# Blocks and routing


def _make_block(network: Network, step: Step) -> None:
    kinds = ["linear", "gelu", "f_linear", "add"]
    inner_steps = [Step(kind, (0, 1), i) for i, kind in enumerate(kinds[: 2 + step.number % 3])]
    network.add_module(f"b{step.number}", Network(inner_steps, network.depth + 1 if hasattr(network, "depth") else 1))


@step(_make_block)
def block(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    attribute = f"b{here.step.number}"
    inside: Any = here.network.get_submodule(attribute)
    return here.machine.network(f"{here.scope}.{attribute}".lstrip("."), inside, x, here.pick)


def _make_experts(network: Network, step: Step) -> None:
    for expert in range(EXPERTS):
        network.add_module(f"e{step.number}_{expert}", nn.Linear(WIDTH, WIDTH, bias=False))


@step(_make_experts)
def routed(here: _Here, x: Tensor, _: Tensor) -> Tensor:
    y = here.call("zeros_like", torch.zeros_like, x)
    for expert in here.pick.unique().tolist():
        rows = (here.pick == expert).nonzero()[:, 0]
        part = here.call("index_select", torch.index_select, x, 0, rows)
        attribute = f"e{here.step.number}_{expert}"
        made = here.machine.module(here.scope, attribute, here.network.get_submodule(attribute), part)
        y = here.call("index_add", lambda a, i, b: torch.index_add(a, 0, i, b), y, rows, made)
    return y


# Networks


OF_FUNCTIONS = tuple(
    "add at at_permuted at_turned attention bmm cat_and_cut chunk_and_cat einsum_first einsum_io einsum_oi f_linear "
    "f_linear_turned flip gelu in_place inner items mm mul plus_constant scaled_weight sdpa sigmoid tanh tensordot".split()
)
"""Kinds of steps that call no module."""


def tree_of(network: Network) -> dict[str, Any]:
    """The parameters of a network of functions as the tree that :class:`OfTree` reads."""
    return {"of": {name: [parameter.detach()] for name, parameter in network.named_parameters()}}


@st.composite
def networks(draw: st.DrawFn, kinds: Sequence[str] | None = None) -> Network:
    """Networks of two to nine steps, in evaluation mode."""
    names = st.sampled_from(sorted(RUN) if kinds is None else kinds)
    reads = st.tuples(st.integers(0, 4), st.integers(0, 4))
    steps = [Step(draw(names), draw(reads), i) for i in range(draw(st.integers(2, 9)))]
    torch.manual_seed(draw(st.integers(0, 1000)))
    return Network(steps).eval()


def batches(seed: int, picks: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
    """A batch for each list of the experts of its rows."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(BATCH, TIME, WIDTH, generator=generator), torch.tensor(pick)) for pick in picks]


# The interpreter


class Interpreter(Plain):
    """Calls modules and functions, and does at each call what the sites of a plan say.

    Args:
      q: gives the plan; nothing else of it is used.
      params: of the network.
      act: what happens to a tensor at a site, by the quantizer's name: it is rounded, or noted.
    """

    def __init__(self, q: sq.Quantized, params: Mapping[str, Tensor], act: Callable[[str, Tensor], Tensor]) -> None:
        self.plan = q.plan
        self.params = dict(params)
        self.act = act
        self.counts: Counter[tuple[str, str]] = Counter()
        self.before: dict[str, str] = {}
        self.reached: set[str] = set()
        self.at: dict[tuple[str, str, int, int, int], str] = {}
        self.inputs: dict[str, str] = {}
        for name in self.plan:
            site = self.plan.site(name)
            if site.argument:
                self.inputs[site.argument] = name
            elif not isinstance(site, WeightSite):
                self._note(site)

    def _note(self, site: Site) -> None:
        for place in site.places():
            output = site.output if place.operand < 0 else -1
            self.at[place.path, place.function, place.call, place.operand, output] = site.quantizer

    def run_all(self, network: Network, x: Tensor, pick: Tensor) -> Tensor:
        """The network's output, in eager."""
        self._name_of = {id(tensor): name for name, tensor in own_tensors(network)}
        if "x" in self.inputs:
            x = self._acted(self.inputs["x"], x)
        return network.run(self, "", x, pick)

    def _acted(self, name: str, x: Tensor) -> Tensor:
        self.reached.add(name)
        return self.act(name, x)

    def _place(self, scope: str, path: str, function: str) -> tuple[str, str]:
        """Under which name calls of a module or function are counted: alone, or after what was called before."""
        apart = f"{function}@{self.before.get(scope, '')}"
        is_apart = any(p == path and f.partition("@")[0] == function and "@" in f for p, f, *_ in self.at)
        return (path, apart) if is_apart else (path, function)

    def _around(
        self, scope: str, path: str, function: str, compute: Callable[..., Any], args: Sequence[Any], own: bool = False
    ) -> Any:
        """One call: its operands at their sites, the call, and its results at theirs."""
        place = self._place(scope, path, function)
        number = self.counts[place]
        self.counts[place] += 1
        slot, given = 0, []
        for arg in args:
            if isinstance(arg, Tensor):
                name = self.at.get((*place, number, slot, -1))
                given.append(self._acted(name, arg) if name else arg)
                slot += 1
            else:
                given.append(arg)
        result = compute(*given)
        outputs = list(result) if isinstance(result, tuple | list) else [result]
        for i, output in enumerate(outputs):
            name = self.at.get((*place, number, -1, i))
            outputs[i] = self._acted(name, output) if name else output
        return outputs if isinstance(result, tuple | list) else outputs[0]

    def call(self, scope: str, name: str, function: Callable[..., Any], *args: Any) -> Any:
        return self._around(scope, scope, name, function, args)

    def module(self, scope: str, attribute: str, module: nn.Module, x: Tensor) -> Tensor:
        path = f"{scope}.{attribute}".lstrip(".")

        def compute(x: Tensor) -> Tensor:
            own = {name: self._parameter(tensor) for name, tensor in own_tensors(module)}
            inner = self.at.get((path, "", self.counts[path, ""] - 1, -1, -1))
            if inner:  # a weight that the layer computes itself
                assert isinstance(self.plan.site(inner), ComputedSite)
                return F.linear(x, self._acted(inner, module.weight), module.bias)  # type: ignore[arg-type]
            return torch.func.functional_call(module, own, (x,))  # type: ignore[no-any-return]

        result: Tensor = self._around(scope, path, "", compute, (x,))
        if next(module.parameters(), None) is not None:
            self.before[scope] = path
        return result

    def network(self, scope: str, module: Network, x: Tensor, pick: Tensor) -> Tensor:
        outer = scope.rpartition(".")[0]
        self.before[outer], self.before[scope] = scope, ""
        return module.run(self, scope, x, pick)

    def parameter(self, scope: str, owner: nn.Module, attribute: str) -> Tensor:
        return self._parameter(getattr(owner, attribute))

    def item(self, scope: str, attribute: str, stacked: Tensor, index: int) -> Tensor:
        result: Tensor = self._around(scope, scope, "getitem", lambda w: w[index], (stacked,))
        self.before[scope] = f"{scope}.{attribute}[{index}]".lstrip(".")
        return result

    def _parameter(self, tensor: Tensor) -> Tensor:
        return self.params[self._name_of[id(tensor)]]


def own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Name and value of each parameter and buffer of a leaf."""
    return [*module.named_parameters(), *module.named_buffers()]


def rounded(x: Tensor, scheme: sq.QScheme, qparams: sq.QParams) -> Tensor:
    """The formula of fixed fake quantization: ``(clamp(round(x * (1 / s)) + z) - z) * s``."""
    scale, zero_point = (_along(t, x, scheme) for t in (qparams.scale, qparams.zero_point))
    high = 2 ** (scheme.bits - 1) - 1 if scheme.symmetric else 2**scheme.bits - 1
    low = -high - 1 if scheme.symmetric else 0
    codes = (torch.round(x * (1 / scale)) + zero_point).clamp(low, high)
    return (codes - zero_point) * scale


def _along(values: Tensor, x: Tensor, scheme: sq.QScheme) -> Tensor:
    """Scales or zero points, shaped so that they broadcast with the tensor to which they belong."""
    if values.ndim == 0:
        return values
    axis = scheme.granularity.axis  # type: ignore[union-attr]
    axes = {a % x.ndim for a in ((axis,) if isinstance(axis, int) else axis)}
    return values.reshape([size if i in axes else 1 for i, size in enumerate(x.shape)])


def quantized_params(q: sq.Quantized, params: Mapping[str, Tensor], qparams: Mapping[str, sq.QParams]) -> dict[str, Tensor]:
    """The params with weights on their grids, BatchNorms folded in, and biases rounded, by the formulas."""
    new = dict(params)
    for name in q.plan:
        site = q.plan.site(name)
        if not isinstance(site, WeightSite):
            continue
        w, scheme = params[site.parameter], q.plan[name].scheme
        factor = torch.ones(())
        if site.norm:
            gamma, var = params[f"{site.norm}.weight"], params[f"{site.norm}.running_var"]
            factor = gamma / torch.sqrt(var + 1e-5)
        wide = factor.reshape(-1, *[1] * (w.ndim - 1)) if site.norm else factor
        new[site.parameter] = rounded(w * wide, scheme, qparams[name]) / wide
        if not site.source:
            continue
        step = qparams[site.source].scale * qparams[name].scale
        bias = params.get(site.bias, torch.zeros(())) if site.bias else torch.zeros(())
        folded = bias
        if site.norm:
            folded = (bias - params[f"{site.norm}.running_mean"]) * factor + params[f"{site.norm}.bias"]
        change = torch.round(folded / step) * step - folded
        if site.bias:
            new[site.bias] = bias + change / factor
        elif site.norm:
            new[f"{site.norm}.bias"] = params[f"{site.norm}.bias"] + change
    return new
