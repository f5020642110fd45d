"""What each bit width of each quantizer costs the loss: measured, or predicted from the curvature."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from sophq_func.algorithms.contract import as_batches, begin
from sophq_func.algorithms.curvature import Loss, hessian_trace, rademacher
from sophq_func.core.errors import ConfigError, StateError, check_flags, explain, quoted, raise_all, unknown
from sophq_func.core.progress import shown
from sophq_func.core.public import public
from sophq_func.core.pytree import sorted_dict, tensors
from sophq_func.core.types import Given, Output, Tree
from sophq_func.model.engine import QParamsDict
from sophq_func.model.quantized import Quantized
from sophq_func.model.settings import enabled
from sophq_func.model.tap import unchanged
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.entries import check_entries

Settings: TypeAlias = Mapping[int, Mapping[str, QParams]]
"""By bit width, the qparams of every quantizer at that width."""

Distance: TypeAlias = Callable[[Output, Output], Tensor]
"""From the output of the quantized model and that of the float one to a scalar."""


class BitSensitivity(NamedTuple):
    """What each width of each quantizer adds to the loss.

    Attributes:
      added: ``{quantizer: {bits: float}}``: the loss with this quantizer alone at this width, less the float model's.
      error: the standard error of each, in the same form; 0 where it was measured.
    """

    added: dict[str, dict[int, float]]
    error: dict[str, dict[int, float]]


def relative_error(output: Output, target: Output) -> Tensor:
    """``sum |y - t|**2 / sum |t|**2`` over the floating tensors of an output; shape ``()``.

    Example:
      >>> relative_error(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0]))
      tensor(0.2000)
    """
    pairs = list(zip(tensors(output), tensors(target), strict=True))
    floating = [(y.float(), t.float()) for y, t in pairs if y.is_floating_point()]
    error = torch.stack([(y - t).square().sum() for y, t in floating]).sum()
    power = torch.stack([t.square().sum() for _, t in floating]).sum()
    return error / power.clamp(min=torch.finfo(torch.float32).tiny)


@public
def bit_sensitivity(
    q: Quantized,
    params: Given,
    settings: Settings,
    batches: Iterable[Tree],
    loss: Distance = relative_error,
    *,
    names: Collection[str] | None = None,
    how: str = "auto",
    progress: bool = True,
) -> BitSensitivity:
    """Measure the loss with one quantizer on, at each of some bit widths, and all others off.

    One run for each quantizer, width and batch, by ``q.sweep``. The sum over quantizers predicts the loss of a mixed
    setting as far as errors add up.

    Args:
      q: a quantized model, in evaluation mode and not frozen.
      params: see :meth:`Quantized.apply`.
      settings: by width, qparams: ``{bits: q.qparams(params, ostate, bits={"*weight_fake_quant": bits})}``.
      batches: calls of the model.
      loss: from the outputs of the quantized and of the float model for one batch to a scalar; by default the relative error
        of the outputs.
      names: the quantizers, those of values among them; by default those of weights.
      how, progress: see :meth:`Quantized.sweep`.

    Returns:
      A :class:`BitSensitivity`, sorted; means over the batches.

    Raises:
      ConfigError: no settings, a name that is unknown.
      StateError: no batches; a loss that is no scalar; see :meth:`Quantized.sweep`.

    Example:
      >>> import torch, sophq_func as sq
      >>> _ = torch.manual_seed(0)
      >>> model, x = torch.nn.Linear(4, 3).eval(), torch.randn(16, 4)
      >>> q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
      >>> params = sq.params_of(model)
      >>> _, ostate = q.observe(params, q.init(params), x)
      >>> settings = {bits: q.qparams(params, ostate, bits={"*weight_fake_quant": bits}) for bits in (2, 4)}
      >>> found = bit_sensitivity(q, params, settings, [x], progress=False).added["weight_fake_quant"]
      >>> found[2] > found[4] > 0
      True
    """
    check_flags("bit_sensitivity", {"progress": progress})
    chosen = _chosen("bit_sensitivity", q, params, settings, names)
    data = as_batches("bit_sensitivity", batches)
    first = next(iter(settings.values()))
    off = enabled(first, False)
    keys = [(name, bits) for name in chosen for bits in sorted(settings)]
    each = [off, *({**off, name: enabled({name: settings[bits][name]}, True)[name]} for name, bits in keys)]
    named = q.engine.skeleton.check(params, "bit_sensitivity")
    total = torch.zeros(len(each), dtype=torch.float64)
    for batch in shown(data, "bit_sensitivity", progress):
        args, kwargs = q.engine.call(batch, "bit_sensitivity")
        with q.engine.constant():
            target = q.engine.run_float(named, unchanged, args, kwargs)
        measure = partial(_measured, loss, target)
        found = q.sweep(params, each, batch, reduce=measure, how=how, progress=False)
        total += found.double().cpu() / len(data)
    added = {key: float(value - total[0]) for key, value in zip(keys, total[1:], strict=True)}
    return BitSensitivity(_nested(added), _nested(dict.fromkeys(keys, 0.0)))


def _measured(loss: Distance, target: Output, output: Output) -> Tensor:
    """The loss of an output, which must be a scalar."""
    found = loss(output, target)
    if not isinstance(found, Tensor) or found.ndim:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        sentence, allowed, fix = "loss must return a scalar", "a scalar tensor", "loss.mean()"
        raise StateError(explain("bit_sensitivity", sentence, got=got, allowed=allowed, fix=fix))
    return found


def _chosen(where: str, q: Quantized, params: Given, settings: Settings, names: Collection[str] | None) -> list[str]:
    """The quantizers to measure, after a check of all arguments."""
    if not isinstance(settings, Mapping) or not settings:
        fix = "{bits: q.qparams(params, ostate, bits=bits) for bits in (4, 8)}"
        raise ConfigError(explain(where, "there are no settings", got=settings, allowed="a dict {bits: qparams}", fix=fix))
    problems = [
        explain(where, "a setting is no bit width", got=bits, allowed="an int", fix="{4: qparams}")
        for bits in settings
        if not isinstance(bits, int)
    ]
    raise_all(problems, ConfigError)
    for setting in settings.values():
        start = begin(where, q, params, setting)
    if names is None:
        return sorted(start.weights)
    known = [name for name in q.plan if not q.plan[name].observe_only]
    raise_all([unknown(where, "quantizer", name, known) for name in names if name not in known], ConfigError)
    return sorted(set(names))


def _nested(flat: Mapping[tuple[str, int], float]) -> dict[str, dict[int, float]]:
    """``{name: {bits: value}}``, sorted."""
    found: dict[str, dict[int, float]] = {}
    for name, bits in sorted(flat):
        found.setdefault(name, {})[bits] = flat[name, bits]
    return found


@public
def trace_sensitivity(
    q: Quantized,
    params: Given,
    settings: Settings,
    loss: Loss,
    generator: torch.Generator,
    *,
    samples: int = 8,
    names: Collection[str] | None = None,
    chunk_size: int | None = 1,
) -> BitSensitivity:
    """Predict what the widths of weights cost from the curvature of the loss, as HAWQ-V2 does.

    ``max(trace(H), 0) / n * sum (Q(W) - W)**2`` with the Hessian ``H`` of the loss in the ``n`` elements of the weight (Dong
    et al., arXiv:1911.03852). The trace is estimated from random signs, see :func:`sophq_func.hessian_trace`. A negative
    trace, which would be a reward for few bits, counts as 0.

    Args:
      q: a quantized model, in evaluation mode and not frozen.
      params: see :meth:`Quantized.apply`.
      settings: see :func:`bit_sensitivity`.
      loss: from params by name to a scalar: of the float model, on some data.
      generator: of the signs.
      samples: how many signs for each element; each takes a Hessian-vector product.
      names: weight quantizers; by default all.
      chunk_size: how many samples are computed at once.

    Returns:
      A :class:`BitSensitivity`, sorted, with the standard error of the estimates.

    Raises:
      ConfigError: no settings, a name that is unknown or of no weight.

    Differs from sophgo-mq: the sum of squares, as in the paper, not their mean; of the weight with its BatchNorm folded in;
    with a fixed number of samples and an error.

    Example:
      >>> import torch, sophq_func as sq
      >>> model, x = torch.nn.Linear(4, 3).eval(), torch.randn(16, 4)
      >>> q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
      >>> params = sq.params_of(model)
      >>> _, ostate = q.observe(params, q.init(params), x)
      >>> settings = {bits: q.qparams(params, ostate, bits={"*weight_fake_quant": bits}) for bits in (2, 4)}
      >>> loss = lambda p: torch.func.functional_call(model, p, (x,)).square().mean()
      >>> found = trace_sensitivity(q, params, settings, loss, torch.Generator().manual_seed(0)).added["weight_fake_quant"]
      >>> found[2] > found[4] > 0
      True
    """
    chosen = _chosen("trace_sensitivity", q, params, settings, names)
    weights = {weight.site.quantizer: weight for weight in q.engine.acting}
    raise_all(
        [unknown("trace_sensitivity", "weight quantizer", n, list(weights)) for n in chosen if n not in weights], ConfigError
    )
    named = {name: tensor.detach() for name, tensor in q.engine.skeleton.check(params, "trace_sensitivity").items()}
    parameters = [weights[name].site.parameter for name in chosen]
    traces = hessian_trace(loss, named, rademacher(named, parameters, samples, generator), chunk_size=chunk_size)
    added, error = {}, {}
    for name in chosen:
        weight = weights[name]
        found = traces[weight.site.parameter]
        exact = named[weight.site.parameter]
        for bits, setting in settings.items():
            moved = float((weight.quantize(named, setting[name]) - exact).square().sum()) / exact.numel()
            added[name, bits] = max(float(found.trace), 0.0) * moved
            error[name, bits] = float(found.error) * moved
    return BitSensitivity(_nested(added), _nested(error))


@public
def at_widths(settings: Settings, bits: Mapping[str, int], qparams: Mapping[str, QParams]) -> QParamsDict:
    """The qparams in which some quantizers have those of their width: of the setting that was measured.

    They fit ``q`` and the model of ``q.plan.with_bits(bits)`` alike.

    Args:
      settings: see :func:`bit_sensitivity`.
      bits: by quantizer, a width that ``settings`` has.
      qparams: of all others.

    Raises:
      ConfigError: a name or a width that there is not.

    Example:
      >>> settings = {b: {"a": QParams(torch.tensor(1.0 / b), torch.tensor(0), {})} for b in (2, 4)}
      >>> at_widths(settings, {"a": 4}, settings[2])["a"].scale
      tensor(0.2500)
    """
    check_entries("at_widths", qparams)
    for width, setting in settings.items():
        check_entries(f"at_widths: {quoted(width)} bits", setting)
    unknown_names = [unknown("at_widths", "quantizer", name, list(qparams)) for name in bits if name not in qparams]
    raise_all(unknown_names, ConfigError)
    problems = [
        explain("at_widths", f"{name} was not measured at this width", got=width, allowed=sorted(settings))
        for name, width in bits.items()
        if width not in settings
    ]
    raise_all(problems)
    return sorted_dict({**qparams, **{name: settings[width][name] for name, width in bits.items()}})


@public
def sizes(q: Quantized) -> dict[str, float]:
    """How many elements each quantized weight has: its size in bits, for each bit of its width.

    Example:
      >>> import torch, sophq_func as sq
      >>> _ = torch.manual_seed(0)
      >>> sizes(sq.quantize(torch.nn.Linear(4, 3), sq.QuantConfig(), example_args=(torch.ones(1, 4),)))
      {'weight_fake_quant': 12.0}
    """
    shapes = {weight.site.quantizer: weight.site.shape for weight in q.engine.acting}
    return {name: float(torch.Size(shape).numel()) for name, shape in sorted(shapes.items())}
