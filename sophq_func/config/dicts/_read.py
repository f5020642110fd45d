"""The translation of the dictionaries into one config (semantics.md 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from sophq_func.config.chips import CHIPS, ChipSpec
from sophq_func.config.dicts._fuse import Fusion, read_fusion
from sophq_func.config.dicts._keys import KEYS, REQUIRED
from sophq_func.config.matching import type_text
from sophq_func.config.names import is_value_quantizer, is_weight_quantizer, underscored
from sophq_func.config.rules import DEFAULT_CHIP, QuantConfig, Rule, not_grouped
from sophq_func.config.site import Role
from sophq_func.core.errors import ConfigError, deprecated, explain, near, raise_all, unknown
from sophq_func.core.operations import canonical, family
from sophq_func.core.registry import Factories, Spec
from sophq_func.fake_quantize import fp16, learnable
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, OBSERVERS
from sophq_func.numerics.scheme import Override, PerChannel, PerTensor, QScheme, QuantizerConfig, override
from sophq_func.observers import ema_minmax, minmax

T = TypeVar("T")

NEEDLESS = {
    "preserve_attr": "no model is rewritten, so the model keeps its attributes",
    "concrete_args": "no model is traced symbolically, so control flow on arguments just runs",
}
"""Keys that are accepted without effect, and why none is needed."""

INITIAL = ("scale", "zero_point")
"""Parameters of a quantizer that sophgo-mq sets before calibration, which overwrites them."""


def from_dicts(prepare_custom_config_dict: Mapping[str, Any]) -> QuantConfig:
    """The config that the dictionaries of sophgo-mq ask for.

    Rules come in the order: types, names (containers before what they contain), exclusions, observe-only, additional
    nodes. An entry of ``object_type`` or ``module_name`` replaces the grid of the half that its ``mode`` names, and leaves
    the other half as the next broader level says.

    Args:
      prepare_custom_config_dict: ``quant_dict`` (required), ``extra_qconfig_dict``, ``extra_quantizer_dict``,
        ``extra_fuse_dict``, ``leaf_module``; see ``sophq_func.config.dicts.KEYS`` for what each may hold. It is not changed.

    Raises:
      ConfigError: every unknown key, missing key, wrong value and contradiction, in one message.

    Warns:
      DeprecationWarning: a key is not needed here, and says why.

    Differs from sophgo-mq: ``bit`` may be a string of digits; an omitted ``symmetric_range`` is the chip's; types are
    matched before and after fusion alike; names may be dotted or underscored; bits are checked everywhere.

    Example:
      >>> quant_dict = {"chip": "SG2260", "quantmode": "weight_activation", "strategy": "CNN"}
      >>> from_dicts({"quant_dict": quant_dict, "extra_quantizer_dict": {"exclude_module_name": ["head"]}}).rules
      (Rule(name='head', weight=None, requests=False),)
    """
    reader = _Reader()
    whole = reader.mapping("prepare_custom_config_dict", prepare_custom_config_dict)
    quant, qconfig, quantizer, fuse = (
        reader.mapping(name, whole.get(name, {}))
        for name in ("quant_dict", "extra_qconfig_dict", "extra_quantizer_dict", "extra_fuse_dict")
    )
    chip = reader.quant_dict(quant, whole.get("quant_dict"))
    fusion = reader.attempt("extra_fuse_dict", partial(read_fusion, fuse)) or Fusion()
    weight, activation = reader.half("weight", qconfig, chip), reader.half("activation", qconfig, chip)
    rules = reader.types(qconfig, chip, fusion) + reader.names(qconfig, chip) + reader.quantizers(quantizer, fusion)
    reader.problems += contradictions(quant, qconfig, quantizer)
    raise_all(reader.problems)
    for key, why in NEEDLESS.items():
        if whole.get(key) is not None:
            deprecated(f"{key} has no effect and is not needed: {why}. Fix: leave it out.")
    return QuantConfig(
        chip=quant["chip"],
        quantmode=quant["quantmode"],
        strategy="BF16Mixed" if quant.get("bf16_mix_prec") else quant["strategy"],
        weight=weight,
        activation=activation,
        rules=tuple(rules),
        leaf_module=tuple(whole.get("leaf_module") or ()),
        operations=tuple(fusion.aliases.get(key, key) for key in reader.operations(quantizer)),
        weight_layers=fusion.layers,
        patterns=fusion.patterns,
    )


class _Reader:
    """Reads dictionaries and collects every problem on the way."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def attempt(self, where: str, read: Callable[[], T]) -> T | None:
        """The result of ``read``, or ``None`` and one more problem."""
        try:
            return read()
        except ConfigError as error:
            text = str(error)
            self.problems.append(text if text.startswith(where) else f"{where}: {text}")
            return None

    def mapping(self, name: str, value: Any, where: str = "", further: Sequence[str] = ()) -> dict[str, Any]:
        """What ``value`` holds under keys that are known, where the value is right; all else is a problem.

        Args:
          name: of the dictionary in ``KEYS``.
          value: the dictionary.
          where: its place, if it is not its name.
          further: keys that are known beside those of the table.
        """
        where = where or name
        if not isinstance(value, Mapping):
            self.problems.append(explain(where, "this type is not possible", got=type(value).__name__, allowed="a dict"))
            return {}
        found = {}
        for key, item in value.items():
            if key in further or (item is None and key in KEYS[name] and key not in REQUIRED):
                continue
            problem = KEYS[name][key](f"{where}[{key!r}]", item) if key in KEYS[name] else ""
            if key not in KEYS[name]:
                problem = unknown(where, "key", key, [*KEYS[name], *further])
            if problem:
                self.problems.append(problem)
            else:
                found[key] = item
        return found

    def quant_dict(self, quant: Mapping[str, Any], given: object) -> ChipSpec:
        """The chip's spec, or some chip's where it is not known; what must be there is."""
        there = given if isinstance(given, Mapping) else {}
        for key in ("chip", "quantmode", "strategy"):
            if key not in there:
                self.problems.append(f"quant_dict: {key!r} is missing. Fix: quant_dict[{key!r}] = ...")
        if quant.get("use_tpu_mlir_fwd"):
            because = "it needs the chip's compiler"
            self.problems.append(
                explain("quant_dict['use_tpu_mlir_fwd']", "True is not possible", allowed="False", because=because)
            )
        return CHIPS.get(quant.get("chip", DEFAULT_CHIP))

    def half(self, role: Role, qconfig: Mapping[str, Any], chip: ChipSpec) -> QuantizerConfig:
        """The global config of one half."""
        default, letter = (chip.weight if role == "weight" else chip.activation), role[0]
        key, extra = f"{letter}_qscheme", f"{letter}_observer_extra_args"
        name = OBSERVERS.canonical(qconfig.get(f"{letter}_observer", default.observer.name))
        given = qconfig.get(key, {})
        further = [option for option in given if option in OBSERVERS.options(name)]
        options = {key: {option: given[option] for option in further}, extra: qconfig.get(extra, {})}
        base = default.observer if name == default.observer.name else OBSERVERS.spec(name)
        values: dict[str, Any] = {
            "observer": self.options(OBSERVERS, base, options),
            "fake_quantize": self.fake_quantize(qconfig, letter, default.fake_quantize),
        }
        if key in qconfig:
            values["scheme"] = self.scheme(key, self.mapping("qscheme", given, key, further), default)
        return default if None in values.values() else override(**values)(default)

    def options(self, registry: Factories[Any], spec: Spec, given: Mapping[str, Mapping[str, Any]]) -> Spec | None:
        """``spec`` with further options, told under which key each dictionary of them stands."""
        for where, options in given.items():
            made = self.attempt(where, partial(_checked, registry, spec.name, {**dict(spec.options), **options}))
            if made is None:
                return None
            spec = made
        return spec

    def fake_quantize(self, qconfig: Mapping[str, Any], letter: str, default: Spec) -> Spec | None:
        """The fake quantizer of one half, with its parameters."""
        name, key = FAKE_QUANTIZERS.canonical(qconfig.get(f"{letter}_fakequantize", default.name)), f"{letter}_fakeq_params"
        given = dict(qconfig.get(key, {}))
        for initial in INITIAL:
            if initial in given and initial not in FAKE_QUANTIZERS.options(name):
                deprecated(f"{key}[{initial!r}] has no effect: calibration sets it. Fix: leave it out.")
                del given[initial]
        base = default if name == default.name else FAKE_QUANTIZERS.spec(name)
        return self.options(FAKE_QUANTIZERS, base, {key: given})

    def scheme(
        self, where: str, given: Mapping[str, Any], default: QuantizerConfig, per_channel: str = "per_channel"
    ) -> QScheme | None:
        """A whole grid: what is not given has the defaults of sophgo-mq, but ``symmetric_range`` is the chip's."""
        symmetric = given.get("symmetry", True)
        axis = given.get("ch_axis", 0 if given.get(per_channel) else -1)
        granularity = PerTensor() if axis == -1 else PerChannel(axis if "ch_axis" in given else None)

        def read() -> QScheme:
            return QScheme(
                bits=given.get("bit", 8),
                symmetric=symmetric,
                symmetric_range=given.get("symmetric_range", symmetric and default.scheme.symmetric_range),
                pot_scale=given.get("pot_scale", False),
                granularity=granularity,
            )

        return self.attempt(where, read)

    def types(self, qconfig: Mapping[str, Any], chip: ChipSpec, fusion: Fusion) -> list[Rule]:
        """Rules of ``object_type``; grouped convolutions are left out on TPU chips (semantics.md 1.3)."""
        where = {} if chip.placement else {"where": not_grouped}
        found = []
        for key, entry in qconfig.get("object_type", {}).items():
            origin = f"object_type[{key!r}]"
            change = self.entry(origin, entry, chip)
            named = {"type": fusion.aliases.get(key, key), **where}
            found += [Rule(**named, **change, origin=origin)] if change else []
        return found

    def names(self, qconfig: Mapping[str, Any], chip: ChipSpec) -> list[Rule]:
        """Rules of ``module_name`` and of the lists of operations, which replace entries of the same name."""
        rules: list[Rule] = []
        for name, entry in qconfig.get("module_name", {}).items():
            origin = f"module_name[{name!r}]"
            change = self.entry(origin, entry, chip)
            places = chip.placement and is_value_quantizer(name)
            rules += [Rule(name=name, **change, outputs=True if places else None, origin=origin)] if change else []
        for key, (weight, activation) in OPERATION_LISTS.items():
            for name in qconfig.get(key, ()):
                rules = [rule for rule in rules if underscored(str(rule.name)) != underscored(name)]
                rules.append(Rule(name=name, weight=weight, activation=activation, origin=key))
        return _containers_first(rules)

    def entry(self, where: str, entry: Any, chip: ChipSpec) -> dict[str, Any]:
        """What one entry changes; empty where something is wrong with it."""
        before, mode = len(self.problems), entry.get("mode") if isinstance(entry, Mapping) else None
        if mode not in ("weight", "activation"):
            hint = near(str(mode), ("weight", "activation"))
            self.problems.append(
                explain(where, "this mode is not possible", got=mode, allowed="'weight' or 'activation'", fix=hint)
            )
            return {}
        given = self.mapping(f"entry with mode {mode!r}", entry, where)
        values: dict[str, Any] = {}
        if f"{mode[0]}observer" in given:
            values["observer"] = OBSERVERS.spec(given[f"{mode[0]}observer"])
        if f"{mode[0]}fakequantize" in given:
            values["fake_quantize"] = FAKE_QUANTIZERS.spec(given[f"{mode[0]}fakequantize"])
        values["scheme"] = self.scheme(where, given, chip.weight if mode == "weight" else chip.activation, "wperchannel")
        return {mode: override(**values)} if len(self.problems) == before else {}

    def quantizers(self, given: Mapping[str, Any], fusion: Fusion) -> list[Rule]:
        """Rules of the third dictionary."""
        rules = []
        for item in given.get("exclude_module_name", ()):
            named = {"name": item} if isinstance(item, str) else {"type": fusion.aliases.get(item, item)}
            rules.append(Rule(**named, weight=None, requests=False, origin="exclude_module_name"))
        for item in given.get("exclude_function_type", ()):
            key = fusion.aliases.get(item, item)
            rules.append(Rule(type=key, requests=False, origin="exclude_function_type"))
        flags: dict[str, Callable[..., Rule]] = {
            "exclude_node_name": partial(Rule, requests=False),
            "module_only_enable_observer": partial(Rule, observe_only=True),
            "additional_node_name": partial(Rule, requests=True),
        }
        for key, rule in flags.items():
            rules += [rule(name=item, origin=key) for item in given.get(key, ())]
        return rules

    def operations(self, given: Mapping[str, Any]) -> tuple[Any, ...]:
        """Functions and module classes whose inputs are quantized beside those that the strategy lists."""
        return (*given.get("additional_function_type", ()), *given.get("additional_module_type", ()))


