"""What a model is given and what it returns: every tensor in it is seen, and nothing that is given changes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._pytree import tree_map

import sophq_func as sq
from sophq_func.core.pytree import tensors
from tests.helpers import DEFAULT, FLOAT, WATCHED, Ready, ready, same


class Named(NamedTuple):
    w1: Any
    w2: Any


@dataclass
class Fields:
    w1: Any
    w2: Any


@dataclass(frozen=True, slots=True)
class Frozen:
    w1: Any
    w2: Any


@dataclass
class Registered:
    w1: Any
    w2: Any


_pytree.register_dataclass(Registered)


class Node:
    """Registered without names for its parts."""

    def __init__(self, w1: Any, w2: Any) -> None:
        self.w1, self.w2 = w1, w2


_pytree.register_pytree_node(Node, lambda node: ((node.w1, node.w2), None), lambda parts, _: Node(*parts))


class Plain:
    def __init__(self, w1: Any, w2: Any) -> None:
        self.w1, self.w2 = w1, w2


KINDS: dict[str, Callable[[Any, Any], Any]] = {
    "named tuple": Named,
    "dataclass": Fields,
    "frozen dataclass": Frozen,
    "registered dataclass": Registered,
    "registered node": Node,
    "object": Plain,
}
over_kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


class Products(nn.Module):
    """Everything that it multiplies is an argument."""

    def forward(self, given: Any, x: Tensor) -> Tensor:
        return torch.tanh(x @ given.w1) @ given.w2


def two() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 16), torch.randn(16, 3)


def rounded(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return ((torch.round(x / scale) + zero_point).clamp(low, high) - zero_point) * scale


@over_kinds
def test_tensors_in_an_argument_are_quantized_whatever_holds_them(make: Callable[[Any, Any], Any]) -> None:
    given, x = make(*two()), torch.randn(8, 6)
    r = ready(Products(), given, x, config=sq.QuantConfig(activation=sq.override(bits=2, symmetric=True)))
    first, second, *rest = r.q.plan
    assert rest == ["x.post_act_fake_quantizer", "tanh.post_act_fake_quantizer"]
    if make is not Node:
        assert [first, second] == ["given.w1.post_act_fake_quantizer", "given.w2.post_act_fake_quantizer"]

    # with the calibrated scale the largest value lies between two steps, where the order of operations decides
    qparams = {name: entry._replace(scale=entry.scale * 1.03) for name, entry in r.qparams.items()}

    def fq(name: str, t: Tensor) -> Tensor:
        return rounded(t, qparams[name].scale, qparams[name].zero_point, 2)

    h = fq(rest[1], torch.tanh(fq(rest[0], x) @ fq(first, given.w1)))
    torch.testing.assert_close(r.q.apply(r.params, qparams, given, x), h @ fq(second, given.w2))


@over_kinds
@pytest.mark.parametrize(
    "outer", [lambda t: [t], lambda t: {"k": (t,)}, lambda t: Plain(t, None)], ids=["list", "dict", "object"]
)
def test_containers_in_containers_are_looked_into(make: Callable[[Any, Any], Any], outer: Callable[[Any], Any]) -> None:
    class Nested(nn.Module):
        def forward(self, given: Any, x: Tensor) -> Tensor:
            while not hasattr(given, "w2") or given.w2 is None:
                given = given["k"] if isinstance(given, dict) else given[0] if isinstance(given, list | tuple) else given.w1
            return x @ given.w1

    q = sq.quantize(Nested(), DEFAULT, example_args=(outer(make(*two())), torch.randn(8, 6)))
    assert len(q.plan) == 2


class Returns(nn.Module):
    """Returns two values in a container."""

    def __init__(self, make: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.make = nn.Linear(6, 3), make

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        return self.make(y, torch.relu(y))


@over_kinds
@pytest.mark.parametrize("chip", [None, "BM1690"])
def test_tensors_in_an_output_are_seen_whatever_holds_them(make: Callable[[Any, Any], Any], chip: str | None) -> None:
    x, config = torch.randn(8, 6), sq.QuantConfig(chip=chip)
    r, twin = ready(Returns(make), x, config=config), ready(Returns(lambda a, b: (a, b)), x, config=config)
    assert list(r.q.plan) == list(twin.q.plan)
    assert type(r(x)) is type(make(0, 0))
    same((r(x).w1, r(x).w2), twin(x))
    graph = sq.trace(Returns(make), (x,))
    assert sum(value.output for value in graph.values.values()) == 2
    row = sq.report(r.q.eval(), r.params, r.qparams, [x], progress=False).rows[0]
    assert row.quantizer in r.q.plan


# What is given is not eaten


class Cache:
    """Grows by what it is given, as a cache of keys and values does."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.seen = 0

    def update(self, row: Tensor) -> Tensor:
        self.rows.append(row)
        self.seen += 1
        return torch.cat(self.rows)


