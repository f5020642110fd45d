"""A bound model is a module of the model's class with the numbers of ``q.apply``."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import sophq_func as sq
from sophq_func.model.bound import Bound

LSQ = sq.override(fake_quantize=sq.fake_quantize.learnable())
CNN = sq.QuantConfig(chip="BM1690", strategy="CNN", weight=LSQ, activation=LSQ)
WEIGHTS_ALONE = sq.QuantConfig(strategy="Layers", weight=LSQ, activation=None)
LEARN = (None, "scales", "params", "all")


class Net(nn.Module):
    """A convolution with a BatchNorm, which is folded, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 4)
        self.doubles = False
        self.seen = 0

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x))).mean((2, 3))

    def forward(self, x: Tensor, temperature: float = 1.0) -> Tensor:
        """Logits."""
        self.seen += len(x)
        hidden = torch.relu(self.fc1(self.features(x)))
        logits = self.fc2(hidden)
        if self.doubles:
            logits = 2 * logits
        return logits if temperature == 1.0 else logits / temperature


class Checkpointed(Net):
    """The same, with a part that is computed again in the backward pass."""

    def forward(self, x: Tensor, temperature: float = 1.0) -> Tensor:
        hidden = checkpoint(lambda y: torch.relu(self.fc1(y)), self.features(x), use_reentrant=False)
        return self.fc2(hidden)


class Made(NamedTuple):
    """A quantized model, and what a run of it takes."""

    model: nn.Module
    q: sq.Quantized
    params: dict[str, Tensor]
    qparams: dict[str, sq.QParams]
    x: Tensor

    def apply(self) -> Tensor:
        return self.q.apply(self.params, self.qparams, self.x)


def made(model: nn.Module | None = None, config: sq.QuantConfig = CNN, x: Tensor | None = None, train: bool = False) -> Made:
    torch.manual_seed(0)
    model = (Net() if model is None else model).train(train)
    x = torch.randn(6, 3, 6, 6) if x is None else x
    q = sq.quantize(model, config, example_args=(x,))
    params = sq.params_of(model)
    return Made(model, q, params, q.calibrate(params, [x], progress=False), x)


def sequential() -> Made:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    return made(model, sq.QuantConfig(weight=LSQ, activation=LSQ), torch.randn(6, 4))


def tripled(net: Net, x: Tensor) -> Tensor:
    return 3 * Net.forward(net, x)


def pickled(bound: Bound) -> Bound:
    return pickle.loads(pickle.dumps(bound))


def learned(bound: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in bound.named_parameters() if parameter.requires_grad}


def scale_of(bound: nn.Module, quantizer: str) -> Tensor:
    return bound.get_parameter(f"fake_quantizers.{quantizer.replace('.', '_')}.scale")


@pytest.mark.parametrize("learn", LEARN)
@pytest.mark.parametrize("config", [CNN, WEIGHTS_ALONE], ids=["activations", "weights"])
def test_the_output_is_that_of_apply_bit_for_bit(config: sq.QuantConfig, learn: Any) -> None:
    case = made(config=config)
    bound = case.q.bind(case.params, case.qparams, learn)
    assert torch.equal(bound(case.x), case.apply())
    assert torch.equal(bound.forward(case.x, temperature=2.0), case.apply() / 2)
    assert not torch.equal(bound(case.x), case.model(case.x))


def test_class_signature_layers_and_attributes_are_the_models() -> None:
    case = made()
    bound = case.q.bind(case.params, case.qparams)
    assert isinstance(bound, Net) and isinstance(bound, Bound)
    assert type(bound).__name__ == "Net" and type(bound).__module__ == Net.__module__
    assert inspect.signature(bound.forward) == inspect.signature(case.model.forward)
    assert bound.forward.__doc__ == "Logits."
    assert [type(layer) for layer in bound.children()] == [type(layer) for layer in case.model.children()]
    bound.doubles = True  # read by the forward
    assert torch.equal(bound(case.x), 2 * case.apply())
    assert bound.seen == case.model.seen + len(case.x)  # written by the forward, which apply would undo
    assert "learn=None" in repr(bound) and "5 activation quantizers" in repr(bound)


def test_neither_the_model_nor_params_nor_qparams_change() -> None:
    case = made(train=True)
    before = copy.deepcopy((case.model.state_dict(), case.params, case.qparams))
    bound = case.q.bind(case.params, case.qparams, "all")
    optimizer = torch.optim.SGD(bound.parameters(), lr=1.0)
    bound(case.x).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close((case.model.state_dict(), case.params, case.qparams), before, rtol=0, atol=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.model.modules())


