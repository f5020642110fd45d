"""The laws of algorithms of whole models, which are tried on small ones, and the check that holds one to them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sophq_func.config.algorithms import ALGORITHMS, Algorithm, Run
from sophq_func.config.site import WeightSite
from sophq_func.core.errors import ConfigError, StateError
from sophq_func.core.public import public_as
from sophq_func.core.pytree import leaves
from sophq_func.core.types import Given, Tree
from sophq_func.model.tap import unchanged as as_it_is
from sophq_func.numerics.contracts import QParams
from sophq_func.testing.laws import Law, check_all, law, refused
from sophq_func.testing.models import SUBJECTS, Subject, subject
from sophq_func.testing.pieces import entry_of
from sophq_func.testing.subjects import assert_same, unchanged

KINDS: Mapping[str, str] = {kind: kind for kind in SUBJECTS}

Setting = tuple[Given, dict[str, QParams]]
"""Params and qparams."""


def takes(algorithm: Algorithm, option: str) -> bool:
    """Whether an algorithm has an option."""
    return option in inspect.signature(algorithm.run).parameters


def run(name: str, given: Subject, **options: Any) -> Setting:
    """What an algorithm makes of a model, with the options with which the laws run it."""
    algorithm = ALGORITHMS.get(name)
    chosen = {**algorithm.options, **options}
    if takes(algorithm, "generator") and "generator" not in chosen:
        chosen["generator"] = torch.Generator().manual_seed(7)
    if takes(algorithm, "progress"):
        chosen["progress"] = False
    return algorithm.run(given.q, given.params, given.qparams, given.batches, **chosen)


# by the algorithm and not by its name, under which another one may be registered later
@functools.lru_cache(maxsize=64)
def _done(algorithm: Run, name: str, kind: str) -> tuple[Subject, Given, dict[str, QParams]]:
    made = subject(kind)
    return (made, *run(name, made))


def done(name: str, kind: str) -> tuple[Subject, Given, dict[str, QParams]]:
    """A model, and what an algorithm makes of it: most laws only look at that."""
    return _done(ALGORITHMS.get(name).run, name, kind)


def named(given: Subject, params: Given) -> Mapping[str, Tensor]:
    """Params by name, also those of a function."""
    return given.q.engine.skeleton.check(params, "testing")


def in_float(given: Subject, params: Given, batch: Tree) -> Tensor:
    """The output of the float model."""
    args, kwargs = given.q.engine.call(batch, "testing")
    output: Tensor = given.q.engine.run_float(named(given, params), as_it_is, args, kwargs)
    return output


def rounds(name: str) -> bool:
    """Whether an algorithm promises weights on their grids."""
    return ALGORITHMS.get(name).rounds


def keeps_float(name: str) -> bool:
    """Whether an algorithm promises to keep the float model."""
    return ALGORITHMS.get(name).keeps_float


def measures(name: str) -> bool:
    """Whether an algorithm says what it never makes worse."""
    return ALGORITHMS.get(name).measure is not None


def restricts(name: str) -> bool:
    """Whether ``where=`` names all weights that an algorithm changes; one that keeps the float model changes neighbours."""
    algorithm = ALGORITHMS.get(name)
    return takes(algorithm, "where") and not algorithm.keeps_float


@law(KINDS)
def inputs_and_the_model_stay_as_they_are(name: str, kind: str) -> None:
    """It changes neither its arguments nor the model."""
    made = subject(kind)
    state = dict(made.model.state_dict()) if isinstance(made.model, nn.Module) else {}
    keys = list(named(made, made.params)), list(made.qparams)
    with unchanged(made.params, made.qparams, made.batches, state):
        run(name, made)
    assert (list(named(made, made.params)), list(made.qparams)) == keys


@law(KINDS)
def equal_inputs_give_equal_bits(name: str, kind: str) -> None:
    """Two runs with generators in the same state give the same bits."""
    assert_same(run(name, subject(kind)), done(name, kind)[1:])


@law(KINDS)
def names_shapes_and_dtypes_are_kept(name: str, kind: str) -> None:
    """Params and qparams have the names, shapes and dtypes that they had, no gradient, and run in the same plan."""
    made, params, qparams = done(name, kind)
    assert type(params) is type(made.params)
    before, after = named(made, made.params), named(made, params)
    assert _forms(after) == _forms(before)
    assert list(qparams) == sorted(made.qparams)
    for key, entry in qparams.items():
        for field in ("scale", "zero_point"):
            assert _forms({key: getattr(entry, field)}) == _forms({key: getattr(made.qparams[key], field)}), key
    assert not any(tensor.requires_grad for tensor in (*after.values(), *leaves(qparams)))
    for batch in made.batches:
        assert bool(made.q.apply(params, qparams, batch).isfinite().all())


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


@law(KINDS, only=rounds)
def rounded_weights_lie_on_their_grids(name: str, kind: str) -> None:
    """Of what ``rounds``: to round the weights again changes none, and ``apply`` is the model with these weights."""
    made, params, qparams = done(name, kind)
    frozen, baked = made.q.freeze(params, qparams)
    before, after = named(made, params), named(made, baked)
    for quantizer in made.q.plan:
        site = made.q.plan.site(quantizer)
        if isinstance(site, WeightSite):
            assert_same(after[site.parameter], before[site.parameter])
    batch = made.batches[0]
    assert_same(frozen.apply(baked, qparams, batch), made.q.apply(params, qparams, batch))


@law(KINDS, only=keeps_float)
def the_float_model_computes_what_it_did(name: str, kind: str) -> None:
    """Of what ``keeps_float``: outputs stay, up to 1e-4 of the largest."""
    made, params, _ = done(name, kind)
    for batch in made.batches:
        before = in_float(made, made.params, batch)
        assert_same(in_float(made, params, batch), before, atol=1e-4 * float(before.abs().max()))


@law(KINDS, only=measures)
def what_it_measures_never_gets_worse(name: str, kind: str) -> None:
    """Its ``measure`` of what it returns is at most that of what it was given."""
    measure = ALGORITHMS.get(name).measure
    assert measure is not None
    made, params, qparams = done(name, kind)
    before = measure(made.q, made.params, made.params, made.qparams, made.batches)
    after = measure(made.q, made.params, params, qparams, made.batches)
    # both are sums in another order than the algorithm's own
    assert float(after) <= float(before) * (1 + 1e-4)


@law(only=restricts)
def where_restricts_the_weights_that_change(name: str) -> None:
    """``where=`` leaves all other weights and their grids as they are, and refuses what fits none."""
    made = subject("convolutions")
    params, qparams = run(name, made, where="head")
    before, after = named(made, made.params), named(made, params)
    for quantizer in made.q.plan:
        site = made.q.plan.site(quantizer)
        if isinstance(site, WeightSite) and site.parameter != "head.weight":
            assert_same(after[site.parameter], before[site.parameter])
            assert_same(qparams[quantizer], made.qparams[quantizer])
    with refused(ConfigError, "nowhere"):
        run(name, made, where="nowhere")


@law()
def the_mode_of_the_model_does_not_matter(name: str) -> None:
    """A quantized model in training mode gives what one in evaluation mode gives."""
    made, *expected = done(name, "convolutions")
    assert_same(run(name, made._replace(q=made.q.train())), tuple(expected))


@law()
def frozen_models_and_missing_qparams_are_refused(name: str) -> None:
    """A frozen model, and qparams that lack a quantizer, are a ``StateError`` each."""
    made = subject("convolutions")
    frozen, baked = made.q.freeze(made.params, made.qparams)
    with refused(StateError, "frozen"):
        run(name, made._replace(q=frozen, params=baked))
    with refused(StateError, "lack"):
        run(name, made._replace(qparams={}))


LAWS = tuple(one for one in list(globals().values()) if isinstance(one, Law))


def _entry(given: str | Algorithm | Run) -> str | Algorithm:
    """What is registered with this function; what is no such function stays itself."""
    found = (one for one in map(ALGORITHMS.get, ALGORITHMS.names()) if one.run is given)
    return next(found, given)  # type: ignore[return-value]


@public_as("testing.check_algorithm")
def check_algorithm(name: str | Algorithm | Run, *, without: tuple[str, ...] = ()) -> None:
    """Hold a registered algorithm to the laws that the library's own obey.

    It is run on five small models: convolutions with BatchNorms, language models with a tied and with an untied head, and a
    function of a tree of params.

    Args:
      name: of the algorithm; or the function that is registered under it.
      without: names of laws that it does not claim to obey.

    Raises:
      ConfigError: an unknown algorithm or law, or one that is not registered.
      LawError: an ``AssertionError`` that names each law that is broken, with a case.

    Example:
      >>> import sophq_func as sq
      >>> sq.testing.check_algorithm("equalize")
    """
    fix = '@sq.register.algorithm("mine") above the function'
    known = entry_of(ALGORITHMS, _entry(name), "testing.check_algorithm", fix)
    check_all("algorithm", known, LAWS, without, slow=False)
