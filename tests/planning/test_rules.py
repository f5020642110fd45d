"""Rules, twice: a resolver written from ``docs/rules.md`` alone, in the plainest way, must agree with the library's."""

from __future__ import annotations

import dataclasses
import functools
import operator
import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import pytest
import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.intrinsic.qat as nniqat
import torch.ao.nn.qat as nnqat
import torch.ao.nn.quantized as nnq
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sophq_func as sq

# ---------------------------------------------------------------------------------------------------------------- models


class Mine(nn.Conv2d):
    """A subclass."""


class Chain(nn.Sequential):
    """A container class of one's own."""


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x


class Twice(nn.Module):
    """One module, called twice."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.body(x))


class Shared(nn.Module):
    """One module, registered under two paths; called by the second."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.again = nn.ModuleList([body])

    def forward(self, x: Tensor) -> Tensor:
        return self.again[0](x)


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Gate(nn.Module):
    """A sigmoid, spelled in one of its ways."""

    def __init__(self, spelled: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.spelled = spelled

    def forward(self, x: Tensor) -> Tensor:
        return x * self.spelled(x)


class Functional(nn.Module):
    """Functions, with weights of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.matrix = nn.Parameter(torch.randn(4, 4, 1, 1)), nn.Parameter(torch.randn(4, 4))
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel)
        x = F.relu(self.conv(x))
        x = F.softmax(x @ self.matrix, 1)
        x += x.tanh()
        return torch.add(x, torch.mul(x, x))


LEADS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(4, 4, 1),
    "mine": lambda: Mine(4, 4, 1),
    "deconv": lambda: nn.ConvTranspose2d(4, 4, 1),
    "linear": lambda: nn.Linear(4, 4),
    "softmax": lambda: nn.Softmax(1),
    "sigmoid": nn.Sigmoid,
    "sigmoid function": lambda: Gate(torch.sigmoid),
    "sigmoid method": lambda: Gate(Tensor.sigmoid),
    "functional": Functional,
    "tied": Tied,
}
FOLLOWERS: dict[str, Callable[[], nn.Module]] = {"bn": lambda: nn.BatchNorm2d(4), "relu": nn.ReLU}
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {"residual": Residual, "twice": Twice, "shared": Shared}
BLOCKS = LEADS | FOLLOWERS
CHAINS = {"sequential": nn.Sequential, "chain": Chain}


def build(recipe: Any) -> nn.Module:
    """A module from its name, or from ``(container, *parts)``."""
    if isinstance(recipe, str):
        return BLOCKS[recipe]()
    container, *parts = recipe
    modules = [build(part) for part in parts]
    return CHAINS[container](*modules) if container in CHAINS else WRAPPERS[container](*modules)


class Net(nn.Module):
    def __init__(self, *recipes: Any) -> None:
        super().__init__()
        for name, recipe in zip("abcdefgh", recipes, strict=False):
            setattr(self, name, build(recipe))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


@functools.cache
def traced(*recipes: Any) -> tuple[nn.Module, sq.Graph]:
    model = Net(*recipes).eval()
    return model, sq.trace(model, (torch.randn(2, 4, 4, 4),))


FUSED = ("sequential", "conv", "bn", "relu")
LEAD = st.sampled_from(sorted(LEADS))
SHAREABLE = st.sampled_from(sorted(LEADS.keys() - {"functional"}))


def chains(lead: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """A container of one to three parts, of which the first is no follower."""
    further = st.lists(lead | st.sampled_from(sorted(FOLLOWERS)), max_size=2)
    return st.builds(
        lambda kind, first, rest: (kind, first, *rest), st.sampled_from(sorted(CHAINS)), lead, further
    ) | st.just(FUSED)


BLOCK = st.one_of(
    LEAD,
    chains(LEAD),
    st.tuples(st.sampled_from(("residual", "twice")), LEAD | chains(LEAD)),
    st.tuples(st.just("shared"), SHAREABLE | chains(SHAREABLE)),
)
RECIPES = st.lists(BLOCK, min_size=1, max_size=4).map(tuple)

# ------------------------------------------------------------------------------------------------ section 2: what matches


class Key(NamedTuple):
    """What a type key stands for: module classes, an operation, or a fused pattern."""

    modules: tuple[type[nn.Module], ...] = ()
    operation: str = ""
    pattern: str = ""


OPERATIONS: dict[type[nn.Module], str] = {
    nn.Conv2d: "conv2d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.Linear: "linear",
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    nn.Softmax: "softmax",
    nn.Tanh: "tanh",
    nn.BatchNorm2d: "batch_norm",
}
CLASSES = {cls: Key((cls,), operation) for cls, operation in OPERATIONS.items()}
CONV, LINEAR, SIGMOID, ADD = CLASSES[nn.Conv2d], CLASSES[nn.Linear], Key((), "sigmoid"), Key((), "add")
KEYS: dict[Any, Key] = {
    **CLASSES,
    **{cls: Key((cls,)) for cls in (Mine, Chain, Residual, Twice, Shared, Tied, Gate, Functional, nn.Sequential)},
    **dict.fromkeys((F.sigmoid, torch.sigmoid, Tensor.sigmoid, Tensor.sigmoid_, torch.special.expit), SIGMOID),
    **dict.fromkeys((torch.add, operator.add, operator.iadd, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__), ADD),
    **{f: Key((), "mul") for f in (torch.mul, torch.multiply, operator.mul, Tensor.mul)},
    **{f: Key((), "matmul") for f in (torch.matmul, operator.matmul, Tensor.matmul)},
    **{f: Key((), "relu") for f in (F.relu, torch.relu, Tensor.relu_)},
    **{f: Key((), "softmax") for f in (F.softmax, torch.softmax, Tensor.softmax)},
    **{f: Key((), "tanh") for f in (torch.tanh, Tensor.tanh)},
    F.conv2d: Key((), "conv2d"),
    F.linear: Key((), "linear"),
    F.gelu: Key((), "gelu"),
    nn.GELU: Key((nn.GELU,), "gelu"),
    sq.patterns.ConvBnReLU2d: Key(pattern="ConvBnReLU2d"),
    sq.patterns.ConvReLU2d: Key(pattern="ConvReLU2d"),
    sq.patterns.ConvBn2d: Key(pattern="ConvBn2d"),
    sq.patterns.LinearReLU: Key(pattern="LinearReLU"),
    sq.patterns.ConvTransposeReLU2d: Key(pattern="ConvTransposeReLU2d"),
    sq.patterns.BnReLU2d: Key(pattern="BnReLU2d"),
    nni.ConvReLU2d: Key(pattern="ConvReLU2d"),
    nni.ConvBnReLU2d: Key(pattern="ConvBnReLU2d"),
    nni.LinearReLU: Key(pattern="LinearReLU"),
    nniqat.ConvBnReLU2d: Key(pattern="ConvBnReLU2d"),
    nniqat.ConvBn2d: Key(pattern="ConvBn2d"),
    nnqat.Linear: LINEAR,
    nnqat.Conv2d: CONV,
    nnq.Linear: LINEAR,
    "Conv2d": CONV,
    "Linear": LINEAR,
    "Linear_sophgo": LINEAR,
    "Conv2d_sophgo": CONV,
    "Sequential": Key((nn.Sequential,)),
    "ConvBnReLU2d": Key(pattern="ConvBnReLU2d"),
    "ConvReLU2d_sophgo": Key(pattern="ConvReLU2d"),
    "torch.sigmoid": SIGMOID,
    "Sigmoid": CLASSES[nn.Sigmoid],
    "torch.add": ADD,
    "GELU": Key((nn.GELU,), "gelu"),
}


class Facts(NamedTuple):
    """What rules may ask about one quantizer.

    Attributes:
      names: every name that it has.
      modules: the modules that make the value, own the weight, or in which the function is called, and all around them.
      operation: of the call.
      pattern: of the fused group.
    """

    names: frozenset[str]
    modules: tuple[nn.Module, ...]
    operation: str
    pattern: str


def join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def around(path: str) -> list[str]:
    """A path and those of all modules around it, but for the root, which has no name."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def facts(model: nn.Module, site: sq.Site) -> Facts:
    """Read off the module tree; of the site only the call, its group and the parameter's name are taken."""
    every = list(model.named_modules(remove_duplicate=False))
    modules = dict(every)
    names = {site.quantizer, site.value}
    if site.parameter:
        tensor = model.get_parameter(site.parameter)
        uses = [(path, key) for path, m in every for key, p in m._parameters.items() if p is tensor]
        owners = [path for path, _ in uses]
        names |= {join(path, f"{key}_fake_quant") for path, key in uses}
    else:
        owners = [path for path, m in every if m is modules[site.path]]
        if site.value == site.path and site.operand < 0:
            names |= {f"{path}.post_act_fake_quantizer" for path in owners}
    called = [path for path in map(module_path(modules), site.members[1:]) if path and not site.parameter]
    further = [path for path, m in every if any(m is modules[other] for other in called)]
    for path in owners + further:
        names.update(around(path))
    operation = site.function or next((o for cls, o in OPERATIONS.items() if isinstance(modules[site.path], cls)), "")
    inside = tuple(modules[p] for owner in owners for p in [*around(owner), ""])
    return Facts(frozenset(names - {""}), inside, operation, site.pattern)


def module_path(modules: dict[str, nn.Module]) -> Callable[[str], str]:
    """Of a call's name: ``a.0`` for ``a.0`` and ``a.0_1``; empty for functions."""

    def of(call: str) -> str:
        bare, _, number = call.rpartition("_")
        return call if call in modules else bare if number.isdigit() and bare in modules else ""

    return of


def name_fits(asked: str, names: frozenset[str], known: frozenset[str]) -> bool:
    """Whether a rule's name is one of ``names``; an exact name counts before an underscored one."""
    flat = {name.replace(".", "_") for name in names}
    if any(c in asked for c in "*?["):
        return any(fnmatchcase(name, asked) for name in names | flat)
    return asked in names if asked in known else asked in flat


def type_fits(key: Key, about: Facts) -> bool:
    inside = any(isinstance(module, key.modules) for module in about.modules)
    return inside or key.operation == about.operation != "" or key.pattern == about.pattern != ""


Options = dict[str, Any]
"""A rule as the keywords of ``sq.Rule``: what is left out is not there."""


def matches(rule: Options, about: Facts, site: sq.Site, known: frozenset[str]) -> bool:
    """Section 2: it matches where all that it has match."""
    if "name" in rule and not name_fits(rule["name"], about.names, known):
        return False
    if "type" in rule and not type_fits(KEYS[rule["type"]], about):
        return False
    return "where" not in rule or rule["where"](site)


# --------------------------------------------------------------------------------------------------- section 1: resolving

SCHEME = ("bits", "symmetric", "symmetric_range", "pot_scale", "granularity", "dynamic")
FIELDS = (*SCHEME, "observer", "fake_quantize", "observe_only", "optional")
Flat = dict[str, Any]
"""A config field by field, those of the scheme among the others."""


def flat(config: sq.QuantizerConfig) -> Flat:
    scheme = {name: getattr(config.scheme, name) for name in SCHEME}
    return scheme | {name: getattr(config, name) for name in FIELDS if name not in SCHEME}


def whole(fields: Flat) -> sq.QuantizerConfig:
    scheme = sq.QScheme(**{name: fields[name] for name in SCHEME})
    return sq.QuantizerConfig(scheme=scheme, **{name: fields[name] for name in FIELDS if name not in SCHEME})


class Override(NamedTuple):
    """The fields that ``sq.override`` is told to change."""

    values: tuple[tuple[str, Any], ...]


def changes(half: Override | sq.QuantizerConfig) -> Flat:
    return dict(half.values) if isinstance(half, Override) else flat(half)


def plain(options: Options) -> Options:
    """As the library wants it."""
    return {k: sq.override(**dict(v.values)) if isinstance(v, Override) else v for k, v in options.items()}


class Case(NamedTuple):
    """A model, and a config without and with rules."""

    recipes: tuple[Any, ...]
    chip: str | None
    strategy: str | None
    halves: Options
    rules: tuple[Options, ...]

    def config(self, rules: tuple[Options, ...] | None = None, **halves: Any) -> sq.QuantConfig:
        own = tuple(sq.Rule(**plain(rule)) for rule in (self.rules if rules is None else rules))
        return sq.QuantConfig(chip=self.chip, strategy=self.strategy, rules=own, **(plain(self.halves) | halves))

    def plan(self, rules: tuple[Options, ...] | None = None) -> sq.Plan:
        return sq.plan(traced(*self.recipes)[1], self.config(rules))

    def places(self) -> sq.Plan:
        """Where the strategy places quantizers, and what it knows about the places: the plan without rules."""
        given = {half: value for half, value in self.halves.items() if value is not None}
        return self._replace(halves=given).plan(())


class Answer(NamedTuple):
    """What the naive resolver says about one quantizer: its config, if it is there, and the rule that decided each field."""

    config: sq.QuantizerConfig | None
    deciders: dict[str, Options]


STRATEGY = ("strategy ", "is a first layer", "is a last layer")


def expected(case: Case, places: sq.Plan, about: dict[str, Facts], name: str) -> Answer:
    """Sections 1 and 2, word by word, for the quantizer ``name``."""
    site, known = places.site(name), frozenset().union(*(f.names for f in about.values()), module_names(case))
    half = site.role
    chip = sq.CHIPS.get(case.chip or "BM1690")
    start = flat(chip.weight if half == "weight" else chip.activation)
    if case.halves.get(half) is not None:
        start |= changes(case.halves[half])
    reasons = places.reasons(name)
    known_to_strategy = [f for f in FIELDS if any(word in reasons.get(f, "") for word in STRATEGY)]
    float_half = half in case.halves and case.halves[half] is None
    start = start if float_half else start | {f: flat(places[name])[f] for f in known_to_strategy}
    fields: Flat | None = None if float_half else start
    deciders: dict[str, Options] = {}
    for rule in case.rules:
        if not matches(rule, about[name], site, known):
            continue
        if half in rule and rule[half] is None:
            fields, deciders = None, {}
        elif half in rule:
            fields = (start if fields is None else fields) | changes(rule[half])
            deciders |= dict.fromkeys(changes(rule[half]), rule)
        flags = [flag for flag in ("observe_only", "optional") if flag in rule]
        if fields is not None:
            fields = fields | {flag: rule[flag] for flag in flags}
            deciders |= dict.fromkeys(flags, rule)
    if fields is None:
        return Answer(None, {})
    if half == "weight" and getattr(fields["granularity"], "axis", 0) is None:
        fields["granularity"] = dataclasses.replace(fields["granularity"], axis=site.axis)
    return Answer(whole(fields), deciders)


def module_names(case: Case) -> frozenset[str]:
    return frozenset(path for path, _ in traced(*case.recipes)[0].named_modules(remove_duplicate=False) if path)


def facts_of(case: Case, places: sq.Plan) -> dict[str, Facts]:
    return {name: facts(traced(*case.recipes)[0], places.site(name)) for name in places}


# ------------------------------------------------------------------------------------------------------------ random cases


class Chip(NamedTuple):
    """A chip and a strategy with bits that it allows (never 4 in both, which places further quantizers)."""

    chip: str | None
    strategy: str | None
    weight: tuple[int, ...]
    activation: tuple[int, ...]


CHIPS = (
    Chip(None, None, (2, 4, 8, 16), (3, 8, 16)),
    Chip(None, "CNN", (3, 4, 8), (3, 6, 8)),
    Chip(None, "BF16Mixed", (4, 8), (6, 8)),
    Chip(None, "Transformer", (4, 8), (6, 8)),
    Chip("BM1690", "Dataflow", (4, 8), (8,)),
    Chip("BM1688", "CNN", (4, 8), (8,)),
    Chip("BM1688", "CNN", (8,), (4, 8)),
    Chip("MARS3", "Dataflow", (4, 7), (5, 8)),
    Chip("Academic", None, (4, 6, 8), (3, 8)),
)
OBSERVERS = st.sampled_from(
    (sq.observers.minmax(), sq.observers.ema_minmax(), sq.observers.ema_minmax(decay=0.5), sq.observers.mse())
)
GRIDS = {"weight": (sq.PerTensor(), sq.PerChannel(), sq.PerGroup(size=2)), "activation": (sq.PerTensor(),)}
FAKES = st.sampled_from(
    (sq.fake_quantize.learnable(), sq.fake_quantize.fixed(), sq.fake_quantize.learnable(use_grad_scaling=False))
)


def fields_of(chip: Chip, half: str) -> dict[str, st.SearchStrategy[Any]]:
    """Values for each field of a half's config that go together."""
    return {
        "bits": st.sampled_from(getattr(chip, half)),
        "symmetric": st.booleans(),
        "symmetric_range": st.booleans(),
        "pot_scale": st.booleans(),
        "granularity": st.sampled_from(GRIDS[half]),
        "observer": OBSERVERS,
        "fake_quantize": FAKES,
        "observe_only": st.booleans(),
        "optional": st.booleans(),
    }


def halves(chip: Chip, half: str) -> st.SearchStrategy[Any]:
    fields = fields_of(chip, half)
    some = st.fixed_dictionaries({}, optional=fields).map(lambda values: Override(tuple(sorted(values.items()))))
    every = st.fixed_dictionaries(fields | {"dynamic": st.just(False)}).map(whole)
    return some | every | st.none()


def spoiled(name: str, at: int, way: int) -> str:
    """A name as a glob, or with underscores."""
    parts = name.split(".")
    at %= len(parts)
    ways = (
        name.replace(".", "_"),
        ".".join([*parts[:at], "*", *parts[at + 1 :]]),
        ".".join(parts[: at + 1]) + "*",
        "*" + ".".join(parts[at:]),
        "_".join([*parts[:at], "*", *parts[at + 1 :]]),
        "?" + name[1:],
        f"[!{name[0]}]" + name[1:],
        f"[{name[0]}z]*",
        f"{name}.nothing*",
    )
    return ways[way % len(ways)]


WHERES: tuple[Callable[[sq.Site], bool], ...] = (
    lambda site: site.role == "weight",
    lambda site: len(site.shape) == 4,
    lambda site: bool(site.members),
    lambda site: site.path.startswith("a"),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    recipes, chip = draw(RECIPES), draw(st.sampled_from(CHIPS))
    assume(chip.strategy != "BF16Mixed" or "shared" not in str(recipes))
    given_halves = st.fixed_dictionaries({}, optional={half: halves(chip, half) for half in ("weight", "activation")})
    bare = Case(recipes, chip.chip, chip.strategy, draw(given_halves), ())
    own = module_names(bare).union(*(f.names for f in facts_of(bare, bare.places()).values()))
    pool = sorted(name for name in own if "input_act_fake_quantizer_" not in name)
    exact = st.sampled_from(pool)
    names = exact | st.builds(spoiled, exact, st.integers(0, 3), st.integers(0, 20)) | st.just("*")
    says = {
        "name": names,
        "type": st.sampled_from(list(KEYS)),
        "where": st.sampled_from(WHERES),
        "weight": halves(chip, "weight"),
        "activation": halves(chip, "activation"),
        "observe_only": st.booleans(),
        "optional": st.booleans(),
    }
    kinds = (("name",), ("name",), ("type",), ("type",), ("name", "type"), ("where",))
    rules = []
    for _ in range(draw(st.sampled_from(range(9)))):
        matched = draw(st.sampled_from(kinds))
        told = {k: v for k, v in says.items() if k in ("weight", "activation", "observe_only", "optional")}
        rules.append(draw(st.fixed_dictionaries({k: says[k] for k in matched}, optional=told)))
    return bare._replace(rules=tuple(rules))


def quick(examples: int) -> Callable[[Any], Any]:
    slow = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=slow)


@pytest.mark.slow
@quick(600)
@given(cases())
def test_a_naive_reading_of_the_rules_and_the_plan_agree_on_every_field_of_every_quantizer(case: Case) -> None:
    places, got = case.places(), case.plan()
    about = facts_of(case, places)
    assert [name for name in places if name in got] == list(got)
    for name in places:
        answer = expected(case, places, about, name)
        assert got.get(name) == answer.config, name
        for field in answer.deciders.keys() - {"observe_only", "optional"}:
            assert got.reasons(name)[field] == repr(sq.Rule(**plain(answer.deciders[field]))), (name, field)


def takes_hold(case: Case, rule: Options, places: sq.Plan, about: dict[str, Facts]) -> bool:
    """Whether a rule matches some quantizer of which it says something."""
    known = frozenset().union(*(f.names for f in about.values()), module_names(case))
    for name in places:
        site = places.site(name)
        if matches(rule, about[name], site, known) and rule.keys() & {site.role, "observe_only", "optional"}:
            return True
    return False


@pytest.mark.slow
@quick(200)
@given(cases())
def test_the_unused_rules_are_those_that_match_nothing_of_which_they_speak(case: Case) -> None:
    places = case.places()
    about = facts_of(case, places)
    idle = [sq.Rule(**plain(rule)) for rule in case.rules if not takes_hold(case, rule, places, about)]
    assert list(case.plan().unused) == idle


# ------------------------------------------------------------------------------------------- sections 1 and 2, one by one

NAMED: tuple[Any, ...] = (FUSED, ("residual", "linear"), "sigmoid")
PLAIN = Case(NAMED, None, "CNN", {}, ())
WEIGHT, VALUE = "a.0.weight_fake_quant", "a.0.post_act_fake_quantizer"


def plan(*rules: Options, **config: Any) -> sq.Plan:
    return PLAIN._replace(**config).plan(rules)


def bits(number: int) -> Override:
    return Override((("bits", number),))


@pytest.mark.parametrize("broad", [{"name": "a"}, {"name": "*"}, {"type": nn.Conv2d}, {"where": lambda site: True}])
def test_of_two_rules_for_one_field_the_later_wins_be_it_broader_or_narrower(broad: Options) -> None:
    narrow, broad = {"name": WEIGHT, "weight": bits(5)}, broad | {"weight": bits(6)}
    assert plan(narrow, broad)[WEIGHT].scheme.bits == 6
    assert plan(broad, narrow)[WEIGHT].scheme.bits == 5


def test_rules_for_different_fields_or_halves_may_change_places() -> None:
    first, second = {"name": "a", "weight": bits(5)}, {"name": "*", "weight": Override((("pot_scale", True),))}
    third = {"type": nn.Conv2d, "activation": bits(6), "optional": True}
    orders = [plan(first, second, third), plan(third, second, first), plan(second, third, first)]
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize("given", [bits(6), whole(flat(sq.CHIPS.get("BM1690").weight) | {"bits": 6})])
def test_after_a_none_an_override_starts_again_from_the_config_and_a_whole_config_is_itself(given: Any) -> None:
    forgotten = {"name": WEIGHT, "weight": Override((("bits", 4), ("pot_scale", True), ("optional", True)))}
    back = plan(forgotten, {"name": "a", "weight": None}, {"name": WEIGHT, "weight": given}, halves={"weight": bits(7)})
    assert back[WEIGHT] == plan({"name": WEIGHT, "weight": bits(6)})[WEIGHT]


@pytest.mark.parametrize("pattern", [sq.patterns.ConvBnReLU2d, nni.ConvBnReLU2d, nniqat.ConvBnReLU2d, "ConvBnReLU2d_sophgo"])
def test_the_further_modules_of_a_group_name_its_value_and_its_pattern_all_of_it(pattern: Any) -> None:
    for name in ("a.1", "a.2"):
        got = plan({"name": name, "weight": bits(5), "activation": bits(6)})
        assert (got[WEIGHT].scheme.bits, got[VALUE].scheme.bits) == (8, 6)
    got = plan({"type": pattern, "weight": bits(5), "activation": bits(6)})
    assert (got[WEIGHT].scheme.bits, got[VALUE].scheme.bits) == (5, 6)


def test_after_a_none_an_override_starts_again_from_what_the_strategy_knows_about_the_place() -> None:
    places = Case((("residual", "softmax"),), None, "Dataflow", {}, ())
    name = "a.body.post_act_fake_quantizer"
    assert places.plan(())[name].observer == sq.observers.fixed_range(lo=0.0, hi=1.0)
    back = places.plan(({"name": name, "activation": None}, {"name": name, "activation": bits(6)}))[name]
    assert flat(back) == flat(places.plan(())[name]) | {"bits": 6}


def test_where_the_config_leaves_a_half_float_rules_bring_single_quantizers_back() -> None:
    got = plan(
        {"name": WEIGHT, "weight": bits(4)}, {"name": "*", "observe_only": True}, halves={"weight": None, "activation": None}
    )
    assert list(got) == [WEIGHT]
    assert got[WEIGHT].scheme.bits == 4
    assert got[WEIGHT].observe_only


def test_what_the_transformer_strategy_only_observes_a_rule_may_quantize() -> None:
    name = "b.add.post_act_fake_quantizer"
    observed = plan({"name": "b.add", "activation": bits(6)}, strategy="Transformer")[name]
    assert (observed.observe_only, observed.scheme.bits) == (True, 6)
    assert not plan({"name": "b.add", "observe_only": False}, strategy="Transformer")[name].observe_only
    assert not plan({"name": name, "activation": Override((("observe_only", False),))}, strategy="Transformer")[
        name
    ].observe_only


@pytest.mark.parametrize("name", ["a.00", "a.0.weight_fake_quants", "b.bodi", "a_0_weight_fake_qant", "A.0"])
def test_an_exact_name_that_the_model_does_not_have_is_an_error_that_says_what_is_near(name: str) -> None:
    with pytest.raises(sq.ConfigError, match="did you mean") as caught:
        plan({"name": name, "weight": None})
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["a.00*", "A.0*", "*.weight_fake_quants", "[b-c].bodi", "b_bodi?"])
def test_a_glob_that_matches_nothing_is_no_error_but_unused(name: str) -> None:
    with pytest.warns(sq.PlanWarning, match="fits no name of the model. Fix: did you mean"):
        got = plan({"name": name, "weight": None, "activation": None})
    assert got.unused == (sq.Rule(name=name, weight=None, activation=None),)
    assert not got.diff(plan())


