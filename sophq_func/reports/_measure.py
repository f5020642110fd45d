"""Measures a report: what each quantizer does to its own values and to the model's output, in runs over batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from sophq_func.codes import Refusal
from sophq_func.core.errors import StateError, explain
from sophq_func.core.progress import shown
from sophq_func.core.public import public
from sophq_func.core.pytree import tensors
from sophq_func.core.types import Given, Output, Tree
from sophq_func.model.derived import derived, derived_names
from sophq_func.model.finite import check_numbers
from sophq_func.model.quantized import Quantized
from sophq_func.model.settings import enabled
from sophq_func.model.weight_quantizer import Params
from sophq_func.numerics import pieces
from sophq_func.numerics.contracts import FakeQuantize, QParams
from sophq_func.numerics.scheme import QuantizerConfig
from sophq_func.observers import HISTOGRAM_UNIT
from sophq_func.planning import text
from sophq_func.reports._report import Report
from sophq_func.reports._row import ReportRow
from sophq_func.reports._statistics import Clipping, Sums, added, clipping, decibel, nothing, stored_grid

Setting: TypeAlias = Mapping[str, QParams]
"""Qparams of every quantizer."""

Clips: TypeAlias = Mapping[str, Clipping | None]
"""Where the grid of each quantizer ends, by name."""

NO_SIZE = (0, 0)
"""Bytes before and after, of an activation: it is not stored."""


@public
def report(
    q: Quantized,
    params: Given,
    qparams: Setting,
    batches: Iterable[Tree],
    *,
    how: str = "auto",
    progress: bool = True,
) -> Report:
    """Range, clipping, noise and size at each quantizer, and its share of the error of the model's output.

    The share is measured by switching on one quantizer at a time, in a model that is float otherwise: ``n + 3`` runs of each
    batch for ``n`` quantizers, without gradients. The other three: in float, with all on, and to see the values.
    What quantizers do only together is in no share; ``report.sqnr_db`` is measured with all of them on.

    The weights of a frozen model are on their grids already, so their rows show no noise and no share, and the model that
    is compared with has the same weights: what is left are the activations.

    Args:
      q: a quantized model in eval mode.
      params, qparams: see :meth:`Quantized.apply`; masks that :func:`sophq_func.enabled` put there are replaced.
      batches: each a tensor, a tuple of positional arguments, or a dict of keyword arguments.
      how: how the runs are made, see :meth:`Quantized.sweep`.
      progress: show how far it is: a line in a notebook, a bar in a terminal where the package ``rich`` is installed.

    Returns:
      A :class:`Report`.

    Raises:
      StateError: no batches, training mode, NaN in a scale, a weight or a bias, an output without floating tensors; see
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
    _check_eval(q)
    each = _listed(batches)
    params = q.engine.check(params, qparams, "report", "qparams")
    check_numbers("report", q.plan, q.engine.quantizers, params, qparams)
    on = enabled(qparams, True)
    clips = {name: clipping(config, on[name]) for name, config in q.plan.items()}
    with torch.no_grad():
        sums = _weight_sums(q, params, on, clips)
        errors = _Errors(q, params, on)
        for batch in shown(each, "report", progress):
            _add_activations(q, params, on, clips, batch, sums)
            errors.add(batch, how)
    sizes = {name: _size(q, name, params[q.plan.site(name).parameter], on[name]) for name in q.weights_seen(params)}
    of_derived = derived(q.engine, params, dict(on), q.engine.call(each[0], "report"), derived_names(q.engine))
    sizes |= {name: _size(q, name, weight, on[name]) for name, weight in of_derived.weights.items()}
    rows = []
    for position, name in enumerate(q.plan):
        if name in sums:  # a value that no batch reached has no row
            rows.append(_row(q, position, name, sums[name], clips[name], sizes.get(name, NO_SIZE), errors))
    before = sum(p.numel() * p.element_size() for p in params.values())
    saved = sum(row.bytes_before - row.bytes_after for row in rows)
    if of_derived.weights:  # what is left out are the parameters that they are computed from, not the weights themselves
        parents = sum(params[name].numel() * params[name].element_size() for name in of_derived.parents)
        saved += parents - sum(sizes[name][0] for name in of_derived.weights)
    return Report(
        model=q.model_name,
        digest=q.plan.digest(),
        batches=len(each),
        rows=tuple(sorted(rows, key=_largest_share_first)),
        sqnr_db=decibel(errors.signal, errors.all),
        bytes_before=before,
        bytes_after=before - saved,
    )


def _largest_share_first(row: ReportRow) -> tuple[float, int]:
    return -row.share, row.position


def _check_eval(q: Quantized) -> None:
    """Raise a :class:`StateError` unless runs with and without a quantizer can be compared."""
    if q.training:
        because = "runs with and without a quantizer are compared"
        sentence = "a model in training mode cannot be reported on"
        raise StateError(explain("report", sentence, because=because, fix="q.eval()"))


