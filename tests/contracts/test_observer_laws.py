"""What every registered observer obeys, on every granularity and kind of scheme; the laws are in ``sq.testing``."""

from __future__ import annotations

import pytest
import torch

import sophq_func as sq
from sophq_func.numerics.contracts import OBSERVERS
from sophq_func.testing import observers as laws
from sophq_func.testing.observers import after
from tests.contracts import over_granularities, over_schemes, sample

over_observers = pytest.mark.parametrize("name", OBSERVERS.names())


@over_observers
@over_schemes
def test_inputs_stay_as_they_are(name: str, scheme: sq.QScheme) -> None:
    laws.inputs_stay_as_they_are(name, scheme)


@over_observers
@over_schemes
def test_equal_inputs_give_equal_bits(name: str, scheme: sq.QScheme) -> None:
    laws.equal_inputs_give_equal_bits(name, scheme)


@over_observers
@over_granularities
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_shapes_and_dtypes_of_a_state_are_stable(name: str, scheme: sq.QScheme, dtype: torch.dtype) -> None:
    laws.shapes_and_dtypes_of_a_state_are_stable(name, scheme, dtype)


@over_observers
@over_granularities
def test_init_does_not_look_at_values(name: str, scheme: sq.QScheme) -> None:
    laws.init_does_not_look_at_values(name, scheme)


@over_observers
@over_granularities
def test_no_gradient_flows_into_statistics(name: str, scheme: sq.QScheme) -> None:
    laws.no_gradient_flows_into_statistics(name, scheme)


@over_observers
@over_schemes
def test_qparams_have_the_shape_of_the_granularity(name: str, scheme: sq.QScheme) -> None:
    laws.qparams_have_the_shape_of_the_granularity(name, scheme)


@over_observers
@over_schemes
def test_vmap_equals_the_loop(name: str, scheme: sq.QScheme) -> None:
    laws.vmap_equals_the_loop(name, scheme)


@over_observers
@over_granularities
def test_both_tree_libraries_read_states_and_qparams_alike(name: str, scheme: sq.QScheme) -> None:
    laws.both_tree_libraries_read_states_and_qparams_alike(name, scheme)


@over_observers
@over_granularities
@pytest.mark.parametrize("shape", [(0, 4, 2), (3, 0, 2), (3, 4, 0), (0,)], ids=str)
def test_an_empty_tensor_leaves_the_state_as_it_is(name: str, scheme: sq.QScheme, shape: tuple[int, ...]) -> None:
    laws.an_empty_tensor_leaves_the_state_as_it_is(name, scheme, shape)


@over_observers
def test_extreme_values_give_a_finite_positive_scale(name: str) -> None:
    laws.extreme_values_give_a_finite_positive_scale(name)


@over_observers
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_range_collapses(name: str, bits: int, symmetric: bool) -> None:
    laws.no_range_collapses(name, bits, symmetric)


@over_observers
def test_values_that_are_not_finite_are_refused_in_eager_and_nan_under_vmap(name: str) -> None:
    laws.values_that_are_not_finite_are_refused_in_eager_and_nan_under_vmap(name)


@over_observers
@over_schemes
def test_what_was_never_observed_is_refused_in_eager_and_nan_under_vmap(name: str, scheme: sq.QScheme) -> None:
    laws.what_was_never_observed_is_refused_in_eager_and_nan_under_vmap(name, scheme)


@over_observers
def test_a_state_without_a_scale_is_refused_by_the_name_of_the_observer(name: str) -> None:
    observer, scheme = sq.observer(name), sq.QScheme()
    for state in (observer.init(sample(0), scheme), after(observer, scheme, sample(0) * torch.nan)):
        with pytest.raises(sq.StateError, match=name):
            observer.qparams(state, scheme)


@over_observers
@over_schemes
def test_merging_shards_equals_observing_them_in_turn_or_is_refused(name: str, scheme: sq.QScheme) -> None:
    laws.merging_shards_equals_observing_them_in_turn_or_is_refused(name, scheme)


@pytest.mark.slow
@over_observers
def test_a_compiled_update_equals_the_eager_one(name: str) -> None:
    laws.a_compiled_update_equals_the_eager_one(name)


@over_observers
def test_every_alias_leads_to_one_spec(name: str) -> None:
    laws.every_alias_leads_to_one_spec(name)


@over_observers
def test_every_reference_name_of_an_option_means_the_own_one(name: str) -> None:
    laws.every_reference_name_of_an_option_means_the_own_one(name)


@over_observers
@over_schemes
@pytest.mark.parametrize("factor", [0.125, 4.0])
def test_a_scale_is_as_large_as_the_values(name: str, scheme: sq.QScheme, factor: float) -> None:
    laws.a_scale_is_as_large_as_the_values(name, scheme, factor)


@over_observers
@over_schemes
def test_the_order_of_the_elements_of_a_scale_does_not_matter(name: str, scheme: sq.QScheme) -> None:
    laws.the_order_of_the_elements_of_a_scale_does_not_matter(name, scheme)


@pytest.mark.slow
@over_observers
def test_statistics_are_taken_alone_by_compiled_qparams_too(name: str) -> None:
    laws.statistics_are_taken_alone_by_compiled_qparams_too(name)


@over_observers
@over_granularities
def test_tangents_do_not_reach_statistics(name: str, scheme: sq.QScheme) -> None:
    laws.tangents_do_not_reach_statistics(name, scheme)


def test_a_moving_average_forgets_at_the_rate_of_its_decay() -> None:
    observer, scheme = sq.observer("EMAMinMaxObserver", ema_ratio=0.5), sq.QScheme()
    state = after(observer, scheme, torch.tensor([0.0, 8.0]), torch.tensor([-4.0, 4.0]), torch.tensor([0.0, 2.0]))
    assert (state.lo, state.hi) == (-1.0, 4.0)


def test_mse_finds_the_best_of_its_candidates() -> None:
    x, scheme = sample(0, 50), sq.QScheme(bits=3)

    def error(shrink: float) -> float:
        scale = float(x.abs().max()) * shrink / 3.5
        return float(((x / scale).round().clamp(-4, 3) * scale - x).square().mean())

    candidates = [1.0 - 0.01 * i for i in range(95)]
    best = min(candidates, key=error)
    assert best < 1.0
    state = after(sq.observer("mse"), scheme, x)
    torch.testing.assert_close(state.hi, x.max() * best)
    torch.testing.assert_close(state.lo, x.min() * best)


@over_observers
def test_a_model_is_calibrated_with_it(name: str) -> None:
    laws.a_model_is_calibrated_with_it(name)


@over_observers
def test_an_observer_that_loses_values_says_what_it_keeps(name: str) -> None:
    schemes = [sq.QScheme(bits=8, symmetric=symmetric) for symmetric in (True, False)]
    loses = any(laws.allowed_less(name, scheme, values) for scheme in schemes for values in laws.distributions())
    assert not loses or "Keeps" in (getattr(sq.observers, name).__doc__ or "")
