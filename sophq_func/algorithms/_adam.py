"""Optimizers as pairs of pure functions, and a small Adam."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from sophq_func.core.errors import ConfigError, explain
from sophq_func.core.public import public

Tensors: TypeAlias = Mapping[str, Tensor]
"""Tensors by name."""

Rate: TypeAlias = float | Tensor | Callable[[Tensor], float | Tensor]
"""A learning rate, or a function from the number of steps so far, of shape ``()``, to one."""


class Optimizer(Protocol):
    """What turns gradients into updates: torchopt's and optax-like transformations have this form.

    Attributes:
      init: from what is learned, to the state before any step.
      update: from gradients and a state, to what is added to what is learned, and the next state.
    """

    @property
    def init(self) -> Callable[[Any], Any]: ...

    @property
    def update(self) -> Callable[..., tuple[Any, Any]]: ...


class Transformation(NamedTuple):
    """An :class:`Optimizer` as :func:`adam` returns it."""

    init: Callable[[Tensors], Moments]
    update: Callable[..., tuple[dict[str, Tensor], Moments]]


class Moments(NamedTuple):
    """State of :func:`adam`.

    Attributes:
      steps: number of steps so far, shape ``()``.
      first, second: running means of gradients and of their squares, by name.
    """

    steps: Tensor
    first: dict[str, Tensor]
    second: dict[str, Tensor]


@public
def adam(rate: Rate, decay: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> Transformation:
    """Adam (Kingma and Ba, arXiv:1412.6980) on flat dicts of tensors.

    ``m <- a m + (1 - a) g``, ``v <- b v + (1 - b) g**2``, and ``- rate m' / (sqrt(v') + eps)`` is added, where
    ``m' = m / (1 - a**t)`` and ``v' = v / (1 - b**t)`` after ``t`` steps.

    Args:
      rate: the learning rate: a number, a tensor that may be mapped over, or a function of the number of steps so far.
      decay: ``a`` and ``b``.
      eps: keeps the quotient finite.

    Returns:
      ``(init, update)``.

    Example:
      >>> optimizer = adam(0.1)
      >>> state = optimizer.init({"x": torch.tensor(1.0)})
      >>> updates, state = optimizer.update({"x": torch.tensor(3.0)}, state)
      >>> updates["x"]
      tensor(-0.1000)
    """
    if not callable(rate) and not isinstance(rate, int | float | Tensor):
        allowed = "a number, a tensor, or a function of the number of steps"
        raise ConfigError(explain("adam", "rate is no learning rate", got=rate, allowed=allowed))
    if not isinstance(eps, int | float | Tensor):
        raise ConfigError(explain("adam", "eps must be a number", got=eps, allowed="a positive number"))
    if not isinstance(decay, tuple | list) or len(decay) != 2:
        raise ConfigError(explain("adam", "decay must be two numbers", got=decay, allowed="(0.9, 0.999), for example"))
    a, b = decay

    def init(learned: Tensors) -> Moments:
        zeros = {name: torch.zeros_like(value) for name, value in learned.items()}
        return Moments(torch.zeros(()), zeros, dict(zeros))

    def update(gradients: Tensors, state: Moments, **_: object) -> tuple[dict[str, Tensor], Moments]:
        step = rate(state.steps) if callable(rate) else rate
        count = state.steps + 1
        # in few passes over memory: a weight may have millions of elements
        first = {name: torch.lerp(state.first[name], g, 1 - a) for name, g in gradients.items()}
        second = {name: torch.addcmul(b * state.second[name], g, g, value=1 - b) for name, g in gradients.items()}
        for_first, for_second = 1 - a**count, 1 - b**count
        root, factor = for_second.sqrt(), -step / for_first
        updates = {name: first[name] / (second[name].sqrt() / root + eps) * factor for name in gradients}
        return updates, Moments(count, first, second)

    return Transformation(init, update)
