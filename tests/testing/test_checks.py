"""The checks of a user's own pieces: what they report of broken ones, and that each law can be broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.numerics.layout import rows
from sophq_func.numerics.ranges import no_range
from sophq_func.testing import algorithms, fake_quantizers, observers, plans
from sophq_func.testing.subjects import SCHEMES

pytestmark = pytest.mark.usefixtures("scratch_registries")


def report(check: Callable[..., None], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(sq.testing.LawError) as caught:
        check(*args, **kwargs)
    assert isinstance(caught.value, AssertionError)
    return str(caught.value)


def observer_with(**changes: Callable[..., Any]) -> str:
    """Registers ``minmax`` with other functions; its name."""

    @sq.register.observer("broken")
    def broken() -> sq.Observer:
        """minmax, changed."""
        return sq.observer("minmax")._replace(**changes)

    return "broken"


def written_to(state: Any, x: Tensor, scheme: sq.QScheme) -> Any:
    lo, hi = sq.numerics.ranges.min_max(x, scheme.granularity)
    with torch.no_grad():
        return type(state)(state.lo.minimum(lo), state.hi.copy_(torch.maximum(state.hi, hi)))


def looking(x: Tensor, scheme: sq.QScheme) -> Any:
    minmax = sq.observer("minmax")
    return minmax.update(minmax.init(x, scheme), x, scheme)


def doubled(state: Any, scheme: sq.QScheme) -> sq.QParams:
    found = sq.observer("minmax").qparams(state, scheme)
    return found._replace(zero_point=found.zero_point.float())


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "it writes into its state": ({"update": written_to}, "inputs_stay_as_they_are"),
    "init reads values": ({"init": looking}, "init_does_not_look_at_values"),
    "a zero point of another dtype": ({"qparams": doubled}, "qparams_have_the_shape_of_the_granularity"),
    "a merge that forgets": ({"merge": lambda a, b: a}, "merging_shards_equals_observing_them_in_turn_or_is_refused"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_observer_is_told_which_law_it_breaks(name: str) -> None:
    changes, law = BROKEN[name]
    text = report(sq.testing.check_observer, observer_with(**changes))
    assert text.startswith("observer 'broken' breaks ")
    assert f"\n  {law}: " in text and "cases, the first: " in text


def test_a_law_that_is_not_claimed_can_be_left_out() -> None:
    name = observer_with(merge=lambda a, b: a)
    sq.testing.check_observer(name, without=["merging_shards_equals_observing_them_in_turn_or_is_refused"])
    with pytest.raises(sq.ConfigError, match="law 'merging' is not known"):
        sq.testing.check_observer(name, without=["merging"])


class Total(NamedTuple):
    total: Tensor


def test_a_sum_of_floats_may_be_rounded_where_the_observer_says_so() -> None:
    def update(state: Total, x: Tensor, scheme: sq.QScheme) -> Total:
        return Total(state.total + rows(x, scheme.granularity).sum(-1))

    def total(merge: Callable[[Total, Total], Total], sums: bool = True) -> sq.Observer:
        def init(x: Tensor, scheme: sq.QScheme) -> Total:
            return Total(torch.zeros_like(no_range(x, scheme.granularity)[0]))

        return sq.Observer(init, update, merge, sq.observer("minmax").qparams, sums=sums)

    @sq.register.observer("silent")
    def silent() -> sq.Observer:
        """The sum."""
        return total(lambda a, b: Total(a.total + b.total), sums=False)

    @sq.register.observer("said")
    def said() -> sq.Observer:
        """The sum."""
        return total(lambda a, b: Total(a.total + b.total))

    @sq.register.observer("wrong")
    def wrong() -> sq.Observer:
        """Not the sum."""
        return total(lambda a, b: Total(torch.where(b.total == 0, a.total, torch.where(a.total == 0, b.total, a.total))))

    law = observers.merging_shards_equals_observing_them_in_turn_or_is_refused
    assert law.broken("silent")
    assert not law.broken("said")
    assert len(law.broken("wrong")) == len(SCHEMES)


def test_an_assertion_without_words_shows_its_line() -> None:
    assert "AssertionError: assert " in report(sq.testing.check_observer, observer_with(qparams=doubled))


def test_a_broken_fake_quantizer_is_told_which_laws_it_breaks() -> None:
    @sq.register.fake_quantizer("wandering")
    def wandering() -> sq.FakeQuantize:
        """Half a step beside the grid."""
        fixed = sq.fake_quantizer("fixed")

        def apply(x: Tensor, qparams: sq.QParams, scheme: sq.QScheme, noise: Tensor | None = None) -> Tensor:
            return fixed.apply(x.float() + 0.3, qparams, scheme)

        return sq.FakeQuantize(fixed.init, apply)

    text = report(sq.testing.check_fake_quantizer, "wandering")
    for law in ("zero_stays_zero", "shape_and_dtype_come_back", "quantizing_twice_is_quantizing_once"):
        assert f"\n  {law}: " in text


def test_a_broken_format_is_told_which_laws_it_breaks() -> None:
    class Truncating:
        largest = 3.0

        def values(self) -> Tensor:
            return torch.arange(-3.0, 4.0, dtype=torch.float64)

        def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
            return x.trunc().clamp(-3, 3)

    text = report(sq.testing.check_format, Truncating())
    assert "numbers_become_the_nearest_value" in text and "no_gradient_passes" in text


def test_a_broken_chip_is_told_which_law_it_breaks() -> None:
    known = sq.CHIPS.get("BM1690")
    wide = replace(known.weight, scheme=sq.QScheme(bits=16))
    sq.register.chip("Contradicting", sq.ChipSpec(weight=wide, activation=known.activation, weight_bits=(8,)))
    assert "defaults_lie_within_the_limits" in report(sq.testing.check_chip, "Contradicting")


def test_a_broken_strategy_is_told_which_law_it_breaks() -> None:
    def place(graph: sq.Graph, requests: sq.strategies.Requests) -> sq.strategies.Placement:
        return sq.strategies.Placement({})

    sq.register.strategy("Weightless", sq.strategies.Strategy(place, weights=(nn.Bilinear,)))
    assert "a_strategy_plans_every_network" in report(sq.testing.check_strategy, "Weightless")


def test_a_broken_algorithm_is_told_which_laws_it_breaks() -> None:
    @sq.register.algorithm("careless", rounds=True)
    def careless(q: sq.Quantized, params: Any, qparams: Any, batches: Any) -> Any:
        if isinstance(params, dict) and "head.bias" in params:
            params["head.bias"].add_(1)
        return params, {name: entry._replace(scale=entry.scale.double()) for name, entry in qparams.items()}

    text = report(sq.testing.check_algorithm, careless)
    assert "inputs_and_the_model_stay_as_they_are" in text and "names_shapes_and_dtypes_are_kept" in text
    assert "rounded_weights_lie_on_their_grids" in text and "frozen_models_and_missing_qparams_are_refused" in text
    with pytest.raises(sq.ConfigError, match="not registered"):
        sq.testing.check_algorithm(lambda q, params, qparams, batches: (params, qparams))


def test_an_algorithm_that_does_nothing_obeys_the_laws_that_it_claims() -> None:
    @sq.register.algorithm("idle", keeps_float=True)
    def idle(q: sq.Quantized, params: Any, qparams: Any, batches: Any) -> Any:
        return params, qparams

    sq.testing.check_algorithm("idle", without=("frozen_models_and_missing_qparams_are_refused",))


def test_every_law_says_what_it_demands() -> None:
    for laws in (algorithms.LAWS, observers.LAWS, fake_quantizers.LAWS, plans.CHIP_LAWS, plans.STRATEGY_LAWS):
        assert len(laws) >= 4
        assert all(law.says.endswith(".") for law in laws)


def test_a_check_takes_the_registered_function_and_what_it_returns() -> None:
    @sq.register.observer("widened")
    def widened(by: float = 1.0) -> sq.Observer:
        """minmax; its scale is wrong where ``by`` is not 1."""
        minmax = sq.observer("minmax")

        def qparams(state: Any, scheme: sq.QScheme) -> sq.QParams:
            found = minmax.qparams(state, scheme)
            return found._replace(scale=found.scale * by)

        return minmax._replace(qparams=qparams)

    sq.testing.check_observer(widened)
    sq.testing.check_observer(widened())
    text = report(sq.testing.check_observer, widened(by=8.0))
    assert "observer widened(by=8.0) breaks" in text and "no_range_collapses" in text


def test_a_check_knows_a_variant_by_its_options() -> None:
    sq.testing.check_fake_quantizer(sq.fake_quantize.dorefa(mapping="tanh"))


def test_a_check_takes_a_registered_value() -> None:
    sq.testing.check_chip(sq.CHIPS.get("BM1690"))
    mine = sq.CHIPS.get("BM1690")
    with pytest.raises(sq.ConfigError, match=r"this chip is not registered.*sq.register.chip"):
        sq.testing.check_chip(replace(mine, weight_bits=(8,)))


@pytest.mark.parametrize(
    ("check", "piece", "decorator"),
    [
        (sq.testing.check_observer, sq.observer("minmax"), "@sq.register.observer"),
        (sq.testing.check_fake_quantizer, sq.fake_quantizer("fixed"), "@sq.register.fake_quantizer"),
        (sq.testing.check_observer, 3, "@sq.register.observer"),
    ],
)
def test_a_piece_without_a_name_is_refused_with_the_way_to_one(
    check: Callable[..., None], piece: Any, decorator: str
) -> None:
    with pytest.raises(sq.ConfigError) as caught:
        check(piece)
    assert decorator in str(caught.value)
