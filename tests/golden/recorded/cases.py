"""What is recorded: models and settings, and the numbers that each of them gives, by the public functions alone.

A case is *exact* where every sum is exact in float32, in any order: weights, inputs and steps are small multiples of
powers of two. Its bits are the same on every CPU. In the others sums are rounded, and a CPU with wider registers adds in
another order; they carry the bits of the float model, too, which tell whether this CPU adds as the recording one did.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optree
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sophq_func as sq
from tests.golden.recorded.models import (
    Attention,
    Branches,
    ConvNet,
    Deconv,
    Depthwise,
    Functional,
    Fused,
    Perceptron,
    Residual,
    Tied,
    fill,
    fill_exact,
    integers,
)
from tests.helpers import with_hessians

Results = dict[str, Tensor]
Batch = tuple[Tensor, ...]
More = Callable[["Made"], Results]


class Made(NamedTuple):
    """A quantized model with what its methods take."""

    q: sq.Quantized
    params: dict[str, Tensor]
    qparams: dict[str, sq.QParams]
    ostate: dict[str, Any]
    batch: Batch


class Subject(NamedTuple):
    """A model, how it is quantized, and on what.

    Attributes:
      model: with its weights.
      quantize: ``sq.quantize`` or ``sq.prepare_by_platform`` with a config, waiting for the model.
      batches: to calibrate on; the first one is also the example and what outputs are computed of.
      training: outputs and gradients are those in training mode.
      noise: quantizers take uniform numbers, drawn once.
      rounded: what of it is rounded where the rest is exact: the beginnings of names that are not recorded.
      more: further results.
    """

    model: nn.Module
    quantize: Callable[[nn.Module, Batch], sq.Quantized]
    batches: list[Batch]
    training: bool = False
    noise: bool = False
    rounded: tuple[str, ...] = ()
    more: More = lambda made: {}


class Case(NamedTuple):
    """A name, whether its sums are exact, and how the subject is made."""

    name: str
    exact: bool
    make: Callable[[], Subject]


CASES: dict[str, Case] = {}


def case(exact: bool) -> Callable[[Callable[[], Subject]], Callable[[], Subject]]:
    """Record what the decorated function makes, under its name."""

    def add(make: Callable[[], Subject]) -> Callable[[], Subject]:
        CASES[make.__name__] = Case(make.__name__, exact, make)
        return make

    return add


def by(config: sq.QuantConfig, *others: Batch) -> Callable[[nn.Module, Batch], sq.Quantized]:
    """Quantize by a config, from one example or from several."""

    def run(model: nn.Module, batch: Batch) -> sq.Quantized:
        if others:
            return sq.quantize(model, config, examples=[(args, None) for args in (batch, *others)])
        return sq.quantize(model, config, example_args=batch)

    return run


def by_dicts(**dictionaries: Any) -> Callable[[nn.Module, Batch], sq.Quantized]:
    """Quantize by the three dictionaries."""
    return lambda model, batch: sq.prepare_by_platform(model, dictionaries, example_args=batch)


# What is computed of each subject


def prepared(subject: Subject, plan: sq.Plan | None = None) -> Made:
    """The subject, quantized and calibrated: by its own plan, or by another one."""
    batch = subject.batches[0]
    q = subject.quantize(subject.model, batch) if plan is None else sq.build(subject.model, plan)
    params = sq.params_of(subject.model)
    ostate = q.init(params)
    for args in subject.batches:
        _, ostate = q.observe(params, ostate, *args)
    qparams = with_hessians(q, params, q.qparams(params, ostate))
    if subject.noise:
        qparams = q.with_noise(params, qparams, torch.Generator().manual_seed(7), *batch)
    return Made(q, params, qparams, ostate, batch)


def results(subject: Subject, made: Made) -> Results:
    """Everything that is recorded of a subject, by name."""
    found = {f"qparams/{name}": leaf for name, leaf in _leaves(made.qparams).items()}
    found |= {f"ostate/{name}": leaf for name, leaf in _leaves(made.ostate).items()}
    q = made.q.train() if subject.training else made.q
    learned, rest = q.split(made.qparams)

    def run(params: dict[str, Tensor], learned: dict[str, Tensor]) -> Any:
        return q.apply(params, sq.merge(learned, rest), *made.batch)

    found |= _output_and_gradients(run, made.params, learned)
    captured = q.capture(made.params, made.qparams, *made.batch).items()
    found |= {f"captured/{name}": after for name, (_, after) in captured if q.plan.site(name).role == "activation"}
    found |= {f"more/{name}": leaf for name, leaf in subject.more(made).items()}
    return {name: leaf for name, leaf in found.items() if not name.startswith(subject.rounded)}


def float_results(subject: Subject) -> Results:
    """Outputs and gradients of the model itself: what they round to tells in which order this CPU adds."""
    model, batch = subject.model.train(subject.training), subject.batches[0]
    params = {name: p.detach() for name, p in model.named_parameters()}

    def run(params: dict[str, Tensor], learned: dict[str, Tensor]) -> Any:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return torch.func.functional_call(model, {**params, **buffers}, batch)

    found = _output_and_gradients(run, params, {})
    model.eval()
    return {f"float/{name}": leaf for name, leaf in found.items()} | elementary()


def elementary() -> Results:
    """What this CPU makes of functions and sums that observers and fake quantizers use beside the model's."""
    x = integers(1, 1, 4000, 32, 128) / 2**10
    functions = (torch.exp, torch.log, torch.log2, torch.tanh, torch.sigmoid, torch.rsqrt)
    found = {f"float/{f.__name__}": f(x) for f in functions}
    sums = {"sum": x.sum(), "rows": x.sum(1), "columns": x.sum(0), "std": x.std(), "cumsum": x.cumsum(1)}
    return found | {f"float/{name}": value for name, value in sums.items()}