COUNTS = [(None, 0, 0), ("scales", 8, 0), ("params", 0, 7), ("all", 8, 7)]


@pytest.mark.parametrize(("learn", "of_scales", "of_params"), COUNTS)
def test_learn_says_what_requires_a_gradient(learn: Any, of_scales: int, of_params: int) -> None:
    case = made()
    bound = case.q.bind(case.params, case.qparams, learn)
    names = learned(bound)
    scales = {name for name in names if name.startswith("fake_quantizers.")}
    assert (len(scales), len(names) - len(scales)) == (of_scales, of_params)
    learnable, _ = case.q.split(case.qparams)
    expected = {f"fake_quantizers.{name.rpartition('.')[0].replace('.', '_')}.scale" for name in learnable}
    assert scales == (expected if of_scales else set())


def test_parameters_that_the_model_froze_stay_so() -> None:
    case = made()
    case.model.requires_grad_(False).get_submodule("fc2").requires_grad_(True)
    q = sq.quantize(case.model, CNN, example_args=(case.x,))
    assert set(learned(q.bind(case.params, case.qparams, "params"))) == {"fc2.weight", "fc2.bias"}


def test_gradients_are_those_of_apply() -> None:
    case = made()
    bound = case.q.bind(case.params, case.qparams, "all")
    bound(case.x).square().sum().backward()
    learnable, rest = case.q.split(case.qparams)
    names = {name: case.params[name] for name in learned(bound) if name in case.params}

    def loss(some: dict[str, Tensor], scales: dict[str, Tensor]) -> Tensor:
        return case.q.apply({**case.params, **some}, sq.merge(scales, rest), case.x).square().sum()

    of_params, of_scales = grad(loss, argnums=(0, 1))(names, learnable)
    for name, expected in of_params.items():
        torch.testing.assert_close(bound.get_parameter(name).grad, expected)
    for name, expected in of_scales.items():
        torch.testing.assert_close(scale_of(bound, name.rpartition(".")[0]).grad, expected)


def test_a_step_of_training_moves_the_statistics_as_apply_and_update_does() -> None:
    case = made(train=True)
    bound = case.q.bind(case.params, case.qparams, "all")
    _, after = case.q.apply_and_update(case.params, case.qparams, case.x)
    bound(case.x)
    params, qparams = bound.state()
    assert params.keys() == after.keys() and qparams.keys() == case.qparams.keys()
    assert all(torch.equal(params[name], after[name]) for name in after)
    assert not torch.equal(params["bn.running_mean"], case.params["bn.running_mean"])
    bound.eval()
    assert torch.equal(bound(case.x), case.q.eval().apply(params, qparams, case.x))
    bound.train()
    expected = case.q.apply(params, qparams, case.x)  # before the next step, which moves these statistics
    assert torch.equal(bound(case.x), expected)


def test_a_checkpoint_in_the_model_has_the_gradients_of_the_model_without_it() -> None:
    for config in (CNN, WEIGHTS_ALONE):
        gradients = []
        for kind in (Net, Checkpointed):
            case = made(kind(), config)
            bound = case.q.bind(made(Net(), config).params, made(Net(), config).qparams, "all")
            bound(case.x).square().sum().backward()
            gradients.append({name: parameter.grad for name, parameter in learned(bound).items()})
        torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("learn", [None, "all"])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_have_tensors_of_their_own(copied: Callable[[Bound], Bound], learn: Any) -> None:
    case = made()
    bound = case.q.bind(case.params, case.qparams, learn)
    expected = bound(case.x)
    other = copied(bound)
    assert type(other) is type(bound) and torch.equal(other(case.x), expected)
    assert list(learned(other)) == list(learned(bound))
    with torch.no_grad():
        bound.get_parameter("fc1.weight").mul_(2)
    assert torch.equal(other(case.x), expected) and not torch.equal(bound(case.x), expected)
    other.load_state_dict(bound.state_dict())
    assert torch.equal(other(case.x), bound(case.x))


def test_torch_saves_and_loads_it(tmp_path: Path) -> None:
    case = made()
    bound = case.q.bind(case.params, case.qparams, "params")
    torch.save(bound, tmp_path / "bound.pt")
    other = torch.load(tmp_path / "bound.pt", weights_only=False)
    assert torch.equal(other(case.x), case.apply())