def _containers_first(rules: Sequence[Rule]) -> list[Rule]:
    """Rules by name, each behind those of the containers around it."""
    names = [underscored(str(rule.name)) for rule in rules]

    def order(rule: Rule) -> tuple[int, int]:
        own = underscored(str(rule.name))
        around = sum(own.startswith(f"{name}_") for name in names)
        return around, str(rule.name).count(".")

    return sorted(rules, key=order)


def _checked(registry: Factories[Any], name: str, options: Mapping[str, Any]) -> Spec:
    """A spec whose options are known and have allowed values."""
    spec = registry.spec(name, **options)
    registry.build(spec)
    return spec


def _both(bits: int, fake_quantize: Spec) -> tuple[Override, Override]:
    scheme = QScheme(bits=bits)
    return (
        override(scheme=scheme, observer=minmax(), fake_quantize=fake_quantize),
        override(scheme=scheme, observer=ema_minmax(), fake_quantize=fake_quantize),
    )


OPERATION_LISTS: Mapping[str, tuple[Override, Override]] = {
    "int4_op": _both(4, learnable()),
    "int8_op": _both(8, learnable()),
    "f16_op": _both(16, fp16()),
}
"""What each list gives the weights and the activations of the operations that it names; later lists win."""


def contradictions(quant: Mapping[str, Any], qconfig: Mapping[str, Any], quantizer: Mapping[str, Any]) -> Iterator[str]:
    """What the dictionaries both ask for and forbid."""
    if quant.get("quantmode") == "weight_only" and quant.get("strategy") == "CNN":
        fix = "quant_dict['strategy'] = 'Transformer'"
        yield explain("quant_dict", "quantmode 'weight_only' with strategy 'CNN' is not possible", fix=fix)
    if quant.get("bf16_mix_prec") and (quant.get("quantmode") == "weight_only" or quant.get("chip") == "Academic"):
        because = "it places activation quantizers as TPU chips do"
        yield explain(
            "quant_dict['bf16_mix_prec']", "with quantmode 'weight_only' or chip 'Academic' is not possible", because=because
        )
    names = [name for name in quantizer.get("exclude_module_name", ()) if isinstance(name, str)]
    entries = {name: entry for name, entry in qconfig.get("module_name", {}).items() if isinstance(entry, Mapping)}
    asked = {name: "module_name" for name, entry in entries.items() if entry.get("mode") == "weight"}
    asked |= {name: key for key in OPERATION_LISTS for name in qconfig.get(key, ())}
    fix = "take it out of one of them"
    for name, key in asked.items():
        for owner in (owner for owner in names if _is_inside(name, owner)):
            what, because = f"quantizing the weights of {name!r}", f"exclude_module_name holds {owner!r}"
            yield explain(key, f"{what} is not possible", because=because, fix=fix)
    for name in quantizer.get("module_only_enable_observer", ()):
        for owner in (owner for owner in names if is_weight_quantizer(name) and _is_inside(name, owner)):
            because = f"exclude_module_name holds {owner!r}"
            yield explain("module_only_enable_observer", f"observing {name!r} is not possible", because=because, fix=fix)
    removed = [*quantizer.get("exclude_function_type", ()), *quantizer.get("exclude_module_name", ())]
    operations = {_operation(key) for key in removed}
    for where in ("additional_function_type", "additional_module_type"):
        for key in quantizer.get(where, ()):
            if _operation(key) in operations:
                yield explain(where, f"adding {type_text(key)} is not possible", because="it is excluded, too", fix=fix)


def _is_inside(name: str, owner: str) -> bool:
    return f"{underscored(name)}_".startswith(f"{underscored(owner)}_")


def _operation(key: Any) -> str:
    """One name for each operation, by whatever key."""
    if isinstance(key, type):
        return family(key) or key.__name__
    return canonical(key)