def test_a_glob_that_fits_a_name_where_nothing_is_quantized_is_no_mistake() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", sq.PlanWarning)
        plan({"name": "a.*", "weight": None}, {"name": "b_*", "activation": None}, {"type": nn.Conv3d, "weight": None})


def test_a_glob_without_dots_is_compared_with_the_steps_of_paths() -> None:
    with pytest.warns(sq.PlanWarning, match=r"^Rule\(name='\*bodi\*', weight=None\): its glob .*did you mean 'body'"):
        plan({"name": "*bodi*", "weight": None})


def test_names_of_the_three_dictionaries_may_fit_nothing() -> None:
    quant = {"chip": "BM1690", "quantmode": "weight_activation", "strategy": "CNN"}
    config = sq.from_dicts({"quant_dict": quant, "extra_quantizer_dict": {"exclude_module_name": ["nowhere*"]}})
    with warnings.catch_warnings():
        warnings.simplefilter("error", sq.PlanWarning)
        made = sq.quantize(nn.Conv2d(3, 4, 1).eval(), config, example_args=(torch.ones(1, 3, 2, 2),)).plan
    assert [rule.name for rule in made.unused] == ["nowhere*"]


class Alike(nn.Module):
    """Two places that one underscored name fits."""

    def __init__(self) -> None:
        super().__init__()
        self.a_b = nn.ModuleDict({"c": nn.Linear(4, 4)})
        self.a = nn.ModuleDict({"b_c": nn.Linear(4, 4), "d": nn.Linear(4, 4)})
        self.a_d = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a_d(self.a["d"](self.a["b_c"](self.a_b["c"](x))))


