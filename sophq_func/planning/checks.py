"""What can be wrong with a config once the model is known: names, leaf modules, and the limits of the chip."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from functools import lru_cache
from math import prod

from torch import nn

from sophq_func.capture.graph import Graph
from sophq_func.config.matching import fits_any, is_glob
from sophq_func.config.names import underscored, value_quantizer
from sophq_func.config.patterns import PATTERNS
from sophq_func.config.rules import QuantConfig, Rule
from sophq_func.config.site import Site, path_and_those_around
from sophq_func.core.errors import explain, near
from sophq_func.core.operations import CONTRACTIONS, canonical, is_operation, operations
from sophq_func.core.registry import Spec
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, OBSERVERS, FakeQuantize
from sophq_func.numerics.granularity import PerBlock, PerGroup
from sophq_func.numerics.layout import indivisible, uneven
from sophq_func.numerics.scheme import QuantizerConfig
from sophq_func.planning.strategies import reached

OPERATIONS = "operations (additional_function_type, additional_module_type)"
"""The field of a config with further operations, for errors, beside the keys that it is translated from."""


# A plan has many quantizers, and few different specs among them.
@lru_cache(maxsize=256)
def _fake_quantizer(spec: Spec) -> FakeQuantize:
    """The functions that a spec describes."""
    return FAKE_QUANTIZERS.build(spec)


def is_integer(config: QuantizerConfig) -> bool:
    """Whether the quantizer's codes are integers on a uniform grid, as its fake quantizer says; no float or table codes."""
    return _fake_quantizer(config.fake_quantize).integer


def block_size(config: QuantizerConfig) -> int:
    """How many elements of an axis share a scale in the quantizer's format; 0 in formats without blocks."""
    return _fake_quantizer(config.fake_quantize).block_size


def is_scaled_grid(config: QuantizerConfig) -> bool:
    """Whether the quantizer has a scale that is known before the forward, so that a bias can be rounded with it."""
    fake_quantizer = _fake_quantizer(config.fake_quantize)
    has_scale = fake_quantizer.integer or fake_quantizer.scales_bias
    return has_scale and not config.observe_only and not config.scheme.dynamic


def violations(config: QuantConfig, site: Site, quantizer: QuantizerConfig, reasons: Mapping[str, str]) -> list[str]:
    """What the chip forbids about one quantizer.

    Args:
      config: what is asked for.
      site: where the quantizer sits.
      quantizer: its config.
      reasons: for each field of it, what decided it.

    Raises:
      ConfigError: the observer or the fake quantizer is not registered.
    """
    name = FAKE_QUANTIZERS.canonical(quantizer.fake_quantize.name)
    OBSERVERS.canonical(quantizer.observer.name)  # for its error: no chip limits the observer
    if config.chip is None:
        return []
    problems = []
    fake_quantizers = config.spec.fake_quantizers
    if fake_quantizers is not None and name not in fake_quantizers:
        sentence, allowed = f"the chip does not allow fake quantizer {name}", " or ".join(fake_quantizers)
        because = f"chip {config.chip}; set by {reasons['fake_quantize']}"
        problems.append(explain(site.quantizer, sentence, allowed=allowed, because=because, fix="chip=None"))
    allowed_bits = config.spec.weight_bits if site.role == "weight" else config.spec.activation_bits
    bits = quantizer.scheme.bits
    if allowed_bits is not None and is_integer(quantizer) and bits not in allowed_bits:
        sentence, allowed = f"the chip does not allow {bits} bits", " or ".join(map(str, allowed_bits))
        because = f"chip {config.chip}; set by {reasons['bits']}"
        fix = f"bits={allowed_bits[-1]}"  # the last one is the widest
        problems.append(explain(site.quantizer, sentence, got=bits, allowed=allowed, because=because, fix=fix))
    return problems


def shape_problems(site: Site, quantizer: QuantizerConfig, unknown: str) -> list[str]:
    """Problems with a weight that cannot be cut into groups or blocks.

    Args:
      site: of the weight.
      quantizer: its config.
      unknown: name of a call that does not tell which axes of the weight it sums over; empty where all do.
    """
    granularity, shape, name = quantizer.scheme.granularity, site.shape, site.quantizer
    fix = f'sq.Rule(name="{name}", weight=sq.override(granularity=sq.PerChannel()))'
    has_blocks = bool(block_size(quantizer))
    if unknown and (has_blocks or isinstance(granularity, PerGroup)):
        because = f"{unknown} does not tell which axes of it are summed over, along which its groups must lie"
        fix = f'sq.Rule(name="{name}", weight=None), or a granularity and a format without groups'
        return [explain(name, "this weight has no groups", because=because, fix=fix)]
    if isinstance(granularity, PerGroup) and shape:
        length = _channel_length(site, granularity)
        return [indivisible(name, length, granularity, fix)] if length % granularity.size else []
    if isinstance(granularity, PerBlock) and shape:
        high, wide = shape[0], prod(shape[1:])
        is_even = high % granularity.rows == 0 and wide % granularity.columns == 0
        return [] if is_even else [uneven(name, high, wide, granularity, fix)]
    return []


