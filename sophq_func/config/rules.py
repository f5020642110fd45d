"""What a user asks for: a :class:`QuantConfig` with its ordered :class:`Rule` s. Frozen, compared by value.

One resolver serves every quantizer: start from the config's half, go through the rules in order, and let each that
matches override the fields it names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from sophq_func.config.chips import CHIPS, ChipSpec
from sophq_func.config.matching import check_type_key, matches_name, matches_type, type_key_problem, type_text
from sophq_func.config.patterns import Fused
from sophq_func.config.site import Role, Site
from sophq_func.config.strategies import PLACEMENTS, Preset
from sophq_func.core.errors import ConfigError, explain, raise_all, unknown
from sophq_func.numerics.scheme import SCHEME_FIELDS, Override, QuantizerConfig

QUANTMODES = ("weight_activation", "weight_only")
DEFAULT_CHIP = "BM1690"


STATE_FLAGS = ("observe_only", "optional")
FLAGS = ("requests", "outputs", *STATE_FLAGS)


class _Unset:
    """Marks a half that a rule or config does not mention."""

    def __repr__(self) -> str:
        return "unset"

    def __reduce__(self) -> str:
        return "UNSET"


UNSET = _Unset()
Half = QuantizerConfig | Override | None | _Unset


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which quantizers, and what is different about them. Later rules override earlier ones, field by field.

    Attributes:
      name: a module path (that module and all below it), a value, a quantizer, or a glob over any of them; dots may be
        written as underscores.
      type: a module class, a fused pattern, a function, a Tensor method, or a string that names one.
      where: a predicate on the :class:`~sophq_func.config.site.Site`.
      weight, activation: an :func:`~sophq_func.numerics.scheme.override`, a whole config, or ``None``: not quantized.
      requests: ``False``: the matched module (with its subtree) or function asks for no quantizer, neither on its inputs
        nor on its output; ``True``: it asks for one on each input, whatever the strategy says.
      outputs: ``True``: what the matched call returns is quantized, whatever the strategy says.
      observe_only: the quantizer observes, and values pass unchanged.
      optional: a run may leave the value out.
      origin: what the rule was translated from, for messages; it plays no part in comparisons.

    Example:
      >>> from sophq_func.numerics.scheme import override
      >>> Rule(name="layer1.*", weight=override(bits=4))
      Rule(name='layer1.*', weight=override(bits=4))
    """

    name: str | None = None
    type: Any = None
    where: Callable[[Site], bool] | None = None
    weight: Half = UNSET
    activation: Half = UNSET
    requests: bool | None = None
    outputs: bool | None = None
    observe_only: bool | None = None
    optional: bool | None = None
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.name is None and self.type is None and self.where is None:
            raise ConfigError(
                explain("Rule", "matching is not possible", allowed="name, type or where", fix='Rule(name="*", ...)')
            )
        if self.name is not None and (not isinstance(self.name, str) or not self.name):
            raise ConfigError(
                explain("Rule", "this name is not possible", got=self.name, allowed="a module path, quantizer name or glob")
            )
        for role in ("weight", "activation"):
            raise_all(_wrong_half("Rule", role, getattr(self, role)))
        for flag in FLAGS:
            if not isinstance(getattr(self, flag), bool | None):
                raise ConfigError(
                    explain("Rule", f"{flag} is not possible", got=getattr(self, flag), allowed="True, False or None")
                )
        if self.outputs is False:
            raise ConfigError(
                explain("Rule", "outputs=False is not possible", allowed="True or None", fix="activation=None")
            )
        if self.where is not None and not callable(self.where):
            raise ConfigError(explain("Rule", "this where is not possible", got=self.where, allowed="a function of a Site"))
        check_type_key(self.type, "Rule")

    def __repr__(self) -> str:
        parts = [f"name={self.name!r}"] if self.name is not None else []
        parts += [f"type={type_text(self.type)}"] if self.type is not None else []
        parts += [f"where={getattr(self.where, '__name__', self.where)}"] if self.where is not None else []
        for name in ("weight", "activation"):
            parts += [f"{name}={getattr(self, name)}"] if getattr(self, name) is not UNSET else []
        for name in FLAGS:
            parts += [f"{name}={getattr(self, name)}"] if getattr(self, name) is not None else []
        return f"Rule({', '.join(parts)})"

    def half(self, role: Role) -> Half:
        """What the rule says about quantizers of this role."""
        return self.weight if role == "weight" else self.activation

    def matches(self, site: Site) -> bool:
        """Whether the rule speaks of this quantizer."""
        return (
            (self.name is None or matches_name(self.name, site))
            and (self.type is None or matches_type(self.type, site))
            and (self.where is None or bool(self.where(site)))
        )


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Everything a plan is made of: chip, strategy, the two default configs, and rules.

    Attributes:
      chip: fills what is not given, and validates; ``None``: no limits, and BM1690's defaults.
      strategy: where activation quantizers go: ``"CNN"``, ``"Transformer"``, ``"Layers"``, ``"BF16Mixed"`` or
        ``"Dataflow"`` (the default without a chip; with one it is ``"CNN"``), or another one that is registered in
        ``sophq_func.config.strategies.PLACEMENTS``.
      quantmode: ``"weight_activation"``, or ``"weight_only"`` for no activation quantizers.
      weight, activation: config of every quantizer that no rule changes: a whole one, an override of the chip's, or
        ``None``, which leaves that half float.
      rules: in order; later ones override earlier ones.
      leaf_module: module classes whose inside is not looked at.
      operations: further module classes and functions that the strategy treats like those in its list of operations
        whose inputs are quantized.
      weight_layers: further module classes whose weights are quantized; their inside is not looked at.
      patterns: further fused patterns, from :func:`sophq_func.config.patterns.fused`.

    Raises:
      ConfigError: an unknown name or wrong type, or a combination that does not exist; all of them at once. What the
        chip forbids is said by :func:`sophq_func.plan`, quantizer by quantizer.

    Example:
      >>> QuantConfig(chip="SG2260").spec.activation_bits
      (8,)
    """

    chip: str | None = None
    strategy: str | None = None
    quantmode: str = "weight_activation"
    weight: Half = UNSET
    activation: Half = UNSET
    rules: tuple[Rule, ...] = ()
    leaf_module: tuple[type, ...] = ()
    operations: tuple[Any, ...] = ()
    weight_layers: tuple[type, ...] = ()
    patterns: tuple[type[Fused], ...] = ()

    def __post_init__(self) -> None:
        raise_all(self._problems())
        if self.chip is not None:
            object.__setattr__(self, "chip", CHIPS.canonical(self.chip))
        default = "Dataflow" if self.chip is None else "CNN"
        object.__setattr__(self, "strategy", PLACEMENTS.canonical(self.strategy or default))
        for name in TUPLES:
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def _problems(self) -> list[str]:
        """What is wrong with each field by itself."""
        found = []
        if self.chip is not None and (not isinstance(self.chip, str) or self.chip not in CHIPS):
            found.append(unknown("QuantConfig", "chip", self.chip, CHIPS.spellings()))
        if self.strategy is not None and not _is_registered(self.strategy):
            found.append(unknown("QuantConfig", "strategy", self.strategy, PLACEMENTS.spellings()))
        if self.quantmode not in QUANTMODES:
            found.append(unknown("QuantConfig", "quantmode", self.quantmode, QUANTMODES))
        strategy = self.strategy or (None if self.chip is None else "CNN")
        if self.quantmode == "weight_only" and strategy == "CNN":
            fix = 'strategy="Transformer" or quantmode="weight_activation"'
            found.append(explain("QuantConfig", 'quantmode "weight_only" with strategy "CNN" is not possible', fix=fix))
        for role in ("weight", "activation"):
            found += _wrong_half("QuantConfig", role, getattr(self, role))
        for name, (good, allowed) in TUPLES.items():
            value = getattr(self, name)
            if not isinstance(value, tuple | list) or not all(map(good, value)):
                found.append(
                    explain("QuantConfig", f"{name} is not possible", got=value, allowed=allowed, fix=f"{name}=(...,)")
                )
        return found

    @property
    def leaves(self) -> tuple[type, ...]:
        """Module classes into which a trace does not look."""
        return self.leaf_module + self.weight_layers

    @property
    def spec(self) -> ChipSpec:
        """Defaults and limits in force."""
        return CHIPS.get(self.chip or DEFAULT_CHIP)

    @property
    def placement(self) -> str:
        """Name of the strategy that places activation quantizers."""
        return (self.chip is not None and self.spec.placement) or str(self.strategy)

    def default(self, role: Role) -> QuantizerConfig | None:
        """Config of a quantizer that no rule changes."""
        given = self.half(role)
        if isinstance(given, Override):
            return given(self.spec_default(role))
        return self.spec_default(role) if isinstance(given, _Unset) else given

    def spec_default(self, role: Role) -> QuantizerConfig:
        """Config of a quantizer where neither this config nor a rule says anything: the chip's."""
        return self.spec.weight if role == "weight" else self.spec.activation

    def half(self, role: Role) -> Half:
        """What the config itself says about quantizers of this role."""
        return self.weight if role == "weight" else self.activation

    def sets(self, role: Role, change: Override) -> bool:
        """Whether the config itself says something about a field that ``change`` sets."""
        return any(self.source(role, field) == f"config {role}" for field in change.names())

    def source(self, role: Role, field: str) -> str:
        """Who said what :meth:`default` has in a field."""
        given = self.half(role)
        if isinstance(given, _Unset) or (isinstance(given, Override) and field not in given.names()):
            return f"chip {self.chip}" if self.chip else f"default ({DEFAULT_CHIP})"
        return f"config {role}"