def alike(rule: Options) -> sq.Plan:
    config = sq.QuantConfig(rules=(sq.Rule(**plain(rule)),))
    return sq.plan(sq.trace(Alike(), (torch.randn(2, 4),)), config)


@pytest.mark.parametrize("suffix", ["", "_weight_fake_quant", "_post_act_fake_quantizer"])
def test_an_underscored_name_that_fits_two_places_is_an_error_that_lists_both(suffix: str) -> None:
    dotted = "." + suffix[1:] if suffix else ""
    with pytest.raises(sq.ConfigError) as caught:
        alike({"name": f"a_b_c{suffix}", "weight": None})
    assert f"'a_b.c{dotted}'" in str(caught.value)
    assert f"'a.b_c{dotted}'" in str(caught.value)


def test_a_name_with_its_dots_is_never_taken_for_another_place() -> None:
    for name in ("a_b.c", "a.b_c", "a.d", "a_d.weight_fake_quant"):
        got = alike({"name": name, "weight": bits(4)})
        assert [own for own in got if got[own].scheme.bits == 4] == [
            f"{name.removesuffix('.weight_fake_quant')}.weight_fake_quant"
        ]


def test_an_underscored_glob_is_matched_against_every_place() -> None:
    got = alike({"name": "a_b_c_*_quant", "weight": bits(4)})
    assert {name for name in got if got[name].scheme.bits == 4} == {"a_b.c.weight_fake_quant", "a.b_c.weight_fake_quant"}


