"""What a user asks for: a :class:`QuantConfig` with its ordered :class:`Rule` s. Both are frozen and compared by value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from torch import nn

from sophq_func.config import paths, stored
from sophq_func.config.chips import CHIPS, ChipName, ChipSpec
from sophq_func.config.matching import TYPE_KEYS, TypeKey, is_type_key, matches_name, matches_type, type_text
from sophq_func.config.patterns import Fused
from sophq_func.config.site import Role, Site, shown
from sophq_func.config.strategies import PLACEMENTS, Strategy, StrategyName
from sophq_func.core.errors import ConfigError, explain, raise_all, unknown
from sophq_func.core.plain import is_list
from sophq_func.core.public import constructor_for
from sophq_func.core.registry import Registry
from sophq_func.numerics.elsewhere import ELSEWHERE
from sophq_func.numerics.scheme import SCHEME_FIELDS, Override, QuantizerConfig

__all__ = ["QuantConfig", "Rule", "not_grouped"]


def __dir__() -> list[str]:
    return __all__


QuantMode: TypeAlias = Literal["weight_activation", "weight_only"]
"""What a type checker accepts for ``QuantConfig(quantmode=...)``."""

QUANTMODES = ("weight_activation", "weight_only")

DEFAULT_CHIP = "BM1690"
"""The chip whose default configs are used where none is named."""

SEVERAL = (tuple, list, set, frozenset)
"""What people give where one name or type is expected."""

ROLES: tuple[Role, ...] = ("weight", "activation")

STATE_FLAGS = ("observe_only", "optional")
"""Fields of a quantizer's config that a rule may set for weights and activations alike."""

FLAGS = ("requests", "outputs", "share", *STATE_FLAGS)
"""Fields of a rule that are ``True``, ``False``, or ``None`` for nothing."""

DECIDED_FIELDS = ("observer", "fake_quantize", *SCHEME_FIELDS)
"""Fields of a quantizer's config that a chip or config decides where no rule does."""


class _Unset:
    """The type of ``UNSET``, which says nothing about a role. ``None`` cannot: it says that nothing is quantized."""

    def __repr__(self) -> str:
        return "unset"

    def __reduce__(self) -> str:
        # A copy or a pickle of ``UNSET`` is ``UNSET`` itself, since it is compared with ``is``.
        return "UNSET"


UNSET = _Unset()

Half = QuantizerConfig | Override | None | _Unset
"""What a rule or a config says about the quantizers of one role.

A whole config, changes of some fields, ``None`` for no quantizer, or nothing.
"""