def test_state_dicts_name_what_does_not_fit() -> None:
    case = sequential()
    frozen, trained = (case.q.bind(case.params, case.qparams, learn) for learn in (None, "params"))
    with pytest.raises(RuntimeError, match=r"Missing key.*fake_quantizers.weights_are_quantized"):
        frozen.load_state_dict(trained.state_dict())  # float weights would be used as they are
    with pytest.raises(RuntimeError, match=r"Unexpected key.*fake_quantizers.weights_are_quantized"):
        trained.load_state_dict(frozen.state_dict())
    state = trained.state_dict()
    del state["fake_quantizers.0_weight_fake_quant.scale"]
    with pytest.raises(RuntimeError, match=r"Missing key.*fake_quantizers.0_weight_fake_quant.scale"):
        trained.load_state_dict({**state, "0.weight": state["0.weight"]})


def test_qparams_are_no_child_of_a_model_that_runs_its_children() -> None:
    case = sequential()
    bound = case.q.bind(case.params, case.qparams, "all")
    assert len(bound) == 3 and bound[-1] is bound[2]
    assert torch.equal(bound(case.x), case.apply())
    around = nn.ModuleDict({"net": bound})
    assert "net.fake_quantizers.0_weight_fake_quant.scale" in dict(around.named_parameters())
    other = copy.deepcopy(around)
    with torch.no_grad():
        for parameter in around.parameters():
            parameter.mul_(1.5)
    other.load_state_dict(around.state_dict())
    assert torch.equal(other["net"](case.x), bound(case.x)) and not torch.equal(bound(case.x), case.apply())


def test_grids_keep_their_dtype_where_the_model_changes_its_own() -> None:
    case = made()
    for learn in (None, "all"):
        bound = case.q.bind(case.params, case.qparams, learn).double()
        assert {tensor.dtype for tensor in bound.state()[1]["fc1.weight_fake_quant"][:2]} <= {torch.float32, torch.int32}
        assert bound.get_parameter("fc1.weight").dtype == torch.float64
    # ``bound`` is the one that is not frozen: a frozen one has weights that were rounded in float32
    params = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in case.params.items()}
    assert torch.equal(bound(case.x.double()), case.q.apply(params, case.qparams, case.x.double()))


def test_bfloat16_is_that_of_apply() -> None:
    case = made()
    half = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in case.params.items()}
    expected = case.q.apply(half, case.qparams, case.x.bfloat16())
    assert torch.equal(case.q.bind(half, case.qparams)(case.x.bfloat16()), expected)
    assert torch.equal(case.q.bind(case.params, case.qparams, "all").bfloat16()(case.x.bfloat16()), expected)


def test_tied_tensors_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
            self.head.weight = self.embed.weight
            self.also = [self.embed.weight]  # a plain attribute that holds it a third time

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x)) + self.also[0].sum()

    case = made(Tied(), WEIGHTS_ALONE, torch.arange(8))
    for learn in (None, "params"):
        bound = case.q.bind(case.params, case.qparams, learn)
        assert torch.equal(bound(case.x), case.apply())
        assert bound.head.weight is bound.embed.weight is bound.also[0]
        assert torch.equal(copy.deepcopy(bound)(case.x), case.apply())
    bound.head.weight = nn.Parameter(bound.head.weight.detach().clone())
    with pytest.raises(sq.StateError, match="two modules share this tensor in the plan"):
        bound(case.x)


def test_a_function_is_bound_to_a_module_without_its_params() -> None:
    torch.manual_seed(0)
    tree = {"l1": {"w": torch.randn(4, 8)}, "l2": torch.randn(8, 2)}
    x = torch.randn(5, 4)
    q = sq.quantize(lambda p, x: (x @ p["l1"]["w"]).tanh() @ p["l2"], sq.QuantConfig(), params=tree, example_args=(x,))
    qparams = q.calibrate(tree, [x], progress=False)
    bound = q.bind(tree, qparams, "params")
    assert torch.equal(bound(x), q.apply(tree, qparams, x))
    other = copy.deepcopy(bound)
    with torch.no_grad():
        next(iter(bound.parameters())).mul_(2)
    other.load_state_dict(bound.state_dict())
    params, qparams = other.state()
    assert torch.equal(params["l1"]["w"], 2 * tree["l1"]["w"])
    assert torch.equal(other(x), q.apply(params, qparams, x))


