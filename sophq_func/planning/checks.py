"""What can be wrong with a config once the model is known: names, leaves, and the limits of the chip."""

from __future__ import annotations

from functools import lru_cache

from torch import nn

from sophq_func.capture.graph import Graph
from sophq_func.config.names import underscored, value_quantizer
from sophq_func.config.patterns import PATTERNS
from sophq_func.config.rules import QuantConfig, Rule
from sophq_func.config.site import Site
from sophq_func.core.errors import explain, near
from sophq_func.core.operations import canonical, is_operation, operations
from sophq_func.core.registry import Spec
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, OBSERVERS, FakeQuantize
from sophq_func.numerics.scheme import QuantizerConfig

OPERATIONS = "operations (additional_function_type, additional_module_type)"


@lru_cache(maxsize=256)
def _made(fake_quantize: Spec) -> FakeQuantize:
    """The functions that a spec describes. A plan asks for few specs, and for each of them once a quantizer."""
    return FAKE_QUANTIZERS.build(fake_quantize)


def is_integer(config: QuantizerConfig) -> bool:
    """Whether codes are integers times a scale."""
    return _made(config.fake_quantize).integer


def is_scaled_grid(config: QuantizerConfig) -> bool:
    """Whether the quantizer has one scale, known before the forward, that can round a bias."""
    made = _made(config.fake_quantize)
    return (made.integer or made.scales_bias) and not config.observe_only and not config.scheme.dynamic


def violations(config: QuantConfig, site: Site, found: QuantizerConfig, reasons: dict[str, str]) -> list[str]:
    """What the chip forbids about one quantizer; a name that is not registered is an error of its own."""
    name = FAKE_QUANTIZERS.canonical(found.fake_quantize.name)
    OBSERVERS.canonical(found.observer.name)
    if config.chip is None:
        return []
    problems = []
    spec, because = config.spec, f"chip {config.chip}; set by {{}}"
    if spec.fake_quantizers is not None and name not in spec.fake_quantizers:
        allowed, why = " or ".join(spec.fake_quantizers), because.format(reasons["fake_quantize"])
        problems.append(
            explain(site.quantizer, f"fake quantizer {name} is not possible", allowed=allowed, because=why, fix="chip=None")
        )
    bits = spec.weight_bits if site.role == "weight" else spec.activation_bits
    if bits is not None and is_integer(found) and found.scheme.bits not in bits:
        what, allowed = f"{found.scheme.bits} bits", " or ".join(map(str, bits))
        why, fix = because.format(reasons["bits"]), f"bits={bits[-1]}"
        problems.append(
            explain(site.quantizer, f"{what} is not possible", got=found.scheme.bits, allowed=allowed, because=why, fix=fix)
        )
    return problems


def unseen_leaves(graph: Graph, config: QuantConfig) -> list[str]:
    """Problems with modules that the config calls leaves, but into which the trace has looked."""
    inside = [path for path, cls in graph.modules.items() if issubclass(cls, config.leaves or ())]
    if set(inside) <= set(graph.opaque) or not config.leaves:
        return []
    types = ", ".join(cls.__name__ for cls in config.leaves)
    what = f"planning with leaf_module=({types},)"
    because = "the graph was traced without it"
    return [
        explain(
            "plan",
            f"{what} is not possible",
            because=because,
            fix="sq.trace(model, args, kwargs, leaf_module=config.leaves)",
        )
    ]


def names_of(graph: Graph) -> set[str]:
    """Every dotted name that a rule may use for a module or value of a traced model, whether it is quantized or not."""
    names = set(graph.modules) | set(graph.nodes) | set(graph.values) | {name for node in graph for name in node.also}
    return names | {value_quantizer(value) for value in graph.values}


def is_exact(rule: Rule) -> bool:
    """Whether a rule has a name that is no glob, and so must be there."""
    return rule.name is not None and not any(c in rule.name for c in "*?[")


def unknown_names(names: set[str], classes: set[str], config: QuantConfig) -> list[str]:
    """Problems with exact names and type names in a config that the traced model does not have."""
    problems = [_unknown_type(OPERATIONS, key, classes, config) for key in config.operations]
    for rule in config.rules:
        said = f"{rule.origin}: {rule!r}" if rule.origin else repr(rule)
        if rule.name is not None and is_exact(rule):
            problems.append(_unknown_name(said, rule.name, names))
        problems.append(_unknown_type(said, rule.type, classes, config))
    return [problem for problem in problems if problem]


def _unknown_name(said: str, wanted: str, names: set[str]) -> str:
    """What is wrong with an exact name; nothing where it fits one thing."""
    fits = sorted({name for name in names if wanted in (name, underscored(name))})
    if not fits:
        hint = near(wanted, names) or "see sq.trace(model, args) for the names"
        return f"{said}: the model has no {wanted!r}. Fix: {hint}"
    if len(fits) == 1:
        return ""
    fix = "write the dots of the one, a glob for the other" if wanted in fits else "write the dots"
    return f"{said}: {wanted!r} fits {' and '.join(map(repr, fits))}. Fix: {fix}."


def _unknown_type(said: str, key: object, classes: set[str], config: QuantConfig) -> str:
    """What is wrong with a type key that is a string; nothing where it names something."""
    if not isinstance(key, str):
        return ""
    text = key.rpartition(".")[2]
    own = text.removesuffix("_sophgo")
    known = {pattern.__name__ for pattern in config.patterns} | set(PATTERNS.spellings())
    if text in known or hasattr(nn, own) or own in classes or is_operation(canonical(key)):
        return ""
    hint = near(own, [*known, *classes, *dir(nn), *operations()]) or "use the class itself"
    return f"{said}: type {key!r} is not known. Fix: {hint}"
