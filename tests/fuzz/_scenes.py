"""What may be interrupted: small models, and everything that runs one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import sophq_func as sq
from sophq_func.capture.skeleton import Skeleton
from tests.helpers import Ready, ready


class Scene(NamedTuple):
    """One call of the library, and what it is made of.

    Attributes:
      act: the call; returns a tree of tensors, the same bits each time.
      skeletons: those that it runs, and others of the same model.
      modules: those of the user: the model, and a bound model.
      slow: whether it takes a tenth of a second and more, so that a campaign interrupts it less often.
      reset: before each call, brings back what a training step of a module changes.
    """

    act: Callable[[], Any]
    skeletons: list[Skeleton]
    modules: list[nn.Module]
    slow: bool = False
    reset: Callable[[], object] = lambda: None


class Doubled(torch.autograd.Function):
    """A user's own function, with a rule for each transform."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return 2 * tangents[0]


class Functions(nn.Module):
    """Layers, functions, a scope, an attribute that a run binds anew, and an ``autograd.Function``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        x = Doubled.apply(self.body(x)).mean((2, 3))
        return self.head(x) @ torch.ones(2, 2) + 1


class Checkpointed(Functions):
    """The same with a checkpoint, which computes a part again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        x = Doubled.apply(self.body(x)).mean((2, 3))
        return checkpoint(self.head, x, use_reentrant=False) + 1


class Scan(nn.Module):
    """A loop over time whose steps share quantizers."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[0])
        for step in x:
            state = torch.tanh(self.cell(state) + step)
        return state


class Mapped(nn.Module):
    """A transform inside the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.weight = nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: self.linear(row).relu() @ self.weight)(x)


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


SHARED = sq.QuantConfig(rules=(sq.Rule(name="*", share=True),))


def skeletons_of(*quantized: sq.Quantized) -> list[Skeleton]:
    """The skeletons of some quantized models, with those that report less."""
    found = [skeleton for q in quantized for skeleton in (q.engine.skeleton, q.engine.loop.skeleton, q.engine.loop.bare)]
    return list({id(skeleton): skeleton for skeleton in found if skeleton is not None}.values())


def _loss(made: Ready, x: Tensor, params: dict[str, Tensor]) -> Tensor:
    return made.q.apply(params, made.qparams, x).square().mean()


def _scenes_of(model: nn.Module, x: Tensor, config: sq.QuantConfig, kernels: str = "off") -> dict[str, Scene]:
    """Each way to run one model."""
    model = model.eval()
    made = ready(model, x, config=config)
    q, params, qparams = made
    if kernels != "off":
        made = Ready(sq.build(model, q.plan, kernels=kernels), params, qparams)
        q = made.q
    floating = {name: tensor for name, tensor in params.items() if tensor.is_floating_point()}
    loss = partial(_loss, made, x)
    ostate = q.init(params)
    rows = torch.stack([x, x + 1])
    skeletons = skeletons_of(q)

    def inference() -> Tensor:
        with torch.inference_mode():
            return q.apply(params, qparams, x)

    def jvp() -> Any:
        tangents = {name: torch.ones_like(tensor) for name, tensor in floating.items()}
        return torch.func.jvp(lambda p: loss({**params, **p}), (floating,), (tangents,))

    def backward() -> Any:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in floating.items()}
        return torch.autograd.grad(loss({**params, **leaves}), list(leaves.values()), allow_unused=True)

    acts: dict[str, Callable[[], Any]] = {
        "apply": lambda: q.apply(params, qparams, x),
        "observe": lambda: q.observe(params, ostate, x),
        "calibrate": lambda: q.calibrate(params, [x, x + 1], progress=False),
        "backward": backward,
        "grad": lambda: torch.func.grad(lambda p: loss({**params, **p}))(floating),
        "vmap": lambda: torch.vmap(lambda one: q.apply(params, qparams, one))(rows),
        "jvp": jvp,
        "inference_mode": inference,
        "tap": lambda: q.tap("*")(params, qparams, x)[0],
        "tap, stopped": lambda: q.tap(q.blocks()[0].path if q.blocks() else "*", stop=True)(params, qparams, x)[0],
        "capture": lambda: list(q.capture(params, qparams, x).values()),
        "freeze": lambda: q.freeze(params, qparams)[1],
    }
    return {name: Scene(act, skeletons, [model]) for name, act in acts.items()}


def _planning(model: nn.Module, x: Tensor, config: sq.QuantConfig) -> Scene:
    model = model.eval()
    params = sq.params_of(model)

    def act() -> Any:
        q = sq.quantize(model, config, example_args=(x,))
        return q.apply(params, q.calibrate(params, [x], progress=False), x)

    return Scene(act, [], [model])