def _output_and_gradients(
    run: Callable[[dict[str, Tensor], dict[str, Tensor]], Any], params: dict[str, Tensor], learned: dict[str, Tensor]
) -> Results:
    """Outputs, and gradients of their sum with weights that differ from element to element."""
    floats = {name: p for name, p in params.items() if p.is_floating_point()}
    others = {name: p for name, p in params.items() if not p.is_floating_point()}

    def loss(floats: dict[str, Tensor], learned: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = _leaves(run({**floats, **others}, learned))
        terms = [(out * direction(out)).sum() for out in outputs.values()]
        return torch.stack(terms).sum(), outputs

    (of_params, of_learned), outputs = torch.func.grad(loss, argnums=(0, 1), has_aux=True)(floats, learned)
    found = {f"output/{name}": out for name, out in outputs.items()}
    found |= {f"gradient/{name}": g for name, g in of_learned.items()}
    return found | {f"gradient/{name}": g for name, g in of_params.items()}


def direction(x: Tensor) -> Tensor:
    """-1, 0 and 1 in the shape of ``x``: what outputs are multiplied with in the loss."""
    return integers(x.numel(), -1, 1, *x.shape)


def _leaves(tree: Any) -> dict[str, Tensor]:
    """Tensors of a tree by their path."""
    paths, leaves, _ = optree.tree_flatten_with_path(tree)
    return {".".join(map(str, path)) or "0": leaf for path, leaf in zip(paths, leaves, strict=True)}


def digest(x: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes."""
    x = x.detach().contiguous()
    start = f"{x.dtype} {tuple(x.shape)} ".encode()
    return hashlib.sha256(start + bytes(x.reshape(-1).view(torch.uint8).tolist())).hexdigest()


def doubled(made: Made) -> Made:
    """The same in float64, steps and states included."""

    def double(tree: Any) -> Any:
        return optree.tree_map(lambda x: x.double() if x.is_floating_point() else x, tree)

    return made._replace(**{name: double(getattr(made, name)) for name in ("params", "qparams", "ostate", "batch")})


def names_of(plan: sq.Plan) -> dict[str, Mapping[str, str]]:
    """The reasons of each quantizer, in order."""
    return {name: dict(plan.reasons(name)) for name in plan}


# Further results


def frozen(made: Made) -> Results:
    """Weights put on their grids once, and a run with them."""
    q, params = made.q.freeze(made.params, made.qparams)
    return {"frozen/output": _one(q.apply(params, made.qparams, *made.batch)), **_prefixed("frozen/params", params)}


def observed_again(made: Made) -> Results:
    """Statistics of a run that quantizes, from the start."""
    _, ostate = made.q.observe_quantized(made.params, made.q.init(made.params), made.qparams, *made.batch)
    return _prefixed("observed_quantized", ostate)


def updated(made: Made) -> Results:
    """A run in training mode and the buffers behind it."""
    output, params = made.q.train().apply_and_update(made.params, made.qparams, *made.batch)
    buffers = {name: p for name, p in params.items() if "running" in name or "tracked" in name}
    return {"updated/output": _one(output), **_prefixed("updated", buffers)}


def mapped(made: Made) -> Results:
    """Derivative along the learned leaves, and a run for each of three sizes of the steps, mapped."""
    learned, rest = made.q.split(made.qparams)

    def run(learned: dict[str, Tensor]) -> Tensor:
        return _one(made.q.apply(made.params, sq.merge(learned, rest), *made.batch))

    tangents = {name: leaf.abs() for name, leaf in learned.items()}
    _, tangent = torch.func.jvp(run, (learned,), (tangents,))
    factors = torch.tensor([0.5, 1.0, 2.0])
    several = {name: factors.reshape(-1, *[1] * leaf.ndim) * leaf for name, leaf in learned.items()}
    return {"jvp": tangent, "vmap": torch.func.vmap(run)(several)}


def all_of(*parts: More) -> More:
    """Several further results together."""
    return lambda made: {name: leaf for part in parts for name, leaf in part(made).items()}


def _prefixed(prefix: str, tree: Any) -> Results:
    return {f"{prefix}/{name}": leaf for name, leaf in _leaves(tree).items()}


def _one(output: Any) -> Tensor:
    (tensor,) = _leaves(output).values()
    return tensor


# Exact subjects

STEP = 2.0**-3
"""Of most activations; inputs are multiples of half of it, so that rounding has something to do."""


PLAIN_LSQ = sq.fake_quantize.learnable(use_grad_scaling=False)
"""LSQ without the factor on gradients, which is no power of two, and turns a channel's step into a neighbouring float."""
FIXED, MINMAX = sq.fake_quantize.fixed(), sq.observers.minmax()


def fixed_range(step: float = STEP, **changes: Any) -> Any:
    """8 bits whose step is a power of two, whatever the values are; affine: codes around a quarter."""
    half = (127 if changes.get("symmetric_range") else 127.5) * step
    low, high = (-half, half) if changes.get("symmetric", True) else (-64 * step, 191 * step)
    return sq.override(**{"observer": sq.observers.fixed_range(low, high), "fake_quantize": PLAIN_LSQ, **changes})


def images(seed: int, *shape: int) -> Batch:
    return (integers(seed, -40, 40, *shape) / 2**4,)


def weights(**changes: Any) -> Any:
    """Min/max steps of each channel."""
    return sq.override(**{"observer": MINMAX, "fake_quantize": PLAIN_LSQ, "granularity": sq.PerChannel(), **changes})


@case(exact=True)
def conv_net_on_bm1690() -> Subject:
    config = sq.QuantConfig(chip="BM1690", weight=weights(), activation=fixed_range())
    more = all_of(frozen, observed_again)
    return Subject(fill_exact(ConvNet(), 1), by(config), [images(1, 2, 2, 8, 8)], more=more)


@case(exact=True)
def residual_by_dataflow() -> Subject:
    config = sq.QuantConfig(weight=weights(), activation=fixed_range(symmetric=False))
    more = all_of(frozen, mapped)
    return Subject(fill_exact(Residual(), 2), by(config), [images(2, 2, 2, 6, 6), images(3, 2, 2, 6, 6)], more=more)


@case(exact=True)
def depthwise_on_bm1684x() -> Subject:
    rules = (sq.Rule(name="pw", observe_only=True),)
    config = sq.QuantConfig(chip="BM1684X", weight=weights(fake_quantize=FIXED), activation=fixed_range(), rules=rules)
    return Subject(fill_exact(Depthwise(), 3), by(config), [images(4, 1, 2, 6, 6)], more=frozen)


@case(exact=True)
def grouped_deconvolution_on_bm1688() -> Subject:
    config = sq.QuantConfig(chip="BM1688", weight=weights(), activation=fixed_range())
    return Subject(fill_exact(Deconv(), 4), by(config), [images(5, 2, 2, 8, 8)], more=frozen)


@case(exact=True)
def perceptron_on_mars3() -> Subject:
    model = fill_exact(Perceptron(), 5)
    for layer in (model.fc1, model.fc2, model.fc3):
        layer.weight.data[:, 0] = -127 / 2**7
    activation = fixed_range(symmetric_range=True)
    config = sq.QuantConfig(chip="MARS3", strategy="Transformer", weight=weights(), activation=activation)
    return Subject(model, by(config), [images(6, 4, 16)], more=all_of(frozen, observed_again))


@case(exact=True)
def four_bit_layers_on_bm1688() -> Subject:
    rule = sq.Rule(
        name="fc2",
        weight=sq.override(bits=4),
        activation=sq.override(bits=4, observer=sq.observers.fixed_range(-7.5, 7.5)),
    )
    model = fill_exact(Perceptron(), 6)
    model.fc2.weight.data = fill_exact(Perceptron(), 6, bits=4, peak=2.0**3).fc2.weight.data
    config = sq.QuantConfig(chip="BM1688", weight=weights(), activation=fixed_range(), rules=(rule,))
    return Subject(model, by(config), [images(7, 4, 16)])


@case(exact=True)
def tied_embedding_by_layers() -> Subject:
    config = sq.QuantConfig(
        strategy="Layers", weight_layers=(nn.Embedding,), weight=weights(fake_quantize=FIXED), activation=fixed_range()
    )
    return Subject(fill_exact(Tied(), 7), by(config), [(integers(8, 0, 11, 3, 5).long(),)], more=frozen)


@case(exact=True)
def functions_and_products() -> Subject:
    rules = (
        sq.Rule(type=torch.bmm, requests=False),
        sq.Rule(type=F.linear, outputs=True),
        sq.Rule(name="x", activation=fixed_range()),
    )
    config = sq.QuantConfig(weight=weights(), activation=fixed_range(step=2.0**-2), rules=rules)
    return Subject(fill_exact(Functional(), 8), by(config), [(images(9, 2, 2, 7, 7)[0] / 4,)])


@case(exact=True)
def weight_only_in_groups() -> Subject:
    model = fill_exact(Perceptron(), 9, bits=4, peak=2.0**3)
    for layer in (model.fc1, model.fc2, model.fc3):
        layer.weight.data[:, 8] = 7.5 / 2**2
    weight = weights(bits=4, granularity=sq.PerGroup(axis=0, size=8))
    config = sq.QuantConfig(chip="BM1690", strategy="Transformer", quantmode="weight_only", weight=weight)
    return Subject(model, by(config), [images(10, 4, 16)], more=all_of(frozen, mapped))


@case(exact=True)
def blocks_and_tokens() -> Subject:
    model = fill_exact(Perceptron(), 10)
    for layer in (model.fc1, model.fc2, model.fc3):
        layer.weight.data[::2, 0] *= 2
    rules = (
        sq.Rule(name="fc1", weight=sq.override(granularity=sq.PerBlock(rows=4, columns=8))),
        sq.Rule(name="x", activation=sq.override(granularity=sq.PerToken(), dynamic=True)),
        sq.Rule(name="fc2", weight=sq.override(granularity=sq.PerTensor())),
    )
    model.fc1.weight.data[:, 8] = 127.5 / 2**6
    (x,) = images(11, 2, 3, 16)
    x[..., 5] = 127.5 * STEP
    weight = weights(fake_quantize=FIXED)
    config = sq.QuantConfig(strategy="Layers", weight=weight, activation=fixed_range(fake_quantize=FIXED), rules=rules)
    return Subject(model, by(config), [(x,)], more=frozen)


@case(exact=True)
def block_formats() -> Subject:
    formats = sq.fake_quantize
    rules = (
        sq.Rule(name="fc1", weight=sq.override(fake_quantize=formats.mxfp4(block_size=8))),
        sq.Rule(name="fc2", weight=sq.override(fake_quantize=formats.mxint8(block_size=8))),
        sq.Rule(name="fc3", weight=sq.override(fake_quantize=formats.mxfp8(element="e5m2", block_size=16))),
        sq.Rule(name="x", activation=sq.override(fake_quantize=formats.mxfp6(block_size=8))),
    )
    activation = fixed_range(fake_quantize=formats.mxfp4(block_size=16))
    config = sq.QuantConfig(strategy="Layers", weight=weights(), activation=activation, rules=rules)
    return Subject(fill_exact(Perceptron(), 11), by(config), [images(12, 4, 16)], more=frozen)


@case(exact=True)
def tables_and_floats() -> Subject:
    """Steps are powers of two: the largest weight is 6 (FP4), 448 (E4M3) or 6 * 448 (NVFP4) times one."""
    formats = sq.fake_quantize
    model = fill_exact(Perceptron(), 12)
    for layer, largest in ((model.fc1, 6 / 4), (model.fc2, 448 / 2**9), (model.fc3, 6 * 448 / 2**11)):
        layer.weight.data[:, 0] = -largest
    rules = (
        sq.Rule(name="fc1", weight=sq.override(fake_quantize=formats.fp4())),
        sq.Rule(name="fc2", weight=sq.override(fake_quantize=formats.e4m3())),
        sq.Rule(name="fc3", weight=sq.override(fake_quantize=formats.nvfp4(block_size=8), granularity=sq.PerTensor())),
        sq.Rule(name="fc3", activation=sq.override(fake_quantize=formats.bf16())),
        sq.Rule(name="x", activation=sq.override(fake_quantize=formats.e5m2())),
    )
    activation = sq.override(fake_quantize=formats.fp16())
    config = sq.QuantConfig(strategy="Layers", weight=weights(), activation=activation, rules=rules)
    return Subject(model, by(config), [images(13, 4, 16)], more=frozen)


@case(exact=True)
def academic() -> Subject:
    model = fill_exact(Perceptron(), 13)
    for layer in (model.fc1, model.fc2, model.fc3):
        layer.weight.data[:, 0] = -448 / 2**9
        layer.weight.data[layer.weight.abs() < 2.0**-6] = 0  # E4M3 holds small numbers exactly, with many digits
    config = sq.QuantConfig(chip="Academic", activation=fixed_range())
    return Subject(model, by(config), [images(14, 1, 16)], more=frozen)


@case(exact=True)
def bfloat16_between_layers() -> Subject:
    config = sq.QuantConfig(chip="BM1690", strategy="BF16Mixed", weight=weights(), activation=fixed_range())
    return Subject(fill_exact(Residual(), 14), by(config), [images(15, 2, 2, 6, 6)])


@case(exact=True)
def two_examples() -> Subject:
    first, second = images(16, 4, 16), images(17, 2, 1, 4, 4)
    config = sq.QuantConfig(strategy="Layers", weight=weights(), activation=fixed_range(fake_quantize=FIXED))
    return Subject(fill_exact(Branches(), 15), by(config, second), [first, second], more=frozen)


@case(exact=True)
def quantized_by_chance() -> Subject:
    activation = fixed_range(fake_quantize=sq.fake_quantize.qdrop(prob=0.5))
    config = sq.QuantConfig(strategy="Layers", weight=weights(fake_quantize=FIXED), activation=activation)
    return Subject(fill_exact(Perceptron(), 16), by(config), [images(18, 4, 16)], noise=True, more=frozen)


@case(exact=True)
def dictionaries_with_powers_of_two() -> Subject:
    """Ranges are observed, so that they are rounded; the step is the power of two next to them, on every CPU the same."""
    both = {"bit": 8, "symmetry": True, "per_channel": False, "pot_scale": True}
    return Subject(
        fill_exact(Residual(), 17),
        by_dicts(
            quant_dict={"chip": "SG2260", "quantmode": "weight_activation", "strategy": "CNN"},
            extra_qconfig_dict={
                "w_observer": "MinMaxObserver",
                "a_observer": "MinMaxObserver",
                "w_fakequantize": "FixedFakeQuantize",
                "a_fakequantize": "FixedFakeQuantize",
                "w_qscheme": both,
                "a_qscheme": both,
            },
            extra_quantizer_dict={"exclude_function_type": [F.relu], "exclude_module_name": ["conv2"]},
        ),
        [images(19, 1, 2, 4, 4)],
        rounded=("ostate/",),
        more=frozen,
    )


# From 2 ** 14 elements on, a tensor is quantized block by block by one function with derivatives of its own


@case(exact=True)
def large_linear() -> Subject:
    model = fill_exact(nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 128)), 18)
    weight = weights(symmetric_range=True)
    config = sq.QuantConfig(strategy="Layers", weight=weight, activation=fixed_range(symmetric=False))
    for layer in (model[0], model[2]):
        layer.weight.data[:, 0] = -127 / 2**7
    return Subject(model, by(config), [images(18, 128, 16)], more=frozen)


