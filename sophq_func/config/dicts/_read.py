"""The translation of the three dictionaries into one config."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from sophq_func.config.chips import CHIPS, ChipSpec
from sophq_func.config.dicts._fuse import Fusion, read_fusion
from sophq_func.config.dicts._keys import KEYS, REQUIRED, Table, mapping
from sophq_func.config.matching import TypeKey, type_text
from sophq_func.config.names import is_value_quantizer, is_weight_quantizer, underscored
from sophq_func.config.rules import DEFAULT_CHIP, ROLES, QuantConfig, Rule, not_grouped
from sophq_func.config.site import Role
from sophq_func.config.strategies import StrategyName
from sophq_func.core.errors import ConfigError, deprecated, explain, near, raise_all, unknown
from sophq_func.core.operations import canonical, family
from sophq_func.core.plain import plain
from sophq_func.core.public import public
from sophq_func.core.registry import Factories, Spec
from sophq_func.fake_quantize import fp16, learnable
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, OBSERVERS
from sophq_func.numerics.granularity import PerChannel, PerTensor
from sophq_func.numerics.scheme import Override, QScheme, QuantizerConfig, override
from sophq_func.observers import ema_minmax, minmax

T = TypeVar("T")

NEEDLESS = {
    "preserve_attr": "no model is rewritten, so the model keeps its attributes",
    "concrete_args": "no model is traced symbolically, so control flow on arguments just runs",
}
"""Keys that are accepted without effect, and why none is needed."""

ARGUMENTS = {"input_shape_dict": "sq.prepare_by_platform(model, prepare_custom_config_dict, input_shape_dict=...)"}
"""What stands in no dictionary but beside them, and how."""

EXAMPLES = {"chip": DEFAULT_CHIP, "quantmode": "weight_activation", "strategy": "CNN"}
"""The keys that ``quant_dict`` must have, each with a value for the fix of an error that says that it is missing."""

INITIAL = ("scale", "zero_point")
"""Parameters of a quantizer that sophgo-mq sets before calibration, which overwrites them."""


@public
def from_dicts(prepare_custom_config_dict: Table) -> QuantConfig:
    """Translate the dictionaries of sophgo-mq into a config.

    Its rules come in this order: types, names (a module before what is in it), exclusions, observed quantizers, additional
    nodes. An entry of ``object_type`` or ``module_name`` replaces the grid of the weights or of the activations, whichever
    its ``mode`` names, and leaves the others as the next broader level says.

    Args:
      prepare_custom_config_dict: ``quant_dict`` (required), ``extra_qconfig_dict``, ``extra_quantizer_dict``,
        ``extra_fuse_dict``, ``leaf_module``; see ``sophq_func.config.dicts.KEYS`` for what each may hold. It is not changed,
        and may consist of other mappings and sequences, such as those of OmegaConf.

    Raises:
      ConfigError: an unknown or missing key, a wrong value, or a contradiction; all problems in one message.

    Warns:
      DeprecationWarning: a key has no effect; the warning says why.

    Differs from sophgo-mq: ``bit`` may be a string of digits; an omitted ``symmetric_range`` is the chip's; types are
    matched before and after fusion alike; names may be dotted or underscored; bits are checked everywhere.

    Example:
      >>> quant_dict = {"chip": "SG2260", "quantmode": "weight_activation", "strategy": "CNN"}
      >>> from_dicts({"quant_dict": quant_dict, "extra_quantizer_dict": {"exclude_module_name": ["head"]}}).rules
      (Rule(name='head', weight=None, requests=False),)
    """
    reader = _Reader()
    dictionaries = reader.valid_entries("prepare_custom_config_dict", plain(prepare_custom_config_dict))
    quant = reader.valid_entries("quant_dict", dictionaries.get("quant_dict", {}))
    qconfig = reader.valid_entries("extra_qconfig_dict", dictionaries.get("extra_qconfig_dict", {}))
    quantizer = reader.valid_entries("extra_quantizer_dict", dictionaries.get("extra_quantizer_dict", {}))
    fuse = reader.valid_entries("extra_fuse_dict", dictionaries.get("extra_fuse_dict", {}))
    chip = reader.quant_dict(quant, dictionaries.get("quant_dict"))
    fusion = reader.attempt("extra_fuse_dict", partial(read_fusion, fuse)) or Fusion()
    weight = reader.half("weight", qconfig, chip)
    activation = reader.half("activation", qconfig, chip)
    rules = reader.types(qconfig, chip, fusion) + reader.names(qconfig, chip) + reader.quantizers(quantizer, fusion)
    reader.problems += contradictions(quant, qconfig, quantizer)
    raise_all(reader.problems)
    for key, why in NEEDLESS.items():
        if dictionaries.get(key) is not None:
            deprecated(f"{key} has no effect and is not needed: {why}. Fix: leave it out.")
    # What sophgo-mq switches on beside a strategy is here a strategy of its own, in the place of the named one.
    strategy: StrategyName = "BF16Mixed" if quant.get("bf16_mix_prec") else quant["strategy"]
    return QuantConfig(
        chip=quant["chip"],
        quantmode=quant["quantmode"],
        strategy=strategy,
        weight=weight,
        activation=activation,
        rules=tuple(rules),
        leaf_module=tuple(dictionaries.get("leaf_module") or ()),
        operations=tuple(fusion.aliases.get(key, key) for key in reader.operations(quantizer)),
        weight_layers=fusion.layers,
        patterns=fusion.patterns,
    )


class _Reader:
    """Reads dictionaries, and collects every problem with them in ``problems``."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def attempt(self, where: str, read: Callable[[], T]) -> T | None:
        """The result of ``read``; where it raises a :class:`ConfigError`, ``None``, and the error is one more problem.

        Args:
          where: the key that ``read`` reads, for the error.
          read: makes something of the key's value.
        """
        try:
            return read()
        except ConfigError as error:
            text = str(error)
            # Some errors name their place already; that of a factory does not know the key.
            self.problems.append(text if text.startswith(where) else f"{where}: {text}")
            return None

    def valid_entries(self, name: str, value: object, where: str = "", further: Sequence[str] = ()) -> dict[str, Any]:
        """The entries of a dictionary whose keys are known and whose values pass their checks; others become problems.

        Args:
          name: of the dictionary in ``KEYS``.
          value: the dictionary.
          where: its place for errors, if that is not its name.
          further: keys that are allowed beside those of ``KEYS``, and checked elsewhere.
        """
        where = where or name
        if not isinstance(value, Mapping):
            self.problems.append(mapping(where, value))
            return {}
        checks = KEYS[name]
        checked = {}
        for key, item in value.items():
            is_left_out = item is None and key in checks and key not in REQUIRED
            if key in further or is_left_out:
                continue
            if key in checks:
                problem = checks[key](f"{where}[{key!r}]", item)
            elif key in ARGUMENTS:
                problem = explain(where, f"{key!r} is an argument beside the dictionaries, no key", fix=ARGUMENTS[key])
            else:
                problem = unknown(where, "key", key, [*checks, *further])
            if problem:
                self.problems.append(problem)
            else:
                checked[key] = item
        return checked

    def quant_dict(self, quant: Table, given: object) -> ChipSpec:
        """Check that nothing is missing, and return the chip's spec.

        Args:
          quant: the entries that passed their checks.
          given: all that the user gave.

        Returns:
          The spec of the chip; of the default chip where none is known, so that reading can go on to further problems.
        """
        entries = given if isinstance(given, Mapping) else {}
        for key, example in EXAMPLES.items():
            if key not in entries:
                self.problems.append(f"quant_dict: {key!r} is missing. Fix: quant_dict[{key!r}] = {example!r}.")
        if quant.get("use_tpu_mlir_fwd"):
            where, because = "quant_dict['use_tpu_mlir_fwd']", "it needs the chip's compiler"
            fix = "quant_dict['use_tpu_mlir_fwd'] = False"
            self.problems.append(
                explain(where, "the compiler's forward cannot be run", got=True, allowed="False", because=because, fix=fix)
            )
        return CHIPS.get(quant.get("chip", DEFAULT_CHIP))

    def half(self, role: Role, qconfig: Table, chip: ChipSpec) -> QuantizerConfig:
        """The config of every quantizer of a role that no rule changes."""
        default = chip.weight if role == "weight" else chip.activation
        # The keys of the weights start with w, those of the activations with a.
        letter = role[0]
        key, extra = f"{letter}_qscheme", f"{letter}_observer_extra_args"
        name = OBSERVERS.canonical(qconfig.get(f"{letter}_observer", default.observer.name))
        # Beside the scheme, the first of the two dictionaries may hold options of the observer.
        given = qconfig.get(key, {})
        further = [option for option in given if option in OBSERVERS.options(name)]
        options = {key: {option: given[option] for option in further}, extra: qconfig.get(extra, {})}
        base = default.observer if name == default.observer.name else OBSERVERS.spec(name)
        values: dict[str, Any] = {
            "observer": self.options(OBSERVERS, base, options),
            "fake_quantize": self.fake_quantize(qconfig, letter, default.fake_quantize),
        }
        if key in qconfig:
            values["scheme"] = self.scheme(key, self.valid_entries("qscheme", given, key, further), default)
        has_problem = None in values.values()  # noted already; the default lets reading go on to further problems
        return default if has_problem else override(**values)(default)

    def options(self, registry: Factories[Any], spec: Spec, given: Mapping[str, Table]) -> Spec | None:
        """``spec`` with further options; ``None`` if one is wrong.

        Args:
          registry: in which the spec's factory is registered.
          spec: a name with options.
          given: by the key of a dictionary, for errors, the options in it.
        """
        for where, options in given.items():
            made = self.attempt(where, partial(_checked, registry, spec.name, {**dict(spec.options), **options}))
            if made is None:
                return None
            spec = made
        return spec

    def fake_quantize(self, qconfig: Table, letter: str, default: Spec) -> Spec | None:
        """The fake quantizer of one role, with its options."""
        name = FAKE_QUANTIZERS.canonical(qconfig.get(f"{letter}_fakequantize", default.name))
        key = f"{letter}_fakeq_params"
        given = dict(qconfig.get(key, {}))
        for initial in INITIAL:
            if initial in given and initial not in FAKE_QUANTIZERS.options(name):
                deprecated(f"{key}[{initial!r}] has no effect: calibration sets it. Fix: leave it out.")
                del given[initial]
        base = default if name == default.name else FAKE_QUANTIZERS.spec(name)
        return self.options(FAKE_QUANTIZERS, base, {key: given})

    def scheme(self, where: str, given: Table, default: QuantizerConfig, per_channel: str = "per_channel") -> QScheme | None:
        """A whole grid. What is left out has the default of sophgo-mq, except for ``symmetric_range``, which is the chip's.

        There, a scheme that is given replaces the chip's as a whole, so that the range is lost silently.

        Args:
          where: the place of the dictionary, for errors.
          given: the dictionary, checked.
          default: the chip's config for the role.
          per_channel: the key that asks for one scale a channel, which is spelled differently in different dictionaries.
        """
        symmetric = given.get("symmetry", True)
        # A ``ch_axis`` decides alone, and -1 is per tensor. Without one the plan finds the axis of the output channels.
        if "ch_axis" in given:
            axis = given["ch_axis"]
            granularity = PerTensor() if axis == -1 else PerChannel(axis)
        else:
            granularity = PerChannel() if given.get(per_channel) else PerTensor()

        def read() -> QScheme:
            return QScheme(
                bits=given.get("bit", 8),
                symmetric=symmetric,
                symmetric_range=given.get("symmetric_range", symmetric and default.scheme.symmetric_range),
                pot_scale=given.get("pot_scale", False),
                granularity=granularity,
            )

        return self.attempt(where, read)

    def types(self, qconfig: Table, chip: ChipSpec, fusion: Fusion) -> list[Rule]:
        """Rules of ``object_type``; on TPU chips they do not match grouped convolutions."""
        # A chip that places quantizers by itself is no TPU chip.
        condition = None if chip.placement else not_grouped
        rules = []
        for key, entry in qconfig.get("object_type", {}).items():
            origin = f"object_type[{key!r}]"
            change = self.entry(origin, entry, chip)
            if change:
                rules.append(Rule(type=fusion.aliases.get(key, key), where=condition, **change, origin=origin))
        return rules

    def names(self, qconfig: Table, chip: ChipSpec) -> list[Rule]:
        """Rules of ``module_name`` and of the lists of operations, which replace entries of the same name."""
        rules: list[Rule] = []
        for name, entry in qconfig.get("module_name", {}).items():
            origin = f"module_name[{name!r}]"
            change = self.entry(origin, entry, chip)
            # On Academic an entry for the quantizer of a value also places that quantizer.
            outputs = True if chip.placement and is_value_quantizer(name) else None
            if change:
                rules.append(Rule(name=name, **change, outputs=outputs, origin=origin))
        for key, (weight, activation) in OPERATION_LISTS.items():
            for name in qconfig.get(key, ()):
                # A later list replaces what an earlier one, or ``module_name``, says about the operation.
                rules = [rule for rule in rules if underscored(str(rule.name)) != underscored(name)]
                rules.append(Rule(name=name, weight=weight, activation=activation, origin=key))
        return _containers_first(rules)

    def entry(self, where: str, entry: object, chip: ChipSpec) -> dict[str, Any]:
        """What one entry changes, as arguments of a rule; empty if something is wrong with the entry."""
        problems_before = len(self.problems)
        mode = entry.get("mode") if isinstance(entry, Mapping) else None
        if mode not in ROLES:
            allowed, hint = "'weight' or 'activation'", near(str(mode), ROLES)
            fix = hint or "{'mode': 'weight', 'bit': 4}"
            self.problems.append(explain(where, "the mode is neither of the two", got=mode, allowed=allowed, fix=fix))
            return {}
        given = self.valid_entries(f"entry with mode {mode!r}", entry, where)
        # The keys of an entry start with the letter of the role, too, but without the underscore of ``w_observer``.
        values: dict[str, Any] = {}
        if f"{mode[0]}observer" in given:
            values["observer"] = OBSERVERS.spec(given[f"{mode[0]}observer"])
        if f"{mode[0]}fakequantize" in given:
            values["fake_quantize"] = FAKE_QUANTIZERS.spec(given[f"{mode[0]}fakequantize"])
        default = chip.weight if mode == "weight" else chip.activation
        # An entry for activations cannot have this key, so that its scheme is per tensor.
        values["scheme"] = self.scheme(where, given, default, "wperchannel")
        return {mode: override(**values)} if len(self.problems) == problems_before else {}

    def quantizers(self, given: Table, fusion: Fusion) -> list[Rule]:
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

    def operations(self, given: Table) -> tuple[TypeKey, ...]:
        """Functions and module classes whose inputs are quantized beside those that the strategy lists."""
        return (*given.get("additional_function_type", ()), *given.get("additional_module_type", ()))