def test_gradients_of_single_examples_by_torch_func() -> None:
    case = made()
    bound = case.q.bind(case.params, case.qparams, "params")
    own, buffers = learned(bound), dict(bound.named_buffers())

    def loss(some: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(bound, {**some, **buffers}, (x[None],)).square().sum()

    per_example = vmap(grad(loss), (None, 0))(own, case.x)
    for i, x in enumerate(case.x):
        alone = case.q.bind(case.params, case.qparams, "params")
        alone(x[None]).square().sum().backward()
        for name, gradients in per_example.items():
            torch.testing.assert_close(gradients[i], alone.get_parameter(name).grad, rtol=1e-4, atol=1e-5)


def test_hooks_see_quantized_tensors_and_learned_parameters() -> None:
    case = sequential()
    bound = case.q.bind(case.params, case.qparams, "params")
    seen: list[tuple[Tensor, bool]] = []
    bound[2].register_forward_hook(lambda layer, args, output: seen.append((args[0], layer.weight.requires_grad)))
    calls: list[int] = []
    bound.register_forward_hook(lambda *call: calls.append(1))
    bound(case.x)
    _, tapped = case.q.tap("2")(case.params, case.qparams, case.x)
    [(given, requires_grad)] = seen
    assert torch.equal(given, tapped["2"][0].args[0]) and requires_grad and calls == [1]


def test_a_forward_replaced_on_the_instance_wraps_the_quantized_one() -> None:
    case = made()
    bound = case.q.bind(case.params, case.qparams, "params")
    inner = bound.forward
    bound.forward = lambda x: 2 * inner(x)
    assert torch.equal(bound(case.x), 2 * case.apply())
    case.model.forward = types.MethodType(tripled, case.model)
    case = made(case.model)
    for learn in (None, "params"):
        bound = case.q.bind(case.params, case.qparams, learn)
        assert torch.equal(bound(case.x), case.apply())
        assert torch.equal(copy.deepcopy(bound)(case.x), case.apply())
    case = made(case.model, WEIGHTS_ALONE)
    assert torch.equal(case.q.bind(case.params, case.qparams)(case.x), case.apply())


def test_threads_run_one_after_the_other() -> None:
    case = made()
    bound = case.q.bind(case.params, case.qparams, "params")
    batches = [torch.randn_like(case.x) for _ in range(16)]
    expected = [bound(batch) for batch in batches]
    found: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: bound(batches[i])})) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(16))


def test_a_layer_outside_of_the_forward_does_not_compute_in_float() -> None:
    case = made()
    bound = case.q.bind(case.params, case.qparams, "params")
    with pytest.raises(sq.StateError, match=r"fc1: it is called outside the forward.*q.part\('fc1'\)"):
        bound.fc1(torch.randn(2, 8))
    weights_alone = made(config=WEIGHTS_ALONE)
    frozen = weights_alone.q.bind(weights_alone.params, weights_alone.qparams)
    x, (params, qparams) = torch.randn(2, 8), frozen.state()
    assert torch.equal(frozen.fc1(x), weights_alone.q.part("fc1").apply(params, qparams, x))


def test_changed_modules_are_refused() -> None:
    case = made()
    bound = case.q.bind(case.params, case.qparams, "params")
    bound.fc2 = nn.Linear(16, 4)
    with pytest.raises(sq.StateError, match="fc2: this module was replaced"):
        bound(case.x)
    replica = case.q.bind(case.params, case.qparams, "params")._replicate_for_data_parallel()
    with pytest.raises(sq.StateError, match="DistributedDataParallel"):
        replica(case.x)


def test_a_norm_that_is_folded_into_frozen_weights_does_not_train() -> None:
    case = made(train=True)
    with pytest.raises(sq.StateError, match=r"training mode cannot be frozen.*bn.*q.eval\(\).bind"):
        case.q.bind(case.params, case.qparams)
    frozen = case.q.eval().bind(case.params, case.qparams)
    frozen.train()
    assert frozen.training and frozen.fc1.training and not frozen.bn.training
    assert torch.equal(frozen(case.x), case.q.eval().apply(case.params, case.qparams, case.x))
    frozen.bn.train()
    with pytest.raises(sq.StateError, match="frozen weights have a BatchNorm folded in"):
        frozen(case.x)
    without = sequential()
    assert torch.equal(without.q.train().bind(without.params, without.qparams)(without.x), without.apply())