def _is_registered(strategy: object) -> bool:
    return isinstance(strategy, str) and strategy in PLACEMENTS


def _is_module_class(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _is_operation(value: object) -> bool:
    return value is not None and not type_key_problem(value)


TUPLES: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "rules": (lambda value: isinstance(value, Rule), "a tuple of sq.Rule"),
    "leaf_module": (_is_module_class, "a tuple of nn.Module classes"),
    "operations": (_is_operation, "a tuple of module classes and functions"),
    "weight_layers": (_is_module_class, "a tuple of nn.Module classes"),
    "patterns": (lambda value: isinstance(value, type) and issubclass(value, Fused), "a tuple of sq.patterns.fused(...)"),
}
"""Fields of a config that are tuples: what an item must be, and that in words."""


def _wrong_half(where: str, role: str, value: object) -> list[str]:
    if isinstance(value, QuantizerConfig | Override | None | _Unset):
        return []
    allowed = "sq.override(...), a QuantizerConfig or None"
    return [explain(where, f"{role}={value!r} is not possible", got=type(value).__name__, allowed=allowed)]


@dataclass(frozen=True)
class Decision:
    """The config of one quantizer, and who decided it.

    Attributes:
      config: ``None`` where the quantizer is left out.
      reasons: for each field of the config, and of its scheme, the default or rule that set it last.
      matched: indices of the rules that changed something.
    """

    config: QuantizerConfig | None
    reasons: dict[str, str]
    matched: tuple[int, ...]


