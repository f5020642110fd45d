"""The steps of weights whose biases a chip's compiler rounds to int32 itself: they must leave room for the bias."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sophq_func.codes import Grid, Refusal, Stored, bias_codes, bias_step, share_on, stored_form, widened_beside
from sophq_func.core.errors import ConfigError, explain, raise_all
from sophq_func.model.quantized import Quantized
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.model.weight_quantizer import WeightQuantizer
from sophq_func.numerics.contracts import QParams


def with_room_for_biases(q: Quantized, params: Mapping[str, Tensor], qparams: Mapping[str, QParams]) -> dict[str, QParams]:
    """The qparams, with larger scales in channels of zero weights, whose scale is free and whose bias would not fit.

    Raises:
      ConfigError: the bias behind other weights does not fit in int32; one message lists all of them.
    """
    small = widened_beside(q.engine.weights, params)
    new, problems = dict(qparams), []
    for weight, source in _rounded(q, qparams):
        name = weight.site.quantizer
        stored = stored_form(weight, qparams[name], small, frozen=q.frozen, wide=True)
        grid = stored_form(source, qparams[weight.site.source])
        if not isinstance(stored, Stored) or not isinstance(grid, Grid) or not grid.is_integer or grid.dynamic:
            continue  # what has no grid the tables refuse for that reason
        step = bias_step(stored, grid.parts["scale"])
        form = None if step is None else bias_codes(stored, step, weight.folded_bias(small))
        if form is None:
            continue
        if isinstance(form, Refusal):
            fix = "raise the scales of these channels, or use fewer bits"
            problems.append(explain(name, "the tables cannot hold this weight", because=form.because, fix=fix))
        elif not torch.equal(form.scale, stored.grid.parts["scale"]):
            new[name] = qparams[name]._replace(scale=form.scale)
    raise_all(problems, ConfigError)
    return new


def _rounded(q: Quantized, qparams: Mapping[str, QParams]) -> Iterator[tuple[WeightQuantizer, RunQuantizer]]:
    """Each weight that acts and has a rounded bias, and the quantizer of its layer's input."""
    for weight in q.engine.weights:
        site = weight.site
        acts = site.source and not weight.config.observe_only and share_on(qparams[site.quantizer]) == 1
        if acts and site.source in q.engine.running and share_on(qparams[site.source]) == 1:
            yield weight, q.engine.running[site.source]