def _listed(batches: Iterable[Tree]) -> list[Tree]:
    fix = "sq.report(q, params, qparams, [x])"
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        sentence, got = "these batches cannot be observed", type(batches).__name__
        raise StateError(explain("report", sentence, got=got, allowed="a list", fix=fix))
    each = list(batches)
    if not each:
        raise StateError(explain("report", "there are no batches to observe", fix=fix))
    return each


def _weight_sums(q: Quantized, params: Params, on: Setting, clips: Clips) -> dict[str, Sums]:
    """Sums over each weight, by quantizer."""
    sums = {}
    for name, (weight, scheme) in q.weights_seen(params).items():
        quantized = weight if q.frozen else q.quantize_value(name, weight, on[name])
        sums[name] = added(nothing(weight), weight, quantized, clips[name], scheme)
    return sums


def _add_activations(q: Quantized, params: Params, on: Setting, clips: Clips, batch: Tree, sums: dict[str, Sums]) -> None:
    """Add to ``sums`` what the quantizers of activations see in one batch."""
    args, kwargs = q.engine.call(batch, "report")
    for name, (x, y) in q.capture(params, on, *args, **kwargs).items():
        if q.plan.site(name).parameter:
            continue
        before = sums[name] if name in sums else nothing(x)
        sums[name] = added(before, x, y, clips[name], q.plan[name].scheme)


class _Errors:
    """Squared errors of the output, summed over batches.

    Attributes:
      alone: by quantizer, with that one alone switched on.
      all: with all of them on.
      signal: the squared output with all of them off.
    """

    def __init__(self, q: Quantized, params: Params, on: Setting) -> None:
        self.alone = {name: 0.0 for name in sorted(on) if not q.plan[name].observe_only}
        self.all = 0.0
        self.signal = 0.0
        self._q = q
        self._params = params
        self._on = on
        self._off = enabled(on, False)

    def add(self, batch: Tree, how: str) -> None:
        """Add the errors of one more batch."""
        args, kwargs = self._q.engine.call(batch, "report")
        truth = _floating(self._q.apply(self._params, self._off, *args, **kwargs))

        def error(output: Output) -> Tensor:
            pairs = zip(_floating(output), truth, strict=True)
            return torch.stack([(found.double() - true.double()).square().sum() for found, true in pairs]).sum()

        each_alone = [{**self._off, name: self._on[name]} for name in self.alone]
        settings = [*each_alone, self._on]
        errors = self._q.sweep(self._params, settings, batch, reduce=error, how=how, progress=False)
        *alone, together = errors.tolist()
        for name, new in zip(self.alone, alone, strict=True):
            self.alone[name] += new
        self.all += together
        self.signal += sum(float(tensor.double().square().sum()) for tensor in truth)


def _floating(output: Output) -> list[Tensor]:
    """The floating tensors of an output, in order."""
    floating = [tensor for tensor in tensors(output) if tensor.is_floating_point()]
    if not floating:
        sentence, got = "this output has no error to measure", type(output).__name__
        fix = "quantize a model that returns floating tensors"
        raise StateError(explain("report", sentence, got=got, allowed="floating tensors", fix=fix))
    return floating


def _size(q: Quantized, name: str, weight: Tensor, qparams: QParams) -> tuple[int, int]:
    """Bytes of a weight as it is; and as codes, with the scales and zero points that are stored beside them."""
    config = q.plan[name]
    before = weight.numel() * weight.element_size()
    if config.observe_only:
        return before, before
    fake_quantize = pieces.build(config.fake_quantize)
    codes = math.ceil(weight.numel() * _code_bits(config, fake_quantize, qparams) / 8)
    if not fake_quantize.scaled:
        return before, codes
    beside = [qparams.scale] if config.scheme.symmetric else [qparams.scale, qparams.zero_point]
    return before, codes + sum(tensor.numel() * tensor.element_size() for tensor in beside)


def _code_bits(config: QuantizerConfig, fake_quantize: FakeQuantize, qparams: QParams) -> float:
    """What one stored code takes: of a format with a fixed size that, else the width of the grid in force."""
    if fake_quantize.bits is not None:
        return fake_quantize.bits
    grid = stored_grid(config, qparams)
    return config.scheme.bits if isinstance(grid, Refusal) else grid.bits


def _row(
    q: Quantized,
    position: int,
    name: str,
    sums: Sums,
    clip: Clipping | None,
    size: tuple[int, int],
    errors: _Errors,
) -> ReportRow:
    config, site = q.plan[name], q.plan.site(name)
    error, total = errors.alone.get(name, 0.0), sum(errors.alone.values())
    before, after = size
    counts = (sums.histogram.counts / HISTOGRAM_UNIT).round()  # splitting bins leaves fractions
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
        histogram=tuple(int(count) for count in counts.tolist()),
    )
