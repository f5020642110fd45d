"""The laws of chips and strategies, which are tried on plans of small networks, and the checks that hold one to them."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sophq_func.capture.contents import params_of
from sophq_func.capture.graph import Graph
from sophq_func.capture.trace import trace
from sophq_func.config.chips import CHIPS, ChipSpec
from sophq_func.config.rules import ROLES, QuantConfig, Rule
from sophq_func.config.site import Role
from sophq_func.config.strategies import PLACEMENTS, Strategy
from sophq_func.core.errors import ConfigError
from sophq_func.core.public import public_as
from sophq_func.fake_quantize import fixed
from sophq_func.model.build import build
from sophq_func.numerics.scheme import QScheme, QuantizerConfig, override
from sophq_func.observers import minmax
from sophq_func.planning.make import plan as make_plan
from sophq_func.planning.plan import Plan
from sophq_func.testing.laws import Law, check_all, law, refused
from sophq_func.testing.pieces import entry_of
from sophq_func.testing.subjects import assert_same


class Attention(nn.Module):
    """Products of values with one another, beside layers."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, tokens, 8)`` to ``(batch, tokens, 4)``."""
        scores = self.query(x) @ self.key(x).transpose(-1, -2)
        mixed: Tensor = self.head(torch.softmax(scores, -1) @ x + x)
        return mixed


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network of random weights in eval mode, the same each time, and an input."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, shape = {
            "layers": (nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), (5, 8)),
            "convolutions": (
                nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)),
                (2, 2, 6, 6),
            ),
            "attention": (Attention(), (2, 3, 8)),
        }[name]
        return model.eval(), torch.randn(shape)


NETWORKS: Mapping[str, str] = {name: name for name in ("layers", "convolutions", "attention")}

PLAIN = ("CNN", "Transformer", "Layers", "Dataflow")
"""Strategies that choose places alone; others set bits or fake quantizers, too, which a chip may forbid."""

HALVES: Mapping[str, Role] = {role: role for role in ROLES}

LEAST_RATIO = 40.0
"""Decibels between a network and itself with 16 bits.

A range of 8 standard deviations in 2 ** 16 steps has noise 90 dB below its values; half of that is left for layers that
add it up, and for what is calibrated on a few values.
"""


@functools.cache
def graph_of(name: str) -> Graph:
    """A network, traced once."""
    model, x = network(name)
    return trace(model, (x,))


def bits_of(chip: str, role: Role) -> tuple[int, ...] | None:
    """The widths that a chip allows; ``None`` for all."""
    spec = CHIPS.get(chip)
    return spec.weight_bits if role == "weight" else spec.activation_bits


def on_chip(chip: str, role: Role, bits: int) -> QuantConfig:
    """A config with other bits of one half."""
    half = {role: override(bits=bits)}
    return QuantConfig(chip=CHIPS.get(chip), strategy="Transformer", **half)  # type: ignore[arg-type]


@law(NETWORKS)
def a_chip_plans_every_network(chip: str, net: str) -> None:
    """Its defaults plan every network, and the plan survives JSON."""
    for strategy in PLAIN:
        plan = make_plan(graph_of(net), QuantConfig(chip=CHIPS.get(chip), strategy=PLACEMENTS.get(strategy)))
        assert any(plan.site(name).role == "weight" for name in plan)
        assert Plan.from_json(plan.to_json()).digest() == plan.digest()


@law(HALVES)
def defaults_lie_within_the_limits(chip: str, role: Role) -> None:
    """The default configs have bits and fake quantizers that the chip allows."""
    spec, allowed = CHIPS.get(chip), bits_of(chip, role)
    default = spec.weight if role == "weight" else spec.activation
    assert allowed is None or default.scheme.bits in allowed
    assert spec.fake_quantizers is None or default.fake_quantize.name in spec.fake_quantizers


@law(HALVES)
def allowed_bits_are_accepted(chip: str, role: Role) -> None:
    """Every width that the chip allows is planned."""
    for bits in bits_of(chip, role) or range(2, 17):
        # a chip may give the outermost layers other bits, so that the network needs inner ones
        plan = make_plan(graph_of("attention"), on_chip(chip, role, bits))
        assert bits in {config.scheme.bits for name, config in plan.items() if plan.site(name).role == role}


@law(HALVES)
def other_bits_are_refused_by_name(chip: str, role: Role) -> None:
    """A width that the chip does not allow is a ``ConfigError`` that names the width and the chip."""
    allowed = bits_of(chip, role)
    for bits in sorted(set(range(2, 17)) - set(range(2, 17) if allowed is None else allowed)):
        with refused(ConfigError, f"{bits} bits", chip):
            make_plan(graph_of("layers"), on_chip(chip, role, bits))