def _containers_first(rules: Sequence[Rule]) -> list[Rule]:
    """Rules by name, the rule for a module before those for what is in it, which override it."""
    names = [underscored(str(rule.name)) for rule in rules]

    def order(rule: Rule) -> tuple[int, int]:
        # ``a_b`` may mean the module ``a.b`` or one named ``a_b``, so that dots alone do not tell how deep a name lies. What
        # counts first is how many of the other names it lies in; where that is equal, the dots that were written.
        own_name = underscored(str(rule.name))
        around = sum(own_name.startswith(f"{name}_") for name in names)
        return around, str(rule.name).count(".")

    return sorted(rules, key=order)


def _checked(registry: Factories[Any], name: str, options: Table) -> Spec:
    """A spec whose options are known and have allowed values."""
    spec = registry.spec(name, **options)
    registry.build(spec)  # for its error: the values are checked by the factory
    return spec


def _both(bits: int, fake_quantize: Spec) -> tuple[Override, Override]:
    """What a list of operations changes for weights, and what for activations."""
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
"""What each list changes for the weights and for the activations of the operations in it. A later list wins."""

ONE_OF_THEM = "take it out of one of the two keys"
"""How to mend a contradiction."""


def contradictions(quant: Table, qconfig: Table, quantizer: Table) -> Iterator[str]:
    """What the dictionaries both ask for and forbid."""
    yield from _contradicting_modes(quant)
    yield from _excluded_weights(qconfig, quantizer)
    yield from _excluded_operations(quantizer)