def resolve(config: QuantConfig, site: Site, preset: Preset | None = None) -> Decision:
    """Config of the quantizer at ``site``: the default of its half, the strategy's preset, then each matching rule."""
    start = config.default(site.role)
    before = {name: config.source(site.role, name) for name in ("observer", "fake_quantize", *SCHEME_FIELDS)}
    if start is not None and preset is not None and not (preset.yields and config.sets(site.role, preset.change)):
        start = preset.change(start)
        before.update(dict.fromkeys(preset.change.names(), preset.why))
    current, reasons = start, dict(before)
    matched: list[int] = []
    for index, rule in enumerate(config.rules):
        if not rule.matches(site):
            continue
        half, text = rule.half(site.role), repr(rule)
        if half is None:
            current = None
        elif isinstance(half, QuantizerConfig):
            current, reasons = half, dict.fromkeys((*before, *STATE_FLAGS), text)
        elif isinstance(half, Override):
            reasons = dict(before) if current is None else reasons
            current = half(current or start or config.spec_default(site.role))
            reasons.update(dict.fromkeys(half.names(), text))
        flags = {n: v for n in STATE_FLAGS if (v := getattr(rule, n)) is not None}
        if current is not None and flags:
            current = replace(current, **flags)
            reasons.update(dict.fromkeys(flags, text))
        if flags or not isinstance(half, _Unset):
            matched.append(index)
    return Decision(current, reasons, tuple(matched))


def requested(config: QuantConfig, site: Site) -> tuple[bool | None, list[int]]:
    """The last word of the rules on whether the call at ``site`` asks for quantizers, and which rules have one."""
    found = [i for i, rule in enumerate(config.rules) if rule.requests is not None and rule.matches(site)]
    return (config.rules[found[-1]].requests if found else None), found


def not_grouped(site: Site) -> bool:
    """Whether ``site`` is no grouped or depthwise ``Conv2d``: those stay as the global config says (semantics.md 1.3)."""
    return site.groups == 1 or site.operation != "conv2d"