@constructor_for(ELSEWHERE)
@dataclass(frozen=True, kw_only=True)
class Rule:
    """Changes the config of the quantizers that it matches; a later rule overrides an earlier one, field by field.

    A rule matches a quantizer where each of ``name``, ``type`` and ``where`` that it has does. The quantizers of a model,
    with the rules and defaults that decided each of their fields, are shown by ``print(plan.table())``.

    Attributes:
      name: path of a module, which matches everything in the module; or name of a value or of a quantizer; or a glob that is
        compared with all of these. Dots may be written as underscores.
      type: a module class, a fused pattern, a function, a Tensor method, or a string that names one.
      where: a function that takes the quantizer's :class:`~sophq_func.config.site.Site` and says whether it matches,
        with ``True`` or ``False``.
      weight: for quantizers of weights: fields to change, from :func:`sophq_func.override`; a whole
        :class:`~sophq_func.numerics.scheme.QuantizerConfig`; or ``None`` for no quantizer. Left out, nothing changes.
      activation: the same for quantizers of activations.
      requests: ``True``: each input of the matched call is quantized, whatever the strategy says. ``False``: the call, or
        every call in the matched module, is no reason to quantize its inputs or its result.
      outputs: ``True``: the result of the matched call is quantized, whatever the strategy says.
      share: ``True``: the matched calls of one place, a module or a function in a module, have one quantizer, so that a run
        may make any number of them: steps of a scan, or of a loop over time. The rule must match all calls of the place.
      observe_only: ``True``: the quantizer observes values and passes them on unchanged.
      optional: ``True``: a run may leave out the call at which the quantizer acts.
      origin: the key of a dictionary that the rule was translated from, for messages. It plays no part in comparisons.

    Raises:
      ConfigError: a rule without ``name``, ``type`` and ``where``, or a field of a wrong type; all problems in one message.

    Example:
      >>> from sophq_func.numerics.scheme import override
      >>> Rule(name="layer1.*", weight=override(bits=4))
      Rule(name='layer1.*', weight=override(bits=4))
    """

    name: str | None = None
    type: TypeKey | None = None
    where: Callable[[Site], bool] | None = None
    weight: Half = UNSET
    activation: Half = UNSET
    requests: bool | None = None
    outputs: bool | None = None
    share: bool | None = None
    observe_only: bool | None = None
    optional: bool | None = None
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        problems = [*self._selector_problems(), *_half_problems("Rule", self), *self._flag_problems()]
        raise_all(problems)

    def _selector_problems(self) -> Iterator[str]:
        """What is wrong with the fields that say which quantizers the rule matches."""
        if self.name is None and self.type is None and self.where is None:
            allowed = "at least one of name, type and where"
            yield explain("Rule", "it says nothing about what it matches", allowed=allowed, fix='name="*"')
        if self.name is not None and (not isinstance(self.name, str) or not self.name):
            allowed = "the path of a module, the name of a value or quantizer, or a glob"
            fix = (
                "rules=[sq.Rule(name=name, ...) for name in names]" if isinstance(self.name, SEVERAL) else 'name="layer1.*"'
            )
            yield explain("Rule", "name is not a name", got=self.name, allowed=allowed, fix=fix)
        if self.type is not None and not is_type_key(self.type):
            fix = "rules=[sq.Rule(type=key, ...) for key in keys]" if isinstance(self.type, SEVERAL) else "type=nn.Linear"
            yield explain("Rule", "type is not a type key", got=self.type, allowed=TYPE_KEYS, fix=fix)
        if self.where is not None and not callable(self.where):
            allowed, fix = "a function of a Site", "where=lambda site: site.groups == 1"
            yield explain("Rule", "where cannot be called", got=self.where, allowed=allowed, fix=fix)
        if not isinstance(self.origin, str):
            yield explain("Rule", "origin is not a text", got=self.origin, allowed="a string")

    def _flag_problems(self) -> Iterator[str]:
        """What is wrong with the fields that are ``True``, ``False`` or ``None``."""
        for flag in FLAGS:
            value = getattr(self, flag)
            if not isinstance(value, bool | None):
                allowed, fix = "True, False or None", f"{flag}=True"
                yield explain("Rule", f"{flag} has the wrong type", got=value, allowed=allowed, fix=fix)
        if self.outputs is False:
            because = "outputs can only add a quantizer"
            yield explain("Rule", "outputs cannot be False", allowed="True or None", because=because, fix="activation=None")

    def __repr__(self) -> str:
        parts = [f"name={self.name!r}"] if self.name is not None else []
        parts += [f"type={type_text(self.type)}"] if self.type is not None else []
        parts += [f"where={getattr(self.where, '__name__', self.where)}"] if self.where is not None else []
        for role in ROLES:
            parts += [f"{role}={self.half(role)}"] if self.half(role) is not UNSET else []
        for flag in FLAGS:
            parts += [f"{flag}={getattr(self, flag)}"] if getattr(self, flag) is not None else []
        return f"Rule({', '.join(parts)})"

    def __getstate__(self) -> dict[str, object]:
        return paths.state_of(self)

    def __setstate__(self, state: Mapping[str, object]) -> None:
        self.__dict__.update(paths.fields_of(state))

    def half(self, role: Role) -> Half:
        """What the rule says about quantizers of a role."""
        return self.weight if role == "weight" else self.activation

    def state_change(self) -> Override:
        """What the rule sets among the fields of ``STATE_FLAGS``."""
        values = [(name, getattr(self, name)) for name in STATE_FLAGS]
        return Override(tuple((name, value) for name, value in values if value is not None))

    def changes(self, role: Role) -> bool:
        """Whether the rule changes the configs of quantizers of a role."""
        return self.half(role) is not UNSET or self.observe_only is not None or self.optional is not None

    def matches(self, site: Site) -> bool:
        """Whether the rule matches the quantizer at a site."""
        if self.name is not None and not matches_name(self.name, site):
            return False
        if self.type is not None and not matches_type(self.type, site):
            return False
        return self.where is None or self._where_answers(self.where, site)

    def _where_answers(self, where: Callable[[Site], object], site: Site) -> bool:
        """What the predicate says about a site. Another value than a bool is more likely a mistake than an answer."""
        answer = where(site)
        if isinstance(answer, bool):
            return answer
        sentence, because = "where does not return a bool", f"at {site.quantizer or site.path}"
        fix = "where=lambda site: bool(...)"
        raise ConfigError(explain(repr(self), sentence, got=answer, allowed="True or False", because=because, fix=fix))


