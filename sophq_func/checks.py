"""What can be wrong with a config once the model is known: names, leaves, and the limits of the chip."""

from __future__ import annotations

from torch import nn

from sophq_func.base import FAKE_QUANTIZERS, OBSERVERS
from sophq_func.errors import explain, near
from sophq_func.functions import canonical, is_operation
from sophq_func.graph import Graph
from sophq_func.patterns import PATTERNS
from sophq_func.rules import QuantConfig, underscored
from sophq_func.scheme import QuantizerConfig
from sophq_func.site import Site
from sophq_func.strategies import activation_quantizer


def is_integer(config: QuantizerConfig) -> bool:
    """Whether codes are integers times a scale."""
    return FAKE_QUANTIZERS.build(config.fake_quantize).integer


def is_scaled_grid(config: QuantizerConfig) -> bool:
    """Whether the quantizer has one scale, known before the forward, that can round a bias."""
    made = FAKE_QUANTIZERS.build(config.fake_quantize)
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
        problems.append(explain(site.quantizer, f"fake quantizer {name}", allowed=allowed, because=why, fix="chip=None"))
    bits = spec.weight_bits if site.role == "weight" else spec.activation_bits
    if bits is not None and is_integer(found) and found.scheme.bits not in bits:
        what, allowed = f"{found.scheme.bits} bits", " or ".join(map(str, bits))
        why, fix = because.format(reasons["bits"]), f"bits={bits[-1]}"
        problems.append(explain(site.quantizer, what, got=found.scheme.bits, allowed=allowed, because=why, fix=fix))
    return problems


def unseen_leaves(graph: Graph, config: QuantConfig) -> list[str]:
    """Problems with modules that the config calls leaves, but into which the trace has looked."""
    inside = [path for path, cls in graph.modules.items() if issubclass(cls, config.leaves or ())]
    if set(inside) <= set(graph.opaque) or not config.leaves:
        return []
    types = ", ".join(cls.__name__ for cls in config.leaves)
    what = f"planning with leaf_module=({types},)"
    because = "the graph was traced without it"
    return [explain("plan", what, because=because, fix="sq.trace(model, args, kwargs, leaf_module=config.leaves)")]


def names_of(graph: Graph) -> set[str]:
    """Every dotted name that a rule may use for a part of a traced model, whether it is quantized or not."""
    names = set(graph.modules) | set(graph.nodes) | set(graph.values) | {name for node in graph for name in node.also}
    names |= {activation_quantizer(value) for value in graph.values}
    for node in graph:
        names.add(f"{node.name}.input_act_fake_quantizer")
        weights = [a for a in node.parameters if a.startswith("weight")] + ["weight"] * ("weight_shape" in node.options)
        names |= {f"{path}.{attribute}_fake_quant" for path in node.paths if path for attribute in weights}
        names |= {f"{node.parameters[attribute]}_fake_quant" for attribute in weights if attribute in node.parameters}
        names |= {f"{operand.parameter}_fake_quant" for operand in node.operands if operand.parameter}
    return names


def unknown_names(names: set[str], classes: set[str], config: QuantConfig) -> list[str]:
    """Problems with exact names and type names in rules that the traced model does not have."""
    problems = []
    known = {pattern.__name__ for pattern in config.patterns} | set(PATTERNS.spellings())
    for rule in config.rules:
        if rule.name is not None and not any(c in rule.name for c in "*?["):
            fits = sorted({name for name in names if rule.name in (name, underscored(name))})
            if not fits:
                hint = near(rule.name, names) or "see sq.trace(model, args) for the names"
                problems.append(f"{rule!r}: the model has no {rule.name!r}. Fix: {hint}")
            elif len(fits) > 1:
                fix = "write the dots" if rule.name not in fits else "write the dots of the one, a glob for the other"
                problems.append(f"{rule!r}: {rule.name!r} fits {' and '.join(map(repr, fits))}. Fix: {fix}.")
        if isinstance(rule.type, str):
            text = rule.type.rpartition(".")[2]
            own = text.removesuffix("_sophgo")
            if not (text in known or hasattr(nn, own) or own in classes or is_operation(canonical(rule.type))):
                hint = near(own, [*known, *classes, *dir(nn)])
                problems.append(f"{rule!r}: type {rule.type!r} is not known. Fix: {hint or 'use the class itself'}")
    return problems
