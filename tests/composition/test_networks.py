"""Random networks: nothing that a plan names acts elsewhere, and nothing that leaves is another number."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import sophq_func as sq
from tests.networks import (
    OF_FUNCTIONS,
    RUN,
    Interpreter,
    Network,
    OfTree,
    batches,
    networks,
    quantized_params,
    rounded,
    tree_of,
)

FEW = 40
NETWORKS = int(os.environ.get("NETWORKS", "2000"))
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # fused attention under vmap

MANY = NETWORKS // 4
COMPILED = NETWORKS // 80
"""How many networks: in a quick run, in each of four slow ones, and in the one that compiles (one takes as long as twenty).

``make fuzz`` looks at ten times as many.
"""

IN_ONE_GRAPH = sorted(RUN.keys() - {"routed", "relu_in_place_of_torch"})
"""Kinds of steps that a compiler takes into one graph and shows.

Not experts, since which of them run depends on numbers, and not ``torch.relu_``, of which Dynamo shows no call: an error.
"""

AS_WRITTEN = sorted(RUN.keys() - {"mapped"})
"""Kinds of steps that the interpreter computes by the same calls of torch, in which a sum has one order."""

NO_SHRINKING = (Phase.explicit, Phase.generate)
"""To make a failing network smaller takes longer than to look for one."""


def config(bits: int) -> sq.QuantConfig:
    """All of a network in some bits, with scales that follow from the data alone."""
    change = sq.override(bits=bits, observer=sq.observers.minmax(), fake_quantize=sq.fake_quantize.fixed())
    return sq.QuantConfig(weight=change, activation=change)


PICKS = ([0, 1, 0, 1], [2, 2, 2, 2])
"""The experts of each row, in the batches that calibrate."""

OTHER = [2, 0, 2, 0]
"""Those of a batch for which no example has the same set."""


def check(network: Network, bits: int, number: int) -> None:
    """One network: the scales are those of the values at their sites, and the output is that of the interpreter.

    Both make the same calls of torch in the same order, so that they take the same codes on any CPU.
    """
    *examples, other = batches(number, [*PICKS, OTHER])
    q = sq.quantize(network, config(bits), examples=[(one, {}) for one in examples])
    params = sq.params_of(network)
    qparams = q.calibrate(params, examples, progress=False)
    check_scales(q, network, params, qparams, examples)
    weights = quantized_params(q, params, qparams)
    for given_x, given_pick in (examples[0], other):
        interpreter = Interpreter(q, weights, lambda name, x: rounded(x, q.plan[name].scheme, qparams[name]))
        with torch.no_grad():
            expected = interpreter.run_all(network, given_x, given_pick)
            actual = q.apply(params, qparams, given_x, given_pick)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def check_scales(
    q: sq.Quantized,
    network: Network,
    params: dict[str, Tensor],
    qparams: dict[str, sq.QParams],
    examples: Sequence[tuple[Tensor, Tensor]],
) -> None:
    """Every quantizer has the scale of the values that the float model has at its site."""
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, x: Tensor) -> Tensor:
        seen.setdefault(name, []).append(x.clone())  # a later step may write into it
        return x

    for one in examples:
        interpreter = Interpreter(q, params, note)
        with torch.no_grad():
            interpreter.run_all(network, *one)
    for name, values in seen.items():
        scheme, observer = q.plan[name].scheme, sq.observer("minmax")
        state = observer.init(values[0], scheme)
        for value in values:
            state = observer.update(state, value, scheme)
        expected = observer.qparams(state, scheme)
        torch.testing.assert_close(qparams[name].scale, expected.scale, rtol=1e-5, atol=1e-12)
    acting = {name for name in q.plan if q.plan.site(name).role == "activation"}
    assert acting <= seen.keys(), acting - seen.keys()


def check_16_bits(network: Network, number: int, compiled: bool) -> None:
    """One network with steps so small that it computes what the float model does: in eager, under vmap, and compiled."""
    examples = batches(number, PICKS)
    q = sq.quantize(network, config(16), examples=[(one, {}) for one in examples])
    params = sq.params_of(network)
    qparams = q.calibrate(params, examples, progress=False)
    with torch.no_grad():
        for one in examples:
            close(q.apply(params, qparams, *one), network(*one))
        if compiled:
            torch._dynamo.reset()
            program = torch.compile(q.apply, fullgraph=True, backend="aot_eager")
            close(program(params, qparams, *examples[0]), network(*examples[0]))
        pick = examples[0][1]
        members = torch.stack([x for x, _ in examples])
        mapped = torch.vmap(lambda x: q.apply(params, qparams, x, pick))(members)
        for x, output in zip(members, mapped, strict=True):
            close(output, q.apply(params, qparams, x, pick))


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for steps of 16 bits: each of up to thirty roundings is off by 2**-17 of a range of a few deviations."""
    assert (actual - expected).norm() <= 0.01 * expected.norm() + 1e-6


def check_function(network: Network, number: int) -> None:
    """A network of functions, as a function of a tree of params, is what it is as a module."""
    examples = batches(number, PICKS)
    q = sq.quantize(network, config(4), examples=[(one, {}) for one in examples])
    params = sq.params_of(network)
    qparams = q.calibrate(params, examples, progress=False)

    def f(params: Any, x: Tensor, pick: Tensor) -> Tensor:
        return network.run(OfTree(params), "", x, pick)

    tree = tree_of(network)
    as_function = sq.quantize(f, config(4), params=tree, examples=[(one, {}) for one in examples])
    renamed = {name: name.replace("of.", "").replace(".0_fake_quant", "_fake_quant") for name in as_function.plan}
    assert list(renamed.values()) == list(q.plan)
    own = as_function.calibrate(tree, examples, progress=False)
    with torch.no_grad():
        for one in examples:
            torch.testing.assert_close(as_function.apply(tree, own, *one), q.apply(params, qparams, *one), rtol=0, atol=0)


ANY = settings(max_examples=FEW, deadline=None, suppress_health_check=list(HealthCheck))


@ANY
@given(networks(AS_WRITTEN), st.integers(0, 100))
def test_a_network_of_4_bits_is_what_its_plan_says(network: Network, number: int) -> None:
    check(network, 4, number)


@ANY
@given(networks(), st.integers(0, 100))
def test_a_network_of_16_bits_is_the_float_network(network: Network, number: int) -> None:
    check_16_bits(network, number, compiled=False)


@ANY
@given(networks(OF_FUNCTIONS), st.integers(0, 100))
def test_a_function_of_a_tree_is_the_module_of_the_same_network(network: Network, number: int) -> None:
    check_function(network, number)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_many_networks_are_what_their_plans_say(part: int) -> None:
    @seed(part)
    @settings(max_examples=MANY, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(networks(AS_WRITTEN), st.integers(0, 100))
    def all_of_them(network: Network, number: int) -> None:
        check(network, 4, number)
        if number % 4 == 0:
            check_16_bits(network, number, compiled=False)

    all_of_them()


@pytest.mark.slow
@seed(0)
@settings(max_examples=COMPILED, deadline=None, database=None, phases=NO_SHRINKING, suppress_health_check=list(HealthCheck))
@given(networks(IN_ONE_GRAPH), st.integers(0, 100))
def test_compiled_networks_are_the_float_networks(network: Network, number: int) -> None:
    check_16_bits(network, number, compiled=True)
