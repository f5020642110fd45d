"""One batch under many settings: a weight is quantized once per distinct setting, a small model runs under one vmap."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sophq_func.capture.calls import one_call
from sophq_func.core.errors import StateError, explain
from sophq_func.core.progress import shown
from sophq_func.core.pytree import flatten, leaves, taken_apart, tensors
from sophq_func.core.types import Given, Output, Tree
from sophq_func.model.apply import apply
from sophq_func.model.engine import Engine
from sophq_func.model.settings import stack, unstack
from sophq_func.model.weight_quantizer import Params, WeightQuantizer
from sophq_func.numerics.contracts import QParams
from sophq_func.planning.plan import Plan

Setting = Mapping[str, QParams]
"""Qparams of every quantizer: one point of a sweep."""

Reduce = Callable[[Output], Tree]
"""What to keep of an output."""

Key = Mapping[str, list[Tensor]]
"""For each quantizer, what tells whether two settings of it agree."""

Run = Callable[[Setting], Tree]
"""Runs the model under a setting, and returns what is kept of its output."""

WAYS = ("auto", "loop", "vmap", "compile")

SMALL = 2**13
"""Up to how many elements a quantizer ``"auto"`` maps: what costs then is calling torch, not its arithmetic.

A rule, and not a measurement in each sweep: the two ways round differently, so that a choice by the clock would give other
numbers on another day. Time of vmap in that of the loop, 16 settings, one core, by elements of weights and values:

==========================================  ===========  ==========
network                                     a quantizer  vmap, loop
==========================================  ===========  ==========
20 convolutions of 8 channels, 4x8x8x8            1,300        0.31
3 linear layers of 64 features, batch 16          2,600        0.45
8 convolutions of 16 channels, 4x16x8x8           3,200        0.36
8 convolutions of 32 channels, 4x32x8x8           8,700        0.46
8 convolutions of 8 channels, 4x8x32x32          16,700        0.83
MLP 784-256-256-10, batch 64                     58,600        0.83
a language model of 4 layers, 8x64x128           80,000        2.05
==========================================  ===========  ==========

