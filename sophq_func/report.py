"""How well each quantizer represents what it is there for, as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from sophq_func.base import QParams
from sophq_func.pytree import sorted_dict
from sophq_func.quantized import Quantized


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