# ----------------------------------------------------------------------------------------------------- section 3: placement

STRATEGIES = (
    ("BM1690", "CNN"),
    ("BM1690", "Transformer"),
    (None, "Dataflow"),
    (None, "Layers"),
    (None, "BF16Mixed"),
    ("Academic", None),
)
EVERY = pytest.mark.parametrize(("chip", "strategy"), STRATEGIES)
MIXED: tuple[Any, ...] = (FUSED, ("twice", ("sequential", "linear")), "functional", ("residual", "deconv"), "softmax")


def mixed(chip: str | None, strategy: str | None, *rules: Options) -> sq.Plan:
    return Case(MIXED, chip, strategy, {}, rules).plan()


def activations(got: sq.Plan) -> Iterator[str]:
    return (name for name in got if got.site(name).role == "activation")


def every_value(chip: str | None, strategy: str | None) -> list[str]:
    """Names of the values that ``outputs=True`` for each call quantizes."""
    placed = mixed(chip, strategy, {"name": "*", "outputs": True})
    return [placed.site(name).value for name in activations(placed) if placed.site(name).operand < 0]


@EVERY
def test_no_activation_quantizer_is_left_where_a_rule_says_none_whoever_asks(chip: str | None, strategy: str | None) -> None:
    asked = {"name": "*", "requests": True, "outputs": True}
    for rules in ((asked, {"name": "*", "activation": None}), ({"name": "*", "activation": None}, asked)):
        got = mixed(chip, strategy, *rules)
        assert list(activations(got)) == []
        assert [name for name in mixed(chip, strategy) if name.endswith("_fake_quant")] == list(got)


