"""What can be wrong with a config once the model is known: names, leaves, and the limits of the chip."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from functools import lru_cache

from torch import nn

from sophq_func.capture.graph import Graph
from sophq_func.config.matching import is_glob
from sophq_func.config.names import underscored, value_quantizer
from sophq_func.config.patterns import PATTERNS
from sophq_func.config.rules import QuantConfig
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


def unknown_names(names: Set[str], classes: Set[str], config: QuantConfig) -> list[str]:
    """Problems with names and type names in a config that the traced model does not have.

    Args:
      names: every dotted name that a rule may use.
      classes: names of the classes of the model's modules.
      config: what is asked for.
    """
    problems = [_unknown_type(OPERATIONS, key, classes, config) for key in config.operations]
    fitting = _fitting_names(names, {rule.name for rule in config.rules if rule.name is not None})
    for rule in config.rules:
        said = f"{rule.origin}: {rule!r}" if rule.origin else repr(rule)
        if rule.name is not None and not is_glob(rule.name):
            problems.append(_unknown_name(said, rule.name, fitting[rule.name], names))
        problems.append(_unknown_type(said, rule.type, classes, config))
    return [problem for problem in problems if problem]


def _fitting_names(names: Iterable[str], wanted: Iterable[str]) -> Mapping[str, Set[str]]:
    """For each wanted name, the names of the model that it means, spelled with dots or with underscores.

    One pass for all of them: a large model has many more names than its config has rules.
    """
    fitting: dict[str, set[str]] = {name: set() for name in wanted}
    for name in names:
        for spelling in (name, underscored(name)):
            if spelling in fitting:
                fitting[spelling].add(name)
    return fitting


def _unknown_name(said: str, wanted: str, fitting: Set[str], names: Set[str]) -> str:
    """What is wrong with an exact name; empty where it means one thing.

    Args:
      said: the rule that has the name, in words.
      wanted: the name.
      fitting: the names of the model that it means.
      names: all of the model's names.
    """
    if len(fitting) == 1:
        return ""
    if not fitting:
        hint = near(wanted, names) or "see sq.trace(model, args) for the names"
        return f"{said}: the model has no {wanted!r}. Fix: {hint}"
    fix = "write the dots of the one, a glob for the other" if wanted in fitting else "write the dots"
    return f"{said}: {wanted!r} fits {' and '.join(map(repr, sorted(fitting)))}. Fix: {fix}."


def _unknown_type(said: str, key: object, classes: Set[str], config: QuantConfig) -> str:
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