@constructor_for(ELSEWHERE)
@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Everything that a plan is made from beside the model: chip, strategy, default configs and rules.

    Attributes:
      chip: gives the default configs, and limits what a quantizer may be. ``None``: the defaults of BM1690, and no limits.
        A name, in any case; or the :class:`ChipSpec` that is registered under one. Type checkers know the names of the
        library's chips; for one of your own, give them the spec.
      strategy: where activation quantizers go: ``"CNN"``, ``"Transformer"``, ``"Chip"``, ``"Layers"``, ``"BF16Mixed"``,
        ``"Dataflow"``, or one of your own, see :func:`sophq_func.register.strategy`. Left out, it is ``"CNN"`` with a
        chip, and ``"Dataflow"`` without.
      quantmode: ``"weight_activation"``, or ``"weight_only"`` for no activation quantizers.
      weight: config of every weight quantizer that no rule changes: changes of the chip's default, from
        :func:`sophq_func.override`; a whole :class:`~sophq_func.numerics.scheme.QuantizerConfig`; or ``None``: weights
        stay float. Left out, it is the chip's default.
      activation: the same for activation quantizers.
      rules: applied from first to last; a later rule overrides an earlier one, field by field.
      leaf_module: module classes that are quantized as one call, whatever they call inside.
      operations: further module classes and functions whose inputs the strategy quantizes.
      weight_layers: further module classes whose weights are quantized. Each is one call, as those of ``leaf_module``.
      patterns: further fused patterns, from :func:`sophq_func.patterns.fused`.

    Raises:
      ConfigError: an unknown name, a wrong type, or fields that contradict one another; all problems in one message. What
        the chip forbids, and names that the model does not have, are reported by :func:`sophq_func.plan`.

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
    operations: tuple[TypeKey, ...] = ()
    weight_layers: tuple[type, ...] = ()
    patterns: tuple[type[Fused], ...] = ()

    if TYPE_CHECKING:  # what is registered may be given for its name, and a list for a tuple

        def __init__(
            self,
            *,
            chip: ChipName | ChipSpec | None = None,
            strategy: StrategyName | Strategy | None = None,
            quantmode: QuantMode = "weight_activation",
            weight: Half = ...,
            activation: Half = ...,
            rules: Sequence[Rule] = (),
            leaf_module: Sequence[type] = (),
            operations: Sequence[TypeKey] = (),
            weight_layers: Sequence[type] = (),
            patterns: Sequence[type[Fused]] = (),
        ) -> None: ...

    def __post_init__(self) -> None:
        # The name stands for what is registered under it, so that a config is data, and equal to one with the name.
        object.__setattr__(self, "chip", _name_of(CHIPS, self.chip))
        object.__setattr__(self, "strategy", _name_of(PLACEMENTS, self.strategy))
        problems = [*self._name_problems(), *_half_problems("QuantConfig", self), *self._tuple_problems()]
        raise_all(problems)
        # An alias becomes the canonical name and a list a tuple, so that configs that mean the same are equal.
        if self.chip is not None:
            object.__setattr__(self, "chip", CHIPS.canonical(self.chip))
        object.__setattr__(self, "strategy", PLACEMENTS.canonical(self._strategy_or_default))
        for name in TUPLES:
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def __getstate__(self) -> dict[str, object]:
        return paths.state_of(self)

    def __setstate__(self, state: Mapping[str, object]) -> None:
        self.__dict__.update(paths.fields_of(state))

    def __repr__(self) -> str:
        return shown(self)

    @property
    def _strategy_or_default(self) -> str:
        """The strategy as the user spelled it, or the default."""
        if self.strategy is not None:
            return self.strategy
        return "Dataflow" if self.chip is None else "CNN"

    def _name_problems(self) -> Iterator[str]:
        """What is wrong with the chip, the strategy and the mode."""
        if self.chip is not None and self.chip not in CHIPS:
            yield _not_registered(CHIPS, self.chip)
        if self.strategy is not None and self.strategy not in PLACEMENTS:
            yield _not_registered(PLACEMENTS, self.strategy)
        if self.quantmode not in QUANTMODES:
            yield unknown("QuantConfig", "quantmode", self.quantmode, QUANTMODES)
        if self.quantmode == "weight_only" and self._strategy_or_default == "CNN":
            sentence = 'quantmode "weight_only" cannot be combined with strategy "CNN"'
            because, fix = "sophgo-mq does not support it", 'strategy="Transformer" or quantmode="weight_activation"'
            yield explain("QuantConfig", sentence, because=because, fix=fix)
        yield from self._arithmetic_problems()

    def _arithmetic_problems(self) -> Iterator[str]:
        """What is wrong where the strategy simulates how the chip computes."""
        is_known = self._strategy_or_default in PLACEMENTS and (self.chip is None or self.chip in CHIPS)
        if not is_known or not PLACEMENTS.get(self._strategy_or_default).exact:
            return
        chip = self.chip or DEFAULT_CHIP
        if CHIPS.get(chip).arithmetic is None:
            allowed = " or ".join(name for name in CHIPS if CHIPS.get(name).arithmetic is not None)
            sentence = f"strategy {self.strategy!r} simulates how a chip computes, which is not known of this one"
            yield explain("QuantConfig", sentence, got=chip, allowed=allowed, fix='strategy="CNN"')

    def _tuple_problems(self) -> Iterator[str]:
        """What is wrong with the fields that are tuples."""
        for name, (is_item, allowed, fix) in TUPLES.items():
            value = getattr(self, name)
            if not isinstance(value, tuple) and not is_list(value):
                yield explain("QuantConfig", f"{name} is not a tuple", got=value, allowed=allowed, fix=fix)
                continue
            wrong = [item for item in value if not is_item(item)]
            if wrong:
                yield explain("QuantConfig", f"{name} has an item of a wrong type", got=wrong[0], allowed=allowed, fix=fix)

    def to_json(self) -> str:
        """The config as JSON text, the same in every process; :meth:`from_json` reads an equal config.

        Classes and functions are stored by the path by which Python imports them, ``torch.nn.Linear`` or
        ``package.module:Block``.

        Raises:
          ConfigError: a class or function that no import finds, such as a lambda as ``where``; all of them in one message.

        Example:
          >>> config = QuantConfig(rules=(Rule(type=nn.Linear, weight=None),))
          >>> QuantConfig.from_json(config.to_json()) == config
          True
        """
        return stored.text(self, UNSET)

    @staticmethod
    def from_json(text: str) -> QuantConfig:
        """The config from a text of :meth:`to_json`.

        Modules are imported that define its classes and functions, which runs their code: read texts that you trust.

        Raises:
          ConfigError: the text holds no config, or one of an unknown version; a path that leads nowhere.
        """
        return QuantConfig.from_dict(stored.parse(text))

    @staticmethod
    def from_dict(data: Mapping[str, object]) -> QuantConfig:
        """The config from nested dicts and lists, as YAML has them, or from their like of OmegaConf.

        Every field may be left out. ``weight`` and ``activation`` are ``None``, or the fields of
        :func:`sophq_func.override`, in which names stand for pieces and granularities, ``{"name": "PerGroup", "size": 32}``
        for those with fields, and ``{"name": "mse", "options": {"p": 3}}`` for pieces with options. A class is
        ``{"type": "torch.nn.Linear"}`` or ``{"type": "package.module:Block"}``, and is imported, see :meth:`from_json`.

        Raises:
          ConfigError: unknown fields, wrong values, paths that lead nowhere; all problems in one message.

        Example:
          >>> rules = [{"name": "head", "weight": None}]
          >>> QuantConfig.from_dict({"chip": "BM1690", "weight": {"bits": 4, "observer": "mse"}, "rules": rules}).weight
          override(bits=4, observer=mse(p=2.0))
        """
        config: QuantConfig = stored.read(data, stored.Kinds(QuantConfig, Rule))
        return config

    def digest(self) -> str:
        """SHA-256 of the config, in hexadecimal: equal for equal configs, in every process and on every machine.

        Raises:
          ConfigError: see :meth:`to_json`.
        """
        return stored.digest(self, UNSET)

    @property
    def leaves(self) -> tuple[type, ...]:
        """Module classes that a trace records as one call."""
        return self.leaf_module + self.weight_layers

    @property
    def spec(self) -> ChipSpec:
        """Defaults and limits of the chip, or of ``DEFAULT_CHIP`` without one."""
        return CHIPS.get(self.chip or DEFAULT_CHIP)

    @property
    def placement(self) -> str:
        """Name of the strategy that places activation quantizers: that of the config, unless the chip has one of its own."""
        if self.chip is not None and self.spec.placement:
            return self.spec.placement
        return str(self.strategy)

    def default(self, role: Role) -> QuantizerConfig | None:
        """Config of a quantizer that no rule changes; ``None`` where there is no such quantizer."""
        return self._defaults[role]

    @cached_property
    def _defaults(self) -> Mapping[Role, QuantizerConfig | None]:
        # A plan asks for them once a quantizer.
        return {role: self._default(role) for role in ROLES}

    def _default(self, role: Role) -> QuantizerConfig | None:
        half = self.half(role)
        if isinstance(half, _Unset):
            return self.chip_default(role)
        if isinstance(half, Override):
            return half(self.chip_default(role))
        return half

    @property
    def is_symmetric(self) -> bool:
        """Whether grids of values are symmetric where neither a strategy nor a rule says something."""
        values = self.default("activation")
        return values is None or values.scheme.symmetric

    def chip_default(self, role: Role) -> QuantizerConfig:
        """Config of a quantizer about which neither this config nor a rule says anything."""
        return self.spec.weight if role == "weight" else self.spec.activation

    def half(self, role: Role) -> Half:
        """What the config itself says about quantizers of a role."""
        return self.weight if role == "weight" else self.activation

    def sets(self, role: Role, change: Override) -> bool:
        """Whether the config itself says something about a field that ``change`` sets."""
        return any(self.source(role, name) == f"config {role}" for name in change.names())

    def source(self, role: Role, name: str) -> str:
        """Which of config and chip decided a field of :meth:`default`, in words."""
        half = self.half(role)
        is_left_to_chip = isinstance(half, _Unset) or (isinstance(half, Override) and name not in half.names())
        if not is_left_to_chip:
            return f"config {role}"
        return f"chip {self.chip}" if self.chip else f"default ({DEFAULT_CHIP})"

    def sources(self, role: Role) -> Mapping[str, str]:
        """For each of ``DECIDED_FIELDS``, what :meth:`source` says about it."""
        return self._sources[role]

    @cached_property
    def _sources(self) -> Mapping[Role, Mapping[str, str]]:
        # A plan asks for them once a quantizer.
        return {role: {name: self.source(role, name) for name in DECIDED_FIELDS} for role in ROLES}


