"""The three dictionaries of sophgo-mq's fine-grained control, translated into a :class:`QuantConfig` (semantics.md 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from sophq_func.base import FAKE_QUANTIZERS, OBSERVERS
from sophq_func.chips import CHIPS, ChipSpec
from sophq_func.errors import ConfigError, explain, near, raise_all, unknown
from sophq_func.rules import DEFAULT_CHIP, QUANTMODES, QuantConfig, Rule, not_grouped
from sophq_func.scheme import PerChannel, PerTensor, QScheme, QuantizerConfig, as_bits, override
from sophq_func.site import Role

T = TypeVar("T")

KEYS: Mapping[str, tuple[str, ...]] = {
    "prepare_custom_config_dict": ("quant_dict", "extra_qconfig_dict", "extra_quantizer_dict"),
    "quant_dict": (
        "chip",
        "quantmode",
        "strategy",
        "bf16_mix_prec",
        "use_tpu_mlir_fwd",
        "not_dynamic_update_param",
        "model_name",
    ),
    "extra_qconfig_dict": (
        "w_observer",
        "a_observer",
        "w_fakequantize",
        "a_fakequantize",
        "w_qscheme",
        "a_qscheme",
        "object_type",
        "module_name",
    ),
    "extra_quantizer_dict": ("exclude_module_name", "exclude_function_type", "module_only_enable_observer"),
    "qscheme": ("bit", "symmetry", "per_channel", "pot_scale", "symmetric_range"),
    "entry with mode 'weight'": ("mode", "bit", "wfakequantize", "wobserver", "wperchannel"),
    "entry with mode 'activation'": ("mode", "bit", "afakequantize", "aobserver"),
}
"""The keys of each dictionary that are understood."""

LATER: Mapping[str, tuple[str, ...]] = {
    "prepare_custom_config_dict": ("extra_fuse_dict", "preserve_attr", "concrete_args", "leaf_module"),
    "extra_qconfig_dict": (
        "w_fakeq_params",
        "a_fakeq_params",
        "w_observer_extra_args",
        "a_observer_extra_args",
        "int4_op",
        "int8_op",
        "f16_op",
    ),
    "extra_quantizer_dict": (
        "exclude_node_name",
        "additional_node_name",
        "additional_function_type",
        "additional_module_type",
    ),
}
"""Keys that sophgo-mq knows and that are not supported yet."""


def from_dicts(prepare_custom_config_dict: Mapping[str, Any]) -> QuantConfig:
    """The config that the three dictionaries of sophgo-mq ask for.

    Rules come in the order: types, names (containers before what they contain), exclusions, observe-only. An entry of
    ``object_type`` or ``module_name`` replaces the grid of the half that its ``mode`` names, and leaves the other half as
    the next broader level says.

    Args:
      prepare_custom_config_dict: ``quant_dict`` (required), ``extra_qconfig_dict``, ``extra_quantizer_dict``; see
        ``KEYS`` for what each may hold. It is not changed.

    Raises:
      ConfigError: every unknown key, missing key and wrong value, in one message.

    Differs from sophgo-mq: ``bit`` may be a string of digits; an omitted ``symmetric_range`` is the chip's; types are
    matched before and after fusion alike; names may be dotted or underscored; bits are checked everywhere.

    Example:
      >>> quant_dict = {"chip": "SG2260", "quantmode": "weight_activation", "strategy": "CNN"}
      >>> from_dicts({"quant_dict": quant_dict, "extra_quantizer_dict": {"exclude_module_name": ["head"]}}).rules
      (Rule(name='head', weight=None, requests=False),)
    """
    reader = _Reader()
    whole = reader.mapping("prepare_custom_config_dict", prepare_custom_config_dict)
    quant = reader.mapping("quant_dict", whole.get("quant_dict", {}))
    qconfig = reader.mapping("extra_qconfig_dict", whole.get("extra_qconfig_dict", {}))
    quantizer = reader.mapping("extra_quantizer_dict", whole.get("extra_quantizer_dict", {}))
    chip = reader.quant_dict(quant)
    weight, activation = reader.half("weight", qconfig, chip), reader.half("activation", qconfig, chip)
    rules = reader.entries("object_type", qconfig, chip)
    rules += sorted(reader.entries("module_name", qconfig, chip), key=lambda rule: len(str(rule.name)))
    rules += reader.quantizers(quantizer)
    raise_all(reader.problems)
    return QuantConfig(
        chip=quant["chip"],
        quantmode=quant["quantmode"],
        strategy=quant["strategy"],
        weight=weight,
        activation=activation,
        rules=tuple(rules),
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

    def mapping(self, name: str, value: Any, where: str = "") -> Mapping[str, Any]:
        """``value`` checked to be a dict with known keys only."""
        if not isinstance(value, Mapping):
            self.problems.append(explain(where or name, "this type", got=type(value).__name__, allowed="a dict"))
            return {}
        for key in value:
            if key in LATER.get(name, ()):
                self.problems.append(f"{where or name}: key {key!r} is not supported yet. Fix: leave it out.")
            elif key not in KEYS[name]:
                self.problems.append(unknown(where or name, "key", key, KEYS[name]))
        return value

    def quant_dict(self, quant: Mapping[str, Any]) -> ChipSpec:
        """Check what the first dictionary says; the chip's spec, or some chip's where it is unknown."""
        for key in ("chip", "quantmode", "strategy"):
            if key not in quant:
                self.problems.append(f"quant_dict: {key!r} is missing. Fix: quant_dict[{key!r}] = ...")
        chip = self.attempt("quant_dict", partial(CHIPS.get, quant["chip"])) if "chip" in quant else None
        if "quantmode" in quant and quant["quantmode"] not in QUANTMODES:
            self.problems.append(unknown("quant_dict", "quantmode", quant["quantmode"], QUANTMODES))
        if "strategy" in quant and quant["strategy"] not in ("CNN", "Transformer"):
            self.problems.append(unknown("quant_dict", "strategy", quant["strategy"], ("CNN", "Transformer")))
        if quant.get("quantmode") == "weight_only" and quant.get("strategy") == "CNN":
            fix = "quant_dict['strategy'] = 'Transformer'"
            self.problems.append(explain("quant_dict", "quantmode 'weight_only' with strategy 'CNN'", fix=fix))
        for key, why in (("bf16_mix_prec", "it is not supported yet"), ("use_tpu_mlir_fwd", "it needs the chip's compiler")):
            if quant.get(key):
                self.problems.append(explain("quant_dict", key, got=quant[key], allowed="False", because=why))
        return chip or CHIPS.get(DEFAULT_CHIP)

    def half(self, role: Role, qconfig: Mapping[str, Any], chip: ChipSpec) -> QuantizerConfig:
        """The global config of one half."""
        default = chip.weight if role == "weight" else chip.activation
        values = self.pieces("extra_qconfig_dict", qconfig, f"{role[0]}_observer", f"{role[0]}_fakequantize")
        key = f"{role[0]}_qscheme"
        if qconfig.get(key) is not None:
            values["scheme"] = self.scheme(key, self.mapping("qscheme", qconfig[key], key), default)
        return default if None in values.values() else override(**values)(default)

    def pieces(self, where: str, given: Mapping[str, Any], observer: str, fake_quantize: str) -> dict[str, Any]:
        """The observer and the fake quantizer that are named under these keys, if any."""
        found: dict[str, Any] = {}
        if given.get(observer) is not None:
            found["observer"] = self.attempt(where, partial(OBSERVERS.spec, given[observer]))
        if given.get(fake_quantize) is not None:
            found["fake_quantize"] = self.attempt(where, partial(FAKE_QUANTIZERS.spec, given[fake_quantize]))
        return found

    def scheme(
        self, where: str, given: Mapping[str, Any], default: QuantizerConfig, per_channel: str = "per_channel"
    ) -> QScheme | None:
        """A whole grid: what is not given has the defaults of sophgo-mq, but ``symmetric_range`` is the chip's."""
        symmetric = given.get("symmetry", True)

        def read() -> QScheme:
            if not isinstance(given.get("per_channel", False), bool | None):
                raise ConfigError(explain(where, per_channel, got=given["per_channel"], allowed="True or False"))
            return QScheme(
                bits=as_bits(given.get("bit", 8), where),
                symmetric=symmetric,
                symmetric_range=given.get("symmetric_range", symmetric is True and default.scheme.symmetric_range),
                pot_scale=given.get("pot_scale", False),
                granularity=PerChannel() if given.get("per_channel") else PerTensor(),
            )

        return self.attempt(where, read)

    def entries(self, name: str, qconfig: Mapping[str, Any], chip: ChipSpec) -> list[Rule]:
        """Rules of ``object_type`` or ``module_name``; by type, grouped convolutions are left out on TPU chips."""
        given = qconfig.get(name) or {}
        if not isinstance(given, Mapping):
            self.problems.append(explain(name, "this type", got=type(given).__name__, allowed="a dict"))
            return []
        rules = [self.entry(name, key, entry, chip) for key, entry in given.items()]
        return [rule for rule in rules if rule is not None]

    def entry(self, name: str, key: Any, entry: Any, chip: ChipSpec) -> Rule | None:
        """One rule."""
        where = f"{name}[{key!r}]"
        mode = entry.get("mode") if isinstance(entry, Mapping) else None
        if mode not in ("weight", "activation"):
            hint = near(str(mode), ("weight", "activation"))
            self.problems.append(explain(where, "this mode", got=mode, allowed="'weight' or 'activation'", fix=hint))
            return None
        self.mapping(f"entry with mode {mode!r}", entry, where)
        prefix, default = mode[0], chip.weight if mode == "weight" else chip.activation
        scheme = {"bit": entry.get("bit", 8), "per_channel": entry.get("wperchannel", False)}
        values = self.pieces(where, entry, f"{prefix}observer", f"{prefix}fakequantize")
        values["scheme"] = self.scheme(where, scheme, default, "wperchannel")
        if None in values.values():
            return None
        named: dict[str, Any] = {"name": key} if name == "module_name" else {"type": key}
        named[mode] = override(**values)
        if name == "object_type" and not chip.placement:
            named["where"] = not_grouped
        return self.attempt(where, partial(Rule, **named))

    def quantizers(self, given: Mapping[str, Any]) -> list[Rule]:
        """Rules of the third dictionary."""
        rules = []
        for item in self.items(given, "exclude_module_name"):
            named = {"name": item} if isinstance(item, str) else {"type": item}
            rules.append(self.attempt("exclude_module_name", partial(Rule, **named, weight=None, requests=False)))
        for item in self.items(given, "exclude_function_type"):
            rules.append(self.attempt("exclude_function_type", partial(Rule, type=item, requests=False)))
        for item in self.items(given, "module_only_enable_observer"):
            rules.append(self.attempt("module_only_enable_observer", partial(Rule, name=item, observe_only=True)))
        return [rule for rule in rules if rule is not None]

    def items(self, given: Mapping[str, Any], key: str) -> Sequence[Any]:
        """The items of a list; a lone string is refused, it would be read letter by letter."""
        value = given.get(key, ())
        if isinstance(value, str) or not isinstance(value, Sequence):
            self.problems.append(explain(f"extra_quantizer_dict[{key!r}]", "this type", got=value, allowed="a list"))
            return ()
        return value
