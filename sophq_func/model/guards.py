"""What a compiled function asks at each call of a quantized model in it: nothing, since that cannot change.

Dynamo guards all Python objects that it read while it traced: for a network of twenty layers some 7,000 questions, which
take longer than the network. A quantized model is immutable, and the constants of this library are none of the data of a
call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sophq_func.core.errors import ConfigError, explain
from sophq_func.core.public import public
from sophq_func.model.engine import IDENTITY, Engine

OURS = f"G['__import_{__name__.partition('.')[0]}"
"""How the names of guards begin that ask for what the modules of this library hold."""


class Guard(Protocol):
    """What is used of ``torch._guards.GuardFilterEntry``."""

    name: str
    value: object


@public
def skip_guards_on_quantized(guards: Sequence[Guard]) -> list[bool]:
    """Which guards a compiled function keeps: all but those on the inside of quantized models and of this library.

    For the option ``guard_filter_fn`` of ``torch.compile``. What remains is asked at each call: dtypes, shapes and devices
    of params, qparams and arguments, modes such as ``torch.no_grad``, the user's own objects, and which quantized model it
    is.

    Args:
      guards: as torch hands them over, with ``name`` and ``value``.

    Returns:
      For each guard, whether it is kept.

    Raises:
      ConfigError: it was called with something else.

    Example:
      >>> import torch, sophq_func as sq
      >>> model, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
      >>> q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
      >>> fast = torch.compile(q.apply, options={"guard_filter_fn": sq.skip_guards_on_quantized})
    """
    if not all(hasattr(guard, "name") and hasattr(guard, "value") for guard in guards):
        allowed, fix = "a sequence of guards, from torch.compile", 'options={"guard_filter_fn": sq.skip_guards_on_quantized}'
        raise ConfigError(explain("skip_guards_on_quantized", "these are no guards", got=guards, allowed=allowed, fix=fix))
    names = {guard.name for guard in guards}
    engines = {guard.name for guard in guards if isinstance(guard.value, Engine)}
    # without the question which one it is, the program of one model would serve another
    known = {name for name in engines if f"{name}.{IDENTITY}" in names}
    identities, inside = {f"{name}.{IDENTITY}" for name in known}, tuple(f"{name}." for name in known)
    return [guard.name in identities or not guard.name.startswith((*inside, OURS)) for guard in guards]
