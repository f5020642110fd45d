"""The candidates that are measured: this library, plain float, a hand-written way, and each peer that is installed.

Each makes W8A8 out of a model: int8 weights per channel, int8 activations per tensor at the inputs of convolutions and
linear layers, or what the peer offers nearest to that. A peer that cannot take a model says why.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch
from subjects import Subject
from torch import Tensor, nn
from torch.func import functional_call

import sophq_func as sq

Call = Callable[[], object]
Kernels = Literal["off", "compiled"]
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
"""The identity, or ``torch.compile``."""


class Candidate(NamedTuple):
    """What can be timed. A peer without a way to calibrate leaves that out.

    Attributes:
      forward: a forward in eval mode without gradients.
      step: forward, backward to every parameter and learned scale, in training mode.
      calibrate: one batch through the observers.
      frozen: a forward with weights quantized beforehand.
      empty: a forward with nothing quantized.
      inner: a step without the gradient to the model's input, which only the scale of that input needs.
    """

    forward: Call
    step: Call
    calibrate: Call | None = None
    frozen: Call | None = None
    empty: Call | None = None
    inner: Call | None = None


def no_grad(call: Call) -> Call:
    """``call`` without gradients."""

    def quiet() -> object:
        with torch.no_grad():
            return call()

    return quiet


def same(f: Any) -> Any:
    """The wrapper that changes nothing."""
    return f


def of_modules(
    subject: Subject, wrap: Wrap, trained: nn.Module, used: nn.Module, calibrate: Call | None = None
) -> Candidate:
    """A candidate that is two copies of a module: one to train, one to use."""
    leaves = [p for p in trained.parameters() if p.requires_grad]
    loss = wrap(lambda *args: subject.read(trained(*args)).square().mean())
    forward = wrap(lambda *args: subject.read(used(*args)))

    def step() -> object:
        return torch.autograd.grad(loss(*subject.args), leaves, allow_unused=True)

    return Candidate(no_grad(lambda: forward(*subject.args)), step, calibrate)


def plain(subject: Subject, wrap: Wrap = same) -> Candidate:
    """The float model."""
    used = subject.make()
    return of_modules(subject, wrap, subject.make().train(), used, no_grad(lambda: used(*subject.args)))


def config() -> sq.QuantConfig:
    """W8A8 with learned scales."""
    per_channel = sq.QScheme(bits=8, granularity=sq.PerChannel())
    shared: dict[str, Any] = {"observer": sq.observers.minmax(), "fake_quantize": sq.fake_quantize.learnable()}
    return sq.QuantConfig(
        strategy="Layers",
        weight=sq.QuantizerConfig(scheme=per_channel, **shared),
        activation=sq.QuantizerConfig(scheme=sq.QScheme(bits=8), **shared),
    )


def ours(subject: Subject, wrap: Wrap = same, kernels: Kernels = "off") -> Candidate:
    """This library."""
    model, args, read = subject.make(), subject.args, subject.read
    q, params = sq.quantize(model, config(), example_args=args, kernels=kernels), sq.params_of(model)
    qparams, ostate = q.calibrate(params, [args], progress=False), q.init(params)
    trained = q.train()
    learned, rest = q.split(qparams)
    inner, outer = ({n: t for n, t in learned.items() if _is_of_an_input(q.plan, n) is wanted} for wanted in (False, True))
    forward = wrap(lambda params, qparams, *args: read(q.apply(params, qparams, *args)))

    # made where their rows are measured: a training step should not be charged with a second set of weights
    @cache
    def use() -> Call:
        frozen, baked = q.freeze(params, qparams)
        run = wrap(lambda params, qparams, *args: read(frozen.apply(params, qparams, *args)))
        return lambda: run(baked, qparams, *args)

    empty = cache(lambda: sq.quantize(model, sq.QuantConfig(weight=None, activation=None), example_args=args))

    def training(scales: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> Call:
        loss = wrap(
            lambda weights, scales, *args: (
                read(trained.apply({**params, **weights}, sq.merge(scales, rest), *args)).square().mean()
            )
        )

        @cache
        def leaves() -> list[dict[str, Tensor]]:
            return [{n: t.clone().requires_grad_() for n, t in tree.items()} for tree in (trainable(model), scales)]

        def step() -> object:
            flat = [leaf for tree in leaves() for leaf in tree.values()]
            return torch.autograd.grad(loss(*leaves(), *args), flat, allow_unused=True)

        return step

    return Candidate(
        no_grad(lambda: forward(params, qparams, *args)),
        training(learned, rest),
        no_grad(lambda: q.observe(params, ostate, *args)),
        no_grad(lambda: use()()),
        no_grad(lambda: empty().apply(params, {}, *args)),
        training(inner, {**rest, **outer}) if outer else None,
    )


def _is_of_an_input(plan: sq.Plan, leaf: str) -> bool:
    """Whether a learned leaf belongs to the quantizer of an argument of the model."""
    return bool(plan.site(leaf.rpartition(".")[0]).argument)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model, without its buffers."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """LSQ as one writes it down: clamp, round straight through, a scale that learns."""
    clipped = torch.clamp(x / scale, -128, 127)
    return (clipped + (clipped.round() - clipped).detach()) * scale


def by_hand(subject: Subject, wrap: Wrap = same) -> Candidate:
    """What one writes without a library: hooks for inputs, ``functional_call`` for weights."""
    models = {"used": subject.make(), "trained": subject.make().train()}
    scales: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}

    def hook(name: str, observe: bool) -> Callable[..., Any]:
        def act(module: nn.Module, args: tuple[Tensor]) -> Any:
            if observe:
                seen[name] = args[0].detach().abs().amax()
                return None
            return (rounded(args[0], scales[f"{name}.input"]),)

        return act

    layers = {n: m for n, m in models["used"].named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    handles = [layer.register_forward_pre_hook(hook(name, True)) for name, layer in layers.items()]
    no_grad(lambda: models["used"](*subject.args))()
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        axes = tuple(range(1, layer.weight.ndim))
        scales[f"{name}.weight"] = (layer.weight.detach().abs().amax(axes, keepdim=True) / 127.5).requires_grad_()
        scales[f"{name}.input"] = (seen[name] / 127.5).requires_grad_()
    for model in models.values():
        for name, layer in model.named_modules():
            if name in layers:
                layer.register_forward_pre_hook(hook(name, False))

    def run(model: nn.Module, *args: Tensor) -> Tensor:
        weights = {f"{n}.weight": rounded(model.get_submodule(n).weight, scales[f"{n}.weight"]) for n in layers}
        return subject.read(functional_call(model, weights, args))

    forward = wrap(lambda *args: run(models["used"], *args))
    loss = wrap(lambda *args: run(models["trained"], *args).square().mean())

    def step() -> object:
        leaves = [*models["trained"].parameters(), *scales.values()]
        return torch.autograd.grad(loss(*subject.args), leaves, allow_unused=True)

    return Candidate(no_grad(lambda: forward(*subject.args)), step)


def fx(subject: Subject, wrap: Wrap = same) -> Candidate:
    """torch.ao, FX graph mode, quantization-aware."""
    from torch.ao.quantization import disable_observer, enable_observer, get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    made = [prepare_qat_fx(subject.make().train(), get_default_qat_qconfig_mapping("x86"), subject.args) for _ in range(3)]
    for module in made:
        module(*subject.args)
    for module in made[:2]:
        module.apply(disable_observer)
    made[2].apply(enable_observer)
    return of_modules(subject, wrap, made[0], made[1].eval(), no_grad(lambda: made[2](*subject.args)))


def pt2e(subject: Subject, wrap: Wrap = same) -> Candidate:
    """torchao, PT2E with the quantizer of x86 inductor, quantization-aware."""
    from torchao.quantization.pt2e import allow_exported_model_train_eval, disable_observer
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    made = []
    for _ in range(3):
        exported = torch.export.export(subject.make().train(), subject.args, strict=True).module()
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
        made.append(prepare_qat_pt2e(exported, quantizer))
        allow_exported_model_train_eval(made[-1])
        made[-1](*subject.args)
    for module in made[:2]:
        module.apply(disable_observer)
    made[1].eval()
    return of_modules(subject, wrap, made[0], made[1], no_grad(lambda: made[2](*subject.args)))


def torchao_qat(subject: Subject, wrap: Wrap = same) -> Candidate:
    """torchao's eager QAT: linear layers only, activations per token."""
    from torchao.quantization import quantize_
    from torchao.quantization.granularity import PerAxis
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    made = [subject.make().train(), subject.make()]
    if any(isinstance(module, nn.Conv2d) for module in made[0].modules()):
        raise TypeError("quantizes linear layers only")
    tokens = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int8, granularity=PerAxis(0))
    for module in made:
        quantize_(module, QATConfig(activation_config=tokens, weight_config=weights, step="prepare"))
    return of_modules(subject, wrap, *made)