CHIP_LAWS = (
    a_chip_plans_every_network,
    defaults_lie_within_the_limits,
    allowed_bits_are_accepted,
    other_bits_are_refused_by_name,
)


def wide(strategy: str) -> QuantConfig:
    """A config with 16 bits everywhere."""
    config = QuantizerConfig(scheme=QScheme(bits=16), observer=minmax(), fake_quantize=fixed())
    # the strategy itself may set bits in presets; rules come after these
    rules = (Rule(name="*", weight=config, activation=config),)
    return QuantConfig(strategy=placed(strategy), weight=config, activation=config, rules=rules)


def placed(strategy: str) -> Strategy:
    """The registered strategy, which a config takes for its name."""
    return PLACEMENTS.get(strategy)


@law(NETWORKS)
def a_strategy_plans_every_network(strategy: str, net: str) -> None:
    """Every network is planned, some weight in it is quantized, and the plan survives JSON."""
    plan = make_plan(graph_of(net), QuantConfig(strategy=placed(strategy)))
    assert any(plan.site(name).role == "weight" for name in plan)
    assert Plan.from_json(plan.to_json()).digest() == plan.digest()


@law(NETWORKS)
def the_same_graph_gives_the_same_plan(strategy: str, net: str) -> None:
    """Placement depends on the graph and the config alone, and does not change the graph."""
    config = QuantConfig(strategy=placed(strategy))
    model, x = network(net)
    plans = [make_plan(graph, config) for graph in (graph_of(net), graph_of(net), trace(model, (x,)))]
    assert len({plan.digest() for plan in plans}) == 1


@law(NETWORKS)
def every_quantizer_has_a_reason(strategy: str, net: str) -> None:
    """Each quantizer is explained by the plan."""
    plan = make_plan(graph_of(net), QuantConfig(strategy=placed(strategy)))
    for name in plan:
        assert all(plan.reasons(name).values())
        assert name in plan.explain(name)


@law(NETWORKS)
def sixteen_bits_are_nearly_float(strategy: str, net: str) -> None:
    """With 16 bits everywhere, a calibrated network computes almost what it computes in float."""
    model, x = network(net)
    q = build(model, make_plan(graph_of(net), wide(strategy)))
    params = params_of(model)
    expected = model(x).detach()
    noise = q.apply(params, q.calibrate(params, [x], progress=False), x) - expected
    power, lost = float(expected.square().sum()), float(noise.square().sum())
    assert lost == 0 or 10 * math.log10(power / lost) > LEAST_RATIO


@law(NETWORKS)
def nothing_is_quantized_where_rules_say_so(strategy: str, net: str) -> None:
    """Rules that leave everything out leave the network as it is, bit for bit."""
    model, x = network(net)
    rules = (Rule(name="*", weight=None, activation=None),)
    q = build(model, make_plan(graph_of(net), QuantConfig(strategy=placed(strategy), rules=rules)))
    assert_same(q.apply(params_of(model), {}, x), model(x).detach())


STRATEGY_LAWS = tuple(one for one in list(globals().values()) if isinstance(one, Law) and one not in CHIP_LAWS)


@public_as("testing.check_chip")
def check_chip(name: str | ChipSpec) -> None:
    """Hold a registered chip to the laws that the library's own obey.

    Args:
      name: of the chip; or what was registered under it.

    Raises:
      ConfigError: an unknown chip, or one that is not registered.
      LawError: an ``AssertionError`` that names each law that is broken, with a case.

    Example:
      >>> import sophq_func as sq
      >>> sq.testing.check_chip("BM1684X")
    """
    fix = 'sq.register.chip("mine", spec)'
    check_all("chip", entry_of(CHIPS, name, "testing.check_chip", fix), CHIP_LAWS, (), slow=False)


@public_as("testing.check_strategy")
def check_strategy(name: str | Strategy) -> None:
    """Hold a registered strategy to the laws that the library's own obey.

    Args:
      name: of the strategy; or the function that was registered under it.

    Raises:
      ConfigError: an unknown strategy, or one that is not registered.
      LawError: an ``AssertionError`` that names each law that is broken, with a case.

    Example:
      >>> import sophq_func as sq
      >>> sq.testing.check_strategy("Layers")
    """
    fix = 'sq.register.strategy("mine", place)'
    check_all("strategy", entry_of(PLACEMENTS, name, "testing.check_strategy", fix), STRATEGY_LAWS, (), slow=False)