@case(exact=True)
def large_folded_convolution() -> Subject:
    layers = nn.Conv2d(32, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()
    config = sq.QuantConfig(chip="BM1690", weight=weights(), activation=fixed_range())
    x = integers(19, -12, 12, 1, 32, 4, 4) / 2**4
    return Subject(fill_exact(nn.Sequential(*layers), 19), by(config), [(x,)], more=frozen)


# Subjects whose sums are rounded


@case(exact=False)
def conv_net_in_training() -> Subject:
    config = sq.QuantConfig(chip="BM1690")
    batches = [images(seed, 4, 2, 8, 8) for seed in (20, 21)]
    more = all_of(updated, observed_again, mapped)
    return Subject(fill(ConvNet(), 20), by(config), batches, training=True, more=more)


@case(exact=False)
def depthwise_by_dictionaries() -> Subject:
    learned = {"mode": "activation", "bit": "8", "afakequantize": "LearnableFakeQuantize", "aobserver": "MinMaxObserver"}
    fixed = {"mode": "weight", "bit": "8", "wfakequantize": "FixedFakeQuantize", "wobserver": "MSEObserver"}
    half = {"bit": 8, "symmetry": False, "per_channel": False, "pot_scale": False}
    return Subject(
        fill(Depthwise(), 21),
        by_dicts(
            quant_dict={"chip": "BM1688", "quantmode": "weight_activation", "strategy": "CNN"},
            extra_qconfig_dict={
                "w_observer": "MinMaxObserver",
                "a_observer": "EMAMinMaxObserver",
                "w_fakequantize": "LearnableFakeQuantize",
                "a_fakequantize": "LearnableFakeQuantize",
                "w_qscheme": {"bit": 4, "symmetry": True, "per_channel": True, "pot_scale": False},
                "a_qscheme": half,
                "object_type": {sq.patterns.ConvBnReLU2d: learned, "ConvReLU2d_sophgo": fixed},
                "module_name": {"dw": fixed, "pw": learned},
            },
            extra_quantizer_dict={
                "module_only_enable_observer": ["pw.weight_fake_quant"],
                "exclude_function_type": [torch.sigmoid],
            },
        ),
        [images(seed, 4, 2, 8, 8) for seed in (22, 23)],
        more=frozen,
    )


@case(exact=False)
def attention_on_bm1690() -> Subject:
    config = sq.QuantConfig(chip="BM1690", strategy="Transformer")
    return Subject(fill(Attention(), 22), by(config), [images(seed, 3, 6, 16) for seed in (24, 25)], more=frozen)


@case(exact=False)
def large_linear_with_scaled_gradients() -> Subject:
    model = fill(nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 128)), 27)
    config = sq.QuantConfig(activation=sq.override(symmetric=False))
    return Subject(model, by(config), [images(32, 8, 16)])