def brevitas(subject: Subject, wrap: Wrap = same) -> Candidate:
    """Brevitas, layer by layer: int8 weights per tensor, int8 activations with learned scales, as it starts."""
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize

    made = [layerwise_quantize(subject.make().train()) for _ in range(3)]
    for module in made[:2]:
        with torch.no_grad(), calibration_mode(module):
            module(*subject.args)

    def calibrate() -> object:
        with calibration_mode(made[2]):
            return made[2](*subject.args)

    return of_modules(subject, wrap, made[0].train(), made[1].eval(), no_grad(calibrate))


def nncf(subject: Subject, wrap: Wrap = same) -> Candidate:
    """NNCF's post-training quantization, whose model can be trained."""
    import nncf as library

    kind = {} if subject.args[0].is_floating_point() else {"model_type": library.ModelType.TRANSFORMER}
    data = library.Dataset([subject.args[0]])

    def quantize() -> nn.Module:
        return library.quantize(subject.make(), data, subset_size=1, fast_bias_correction=True, **kind)

    return of_modules(subject, wrap, quantize().train(), quantize().eval())


CANDIDATES: Mapping[str, Callable[..., Candidate]] = {
    "float": plain,
    "sophq_func": ours,
    "sophq_func, kernels": partial(ours, kernels="compiled"),
    "by hand": by_hand,
    "torch.ao FX": fx,
    "torchao PT2E": pt2e,
    "torchao QAT": torchao_qat,
    "brevitas": brevitas,
    "NNCF": nncf,
}


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep what peers print and warn of away from the table."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def own_compile(call: Call) -> Call:
    """A call of this library, compiled without questions about quantized models."""
    # torch takes options out of the dict that it is given
    return torch.compile(call, fullgraph=True, options={"guard_filter_fn": sq.skip_guards_on_quantized})


def made(name: str, subject: Subject, compiled: bool = False) -> Candidate | str:
    """The candidate, warmed up; or why there is none."""
    is_ours = name.startswith("sophq_func")
    wrap = same if not compiled else own_compile if is_ours else torch.compile
    try:
        with silence():
            candidate = CANDIDATES[name](subject, wrap)
            candidate.forward()
            candidate.step()
    except Exception as error:  # a peer may fail in any way, which is a result
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:90]}"
    return candidate
