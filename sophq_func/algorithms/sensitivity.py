"""One measure for each quantizer: how well it represents its values, and what it costs the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from sophq_func.core.errors import StateError, check_flags, explain
from sophq_func.core.public import public
from sophq_func.core.pytree import sorted_dict
from sophq_func.core.types import Args, Given, Kwargs, Output
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


@public
def fidelity(
    q: Quantized, params: Given, qparams: Mapping[str, QParams], /, *args: object, **kwargs: object
) -> dict[str, Fidelity]:
    """Range and signal-to-quantization-noise ratio at each quantizer, on the values that reach it in the quantized model.

    Errors of the quantizers before it belong to those values: each is measured for its own noise alone.

    Args:
      q: a quantized model.
      params, qparams: see :meth:`Quantized.apply`.
      *args, **kwargs: arguments of the model.

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
    measured = {}
    for name, (before, after) in q.capture(params, qparams, *args, **kwargs).items():
        signal = before.float().square().sum()
        noise = (after - before).float().square().sum()
        measured[name] = Fidelity(before.amin(), before.amax(), 10 * (signal / noise).log10())
    return sorted_dict(measured)


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


@public
def sensitivity(
    q: Quantized,
    params: Given,
    qparams: Mapping[str, QParams],
    batch: Tensor | Args | Kwargs,
    loss: Callable[[Output], Tensor],
    *,
    how: str = "auto",
    progress: bool = True,
) -> dict[str, Sensitivity]:
    """The cost of each quantizer: the loss where it alone is on, with all others off, and where it alone is off.

    One sweep over one-hot masks and their complements, ``2 n + 2`` runs for ``n`` quantizers, without gradients. The loss
    is measured, not approximated; the joint effect of several quantizers shows only in ``saved``.

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
    check_flags("sensitivity", {"progress": progress})
    if q.frozen:
        because, fix = "its weights cannot be switched between float and quantized", "use the q that was frozen"
        raise StateError(explain("sensitivity", "a frozen model cannot be measured", because=because, fix=fix))
    on, off = enabled(qparams, True), enabled(qparams, False)
    names = [name for name in sorted(qparams) if name in q.plan and not q.plan[name].observe_only]
    alone = [{**off, name: on[name]} for name in names]
    without = [{**on, name: off[name]} for name in names]

    def checked_loss(output: Output) -> Tensor:
        result = loss(output)
        if not isinstance(result, Tensor):
            got, fix = type(result).__name__, "return a tensor from loss"
            raise StateError(explain("sensitivity", "loss must return a tensor", got=got, allowed="a tensor", fix=fix))
        return result

    settings = [off, *alone, on, *without]
    losses = q.sweep(params, settings, batch, reduce=checked_loss, how=how, progress=progress)
    count = len(names)
    loss_off, losses_alone = losses[0], losses[1 : count + 1]
    loss_on, losses_without = losses[count + 1], losses[count + 2 :]
    measured = {}
    for name, alone_loss, without_loss in zip(names, losses_alone, losses_without, strict=True):
        measured[name] = Sensitivity(alone_loss, without_loss, alone_loss - loss_off, loss_on - without_loss)
    return measured
