"""What a quantized model says where it is taken for a module: it holds no parameters, so it names what does."""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from sophq_func.core.errors import StateError, explain, near

BECAUSE = "it is functions of params and qparams, and holds no tensors"
"""Why a quantized model cannot do what a module can."""

INSTEAD = {
    "forward": "q.apply(params, qparams, x)",
    "__call__": "q.apply(params, qparams, x); q.bind(params, qparams) is a module; torch.compile(q.apply) compiles it",
    "parameters": "params = sq.params_of(model)",
    "named_parameters": "params = sq.params_of(model)",
    "state_dict": "sq.save(path, plan=q.plan, params=params, qparams=qparams), or q.bind(params, qparams).state_dict()",
    "training_step": "q.bind(params, qparams, learn='params') in a module that has it",
}
"""What to write instead of an attribute; of others, that of the bound model."""


class NoModuleError(StateError, AttributeError):
    """A quantized model was taken for a module. An ``AttributeError``, too, so that ``hasattr`` works."""


def refuse_call() -> NoReturn:
    """Raise the error for ``q(x)``."""
    raise StateError(explain("Quantized", "it cannot be called", because=BECAUSE, fix=INSTEAD["__call__"]))


def refuse_attribute(name: str, model: nn.Module | None, own: list[str]) -> NoReturn:
    """Raise the error for an attribute that a quantized model does not have.

    Args:
      name: of the attribute.
      model: what was quantized, without its weights; ``None`` while the quantized model is being made.
      own: names of the attributes that a quantized model has.
    """
    is_of_module = not name.startswith("_") and model is not None and name in dir(model)
    if is_of_module:
        fix = INSTEAD.get(name, f"q.bind(params, qparams).{name}")
        raise NoModuleError(explain("Quantized", f"it has no {name!r} of a module", because=BECAUSE, fix=fix))
    hint = "" if name.startswith("_") else near(name, own)
    raise AttributeError(f"'Quantized' object has no attribute {name!r}" + (f"; {hint}" if hint else ""))
