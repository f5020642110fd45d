"""One measure for each quantizer: how well it represents its values, and what it costs the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

from torch import Tensor

from sophq_func.core.errors import ConfigError, StateError, check_flags, explain, unknown
from sophq_func.core.modes import is_plain
from sophq_func.core.public import public
from sophq_func.core.pytree import as_dict, sorted_dict
from sophq_func.core.tables import WIDTH, Table, check_width
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
      >>> _ = torch.manual_seed(0)
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


Measure: TypeAlias = Literal["alone", "without", "added", "saved"]
"""A field of a :class:`Sensitivity`."""

MEASURES: tuple[Measure, ...] = get_args(Measure)


@as_dict
class Sensitivities(dict[str, Sensitivity]):
    """``{quantizer name: Sensitivity}``, sorted by name. ``print`` shows a table, the most costly quantizer first.

    Where the loss has several entries, the table shows their mean.

    Example:
      >>> import torch
      >>> costs = torch.tensor([0.1, 0.4]), torch.tensor([0.6, 0.3]), torch.tensor([0.0, 0.3]), torch.tensor([0.2, 0.5])
      >>> found = Sensitivities({name: Sensitivity(*of_one) for name, *of_one in zip(("a", "b"), *costs)})
      >>> found
      quantizer  alone  added  without  saved
      ---------  -----  -----  -------  -----
      b            0.4  +0.3      0.3   +0.5
      a            0.1    +0      0.6   +0.2
      >>> found.ranked("added")
      ['b', 'a']
    """

    def __repr__(self) -> str:
        # inside a transform there are no numbers to show
        fields = [field for own in self.values() for field in own]
        return self.table() if is_plain(fields) else super().__repr__()

    def _repr_html_(self) -> str:
        """The table for a notebook."""
        return self._rows("added").html(f"What each of {len(self)} quantizers costs the loss")

    def ranked(self, by: Measure = "added") -> list[str]:
        """The names, that with the largest value first.

        Args:
          by: which of the measures; of a loss with several entries the mean. NaN counts as the largest.

        Raises:
          ConfigError: no such measure.
        """
        if by not in MEASURES:
            raise ConfigError(unknown("sensitivity.ranked", "measure", by, MEASURES))
        values = {name: _mean(getattr(own, by)) for name, own in self.items()}
        return sorted(values, key=lambda name: math.inf if math.isnan(values[name]) else values[name], reverse=True)

    def table(self, columns: str | Sequence[str] | None = None, width: int = WIDTH, by: Measure = "added") -> str:
        """The measures as text, the largest first.

        Args:
          columns: those to show: ``"quantizer"``, ``"alone"``, ``"added"``, ``"without"``, ``"saved"``; all by default.
          width: characters in a line.
          by: the measure that sorts the rows, see :meth:`ranked`.

        Raises:
          ConfigError: a column or a measure that there is not, or a width of less than 40.
        """
        check_width("sensitivity.table", width)
        return self._rows(by).pick("sensitivity.table", columns).text(width)

    def _rows(self, by: Measure) -> Table:
        headings = ("quantizer", "alone", "added", "without", "saved")
        rows = []
        for name in self.ranked(by):
            alone, without, added, saved = map(_mean, self[name])
            rows.append((name, f"{alone:.4g}", f"{added:+.4g}", f"{without:.4g}", f"{saved:+.4g}"))
        return Table(headings=headings, rows=tuple(rows), right=frozenset(headings[1:]))


def _mean(loss: Tensor) -> float:
    return float(loss.detach().double().mean())


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
) -> Sensitivities:
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
      :class:`Sensitivities`: a dict ``{quantizer name: Sensitivity}``, sorted, without quantizers that only observe;
      ``print`` shows it as a table.

    Raises:
      StateError: frozen weights, a loss that is no tensor, or not finite for the float model, as the mean over an empty
        batch; see :meth:`Quantized.sweep`.

    Example:
      >>> import torch, sophq_func as sq
      >>> _ = torch.manual_seed(0)
      >>> model, x = torch.nn.Linear(2, 3), torch.randn(4, 2)
      >>> q = sq.quantize(model, sq.QuantConfig(weight=sq.override(bits=2)), example_args=(x,))
      >>> params = sq.params_of(model)
      >>> error = lambda out: (out - model(x)).square().mean()
      >>> found = sensitivity(q, params, q.calibrate(params, [x]), x, error)
      >>> found.ranked("added")[0]
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
    if is_plain([loss_off]) and not bool(loss_off.isfinite().all()):
        sentence, because = "the loss of the float model is not finite", "every cost is a difference to it"
        fix = "a batch with examples, and a loss that is finite for it"
        raise StateError(explain("sensitivity", sentence, got=loss_off.tolist(), because=because, fix=fix))
    loss_on, losses_without = losses[count + 1], losses[count + 2 :]
    measured = Sensitivities()
    for name, alone_loss, without_loss in zip(names, losses_alone, losses_without, strict=True):
        measured[name] = Sensitivity(alone_loss, without_loss, alone_loss - loss_off, loss_on - without_loss)
    return measured