def _name_of(registry: Registry[Any], value: object) -> object:
    """The name of a registered object; any other value as it is."""
    return registry.name_of(value) or value


def _not_registered(registry: Registry[Any], value: object) -> str:
    """The problem of a chip or strategy that has no name."""
    if isinstance(value, ChipSpec | Strategy):
        sentence, fix = f"this {registry.kind} is not registered", f'sq.register.{registry.kind}("MyName", ...)'
        return explain("QuantConfig", sentence, got=type(value).__name__, fix=fix)
    return unknown("QuantConfig", registry.kind, value, registry.spellings())


class TupleField(NamedTuple):
    """What a field of a config that is a tuple may hold.

    Attributes:
      is_item: whether a value can be an item.
      allowed: what the field may be, in words.
      fix: a line of code that is right.
    """

    is_item: Callable[[object], bool]
    allowed: str
    fix: str


def _is_rule(value: object) -> bool:
    return isinstance(value, Rule)


def _is_pattern(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Fused)


def _is_module_class(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


TUPLES: Mapping[str, TupleField] = {
    "rules": TupleField(_is_rule, "a tuple of sq.Rule", 'rules=(sq.Rule(name="head", weight=None),)'),
    "leaf_module": TupleField(_is_module_class, "a tuple of nn.Module classes", "leaf_module=(MyBlock,)"),
    "operations": TupleField(is_type_key, "a tuple of module classes and functions", "operations=(F.softmax,)"),
    "weight_layers": TupleField(_is_module_class, "a tuple of nn.Module classes", "weight_layers=(MyLinear,)"),
    "patterns": TupleField(
        _is_pattern, "a tuple of fused patterns", 'patterns=(sq.patterns.fused("LinearGELU", nn.Linear, nn.GELU),)'
    ),
}
"""The fields of a config that are tuples."""


def _half_problems(where: str, given: Rule | QuantConfig) -> Iterator[str]:
    """What is wrong with what a rule or a config says about weights and activations."""
    for role in ROLES:
        half = given.half(role)
        if not isinstance(half, QuantizerConfig | Override | None | _Unset):
            allowed, fix = "sq.override(...), a QuantizerConfig or None", f"{role}=sq.override(bits=8)"
            yield explain(where, f"{role} has the wrong type", got=half, allowed=allowed, fix=fix)


def not_grouped(site: Site) -> bool:
    """Whether a site is not that of a grouped or depthwise ``Conv2d``.

    sophgo-mq applies no entry of ``object_type`` to these: they stay as the global config says.
    """
    return site.groups == 1 or site.operation != "conv2d"
