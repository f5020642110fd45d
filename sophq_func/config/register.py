"""Pieces of your own, by name: observers, fake quantizers, number formats, chips, strategies, fused patterns, algorithms.

What is registered is used like what the library has: by name in configs and in the three dictionaries, as a function of
``sq.observers`` and ``sq.fake_quantize``, in suggestions of error messages, in plans as JSON, and in checkpoints. Names are
the same in upper and lower case. ``sq.testing`` holds a piece to the laws of the library's own.

A package registers when it is imported. To be found by name without that, it declares the module under the entry points
``sophq_func.plugins`` in its ``pyproject.toml``; it is imported when somebody uses a name that is not registered::

    [project.entry-points."sophq_func.plugins"]
    my_pieces = "my_package.pieces"
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

from torch import nn

from sophq_func.config.algorithms import ALGORITHMS, Algorithm, Measure, Run, check_promises
from sophq_func.config.chips import CHIPS, ChipSpec
from sophq_func.config.patterns import Fused, Part, registered
from sophq_func.config.strategies import PLACEMENTS, Strategy
from sophq_func.core.errors import ConfigError, explain
from sophq_func.core.public import check_fields, public_as
from sophq_func.core.registry import Spec
from sophq_func.fake_quantize import scaled
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, OBSERVERS, FakeQuantize, Observer
from sophq_func.numerics.formats import FORMATS, Format

P = ParamSpec("P")
F = TypeVar("F", bound=Run)

__all__ = ["algorithm", "chip", "fake_quantizer", "format", "observer", "pattern", "strategy"]


def __dir__() -> list[str]:
    return __all__


@public_as("register.algorithm")
def algorithm(
    name: str,
    *aliases: str,
    rounds: bool = False,
    keeps_float: bool = False,
    resumes: bool = False,
    measure: Measure | None = None,
    options: Mapping[str, object] | None = None,
) -> Callable[[F], F]:
    """Decorator that registers a whole-model algorithm, ``(q, params, qparams, batches, **options) -> (params, qparams)``.

    It becomes ``sq.algorithms.<name>``. The function itself is returned unchanged.

    Args:
      name: by which ``sq.algorithms`` has it.
      *aliases: other names for the same.
      rounds, keeps_float, resumes, measure, options: what it promises, see :class:`~sophq_func.config.algorithms.Algorithm`.

    Raises:
      ConfigError: a name that is taken; no function.

    Example:
      >>> import sophq_func as sq
      >>> @sq.register.algorithm("halve_weights", options={"by": 4.0})
      ... def halve_weights(q, params, qparams, batches, by=2.0):
      ...     return {name: tensor / by for name, tensor in params.items()}, dict(qparams)
      >>> sq.algorithms.halve_weights is halve_weights
      True
    """
    ALGORITHMS.check_new(name, *aliases)
    promises = {"rounds": rounds, "keeps_float": keeps_float, "resumes": resumes}
    check_promises("register.algorithm", promises, measure, options)

    def decorate(run: F) -> F:
        ALGORITHMS.add(name, Algorithm(run=run, measure=measure, options=options or {}, **promises), *aliases)
        return run

    return decorate


@public_as("register.observer")
def observer(name: str, *aliases: str, **renamed: str) -> Callable[[Callable[P, Observer]], Callable[P, Spec]]:
    """Decorator that registers an observer: a function of options that returns a :class:`sophq_func.Observer`.

    The decorated function returns a :class:`sophq_func.Spec`, data for a config.

    Args:
      name: by which a config names it.
      *aliases: other names for the same.
      **renamed: other names of options, ``foreign="own"``.

    Raises:
      ConfigError: a name that is taken; a function that returns something else.

    Example:
      >>> import sophq_func as sq
      >>> @sq.register.observer("half_range")
      ... def half_range(share: float = 0.5):
      ...     whole = sq.observer("minmax")
      ...
      ...     def qparams(state, scheme):
      ...         found = whole.qparams(state, scheme)
      ...         return found._replace(scale=found.scale * share)
      ...
      ...     return whole._replace(qparams=qparams)
      >>> sq.observers.half_range(share=0.25)
      half_range(share=0.25)
      >>> sq.override(observer="Half_Range")
      override(observer=half_range(share=0.5))
    """

    OBSERVERS.check_new(name, *aliases)

    def decorate(build: Callable[P, Observer]) -> Callable[P, Spec]:
        _check_result("register.observer", name, build, Observer)
        return OBSERVERS.register(name, *aliases, **renamed)(build)

    return decorate


@public_as("register.fake_quantizer")
def fake_quantizer(name: str, *aliases: str, **renamed: str) -> Callable[[Callable[P, FakeQuantize]], Callable[P, Spec]]:
    """Decorator that registers a fake quantizer: a function of options that returns a :class:`sophq_func.FakeQuantize`.

    The decorated function returns a :class:`sophq_func.Spec`, data for a config.

    Args:
      name: by which a config names it.
      *aliases: other names for the same.
      **renamed: other names of options, ``foreign="own"``.

    Raises:
      ConfigError: a name that is taken; a function that returns something else.

    Example:
      >>> import sophq_func as sq
      >>> @sq.register.fake_quantizer("fixed_by_another_name")
      ... def fixed_by_another_name():
      ...     return sq.fake_quantizer("fixed")
      >>> sq.fake_quantizer("fixed_by_another_name").integer
      True
    """

    FAKE_QUANTIZERS.check_new(name, *aliases)

    def decorate(build: Callable[P, FakeQuantize]) -> Callable[P, Spec]:
        _check_result("register.fake_quantizer", name, build, FakeQuantize)
        return FAKE_QUANTIZERS.register(name, *aliases, **renamed)(build)

    return decorate


def _check_result(where: str, name: object, build: object, kind: type) -> None:
    """Raise a :class:`ConfigError` unless a factory makes what it must; one with options that must be given passes."""
    fix = f'@sq.{where}("my_name") above a function that returns a sq.{kind.__name__}'
    if not callable(build):
        raise ConfigError(explain(where, f"{name!r} is registered with no function", got=build, fix=fix))
    if any(option.default is option.empty for option in inspect.signature(build).parameters.values()):
        return
    made = build()
    if not isinstance(made, kind):
        sentence, allowed = f"{name!r} makes no {kind.__name__}", f"a sq.{kind.__name__}"
        raise ConfigError(explain(where, sentence, got=type(made).__name__, allowed=allowed, fix=fix))


@public_as("register.format")
def format(name: str, form: Format, *aliases: str) -> Callable[..., Spec]:  # noqa: A001 - used as register.format
    """Register a number format as a fake quantizer that rounds to it, with a scale for its largest value.

    ``y = form.round(x / s) * s`` with ``s = amax / form.largest``, ``amax`` from the observer for each scale of the scheme's
    granularity. Gradient 1 to ``x``, none to ``s``. Codes are indices into ``form.values()``, where these are at most 256.

    Args:
      name: of the fake quantizer.
      form: from ``sq.formats.int_``, ``float_`` or ``codebook``, or anything with ``largest``, ``values`` and ``round``.
      *aliases: other names for the same.

    Returns:
      The function of the fake quantizer, which takes ``rounding="stochastic"``.

    Raises:
      ConfigError: a name that is taken; no format.

    Example:
      >>> import sophq_func as sq
      >>> e3m4 = sq.register.format("e3m4", sq.formats.float_(3, 4))
      >>> sq.override(fake_quantize="e3m4")
      override(fake_quantize=e3m4())
    """
    if not all(hasattr(form, attribute) for attribute in ("largest", "values", "round")):
        fix = "sq.formats.float_(4, 3), for example"
        raise ConfigError(explain("register.format", f"{name!r} is no format", got=form, fix=fix))

    def build(*, rounding: str = "nearest") -> FakeQuantize:
        return scaled(name, form, rounding=rounding)

    FORMATS.check_new(name, *aliases)
    build.__doc__ = f"The nearest value of {form!r}, times a scale."
    build.__name__ = build.__qualname__ = str(name)
    function = FAKE_QUANTIZERS.register(name, *aliases)(build)
    FORMATS.add(name, form, *aliases)
    return function


@public_as("register.chip")
def chip(name: str, spec: ChipSpec, *aliases: str) -> ChipSpec:
    """Register a chip: default configs and limits.

    Args:
      name: by which a config and the dictionaries name it.
      spec: its defaults and limits.
      *aliases: other names for the same.

    Returns:
      ``spec``, which ``QuantConfig(chip=...)`` takes for the name; type checkers know the names of the library only.

    Raises:
      ConfigError: a name that is taken; no spec.

    Example:
      >>> import sophq_func as sq
      >>> known = sq.CHIPS.get("BM1690")
      >>> narrow = sq.ChipSpec(weight=known.weight, activation=known.activation, weight_bits=(8,), activation_bits=(8,))
      >>> narrow = sq.register.chip("Narrow8", narrow)
      >>> sq.QuantConfig(chip=narrow).chip
      'Narrow8'
    """
    _check_kind("register.chip", name, spec, ChipSpec)
    CHIPS.add(name, spec, *aliases)
    return spec


@public_as("register.strategy")
def strategy(name: str, strategy: Strategy, *aliases: str) -> Strategy:
    """Register a strategy: where activation quantizers go.

    Args:
      name: by which a config names it.
      strategy: a function from a graph to a placement, and what else belongs to it.
      *aliases: other names for the same.

    Returns:
      ``strategy``, which ``QuantConfig(strategy=...)`` takes for the name; type checkers know the names of the library only.

    Raises:
      ConfigError: a name that is taken; no strategy.

    Example:
      >>> import torch, sophq_func as sq
      >>> def place(graph, requests):
      ...     inputs = {operand.value for node in graph for operand in node.operands if node.function == "linear"}
      ...     return sq.strategies.Placement(dict.fromkeys(inputs, "strategy Inputs: a linear layer reads it"))
      >>> layers = (torch.nn.Linear,)
      >>> inputs = sq.register.strategy("Inputs", sq.strategies.Strategy(place, weights=layers))
      >>> sq.QuantConfig(strategy=inputs).strategy
      'Inputs'
    """
    _check_kind("register.strategy", name, strategy, Strategy)
    are_classes = all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in strategy.weights)
    if not callable(strategy.place) or not are_classes:
        allowed, fix = "a function, and classes of modules", "sq.strategies.Strategy(place, weights=(torch.nn.Linear,))"
        raise ConfigError(explain("register.strategy", f"{name!r} places nothing", got=strategy, allowed=allowed, fix=fix))
    PLACEMENTS.add(name, strategy, *aliases)
    return strategy


def _check_kind(where: str, name: object, given: object, kind: type) -> None:
    if not isinstance(given, kind):
        sentence, allowed = f"{name!r} is no {kind.__name__}", f"a {kind.__name__}"
        raise ConfigError(explain(where, sentence, got=type(given).__name__, allowed=allowed))
    if isinstance(given, tuple):
        check_fields(where, given)


@public_as("register.pattern")
def pattern(name: str, *parts: Part) -> type[Fused]:
    """Register a fused pattern, which every later plan fuses; :func:`sophq_func.patterns.fused` makes one for one config.

    Args:
      name: by which rules name it, case included.
      *parts: two or more module classes or functions, in the order in which they are called.

    Raises:
      ConfigError: a name that is taken or is no identifier; fewer than two parts, or one that is no class or function.

    Example:
      >>> import torch, sophq_func as sq
      >>> sq.register.pattern("LinearHardshrink", torch.nn.Linear, torch.nn.Hardshrink).__name__
      'LinearHardshrink'
    """
    return registered(name, *parts)
