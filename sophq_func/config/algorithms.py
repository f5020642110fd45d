"""Algorithms of whole models, as data: the function, and what it promises. They lie in the room ``algorithms``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from sophq_func.core.errors import ConfigError, explain, raise_all
from sophq_func.core.public import constructor
from sophq_func.core.registry import Registry

Run: TypeAlias = Callable[..., tuple[Any, Any]]
"""``(q, params, qparams, batches, **options) -> (params, qparams)``."""

Measure: TypeAlias = Callable[[Any, Any, Any, Any, Any], Tensor]
"""``(q, float_params, params, qparams, batches) -> error``: how far a setting is from the float model; less is better."""


@constructor
@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A function of a whole model that gives better numbers for the same plan, and what it promises.

    All promise: ``run(q, params, qparams, batches, **options)`` returns new params and qparams with the same names, shapes
    and dtypes; its inputs and the model stay as they are; the same inputs give the same bits (``generator=`` in the same
    state where there is chance); ``where=`` restricts the weights that change; ``progress=False`` shows nothing.

    Attributes:
      run: the function.
      rounds: the weights that it works on come back on their grids: ``q.freeze(params, qparams)`` changes none of them.
      keeps_float: the float model with the new params computes what it computed before, up to 1e-4 of its largest output.
      resumes: it takes ``checkpoint=``, the path of a file: a run that was killed goes on there, to the same bits.
      measure: what it never makes worse; ``None`` where it proves that inside, for each weight or block.
      options: with which the laws run it: few steps, for example.

    Example:
      >>> import sophq_func as sq
      >>> def as_it_was(q, params, qparams, batches):
      ...     return params, qparams
      >>> Algorithm(run=as_it_was, keeps_float=True).rounds
      False
    """

    run: Run
    rounds: bool = False
    keeps_float: bool = False
    resumes: bool = False
    measure: Measure | None = None
    options: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.run):
            allowed = "a function (q, params, qparams, batches, **options)"
            raise ConfigError(explain("Algorithm", "run cannot be called", got=self.run, allowed=allowed))
        promises = {flag: getattr(self, flag) for flag in ("rounds", "keeps_float", "resumes")}
        check_promises("Algorithm", promises, self.measure, self.options)


def check_promises(where: str, promises: Mapping[str, bool], measure: Measure | None, options: object) -> None:
    """Raise a :class:`ConfigError` that names everything that is wrong with what an algorithm promises.

    Args:
      where: the function or class that the error names.
      promises: the flags of an :class:`Algorithm`.
      measure, options: see there.
    """
    problems = [
        explain(where, f"{flag} must be a bool", got=promise, allowed="True or False")
        for flag, promise in promises.items()
        if not isinstance(promise, bool)
    ]
    if measure is not None and not callable(measure):
        allowed = "a function (q, float_params, params, qparams, batches), or None"
        problems.append(explain(where, "measure cannot be called", got=measure, allowed=allowed))
    if not isinstance(options, Mapping | None):
        problems.append(explain(where, "options must be a dict", got=options, allowed="a dict {name: value}"))
    raise_all(problems)


ALGORITHMS: Registry[Algorithm] = Registry("algorithm")
