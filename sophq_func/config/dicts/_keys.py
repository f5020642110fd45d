"""Every key of the dictionaries, and what its value may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import nn

from sophq_func.config.chips import CHIPS
from sophq_func.config.matching import is_type_key
from sophq_func.config.rules import QUANTMODES
from sophq_func.core.errors import ConfigError, explain, unknown
from sophq_func.core.registry import Registry
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, OBSERVERS
from sophq_func.numerics.scheme import as_bits

Table: TypeAlias = Mapping[str, Any]
"""One of the dictionaries, or an entry of one. What its values may be depends on the key, see ``KEYS``."""

Check: TypeAlias = Callable[[str, object], str]
"""From the place of a value, for errors, and the value, to what is wrong with it; empty if nothing is."""


def _of(what: str, good: Callable[[object], bool]) -> Check:
    """A check by a predicate; ``what`` names the allowed values."""

    def check(where: str, value: object) -> str:
        return "" if good(value) else explain(where, "the value is of a wrong kind", got=value, allowed=what)

    return check


def _one_of(kind: str, allowed: tuple[str, ...]) -> Check:
    def check(where: str, value: object) -> str:
        return "" if isinstance(value, str) and value in allowed else unknown(where, kind, value, allowed)

    return check


def _registered(registry: Registry[Any]) -> Check:
    def check(where: str, value: object) -> str:
        known = isinstance(value, str) and value in registry
        return "" if known else unknown(where, registry.kind, value, registry.spellings())

    return check


def _raised(read: Callable[[object, str], object]) -> Check:
    """A check by a function that raises a :class:`ConfigError`."""

    def check(where: str, value: object) -> str:
        try:
            read(value, where)
        except ConfigError as error:
            return str(error)
        return ""

    return check


def _is_list(value: object, good: Callable[[object], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(good, value))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_class(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _is_name_or_class(value: object) -> bool:
    return _is_text(value) or (isinstance(value, type) and is_type_key(value))


def _is_dict(value: object, is_key: Callable[[object], bool], is_item: Callable[[object], bool] | None = None) -> bool:
    if not isinstance(value, Mapping) or not all(map(is_key, value)):
        return False
    return is_item is None or all(map(is_item, value.values()))


def _is_pattern(value: object) -> bool:
    return isinstance(value, tuple) and len(value) > 1 and all(is_type_key(part) or _is_pattern(part) for part in value)


def _is_patterns(value: object) -> bool:
    return _is_dict(value, _is_pattern, callable)


def _is_any_class(value: object) -> bool:
    return isinstance(value, type)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_any_text(value: object) -> bool:
    return isinstance(value, str)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text_list(value: object) -> bool:
    return _is_list(value, _is_text)


def _is_false(value: object) -> bool:
    return value is False


def _is_attributes(value: object) -> bool:
    return _is_dict(value, _is_any_text, _is_text_list)


def mapping(where: str, value: object) -> str:
    """A check for dictionaries whose keys are checked later."""
    if isinstance(value, Mapping):
        return ""
    return explain(where, "this is no dictionary", got=type(value).__name__, allowed="a dict")


flag = _of("True or False", _is_bool)
text = _of("a string", _is_any_text)

options = _of("a dict {option: value}", lambda value: _is_dict(value, _is_text))
names = _of("a list of names", _is_text_list)
types = _of("a list of module classes, functions or their names", lambda value: _is_list(value, is_type_key))
classes = _of("a list of nn.Module classes", lambda value: _is_list(value, _is_class))
modules = _of("a list of names or module classes", lambda value: _is_list(value, _is_name_or_class))
whole = _of("an int", _is_int)
replacements = _of("a dict {float class: quantized class}", lambda value: _is_dict(value, _is_any_class, _is_any_class))
bits = _raised(as_bits)
observer = _registered(OBSERVERS)
fake_quantizer = _registered(FAKE_QUANTIZERS)

KEYS: Mapping[str, Mapping[str, Check]] = {
    "prepare_custom_config_dict": {
        "quant_dict": mapping,
        "extra_qconfig_dict": mapping,
        "extra_quantizer_dict": mapping,
        "extra_fuse_dict": mapping,
        "preserve_attr": _of("a dict {module path: [attribute names]}", _is_attributes),
        "concrete_args": mapping,
        "leaf_module": classes,
    },
    "quant_dict": {
        "chip": _registered(CHIPS),
        "quantmode": _one_of("quantmode", QUANTMODES),
        "strategy": _one_of("strategy", ("CNN", "Transformer")),
        "bf16_mix_prec": flag,
        "use_tpu_mlir_fwd": flag,
        "not_dynamic_update_param": flag,
        "model_name": text,
    },
    "extra_qconfig_dict": {
        "w_observer": observer,
        "a_observer": observer,
        "w_fakequantize": fake_quantizer,
        "a_fakequantize": fake_quantizer,
        "w_fakeq_params": options,
        "a_fakeq_params": options,
        "w_qscheme": mapping,
        "a_qscheme": mapping,
        "w_observer_extra_args": options,
        "a_observer_extra_args": options,
        "object_type": _of("a dict {type: entry}", lambda value: _is_dict(value, is_type_key)),
        "module_name": _of("a dict {name: entry}", lambda value: _is_dict(value, _is_text)),
        "int4_op": names,
        "int8_op": names,
        "f16_op": names,
    },
    "extra_quantizer_dict": {
        "exclude_module_name": modules,
        "exclude_function_type": types,
        "exclude_node_name": names,
        "additional_node_name": names,
        "additional_function_type": types,
        "additional_module_type": types,
        "module_only_enable_observer": names,
    },
    "extra_fuse_dict": {
        "additional_fuser_method_mapping": _of("a dict {(type, ...): function}", _is_patterns),
        "additional_fusion_pattern": _of("a dict {(last, ..., first): handler}", _is_patterns),
        "additional_qat_module_mapping": replacements,
        "additional_qat_module_mappings": replacements,
    },
    "qscheme": {
        "bit": bits,
        "symmetry": flag,
        "per_channel": flag,
        "pot_scale": flag,
        "symmetric_range": flag,
        "ch_axis": whole,
        "reduce_range": _of("False; bits and symmetry say the range", _is_false),
    },
    "entry with mode 'weight'": {
        "mode": text,
        "bit": bits,
        "wfakequantize": fake_quantizer,
        "wobserver": observer,
        "wperchannel": flag,
    },
    "entry with mode 'activation'": {"mode": text, "bit": bits, "afakequantize": fake_quantizer, "aobserver": observer},
}
"""The keys of each dictionary, with the check of their values."""

REQUIRED = frozenset(("chip", "quantmode", "strategy", "quant_dict", "extra_qconfig_dict", "extra_quantizer_dict"))
"""Keys whose value may not be ``None``; under all others that counts as left out."""
