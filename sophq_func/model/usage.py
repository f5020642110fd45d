"""How the functions of a quantized model are called, for errors about calls that lack arguments."""

from __future__ import annotations

from typing import NoReturn

from sophq_func.core.errors import ConfigError, explain
from sophq_func.core.public import is_absent

CALLS = {
    "apply": "q.apply(params, qparams, x)",
    "apply_and_update": "q.apply_and_update(params, qparams, x)",
    "capture": "q.capture(params, qparams, x)",
    "observe": "q.observe(params, ostate, x)",
    "observe_quantized": "q.observe_quantized(params, ostate, qparams, x)",
    "qparams": "q.qparams(params, ostate)",
}
"""A call of each method that runs in loops."""

SOURCES = {
    "params": "params = sq.params_of(model)",
    "ostate": "ostate = q.init(params)",
    "qparams": "qparams = q.calibrate(params, batches)",
}
"""Where the arguments come from that a quantized model does not hold."""


def refuse_absent(where: str, **given: object) -> NoReturn:
    """Raise the error for a call that lacks arguments.

    Args:
      where: the method.
      **given: by name, what it got, in the order of its signature.

    Raises:
      ConfigError: always.
    """
    absent = [name for name, value in given.items() if is_absent(value)]
    sentence = f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing"
    because = f"q holds no tensors; {', '.join(given)} come first, by position, and all else goes to the model"
    sources = ", ".join(SOURCES[name] for name in absent)
    raise ConfigError(explain(where, sentence, because=because, fix=f"{CALLS[where]}, where {sources}"))