def _contradicting_modes(quant: Table) -> Iterator[str]:
    """Values of ``quant_dict`` that cannot be combined."""
    is_weight_only = quant.get("quantmode") == "weight_only"
    if is_weight_only and quant.get("strategy") == "CNN":
        sentence = "quantmode 'weight_only' cannot be combined with strategy 'CNN'"
        because, fix = "sophgo-mq does not support it", "quant_dict['strategy'] = 'Transformer'"
        yield explain("quant_dict", sentence, because=because, fix=fix)
    if quant.get("bf16_mix_prec") and (is_weight_only or quant.get("chip") == "Academic"):
        sentence = "it cannot be combined with quantmode 'weight_only' or chip 'Academic'"
        because, fix = "it places activation quantizers as TPU chips do", "quant_dict['bf16_mix_prec'] = False"
        yield explain("quant_dict['bf16_mix_prec']", sentence, because=because, fix=fix)


def _excluded_weights(qconfig: Table, quantizer: Table) -> Iterator[str]:
    """Weights that one key quantizes or observes, and ``exclude_module_name`` leaves float."""
    excluded = [name for name in quantizer.get("exclude_module_name", ()) if isinstance(name, str)]
    entries = {name: entry for name, entry in qconfig.get("module_name", {}).items() if isinstance(entry, Mapping)}
    quantized = {name: "module_name" for name, entry in entries.items() if entry.get("mode") == "weight"}
    quantized |= {name: key for key in OPERATION_LISTS for name in qconfig.get(key, ())}
    for name, key in quantized.items():
        for owner in _owners(name, excluded):
            because = f"exclude_module_name holds {owner!r}"
            yield explain(key, f"the weights of {name!r} cannot be quantized", because=because, fix=ONE_OF_THEM)
    observed = filter(is_weight_quantizer, quantizer.get("module_only_enable_observer", ()))
    for name in observed:
        for owner in _owners(name, excluded):
            because = f"exclude_module_name holds {owner!r}"
            sentence = f"{name!r} cannot be observed"
            yield explain("module_only_enable_observer", sentence, because=because, fix=ONE_OF_THEM)


def _excluded_operations(quantizer: Table) -> Iterator[str]:
    """Operations that one key adds to the strategy's list, and another excludes."""
    removed = [*quantizer.get("exclude_function_type", ()), *quantizer.get("exclude_module_name", ())]
    excluded = {_operation(key) for key in removed}
    for where in ("additional_function_type", "additional_module_type"):
        for key in quantizer.get(where, ()):
            if _operation(key) in excluded:
                sentence = f"{type_text(key)} cannot be added"
                yield explain(where, sentence, because="it is excluded, too", fix=ONE_OF_THEM)


def _owners(name: str, excluded: Iterable[str]) -> list[str]:
    """The excluded modules in which a module or quantizer lies, or which it is."""
    # With an underscore behind both, ``layer1`` begins ``layer1.conv`` and itself, but not ``layer10``.
    return [owner for owner in excluded if f"{underscored(name)}_".startswith(f"{underscored(owner)}_")]


def _operation(key: TypeKey) -> str:
    """The operation that a type key means: one name for a function and for the modules that do the same."""
    if isinstance(key, type):
        return family(key) or key.__name__
    return canonical(key)