@EVERY
def test_none_for_one_value_removes_its_quantizer_and_no_other(chip: str | None, strategy: str | None) -> None:
    for name in activations(mixed(chip, strategy)):
        diff = mixed(chip, strategy).diff(
            mixed(chip, strategy, {"where": lambda s, own=name: s.quantizer == own, "activation": None})
        )
        assert (diff.added, diff.removed) == ((), (name,))


@EVERY
def test_outputs_quantizes_the_result_whatever_the_strategy_says(chip: str | None, strategy: str | None) -> None:
    for value in every_value(chip, strategy):
        got = mixed(chip, strategy, {"name": value, "requests": False}, {"name": value, "outputs": True})
        assert f"{value}.post_act_fake_quantizer" in got


@EVERY
def test_requests_quantizes_each_input_of_the_call(chip: str | None, strategy: str | None) -> None:
    got = mixed(chip, strategy, {"name": "c.add", "requests": False}, {"name": "c.add", "requests": True})
    assert {"c.softmax.post_act_fake_quantizer", "c.tanh.post_act_fake_quantizer"} <= got.keys()


@pytest.mark.parametrize(("chip", "strategy"), STRATEGIES[:-1])
def test_where_no_call_asks_nothing_is_quantized_but_weights(chip: str | None, strategy: str | None) -> None:
    got = mixed(chip, strategy, {"name": "*", "requests": False})
    assert list(activations(got)) == []
    assert [name for name in mixed(chip, strategy) if name.endswith("_fake_quant")] == list(got)