class Remembers(nn.Module):
    """Writes into what it is given, in the way that it is told, and returns it."""

    def __init__(self, update: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.update = nn.Linear(4, 4), update

    def forward(self, x: Tensor, memory: Any) -> tuple[Tensor, Any]:
        return torch.relu(self.update(memory, self.layer(x))), memory


def into_a_cache(memory: Cache, y: Tensor) -> Tensor:
    return memory.update(y)


def into_a_dict(memory: dict[str, Any], y: Tensor) -> Tensor:
    memory["calls"] = memory.get("calls", 0) + 1
    memory["last"] = y
    return y * memory["calls"]


def into_a_list(memory: list[Tensor], y: Tensor) -> Tensor:
    memory.append(y)
    return y * len(memory)


def into_a_tensor_of_a_dict(memory: dict[str, Tensor], y: Tensor) -> Tensor:
    memory["total"] += y.detach().sum()
    return y * memory["total"]


def into_a_tensor_of_an_object(memory: Plain, y: Tensor) -> Tensor:
    memory.w1.add_(y.detach().sum())
    return y * memory.w1


def into_a_nested_list(memory: tuple[dict[str, list[int]]], y: Tensor) -> Tensor:
    memory[0]["n"].append(len(memory[0]["n"]))
    return y * len(memory[0]["n"])


def into_a_set(memory: set[int], y: Tensor) -> Tensor:
    memory.add(len(memory))
    return y * len(memory)


def into_an_ordered_dict(memory: OrderedDict[str, Tensor], y: Tensor) -> Tensor:
    memory[str(len(memory))] = y
    return y * len(memory)


MEMORIES: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[], Any]]] = {
    "cache": (into_a_cache, Cache),
    "dict": (into_a_dict, dict),
    "list": (into_a_list, list),
    "tensor of a dict": (into_a_tensor_of_a_dict, lambda: {"total": torch.ones(())}),
    "tensor of an object": (into_a_tensor_of_an_object, lambda: Plain(torch.ones(1), 0)),
    "nested list": (into_a_nested_list, lambda: ({"n": [0]},)),
    "set": (into_a_set, lambda: {7}),
    "ordered dict": (into_an_ordered_dict, OrderedDict),
}
over_memories = pytest.mark.parametrize(("update", "make"), MEMORIES.values(), ids=MEMORIES)


def contents(memory: Any) -> Any:
    """All that can change in a memory."""
    inside = vars(memory) if hasattr(memory, "__dict__") else memory
    return repr(inside), [t._version for t in tensors(memory)]


@over_memories
@pytest.mark.parametrize("config", [DEFAULT, FLOAT, WATCHED], ids=["default", "float", "watched"])
def test_no_run_changes_what_it_is_given(
    update: Callable[[Any, Tensor], Tensor], make: Callable[[], Any], config: sq.QuantConfig
) -> None:
    model, x, memory = Remembers(update).eval(), torch.randn(2, 4), make()
    before = contents(memory)
    r = ready(model, x, memory, config=config)
    first = r(x, memory)
    ostate = r.q.init(r.params)
    r.q.observe(r.params, ostate, x, memory)
    r.q.observe_quantized(r.params, ostate, r.qparams, x, memory)
    one, other = (r.q.calibrate(r.params, [(x, memory)] * 2, progress=False) for _ in range(2))
    r.q.apply_and_update(r.params, r.qparams, x, memory)
    r.q.capture(r.params, r.qparams, x, memory)
    r.q.tap("layer")(r.params, r.qparams, x, memory)
    r.q.sweep(r.params, [r.qparams], (x, memory), reduce=lambda out: out[0], progress=False)
    assert contents(memory) == before
    same(one, other)
    same(r(x, memory)[0], first[0])
    if config is FLOAT:
        same(first[0], model(x, copy.deepcopy(memory))[0])


@over_memories
def test_what_a_run_returns_holds_the_update(update: Callable[[Any, Tensor], Tensor], make: Callable[[], Any]) -> None:
    """Step by step, each with what the step before returned, as generation does."""
    model, x = Remembers(update).eval(), torch.randn(2, 4)
    r = ready(model, x, make(), config=FLOAT)
    memory, expected = make(), make()
    for _ in range(3):
        with torch.no_grad():
            out, memory = r(x, memory)
            same(out, model(x, expected)[0])
    assert contents(memory)[0] == contents(expected)[0]


