"""Names in any case, names that are taken, and names that a plugin brings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint

import pytest

import sophq_func as sq
from sophq_func.core import plugins
from sophq_func.core.registry import Factories, Registry


def test_a_name_is_found_in_any_case() -> None:
    fruits: Registry[int] = Registry("fruit")
    fruits.add("Apple", 1, "Apfel")
    assert [fruits.get(name) for name in ("Apple", "apple", "APFEL")] == [1, 1, 1]
    assert fruits.canonical("aPFEL") == "Apple" and "apfel" in fruits and "pear" not in fruits


def test_an_exact_registry_tells_cases_apart() -> None:
    fruits: Registry[int] = Registry("fruit", exact=True)
    fruits.add("Apple", 1)
    assert "Apple" in fruits and "apple" not in fruits


@pytest.mark.parametrize("names", [("Pear", "APPLE"), ("apple",), ("Pear", 3), ("",)])
def test_a_name_that_is_taken_or_none_adds_nothing(names: tuple[str, ...]) -> None:
    fruits: Registry[int] = Registry("fruit")
    fruits.add("Apple", 1)
    with pytest.raises(sq.ConfigError):
        fruits.add(names[0], 2, *names[1:])
    assert fruits.names() == fruits.spellings() == ["Apple"]


def test_values_in_every_place_where_a_name_will_do() -> None:
    meant = sq.override(fake_quantize=sq.fake_quantize.learnable(), observer=sq.observers.ema_minmax())
    assert sq.override(fake_quantize="LSQ", observer="emaminmaxobserver") == meant
    assert sq.QuantConfig(chip="sg2260", strategy="cnn") == sq.QuantConfig(chip="BM1690", strategy="CNN")
    assert (
        sq.QScheme(granularity="PER_CHANNEL")
        == sq.QScheme(granularity="perchannel")
        == sq.QScheme(granularity=sq.PerChannel())
    )
    half = {"scheme": sq.QScheme(), "observer": "MSE", "fake_quantize": "Fixed"}
    assert sq.QuantizerConfig(**half).observer == sq.observers.mse()


def test_a_registered_object_stands_for_its_name() -> None:
    chip, strategy = sq.CHIPS.get("BM1688"), sq.strategies.PLACEMENTS.get("Layers")
    assert sq.QuantConfig(chip=chip, strategy=strategy) == sq.QuantConfig(chip="BM1688", strategy="Layers")
    unknown = sq.ChipSpec(weight=chip.weight, activation=chip.activation)
    with pytest.raises(sq.ConfigError, match=r"this chip is not registered.*Fix: sq.register.chip"):
        sq.QuantConfig(chip=unknown)


def test_every_positional_argument_of_a_piece_counts() -> None:
    assert sq.observers.mse(3.0) == sq.observers.mse(p=3.0)
    with pytest.raises(sq.ConfigError, match="too many positional arguments: got 4"):
        sq.observers.mse(3.0, 4)
    with pytest.raises(sq.ConfigError, match="this exponent is not possible: got -1"):
        sq.observers.mse(p=-1)


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Declares an entry point, as if a package were installed."""

    def declare(value: str) -> None:
        entry = EntryPoint("test", value, plugins.GROUP)
        monkeypatch.setattr(plugins, "entry_points", lambda group: [entry] if group == plugins.GROUP else [])

    plugins.load.cache_clear()
    yield declare
    plugins.load.cache_clear()


LOADED: list[str] = []


def register_plugin() -> None:
    """What the entry point of the test names."""
    LOADED.append("once")

    @sq.register.observer("from_a_plugin", "OfPlugin")
    def from_a_plugin() -> sq.Observer:
        """minmax by another name."""
        return sq.observer("minmax")


@pytest.mark.usefixtures("scratch_registries")
def test_a_plugin_is_loaded_when_a_name_is_not_known(declared: Callable[[str], None]) -> None:
    LOADED.clear()
    declared(f"{__name__}:register_plugin")
    assert sq.observer("minmax") and LOADED == []
    assert sq.override(observer="ofplugin") == sq.override(observer=sq.observers.from_a_plugin())
    with pytest.raises(sq.ConfigError, match="did you mean 'from_a_plugin'"):
        sq.observer("from_plugin")
    assert LOADED == ["once"]


def test_a_plugin_that_cannot_be_loaded_is_named(declared: Callable[[str], None]) -> None:
    declared("no_such_module_at_all:register")
    with pytest.raises(sq.ConfigError, match=r"plugin 'test': this plugin cannot be loaded.*ModuleNotFoundError"):
        sq.observer("from_a_plugin")


def test_a_function_that_a_module_does_not_have_is_an_attribute_error() -> None:
    numbers: Factories[sq.Observer] = Factories("number")
    with pytest.raises(AttributeError, match="module 'here' has no attribute 'one'"):
        numbers.function("one", "here")
    with pytest.raises(AttributeError, match="did you mean 'minmax'"):
        sq.observers.minmx  # noqa: B018
    assert not hasattr(sq.fake_quantize, "__wrapped__")


def test_every_spelling_is_a_function_of_its_room() -> None:
    for room, registry in (
        (sq.observers, sq.numerics.contracts.OBSERVERS),
        (sq.fake_quantize, sq.numerics.contracts.FAKE_QUANTIZERS),
    ):
        for name in registry.spellings():
            assert vars(room)[name]() == registry.spec(name)
            assert name in room.__all__