def _channel_length(site: Site, granularity: PerGroup) -> int:
    """How many elements each channel of a weight has."""
    axis = granularity.axis if isinstance(granularity.axis, tuple) else (granularity.axis or 0,)
    axes = {one % len(site.shape) for one in axis if -len(site.shape) <= one < len(site.shape)}
    length = prod(size for i, size in enumerate(site.shape) if i not in axes)
    # A grouped deconvolution has output channels along both of its first axes.
    return length // site.groups if axes == {1} and site.axis == 1 else length


def unseen_leaves(graph: Graph, config: QuantConfig) -> list[str]:
    """Problems with modules that the config calls leaves, but whose inner calls the trace recorded."""
    leaves = {path for path, cls in graph.modules.items() if issubclass(cls, config.leaves)}
    if leaves <= set(graph.opaque):
        return []
    types = ", ".join(cls.__name__ for cls in config.leaves)
    sentence = f"the calls inside leaf_module=({types},) were traced"
    because, fix = "the trace was made without it", "sq.trace(model, args, kwargs, leaf_module=config.leaves)"
    return [explain("plan", sentence, because=because, fix=fix)]


FUNCTION = "sq.quantize(f, config, params=params, example_args=(x,)) for what is called as f(params, x)"
"""How a model is quantized that takes its weights as an argument."""


def is_weight_only(config: QuantConfig) -> bool:
    """Whether a config quantizes weights, and no values."""
    return config.weight is not None and (config.activation is None or config.quantmode == "weight_only")


def multiplies_only_inputs(graph: Graph) -> bool:
    """Whether a model sums over products of its inputs, and over none with a parameter."""
    varying = reached(graph, lambda node: node.kind == "input")
    products = [node for node in graph if node.function in CONTRACTIONS]
    # a layer that sums has a matrix or more; a vector only scales or shifts
    in_layers = any(len(graph.shapes[name]) > 1 for node in graph for name in node.parameters.values())
    in_products = any(operand.value not in varying for node in products for operand in node.operands)
    return bool(products) and not in_layers and not in_products


def names_of(graph: Graph) -> set[str]:
    """Every dotted name that a rule may use for a module or value of a traced model, whether it is quantized or not."""
    names = {*graph.modules, *graph.nodes, *graph.values}
    names.update(name for node in graph for name in node.also)
    names.update(value_quantizer(value) for value in graph.values)
    names.update(name for parameter in graph.shapes for name in path_and_those_around(parameter))
    return names


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
        # The key of a dictionary from which the rule was translated, if any, is what its author wrote.
        said = f"{rule.origin}: {rule!r}" if rule.origin else repr(rule)
        if rule.name is not None and not is_glob(rule.name):
            problems.append(_unknown_name(said, rule.name, fitting[rule.name], names))
        problems.append(_unknown_type(said, rule.type, classes, config))
    return [problem for problem in problems if problem]


def stray_globs(names: Set[str], rules: Iterable[Rule]) -> list[str]:
    """A warning for each rule whose glob fits no name of the model.

    Rules of the three dictionaries are left out: sophgo-mq passes over names that a model does not have.

    Args:
      names: every dotted name that a rule may use.
      rules: those that changed nothing.
    """
    globs = {rule.name: rule for rule in rules if rule.name is not None and is_glob(rule.name) and not rule.origin}
    spellings = {*names, *map(underscored, names)} if globs else set()
    return [_stray(rule, glob, names) for glob, rule in globs.items() if not fits_any(glob, spellings)]


def _stray(rule: Rule, glob: str, names: Set[str]) -> str:
    """The warning of a rule whose glob fits nothing."""
    literal = glob.strip("*?.")
    # without a dot a glob means a step of paths, such as ``q_proj``, to which no whole path is similar
    known = names if "." in literal else {step for name in names for step in name.split(".")}
    hint = near(literal, known) or "see sq.trace(model, args) for the names"
    return explain(repr(rule), f"its glob {glob!r} fits no name of the model", fix=hint)


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
    # The dots single out a name that has dots more than ``wanted``; the name that is spelled like it needs a glob.
    fix = "write the dots of the one, a glob for the other" if wanted in fitting else "write the dots"
    return f"{said}: {wanted!r} fits {' and '.join(map(repr, sorted(fitting)))}. Fix: {fix}."


def _unknown_type(said: str, key: object, classes: Set[str], config: QuantConfig) -> str:
    """What is wrong with a type key that is a string; empty where it names something.

    Args:
      said: the rule or field that has the key, in words.
      key: the type key.
      classes: names of the classes of the model's modules.
      config: its patterns count, too.
    """
    if not isinstance(key, str):
        return ""
    name = key.rpartition(".")[2]
    class_name = name.removesuffix("_sophgo")  # sophgo-mq's own classes are named so after those of torch
    patterns = {pattern.__name__ for pattern in config.patterns} | set(PATTERNS.spellings())
    if name in patterns or class_name in classes or hasattr(nn, class_name) or is_operation(canonical(key)):
        return ""
    hint = near(class_name, [*patterns, *classes, *dir(nn), *operations()]) or "use the class itself"
    return f"{said}: type {key!r} is not known. Fix: {hint}"
