"""Calibration is a fold of ``observe`` over batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from sophq_func.capture.arguments import as_call
from sophq_func.core.errors import StateError, explain
from sophq_func.core.progress import shown
from sophq_func.numerics.contracts import QParams, State

Params = Mapping[str, Tensor]


class Observes(Protocol):
    """What calibration needs of a quantized model."""

    def init(self, params: Params, /) -> dict[str, State]: ...
    def observe(self, params: Params, ostate: Mapping[str, State], /, *args: Any, **kwargs: Any) -> Any: ...
    def qparams(self, params: Params, ostate: Mapping[str, State], /) -> dict[str, QParams]: ...


def calibrate(q: Observes, params: Params, batches: Iterable[Any], progress: bool) -> dict[str, QParams]:
    """See :meth:`sophq_func.Quantized.calibrate`."""
    ostate, count = q.init(params), 0
    with torch.no_grad():
        for batch in shown(_checked(batches), "calibrate", progress):
            args, kwargs = as_call(batch)
            _, ostate = q.observe(params, ostate, *args, **kwargs)
            count += 1
        if not count:
            raise StateError(
                explain("calibrate", "no batches is not possible", fix="pass a list of tensors, tuples or dicts")
            )
        return q.qparams(params, ostate)


def _checked(batches: Iterable[Any]) -> Iterable[Any]:
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        got = type(batches).__name__
        raise StateError(
            explain("calibrate", "these batches is not possible", got=got, allowed="a list", fix="q.calibrate(params, [x])")
        )
    return batches
