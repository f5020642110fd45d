"""Run a quantized model, and sum up what each quantizer does to its own values and to the output."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sophq_func.capture.arguments import as_call
from sophq_func.codes import Refusal
from sophq_func.core.errors import StateError, explain
from sophq_func.core.progress import shown
from sophq_func.core.pytree import tensors
from sophq_func.model.quantized import Quantized
from sophq_func.model.settings import enabled
from sophq_func.numerics import pieces
from sophq_func.numerics.contracts import QParams
from sophq_func.planning import text
from sophq_func.reports._report import Report
from sophq_func.reports._row import ReportRow
from sophq_func.reports._statistics import Clipping, Sums, clipping, decibel, seen, stored_grid


def report(
    q: Quantized,
    params: Mapping[str, Tensor],
    qparams: Mapping[str, QParams],
    batches: Iterable[Any],
    *,
    how: str = "auto",
    progress: bool = True,
) -> Report:
    """Range, clipping, noise and size at each quantizer, and its share of the error of the model's output.

    The share is measured by switching on one quantizer at a time, in a model that is float otherwise: ``n + 3`` runs of each
    batch for ``n`` quantizers, without gradients. What two quantizers do together is in no share; what all of them do is
    in ``report.sqnr_db``.

    Args:
      q: a quantized model in eval mode, whose weights are not frozen.
      params, qparams: see :meth:`Quantized.apply`; masks that :func:`sophq_func.enabled` put there are replaced.
      batches: each a tensor, a tuple of positional arguments, or a dict of keyword arguments.
      how: how the runs are made, see :meth:`Quantized.sweep`.
      progress: show a bar, where the package ``rich`` is installed and the output is a terminal.

    Returns:
      A :class:`Report`.

    Raises:
      StateError: no batches, frozen weights, training mode, an output without floating tensors; see
        :meth:`Quantized.apply`.

    Example:
      >>> import torch, sophq_func as sq
      >>> model, x = torch.nn.Linear(2, 3).eval(), torch.randn(4, 2)
      >>> q = sq.quantize(model, sq.QuantConfig(weight=sq.override(bits=2)), example_args=(x,))
      >>> params = sq.params_of(model)
      >>> found = report(q, params, q.calibrate(params, [x]), [x])
      >>> found.rows[0].quantizer, found.bytes_before
      ('weight_fake_quant', 36)
    """
    if q.frozen or q.training:
        what, fix = ("a frozen model", "use the q that was frozen") if q.frozen else ("training mode", "q.eval()")
        raise StateError(
            explain("report", f"{what} is not possible", because="runs with and without a quantizer are compared", fix=fix)
        )
    given = _listed(batches)
    q.plan.check(qparams, "qparams", dict.fromkeys(q.plan, QParams))
    on = enabled(qparams, True)
    clips = {name: clipping(config, on[name]) for name, config in q.plan.items()}
    with torch.no_grad():
        sums = _weight_sums(q, params, on, clips)
        errors = _Errors(q, params, on)
        for batch in shown(given, "report", progress):
            _add_activations(q, params, on, clips, batch, sums)
            errors.add(batch, how)
    sizes = {name: _size(q, name, params[q.plan.site(name).parameter], on[name]) for name in q.weights_seen(params)}
    rows = [_row(q, i, name, sums[name], clips[name], sizes, errors) for i, name in enumerate(q.plan) if name in sums]
    before = sum(p.numel() * p.element_size() for p in params.values())
    return Report(
        model=q.model_name,
        digest=q.plan.digest(),
        batches=len(given),
        rows=tuple(sorted(rows, key=lambda row: (-row.share, row.position))),
        sqnr_db=decibel(errors.signal, errors.all),
        bytes_before=before,
        bytes_after=before - sum(row.bytes_before - row.bytes_after for row in rows),
    )


def _listed(batches: Iterable[Any]) -> list[Any]:
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        got, fix = type(batches).__name__, "sq.report(q, params, qparams, [x])"
        raise StateError(explain("report", "these batches is not possible", got=got, allowed="a list", fix=fix))
    found = list(batches)
    if not found:
        raise StateError(explain("report", "no batches is not possible", fix="pass a list of tensors, tuples or dicts"))
    return found


def _weight_sums(
    q: Quantized, params: Mapping[str, Tensor], on: Mapping[str, QParams], clips: Mapping[str, Clipping | None]
) -> dict[str, Sums]:
    found = {}
    for name, (weight, scheme) in q.weights_seen(params).items():
        made = q.quantize_value(name, weight, on[name])
        found[name] = seen(weight, made, clips[name], scheme, None)
    return found


def _add_activations(
    q: Quantized,
    params: Mapping[str, Tensor],
    on: Mapping[str, QParams],
    clips: Mapping[str, Clipping | None],
    batch: Any,
    sums: dict[str, Sums],
) -> None:
    """Sum up what the quantizers of activations see in one batch."""
    args, kwargs = as_call(batch, "report")
    for name, (x, y) in q.capture(params, on, *args, **kwargs).items():
        if not q.plan.site(name).parameter:
            sums[name] = seen(x, y, clips[name], q.plan[name].scheme, sums.get(name))


class _Errors:
    """Squared errors of the output, summed over batches: each quantizer alone, and all together."""

    def __init__(self, q: Quantized, params: Mapping[str, Tensor], on: Mapping[str, QParams]) -> None:
        self.q, self.params, self.on, self.off = q, params, on, enabled(on, False)
        names = [name for name in sorted(on) if not q.plan[name].observe_only]
        self.alone = dict.fromkeys(names, 0.0)
        self.all = self.signal = 0.0

    def add(self, batch: Any, how: str) -> None:
        """One more batch."""
        args, kwargs = as_call(batch, "report")
        truth = _floating(self.q.apply(self.params, self.off, *args, **kwargs))

        def error(output: Any) -> Tensor:
            pairs = zip(_floating(output), truth, strict=True)
            return torch.stack([(a.double() - b.double()).square().sum() for a, b in pairs]).sum()

        settings = [*({**self.off, name: self.on[name]} for name in self.alone), self.on]
        found = self.q.sweep(self.params, settings, batch, reduce=error, how=how, progress=False)
        *alone, all_ = found.tolist()
        self.alone = {name: total + new for (name, total), new in zip(self.alone.items(), alone, strict=True)}
        self.all += all_
        self.signal += sum(float(t.double().square().sum()) for t in truth)


def _floating(output: Any) -> list[Tensor]:
    found = [t for t in ((output,) if isinstance(output, Tensor) else tensors(output)) if t.is_floating_point()]
    if not found:
        raise StateError(
            explain("report", "this output is not possible", got=type(output).__name__, allowed="floating tensors")
        )
    return found


def _size(q: Quantized, name: str, weight: Tensor, qparams: QParams) -> tuple[int, int]:
    """Bytes of a weight as it is, and as codes with what they need."""
    before, config = weight.numel() * weight.element_size(), q.plan[name]
    if config.observe_only:
        return before, before
    made = pieces.build(config.fake_quantize)
    grid = stored_grid(config, qparams)
    width = config.scheme.bits if isinstance(grid, Refusal) else grid.bits
    codes = math.ceil(weight.numel() * (width if made.bits is None else made.bits) / 8)
    scales = (qparams.scale, *(() if config.scheme.symmetric else (qparams.zero_point,))) if made.scaled else ()
    return before, codes + sum(t.numel() * t.element_size() for t in scales)


def _row(
    q: Quantized,
    position: int,
    name: str,
    sums: Sums,
    clip: Clipping | None,
    sizes: Mapping[str, tuple[int, int]],
    errors: _Errors,
) -> ReportRow:
    config, site = q.plan[name], q.plan.site(name)
    error, total = errors.alone.get(name, 0.0), sum(errors.alone.values())
    before, after = sizes.get(name, (0, 0))
    return ReportRow(
        quantizer=name,
        position=position,
        role=site.role,
        grid=text.short(config),
        where=text.place(site),
        observe_only=config.observe_only,
        low=float(sums.histogram.lo),
        high=float(sums.histogram.hi),
        clip_low=None if clip is None else float(clip.low.min()),
        clip_high=None if clip is None else float(clip.high.max()),
        step=None if clip is None else float(clip.step.max()),
        clipped=None if clip is None else sums.outside / max(sums.values, 1),
        sqnr_db=sums.sqnr_db(),
        cosine=sums.cosine(),
        error=error / errors.signal if errors.signal else math.nan,
        share=error / total if total else 0.0,
        bytes_before=before,
        bytes_after=after,
        histogram=tuple(int(count) for count in sums.histogram.counts.round().tolist()),
    )
