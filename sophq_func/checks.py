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


def is_integer(config: QuantizerConfig) -> bool:
    """Whether codes are integers times a scale."""
    return FAKE_QUANTIZERS.build(config.fake_quantize).integer


def is_scaled_grid(config: QuantizerConfig) -> bool:
    """Whether the quantizer has one scale, known before the forward, that can round a bias."""
    made = FAKE_QUANTIZERS.build(config.fake_quantize)
    return (made.integer or made.scales_bias) and not config.observe_only and not config.scheme.dynamic


def violations(config: QuantConfig, site: Site, found: QuantizerConfig, reasons: dict[str, str]) -> list[str]:
    """What the chip forbids about one quantizer."""
    FAKE_QUANTIZERS.canonical(found.fake_quantize.name)
    OBSERVERS.canonical(found.observer.name)
    allowed = config.spec.weight_bits if site.role == "weight" else config.spec.activation_bits
    if config.chip is None or allowed is None or not is_integer(found):
        return []
    if found.scheme.bits in allowed:
        return []
    text = " or ".join(map(str, allowed))
    because = f"chip {config.chip}; bits set by {reasons['bits']}"
    what = f"{found.scheme.bits} bits"
    return [explain(site.quantizer, what, got=found.scheme.bits, allowed=text, because=because, fix=f"bits={allowed[-1]}")]


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
    """Every dotted name that a rule may use for a part of a traced model."""
    names = set(graph.modules) | set(graph.nodes) | set(graph.values) | {name for node in graph for name in node.also}
    names |= {f"{value}.post_act_fake_quantizer" for value in graph.values}
    names |= {f"{node.name}.input_act_fake_quantizer" for node in graph}
    names |= {f"{p}_fake_quant" for node in graph for p in node.parameters.values()}
    names |= {f"{path}.{attribute}_fake_quant" for n in graph for path in n.paths for attribute in (*n.parameters, "weight")}
    names |= {f"{path}.post_act_fake_quantizer" for node in graph for path in node.paths if path}
    return names | {f"{o.parameter}_fake_quant" for node in graph for o in node.operands if o.parameter}


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
                problems.append(f"{rule!r}: {rule.name!r} fits {' and '.join(map(repr, fits))}. Fix: write the dots.")
        if isinstance(rule.type, str):
            text = rule.type.rpartition(".")[2]
            own = text.removesuffix("_sophgo")
            if not (text in known or hasattr(nn, own) or own in classes or is_operation(canonical(rule.type))):
                hint = near(own, [*known, *classes, *dir(nn)])
                problems.append(f"{rule!r}: type {rule.type!r} is not known. Fix: {hint or 'use the class itself'}")
    return problems