@pytest.mark.parametrize(("chip", "strategy"), STRATEGIES[:-1])
def test_of_several_rules_about_requests_the_last_that_matches_counts(chip: str | None, strategy: str | None) -> None:
    silent, asking = {"name": "*", "requests": False}, {"name": "*", "requests": True}
    assert mixed(chip, strategy, asking, silent) == mixed(chip, strategy, silent)
    assert mixed(chip, strategy, silent, asking) == mixed(chip, strategy, asking)
    assert mixed(chip, strategy, silent, {"name": "d", "weight": bits(8)}) == mixed(chip, strategy, silent)


def test_what_another_call_asks_for_stays() -> None:
    quantizer = "b.body.post_act_fake_quantizer"
    assert quantizer in plan({"name": "b.body", "requests": False})
    assert quantizer in plan({"name": "b.add", "requests": False})
    assert quantizer not in plan({"name": "b", "requests": False})


# ------------------------------------------------------------------------------------------------ section 4: asking the plan


@quick(60)
@given(cases())
def test_a_plan_read_back_from_its_json_is_the_same_plan(case: Case) -> None:
    got = case.plan()
    back = sq.Plan.from_json(got.to_json())
    assert (back, back.digest(), back.to_json()) == (got, got.digest(), got.to_json())


@pytest.mark.slow
@quick(60)
@given(cases())
def test_overriding_rule_by_rule_is_planning_with_all_of_them(case: Case) -> None:
    got = case.plan(())
    for n, rule in enumerate(case.rules):
        got = got.override(sq.Rule(**plain(rule)))
        assert got == case.plan(case.rules[: n + 1])
        assert got.unused == case.plan(case.rules[: n + 1]).unused