Above some 10,000 elements the two hardly differ, and the loop is ahead where settings agree on most weights.
"""

FEWEST = 4
"""From how many settings on ``"auto"`` maps: a vmap takes as long as four to six settings of the loop, even for one."""

ROOM = 2**22
"""How many elements of weights and values a chunk of mapped settings may hold: 16 MiB in float32, so that memory does not
grow with the number of settings."""

KEPT = 2
"""How many versions of a weight are kept: on and off, where a sweep switches quantizers one by one."""


@one_call("sweep")
def sweep(
    engine: Engine,
    params: Given,
    settings: Sequence[Setting] | Setting,
    batch: Tree,
    reduce: Reduce | None,
    how: str,
    progress: bool,
) -> Tree:
    """See :meth:`sophq_func.Quantized.sweep`."""
    args, kwargs = engine.call(batch, "sweep")
    named = engine.skeleton.check(params, "sweep")
    each = unstack(settings) if isinstance(settings, Mapping) else list(settings)
    for setting in each:
        engine.check_state(setting, "qparams")
        engine.check_kinds(setting)
    _check(how, each)
    keep = reduce or _everything
    frozen = engine.as_frozen()
    versions = Versions(engine.acting, engine.skeleton.detached(named))
    size = size_of(engine.plan, named)

    def run_alone(setting: Setting) -> Tree:
        """Share nothing with other settings: may be mapped and compiled."""
        return keep(apply(engine, named, setting, args, kwargs))

    def run_sharing(setting: Setting, key: Key) -> Tree:
        """Share quantized weights with the settings before."""
        quantized = versions(engine.effective(setting), key)
        return keep(apply(frozen, quantized, setting, args, kwargs))

    with engine.constant():
        if how == "vmap":
            return _mapped(run_alone, each, size)
        is_small = len(each) >= FEWEST and size <= SMALL * len(engine.plan)
        if how == "auto" and is_small and _are_alike(each):
            try:
                return _mapped(run_alone, each, size)
            except RuntimeError as error:  # such as Python that branches on a value
                why = str(error).strip().partition("\n")[0]
                # level 4 is the line that called Quantized.sweep
                warnings.warn(f"sweep: settings run one by one, as vmap fails: {why}", RuntimeWarning, stacklevel=4)
        if how == "compile":
            run = torch.compile(run_alone)
            return _joined([run(setting) for setting in shown(each, "sweep", progress)])
        weights = [weight.site.quantizer for weight in engine.acting]
        keys = on_host(each, weights, copy=not all(tensor.is_cpu for tensor in tensors(each[0])))
        pairs = shown(list(zip(each, keys, strict=True)), "sweep", progress)
        return _joined([run_sharing(setting, key) for setting, key in pairs])


class Versions:
    """Quantized weights, remembered by their quantizer's leaves, so that settings which agree share them.

    Args:
      quantizers: of the weights.
      params: with the weights as they are.
    """

    def __init__(self, quantizers: Sequence[WeightQuantizer], params: Params) -> None:
        self.quantizers = quantizers
        self.params = params
        self._kept: dict[str, list[tuple[list[Tensor], Tensor]]] = {}

    def __call__(self, effective: Setting, key: Key) -> dict[str, Tensor]:
        """The params with weights quantized and biases rounded.

        Args:
          effective: qparams, see :meth:`Engine.effective`.
          key: what tells whether two settings of a weight agree, see :func:`on_host`.
        """
        new = dict(self.params)
        for quantizer in self.quantizers:
            name = quantizer.site.quantizer
            new[quantizer.site.parameter] = self._weight(quantizer, effective[name], key[name])
            new.update(quantizer.rounded_bias(self.params, effective))
        return new

    def _weight(self, quantizer: WeightQuantizer, qparams: QParams, key: list[Tensor]) -> Tensor:
        kept = self._kept.setdefault(quantizer.site.quantizer, [])
        for known_key, weight in kept:
            if _are_equal(known_key, key):
                return weight
        weight = quantizer.quantize(self.params, qparams)
        kept.append((key, weight))
        del kept[:-KEPT]
        return weight


def on_host(each: Sequence[Setting], names: Sequence[str], copy: bool) -> list[Key]:
    """The leaves of some quantizers in each setting, to be compared.

    Args:
      each: the settings.
      names: of the quantizers.
      copy: whether the leaves lie on an accelerator. All are copied from there at once, so that it is waited for once, and
        not at each comparison; in float64, which holds every number of a float32 or int32.
    """
    found: list[Key] = [{name: leaves(setting[name]) for name in names} for setting in each]
    if not copy:
        return found
    every = {id(leaf): leaf for key in found for own in key.values() for leaf in own}
    flat = torch.cat([leaf.detach().reshape(-1).double() for leaf in every.values()]).cpu()
    parts = torch.split(flat, [leaf.numel() for leaf in every.values()])
    copies = dict(zip(every, parts, strict=True))
    return [{name: [copies[id(leaf)] for leaf in own] for name, own in key.items()} for key in found]


def size_of(plan: Plan, params: Params) -> int:
    """How many elements the quantized weights and values of one setting have."""
    size = 0
    for name in plan:
        site = plan.site(name)
        size += params[site.parameter].numel() if site.parameter else math.prod(site.shape)
    return size


def _check(how: str, each: Sequence[Setting]) -> None:
    if how not in WAYS:
        allowed = " or ".join(map(repr, WAYS))
        raise StateError(explain("sweep", "this way is unknown", got=how, allowed=allowed, fix='how="auto"'))
    if not each:
        fix = "pass a list of qparams, or sq.stack of one"
        raise StateError(explain("sweep", "there are no settings to run", fix=fix))


def _are_alike(each: Sequence[Setting]) -> bool:
    """Whether all settings have the same leaves, so that they can be stacked."""
    parts = [taken_apart(dict(setting)) for setting in each]
    kinds = [(structure, [(leaf.shape, leaf.dtype) for leaf in own]) for own, structure in parts]
    return all(kind == kinds[0] for kind in kinds)


def _everything(output: Output) -> Tree:
    """What is kept of an output by default."""
    return output


def _are_equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    if len(some) != len(others):
        return False
    # "is" first: settings of one calibration share most leaves
    return all(one is other or torch.equal(one, other) for one, other in zip(some, others, strict=True))


def _mapped(run: Run, each: Sequence[Setting], size: int) -> Tree:
    """The results of all settings as one tree of batches, by a vmap over each chunk of settings."""
    length = max(1, ROOM // max(1, size))
    chunks = [each[start : start + length] for start in range(0, len(each), length)]
    structures = []

    def kept_tensors(setting: Setting) -> list[Tensor]:
        # vmap returns tensors only; the rest of the tree is remembered on the way
        tree_leaves, rebuild = flatten(run(setting))
        structures.append((tree_leaves, rebuild))
        return _tensors(tree_leaves)

    outputs = [torch.vmap(kept_tensors)(stack(chunk)) for chunk in chunks]
    batches = [torch.cat(column) for column in zip(*outputs, strict=True)]
    return _with_tensors(*structures[0], batches)


def _joined(outputs: Sequence[Tree]) -> Tree:
    """The results of all settings as one tree of batches."""
    rows = [_tensors(flatten(output)[0]) for output in outputs]
    batches = [torch.stack(column) for column in zip(*rows, strict=True)]
    return _with_tensors(*flatten(outputs[0]), batches)


def _tensors(tree_leaves: Sequence[Tree]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves if isinstance(leaf, Tensor)]


def _with_tensors(tree_leaves: Sequence[Tree], rebuild: Callable[[list[Tree]], Tree], tensors: Sequence[Tensor]) -> Tree:
    """A tree with other tensors in the place of its own; leaves that are not tensors stay."""
    replacements = iter(tensors)
    return rebuild([next(replacements) if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves])