@case(exact=False)
def attention_by_dataflow() -> Subject:
    config = sq.QuantConfig(activation=sq.override(symmetric=False))
    return Subject(fill(Attention(), 23), by(config), [images(26, 3, 6, 16)], more=mapped)


@case(exact=False)
def multi_head_attention_and_embedding() -> Subject:
    config = sq.QuantConfig(activation=sq.override(symmetric=False, observer=sq.observers.ema_quantile()))
    tokens = [(integers(seed, 0, 19, 3, 7).long(),) for seed in (27, 28)]
    return Subject(fill(Fused(), 24), by(config), tokens)


class Ladder(nn.Module):
    """Linear layers one behind the other, with a ReLU between them."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x) + 1 / 8)
        return x


OBSERVERS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("absmax", {}),
    ("clip_std", {}),
    ("ema_minmax", {}),
    ("ema_mse", {}),
    ("ema_quantile", {}),
    ("histogram", {"bins": 256}),
    ("kld", {"bins": 256}),
    ("lsq", {}),
    ("lsq_plus", {}),
    ("minmax_floor", {}),
    ("mse", {}),
    ("percentile", {"percentile": 99.0, "bins": 256}),
    ("pot_mode", {}),
    ("rms", {}),
)
PER_TENSOR = ("ema_quantile", "histogram")
"""Observers that have one range for a whole tensor."""


@case(exact=False)
def observers_of_every_family() -> Subject:
    rules = []
    for index, (name, options) in enumerate(OBSERVERS):
        observer = getattr(sq.observers, name)(**options)
        granularity = sq.PerTensor() if name in PER_TENSOR else sq.PerChannel()
        weight = sq.override(observer=observer, granularity=granularity)
        rules.append(sq.Rule(name=f"layers.{index}", weight=weight, activation=sq.override(observer=observer)))
    config = sq.QuantConfig(strategy="Layers", rules=tuple(rules))
    return Subject(fill(Ladder(len(OBSERVERS)), 25), by(config), [images(seed, 16, 16) for seed in (29, 30)])


FAKE_QUANTIZERS: tuple[tuple[Any, Any], ...] = (
    (sq.fake_quantize.adaround(), sq.fake_quantize.pact()),
    (sq.fake_quantize.dorefa(), sq.fake_quantize.dsq()),
    (sq.fake_quantize.dsq(), sq.fake_quantize.tqt()),
    (sq.fake_quantize.tqt(), sq.fake_quantize.lsq_plus()),
    (sq.fake_quantize.gptq(group_size=16), sq.fake_quantize.nnie()),
    (sq.fake_quantize.gptqfp4(), sq.fake_quantize.fpxgroup(group_size=32)),
    (sq.fake_quantize.nvfp4(), sq.fake_quantize.e4m3()),
    (sq.fake_quantize.learnable(), sq.fake_quantize.learnable()),
)


@case(exact=False)
def fake_quantizers_of_every_family() -> Subject:
    rules = tuple(
        sq.Rule(
            name=f"layers.{index}",
            weight=sq.override(fake_quantize=of_weight),
            activation=sq.override(fake_quantize=of_value, symmetric=False),
        )
        for index, (of_weight, of_value) in enumerate(FAKE_QUANTIZERS)
    )
    config = sq.QuantConfig(strategy="Layers", rules=rules)
    return Subject(fill(Ladder(len(FAKE_QUANTIZERS)), 26), by(config), [images(31, 16, 16)], more=observed_again)