@pytest.mark.slow
@quick(60)
@given(cases())
def test_the_difference_of_two_plans_is_empty_exactly_if_they_are_equal(case: Case) -> None:
    plans = [case.plan(case.rules[:n]) for n in range(len(case.rules) + 1)]
    for here in plans:
        for there in plans:
            diff = here.diff(there)
            assert bool(diff) is (here != there) is (here.digest() != there.digest())
            assert (set(diff.added), set(diff.removed)) == (there.keys() - here.keys(), here.keys() - there.keys())
            both = here.keys() & there.keys()
            assert diff.changed.keys() == {n for n in both if (here[n], here.site(n)) != (there[n], there.site(n))}


@quick(60)
@given(cases())
def test_the_table_names_every_quantizer_and_every_rule_that_decided_a_field(case: Case) -> None:
    places, got = case.places(), case.plan()
    about, words = facts_of(case, places), got.table().split()
    assert got.keys() <= set(words)
    for name in got:
        for field, rule in expected(case, places, about, name).deciders.items():
            if field not in ("observe_only", "optional"):
                assert repr(sq.Rule(**plain(rule))) in " ".join(words)


@pytest.mark.parametrize(
    ("field", "several"), [("name", ["a", "b"]), ("name", ("a", "b")), ("type", (nn.Linear, nn.Conv2d))]
)
def test_several_names_or_types_in_one_rule_are_refused_with_one_rule_for_each(field: str, several: Any) -> None:
    with pytest.raises(sq.ConfigError, match=rf"Fix: rules=\[sq\.Rule\({field}=\w+, \.\.\.\) for"):
        sq.Rule(**{field: several}, weight=None)