def test_a_tensor_that_is_given_twice_and_written_into_is_one_tensor() -> None:
    class Writes(nn.Module):
        def forward(self, a: Tensor, b: Tensor, w: Tensor) -> Tensor:
            a += 1
            return b @ w

    x, w = torch.randn(2, 4), torch.randn(4, 3)
    no_sum = sq.QuantConfig(rules=(sq.Rule(name="add", activation=None),))
    for config in (FLOAT, no_sum):
        r = ready(Writes(), x, x, w, config=config)
        same(r(x, x, w), r(x, x, w))
    same(ready(Writes(), x, x, w, config=FLOAT)(x, x, w), (x + 1) @ w)


# Models of transformers


@pytest.fixture(scope="module")
def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config).eval()


IDS = torch.arange(8).remainder(7)[None]


def first_tokens(model: nn.Module, count: int) -> Any:
    """The cache after some tokens."""
    with torch.no_grad():
        return model(input_ids=IDS[:, :count], use_cache=True).past_key_values


def lengths(cache: Any) -> list[int]:
    return [layer.keys.shape[-2] for layer in cache.layers]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_cache_of_keys_and_values_is_seen_and_does_not_grow(llama: Any) -> None:
    call = {"input_ids": IDS[:, 4:], "past_key_values": first_tokens(llama, 4), "use_cache": True}
    q = sq.quantize(llama, DEFAULT, example_kwargs=call)
    assert "past_key_values.layers.1.values.post_act_fake_quantizer" in q.plan
    params = sq.params_of(llama)
    one, other = (q.calibrate(params, [call], progress=False) for _ in range(2))
    same(one, other)
    out = q.apply(params, one, **call)
    assert lengths(call["past_key_values"]) == [4, 4]
    assert lengths(out.past_key_values) == [8, 8]
    floating = sq.quantize(llama, FLOAT, example_kwargs=call)
    same(floating.apply(params, {}, **call).logits, llama(**copy.deepcopy(call)).logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_generation_passes_on_the_cache_that_a_run_returns(llama: Any) -> None:
    whole = {"input_ids": IDS, "use_cache": True}
    q, params = sq.quantize(llama, DEFAULT, example_kwargs=whole), sq.params_of(llama)
    qparams = q.calibrate(params, [whole], progress=False)
    with torch.no_grad():
        cache, logits = None, []
        for i in range(IDS.shape[1]):
            out = q.apply(params, qparams, input_ids=IDS[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
        expected = q.apply(params, qparams, **whole).logits
    # sums over one token at a time and over all, in another order: a value next to a step's edge may round to the other
    step = max(float(entry.scale.max()) for name, entry in qparams.items() if name.startswith("model.norm"))
    assert float((torch.cat(logits, 1) - expected).abs().max()) < step


# Batches


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.layer(x)
        return y if mask is None else y * mask


def with_labels() -> Iterator[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return ((torch.randn(2, 4), torch.tensor([[1.0], [2.0]])) for _ in range(3))


def test_a_label_beside_the_input_is_not_taken_for_an_argument() -> None:
    r = ready(Masked(), torch.randn(2, 4))
    with pytest.raises(sq.StateError, match=r"no example gives: got \['mask'\], allowed \['x'\].*inputs=lambda batch"):
        r.q.calibrate(r.params, with_labels(), progress=False)
    expected = r.q.calibrate(r.params, [x for x, _ in with_labels()], progress=False)
    same(r.q.calibrate(r.params, with_labels(), inputs=lambda batch: batch[0], progress=False), expected)
    same(r.q.calibrate(r.params, with_labels(), inputs=lambda batch: {"x": batch[0]}, progress=False), expected)


@pytest.mark.parametrize("other", [{"how": "loop"}, {}], ids=["sweep", "report"])
def test_other_functions_of_batches_say_so_too(other: dict[str, Any]) -> None:
    r = ready(Masked().eval(), torch.randn(2, 4))
    batch = next(with_labels())
    with pytest.raises(sq.StateError, match="no example gives"):
        if other:
            r.q.sweep(r.params, [r.qparams], batch, progress=False, **other)
        else:
            sq.report(r.q, r.params, r.qparams, [batch], progress=False)


def test_a_batch_that_is_no_call_of_the_model_is_refused_in_our_words() -> None:
    layer = nn.Linear(4, 3)
    r = ready(layer, torch.randn(2, 4))
    for batch in (next(with_labels()), {"image": torch.randn(2, 4)}, ()):
        with pytest.raises(sq.StateError, match=r"not a call of the model.*Linear.*inputs="):
            r.q.calibrate(r.params, [batch], progress=False)


def test_batches_that_are_meant_so_go_through() -> None:
    x, mask = torch.randn(2, 4), torch.ones(2, 1)
    r = ready(Masked(), x)
    for batch in (x, [x], (x, None), {"x": x, "mask": mask}):
        r.q.calibrate(r.params, [batch], progress=False)
    named = ready(Masked(), x, mask=mask)
    named.q.calibrate(named.params, [(x, mask)], progress=False)
    part = ready(nn.Sequential(Masked(), nn.ReLU()), x)
    part.q.part("0").calibrate(part.params, [(x, mask)], progress=False)


# Models and tensors of other kinds


def offloaded(model: nn.Module) -> nn.Module:
    """Parameters on ``meta``, and hooks that load them for the time of a call, as packages for large models do it."""

    def load(layer: nn.Module, _: Any, kept: dict[str, Tensor]) -> None:
        for name, tensor in kept.items():
            setattr(layer, name, nn.Parameter(tensor))

    for layer in [layer for layer in model.modules() if list(layer.parameters(recurse=False))]:
        kept = {name: parameter.detach() for name, parameter in layer.named_parameters(recurse=False)}
        empty = {name: tensor.to("meta") for name, tensor in kept.items()}
        load(layer, None, empty)
        layer.register_forward_pre_hook(lambda layer, args, kept=kept: load(layer, args, kept))
        layer.register_forward_hook(lambda layer, args, out, empty=empty: load(layer, args, empty))
    return model


class Functional(nn.Module):
    """Its own forward reads the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.w)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)),
        lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.Flatten()),
        lambda: nn.Sequential(nn.Identity(), Functional()),
    ],
    ids=["linear", "convolution", "function"],
)
def test_a_model_whose_weights_are_elsewhere_is_refused(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(2, 4, 1) if isinstance(make()[0], nn.Conv1d) else torch.randn(2, 4)
    expected = model(x)
    loaded_by_hooks = offloaded(model)
    same(loaded_by_hooks(x), expected)
    with pytest.raises(sq.PlanError, match=r"meta device.*remove_hook_from_module"):
        sq.quantize(loaded_by_hooks, DEFAULT, example_args=(x,))
    never_loaded = make().to("meta")
    with pytest.raises(sq.PlanError, match="meta device"):
        sq.quantize(never_loaded, DEFAULT, example_args=(x,))
    assert sq.quantize(never_loaded, DEFAULT, example_args=(x.to("meta"),)).plan


def jagged(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(5, 4)], layout=layout)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_tensors_are_refused_where_values_are_quantized(layout: torch.layout) -> None:
    model, padded, nested = nn.Linear(4, 3), torch.randn(2, 5, 4), jagged(layout)
    with pytest.raises(sq.PlanError, match=r"input.*to_padded_tensor"):
        sq.quantize(model, DEFAULT, example_args=(nested,))
    r = ready(model, padded)
    for call in (lambda: r(nested), lambda: r.q.calibrate(r.params, [nested], progress=False)):
        with pytest.raises(sq.StateError, match=r"input.post_act_fake_quantizer.*to_padded_tensor"):
            call()
    weights = ready(model, padded, config=sq.QuantConfig(activation=None))
    same(weights(nested).unbind()[1], weights(nested.unbind()[1]))


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A mesh of one process."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_sharded_params_need_qparams_on_their_mesh(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    model, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(4, 16)
    r: Ready = ready(model, x)
    sharded = {name: distribute_tensor(p, mesh, [Shard(0)]) for name, p in r.params.items()}

    def replicated(tree: Any) -> Any:
        return tree_map(lambda t: distribute_tensor(t, mesh, [Replicate()]), tree)

    same(r.q.apply(sharded, replicated(r.qparams), replicated(x)).full_tensor(), r(x))
    with pytest.raises(sq.StateError, match=r"params are DTensors, and qparams are plain.*Replicate"):
        r.q.apply(sharded, r.qparams, replicated(x))
    for call in (lambda: r.q.init(sharded), lambda: r.q.calibrate(sharded, [replicated(x)], progress=False)):
        with pytest.raises(sq.StateError, match="calibrate before sharding"):
            call()
    fully_shard(model, mesh=mesh)
    with pytest.raises(sq.PlanError, match="before fully_shard"):
        sq.quantize(model, DEFAULT, example_args=(x,))
    with pytest.raises(sq.PlanError, match="before fully_shard"):
        sq.build(model, r.q.plan)
