"""GPTQ for a whole model: every weight rounded so that its layer's output changes least, block by block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, get_args

from torch import Tensor

from sophq_func.algorithms._solve import Order, check_options, gptq_solve
from sophq_func.algorithms._walk import Inputs, Walk, by_input, units_of
from sophq_func.algorithms.contract import Start, as_batches, begin, check_rounding, fits, settled
from sophq_func.algorithms.resume import Resumed, StrPath
from sophq_func.config.register import algorithm
from sophq_func.core.errors import ConfigError, StateError, check_flags, explain, unknown
from sophq_func.core.logs import ALGORITHMS as LOG
from sophq_func.core.progress import shown
from sophq_func.core.public import public
from sophq_func.core.types import Given, Tree
from sophq_func.model.engine import QParamsDict
from sophq_func.model.quantized import Quantized
from sophq_func.model.select import Where
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.moments import Moments


@algorithm("gptq", rounds=True, resumes=True)
@public
def gptq(
    q: Quantized,
    params: Given,
    qparams: Mapping[str, QParams],
    batches: Iterable[Tree],
    *,
    where: Where = None,
    order: Order = "activation",
    damping: float = 0.1,
    sweeps: int = 0,
    inputs: Inputs = "quantized",
    true_sequential: bool = False,
    blocks: str | None = None,
    checkpoint: StrPath | None = None,
    progress: bool = True,
) -> tuple[Given, QParamsDict]:
    """Round the weights of a model by GPTQ (arXiv:2210.17323): :func:`gptq_solve` on each, block by block.

    The blocks of ``q.blocks()`` are taken in execution order. What the weights of a block multiply is measured where the
    blocks before are quantized already. Weights outside of blocks are solved in their turn, from runs of the whole model;
    weights of which no run shows what they multiply (embeddings, recurrent layers) are rounded to the nearest, which the
    logger ``sophq_func.algorithms`` says.

    It takes one run of each block for the moments and one for the outputs, and ``O(out n**2 + n**3)`` operations for each
    weight ``(out, n)``. Beyond the model it keeps the new weights, what one block is given and returns for all batches, and
    ``4 n**2`` bytes for each value that weights of the block read; a weight takes four times as much while it is solved.
    With a checkpoint, the new weights lie in its file, and take memory only when they are read.

    Args:
      q: a quantized model, whose weights are integers; it is run in eval mode.
      params: as :func:`sophq_func.params_of` returns them.
      qparams: the grids to round to: from ``q.calibrate``, or better ones from :func:`clip`. They stay as they are.
      batches: as of :meth:`Quantized.calibrate`.
      where: which weights: a name, glob, path of a module, type, or predicate on the site, or several of these; by default
        all. The others stay as they are given.
      order, damping, sweeps: see :func:`gptq_solve`. With 0.1 the damping is ten times the paper's: as moments of some
        thousand rows are not those of all text, less of it fits them better, and other text worse.
      inputs: ``"quantized"``: what the weights multiply behind the blocks that are quantized already, with activations
        quantized as the plan says; ``"float"``: what they multiply in the float model.
      true_sequential: within a block, too, measure behind the weights that are quantized already: one run for each value
        that weights read.
      blocks: a glob of module paths, see :meth:`Quantized.blocks`.
      checkpoint: path of a file in which each block that is done is kept; a run that was killed goes on there. The new
        weights are read from it, also later: it may be deleted, but not be written to, while they are used.
      progress: see :meth:`Quantized.calibrate`.

    Returns:
      Params with the weights on their grids, and the qparams.

    Raises:
      ConfigError: an option that means nothing; ``where`` fits no weight; a weight whose codes are no integers.
      StateError: names that are missing or unknown, no batches, a frozen model, inputs that are not finite, a checkpoint
        of another call.

    Example:
      >>> import torch, sophq_func as sq
      >>> _ = torch.manual_seed(0)
      >>> model, x = torch.nn.Linear(8, 3), torch.randn(32, 8) @ torch.randn(8, 8)
      >>> config = sq.QuantConfig(chip=None, weight=sq.override(bits=3), activation=None)
      >>> q = sq.quantize(model, config, example_args=(x,))
      >>> params = sq.params_of(model)
      >>> rounded = q.calibrate(params, [x], progress=False)
      >>> better, qparams = sq.algorithms.gptq(q, params, rounded, [x], progress=False)
      >>> error = lambda p, qp: (q.apply(p, qp, x) - model(x)).square().mean()
      >>> bool(error(better, qparams) < error(params, rounded))
      True
    """
    options = SolverOptions(order, damping, sweeps)
    check_options("gptq", *options)
    check_flags("gptq", {"true_sequential": true_sequential, "progress": progress})
    if inputs not in get_args(Inputs):
        raise ConfigError(unknown("gptq", "kind of inputs", inputs, get_args(Inputs)))
    start = begin("gptq", q, params, qparams, where)
    q = start.q
    check_rounding("gptq", start)
    batches = as_batches("gptq", batches)
    units = units_of(q, start.weights, blocks)
    chosen = (options, inputs, true_sequential, [unit.names for unit in units])
    done = Resumed("gptq", checkpoint, (q.plan.digest(), chosen, start.params, start.qparams, batches))
    if inputs == "quantized":
        walk = Walk(q, {**start.params, **done.tensors}, batches, units, start.qparams)
    else:
        walk = Walk(q, start.params, batches, units, None)
    for unit in shown(units[done.step :], "gptq", progress):
        made: dict[str, Tensor] = {}
        for names in by_input(q, unit) if true_sequential else [unit.names]:
            found = walk.moments(unit, names)
            made |= {start.weights[name].site.parameter: _rounded(start, name, found.get(name), options) for name in names}
            if inputs == "quantized":
                walk.replace(made)
        walk.leave(unit)
        kept = done.keep(made)
        if inputs == "quantized":
            walk.replace(kept)
    return start.result({**start.params, **done.tensors}, start.qparams)


class SolverOptions(NamedTuple):
    """See :func:`gptq_solve`."""

    order: Order
    damping: float
    sweeps: int


def _rounded(start: Start, name: str, moments: Moments | None, options: SolverOptions) -> Tensor:
    """A weight on its grid, solved where it is known what it multiplies."""
    weight, grid = start.weights[name], start.grid(name)
    given = start.params[weight.site.parameter]
    if not start.is_on(name):
        return given
    seen = weight.seen(start.params)
    if moments is None or not fits(moments, seen, weight):
        LOG.info("gptq: %s is rounded to the nearest: no run shows what it multiplies", name)
        return weight.quantize(start.params, grid)
    if not bool(moments.second.isfinite().all()):
        fix = "look for the batch with sq.statistics(q, params, [batch])"
        raise StateError(explain(f"gptq: {name}", "what it multiplies is not finite", fix=fix))
    order, damping, sweeps = options
    solved, _ = gptq_solve(
        seen, moments.second, weight.scheme, grid, order=order, damping=damping, sweeps=sweeps, axis=weight.output_axis
    )
    return settled("gptq", start, name, weight.unseen(solved, start.params))
