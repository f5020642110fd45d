"""Single measures: how well each quantizer represents what it is there for, and what it costs the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from sophq_func.core.errors import StateError, explain
from sophq_func.core.pytree import sorted_dict
from sophq_func.model.quantized import Quantized
from sophq_func.model.settings import enabled
from sophq_func.numerics.contracts import QParams


class Fidelity(NamedTuple):
    """One quantizer on one batch; tensors of shape ``()``.

    Attributes:
      lo, hi: range of the values.
      sqnr_db: signal-to-quantization-noise ratio, ``10 log10(sum x**2 / sum (y - x)**2)``, in dB.
    """

    lo: Tensor
    hi: Tensor
    sqnr_db: Tensor


def fidelity(
    q: Quantized, params: Mapping[str, Tensor], qparams: Mapping[str, QParams], /, *args: Any, **kwargs: Any
) -> dict[str, Fidelity]:
    """Range and signal-to-quantization-noise ratio at each quantizer, on the values that reach it in the quantized model.

    What quantizers before it did counts as signal: each is judged for its own noise.

    Returns:
      ``{quantizer name: Fidelity}``, sorted.

    Example:
      >>> import torch, sophq_func as sq
      >>> model, x = torch.nn.Linear(2, 3), torch.randn(4, 2)
      >>> q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
      >>> params = sq.params_of(model)
      >>> bool(fidelity(q, params, q.calibrate(params, [x]), x)["weight_fake_quant"].sqnr_db > 30)
      True
    """
    found = {}
    for name, (before, after) in q.capture(params, qparams, *args, **kwargs).items():
        ratio = before.float().square().sum() / (after - before).float().square().sum()
        found[name] = Fidelity(before.amin(), before.amax(), 10 * ratio.log10())
    return sorted_dict(found)


class Sensitivity(NamedTuple):
    """What one quantizer costs; tensors shaped like the loss.

    Attributes:
      alone: the loss where it is the only one that is on.
      without: the loss where it is the only one that is off.
      added: ``alone``, less the loss where all are off.
      saved: the loss where all are on, less ``without``.
    """

    alone: Tensor
    without: Tensor
    added: Tensor
    saved: Tensor


def sensitivity(
    q: Quantized,
    params: Mapping[str, Tensor],
    qparams: Mapping[str, QParams],
    batch: Any,
    loss: Callable[[Any], Tensor],
    *,
    how: str = "auto",
    progress: bool = True,
) -> dict[str, Sensitivity]:
    """What each quantizer costs the loss: on alone, in a model that is float otherwise; and off alone.

    One sweep over one-hot masks and their complements, ``2 n + 2`` runs for ``n`` quantizers, without gradients. The loss
    is measured, not approximated; what two quantizers do together is only in ``saved``.

    Args:
      q: a quantized model whose weights are not frozen.
      params, qparams: see :meth:`Quantized.apply`; masks that :func:`sophq_func.enabled` put there are replaced.
      batch: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
      loss: from the model's output to a tensor.
      how, progress: see :meth:`Quantized.sweep`.

    Returns:
      ``{quantizer name: Sensitivity}``, sorted, without quantizers that only observe.

    Raises:
      StateError: frozen weights, a loss that is no tensor; see :meth:`Quantized.sweep`.

    Example:
      >>> import torch, sophq_func as sq
      >>> model, x = torch.nn.Linear(2, 3), torch.randn(4, 2)
      >>> q = sq.quantize(model, sq.QuantConfig(weight=sq.override(bits=2)), example_args=(x,))
      >>> params = sq.params_of(model)
      >>> error = lambda out: (out - model(x)).square().mean()
      >>> found = sensitivity(q, params, q.calibrate(params, [x]), x, error)
      >>> max(found, key=lambda name: found[name].added)
      'weight_fake_quant'
    """
    if q.frozen:
        because, fix = "its weights cannot be switched", "use the q that was frozen"
        raise StateError(explain("sensitivity", "a frozen model is not possible", because=because, fix=fix))
    on, off = enabled(qparams, True), enabled(qparams, False)
    names = [name for name in sorted(qparams) if name in q.plan and not q.plan[name].observe_only]
    alone = [{**off, name: on[name]} for name in names]
    without = [{**on, name: off[name]} for name in names]

    def measured(output: Any) -> Tensor:
        found = loss(output)
        if not isinstance(found, Tensor):
            fix = "return a tensor from loss"
            raise StateError(
                explain("sensitivity", "this loss is not possible", got=type(found).__name__, allowed="a tensor", fix=fix)
            )
        return found

    found = q.sweep(params, [off, *alone, on, *without], batch, reduce=measured, how=how, progress=progress)
    none, all_ = found[0], found[len(names) + 1]
    pairs = zip(names, found[1:], found[len(names) + 2 :], strict=False)
    return {name: Sensitivity(only, rest, only - none, all_ - rest) for name, only, rest in pairs}