def test_what_cannot_be_bound_is_named() -> None:
    case = sequential()
    bind = case.q.bind
    with pytest.raises(sq.ConfigError, match="learn names what is trained: got 'scale'"):
        bind(case.params, case.qparams, "scale")  # type: ignore[arg-type]
    with pytest.raises(sq.StateError, match=r"params lack '0.weight'"):
        bind({name: tensor for name, tensor in case.params.items() if name != "0.weight"}, case.qparams)
    with pytest.raises(sq.ConfigError, match="a part cannot be bound: got '0'"):
        case.q.part("0").bind(case.params, case.qparams)
    frozen, baked = case.q.freeze(case.params, case.qparams)
    assert torch.equal(frozen.bind(baked, case.qparams)(case.x), case.apply())
    with pytest.raises(sq.StateError, match="frozen weights cannot be trained"):
        frozen.bind(baked, case.qparams, "params")
    case.model.requires_grad_(False)
    q = sq.quantize(
        case.model,
        sq.QuantConfig(weight=sq.override(fake_quantize=sq.fake_quantize.fixed()), activation=None),
        example_args=(case.x,),
    )
    qparams = q.calibrate(case.params, [case.x], progress=False)
    with pytest.raises(sq.ConfigError, match="no parameter of the model requires a gradient"):
        q.bind(case.params, qparams, "params")
    with pytest.raises(sq.ConfigError, match="no scale that can be learned"):
        q.bind(case.params, qparams, "scales")


@pytest.mark.parametrize(
    ("use", "fix"),
    [
        (lambda q, x: q(x), r"q.apply\(params, qparams, x\)"),
        pytest.param(lambda q, x: torch.compile(q, backend="eager")(x), r"torch.compile\(q.apply\)", marks=pytest.mark.slow),
        (lambda q, x: q.forward(x), r"q.apply\(params, qparams, x\)"),
        (lambda q, x: q.to("cpu"), r"q.bind\(params, qparams\).to"),
        (lambda q, x: q.features(x), r"q.bind\(params, qparams\).features"),
        (lambda q, x: q.parameters(), r"sq.params_of\(model\)"),
    ],
)
def test_a_quantized_model_taken_for_a_module_says_what_to_write(use: Callable[..., Any], fix: str) -> None:
    case = made()
    with pytest.raises(sq.StateError, match=fix):
        use(case.q, case.x)


def test_other_attributes_are_missing_as_they_always_were() -> None:
    case = sequential()
    assert not hasattr(case.q, "parameters") and not hasattr(case.q, "generate")
    with pytest.raises(AttributeError, match="did you mean 'calibrate'"):
        case.q.calibrat  # noqa: B018
    with pytest.raises(sq.PlanError, match="quantized already"):
        sq.quantize(case.q, CNN, example_args=(case.x,))  # type: ignore[arg-type]
    with pytest.raises(sq.PlanError, match="quantized already"):
        sq.quantize(case.q.bind(case.params, case.qparams), CNN, example_args=(case.x,))
    around = nn.Sequential(case.q.bind(case.params, case.qparams), nn.Linear(3, 2))
    with pytest.raises(sq.PlanError, match="0 is quantized already"):
        sq.quantize(around, WEIGHTS_ALONE, example_args=(case.x,))
    assert copy.deepcopy(case.q).plan == pickle.loads(pickle.dumps(case.q)).plan == case.q.plan


@pytest.mark.slow
def test_a_compiled_bound_model_computes_and_learns_the_same() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3))
    case = made(model, sq.QuantConfig(weight=LSQ, activation=LSQ), torch.randn(6, 4), train=True)
    eager = case.q.bind(case.params, case.qparams, "all")
    bound = copy.deepcopy(eager)
    compiled = torch.compile(bound, fullgraph=True, backend="aot_eager")
    found, expected = compiled(case.x), eager(case.x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(dict(bound.named_buffers()), dict(eager.named_buffers()))
    for output in (found, expected):
        output.square().sum().backward()
    for name, parameter in learned(eager).items():
        torch.testing.assert_close(bound.get_parameter(name).grad, parameter.grad)


@pytest.mark.slow
def test_torch_export_takes_a_frozen_one() -> None:
    case = sequential()
    program = torch.export.export(case.q.bind(case.params, case.qparams), (case.x,))
    torch.testing.assert_close(program.module()(case.x), case.apply())