def _in_training(model: nn.Module, x: Tensor) -> dict[str, Scene]:
    """A model with BatchNorms in training mode, as pure functions and bound."""
    made = ready(model.eval(), x)
    q, params, qparams = made.q.train(), made.params, made.qparams
    bound = q.bind(params, qparams, learn="all")
    before = {name: tensor.detach().clone() for name, tensor in bound.state_dict().items()}

    def step() -> Any:
        bound.zero_grad()
        bound(x).square().mean().backward()
        return [p.grad for p in bound.parameters()], dict(bound.named_buffers())

    skeletons = skeletons_of(q)
    return {
        "apply_and_update": Scene(lambda: q.apply_and_update(params, qparams, x), skeletons, [model]),
        "bound": Scene(step, [bound._sophq_engine.skeleton], [model, bound], reset=lambda: bound.load_state_dict(before)),
    }


def _parts(model: nn.Module, x: Tensor, path: str, given: Tensor) -> Scene:
    made = ready(model.eval(), x)
    part = made.q.part(path)
    return Scene(lambda: part.apply(made.params, made.qparams, given), skeletons_of(made.q, part), [model])


def _staged(model: nn.Module, x: Tensor) -> dict[str, Scene]:
    """To record a program, and to run one."""
    made = ready(model.eval(), x)
    staged = sq.stage(made.q.apply)

    def cast() -> Tensor:
        with torch.autocast("cpu"):
            return staged(made.params, made.qparams, x)

    skeletons = skeletons_of(made.q)
    return {
        "stage": Scene(lambda: sq.stage(made.q.apply)(made.params, made.qparams, x), skeletons, [model], slow=True),
        "staged": Scene(cast, skeletons, [model]),
    }


def _of_function(x: Tensor) -> dict[str, Scene]:
    """A function of params instead of a module."""
    params = {"w": torch.randn(4, 3), "b": torch.randn(3)}

    def f(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x @ p["w"] + p["b"]).relu()

    q = sq.quantize(f, sq.QuantConfig(), params=params, example_args=(x,))
    qparams = q.calibrate(params, [x], progress=False)
    skeletons = skeletons_of(q)
    return {
        "apply": Scene(lambda: q.apply(params, qparams, x), skeletons, []),
        "grad": Scene(lambda: torch.func.grad(lambda p: q.apply(p, qparams, x).sum())(params), skeletons, []),
    }


def scenes(kernels: str = "off") -> dict[str, Scene]:
    """Every scene, by name.

    Args:
      kernels: of one more set of scenes; ``"off"``: there is none.
    """
    torch.manual_seed(0)
    image, row = torch.randn(2, 3, 2, 2), torch.randn(3, 4)
    config = sq.QuantConfig()
    models: dict[str, tuple[nn.Module, Tensor, sq.QuantConfig]] = {
        "chain": (chain(), row, config),
        "functions": (Functions(), image, config),
        "scan": (Scan(), torch.randn(3, 2, 4), SHARED),
        "mapped": (Mapped(), torch.randn(4, 3), config),
    }
    found: dict[str, Scene] = {}
    for name, (model, x, config) in models.items():
        found |= {f"{name}: {way}": scene for way, scene in _scenes_of(model, x, config).items()}
        found[f"{name}: quantize"] = _planning(model, x, config)
    ways = _scenes_of(Checkpointed(), image, config)
    found |= {f"checkpoint: {way}": ways[way] for way in ("apply", "backward", "observe")}
    found |= {f"training: {way}": scene for way, scene in _in_training(Functions(), image).items()}
    found["chain: part"] = _parts(chain(), row, "2", torch.randn(3, 8))
    found["functions: part"] = _parts(Functions(), image, "body", image)
    found |= {f"chain: {way}": scene for way, scene in _staged(chain(), row).items()}
    found |= {f"functions: {way}": scene for way, scene in _staged(Functions(), image).items()}
    found |= {f"function: {way}": scene for way, scene in _of_function(row).items()}
    if kernels != "off":
        ways = _scenes_of(chain(), row, config, kernels)
        found |= {f"kernels: {way}": ways[way] for way in ("apply", "backward", "observe")}
    return found


def plain_torch(x: Tensor) -> list[Tensor]:
    """What a user computes without this library, in the ways that a run changes while it lasts."""
    layer = nn.utils.skip_init(nn.Linear, 4, 4, bias=False)  # draws no random numbers
    with torch.no_grad():
        layer.weight.copy_(torch.arange(16.0).reshape(4, 4))
    doubled = Doubled.apply(x)
    twice = checkpoint(torch.tanh, x, use_reentrant=False)
    called = functional_call(layer, {"weight": layer.weight + 1}, (x,))
    return [torch.matmul(x, x.mT), x.mean(1), layer(x).relu() + x, doubled, twice, called]
