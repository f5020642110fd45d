"""Calibration is a fold of ``observe`` over batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from sophq_func.base import QParams, State
from sophq_func.errors import StateError, explain

Params = Mapping[str, Tensor]
V = TypeVar("V")


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
            raise StateError(explain("calibrate", "no batches", fix="pass a list of tensors, tuples or dicts"))
        return q.qparams(params, ostate)


def as_call(batch: Any, where: str = "calibrate") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a batch: a tensor, a tuple or list of arguments, or a dict of keywords."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    allowed = "a tensor, a tuple of arguments or a dict of keyword arguments"
    raise StateError(explain(where, "this batch", got=type(batch).__name__, allowed=allowed))


def _checked(batches: Iterable[Any]) -> Iterable[Any]:
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        got = type(batches).__name__
        raise StateError(explain("calibrate", "these batches", got=got, allowed="a list", fix="q.calibrate(params, [x])"))
    return batches


def shown(items: Iterable[V], what: str, progress: bool) -> Iterator[V]:
    """``items``, with a progress bar on a terminal where ``rich`` is installed."""
    if progress:
        try:
            from rich.console import Console
            from rich.progress import track
        except ModuleNotFoundError:
            progress = False
    if progress and (console := Console(stderr=True)).is_terminal:
        return iter(track(items, description=what, console=console, transient=True))
    return iter(items)
