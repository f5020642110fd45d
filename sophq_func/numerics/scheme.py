"""Frozen values that describe a quantizer: its scheme, the config of which that is a part, and changes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from sophq_func.core.errors import ConfigError, explain, raise_all, unknown
from sophq_func.core.public import constructor, constructor_for
from sophq_func.core.registry import Factories, Option, Spec
from sophq_func.numerics.elsewhere import ELSEWHERE
from sophq_func.numerics.granularity import (
    GRANULARITIES,
    UNSAID,
    Granularity,
    GranularityName,
    PerTensor,
    PerToken,
    as_granularity,
)
from sophq_func.numerics.registries import FAKE_QUANTIZERS, OBSERVERS

Data: TypeAlias = Any
"""What JSON can hold: dicts with string keys, lists, strings, numbers, booleans and ``None``."""


def as_bits(value: object, where: str) -> int:
    """A bit width from an int or a string of digits, as the dictionaries of sophgo-mq have it.

    Args:
      value: the bit width, 2 to 16.
      where: the class or key that an error names.

    Raises:
      ConfigError: no whole number, or not in 2..16.

    Example:
      >>> as_bits("8", "a_qscheme")
      8
    """
    bits = int(value) if isinstance(value, str) and value.strip().isdigit() else value
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 16:
        raise ConfigError(explain(where, "bits must be an int from 2 to 16", got=value, allowed="2..16", fix="bits=8"))
    return bits


@constructor_for(ELSEWHERE)
@dataclass(frozen=True, kw_only=True)
class QScheme:
    """An integer grid and how many scales a tensor has.

    Attributes:
      bits: width of the codes, 2..16.
      symmetric: the zero point is 0 and codes are signed; otherwise (affine) codes start at 0.
      symmetric_range: leave out the most negative code, so that codes are symmetric about 0; for symmetric grids.
      pot_scale: scales are powers of two, ``2 ** round(log2(scale))``.
      granularity: per tensor, channel, group, block or token; or a name, ``"per_channel"``.
      dynamic: scale and zero point are computed from the tensor at hand instead of from observed statistics.

    Example:
      >>> from sophq_func.numerics.granularity import PerChannel
      >>> s = QScheme(bits=4, granularity=PerChannel(0))
      >>> s.qmin, s.qmax, QScheme(bits=4, symmetric=False).qmax
      (-8, 7, 15)
    """

    bits: int = 8
    symmetric: bool = True
    symmetric_range: bool = False
    pot_scale: bool = False
    granularity: Granularity = PerTensor()
    dynamic: bool = False

    if TYPE_CHECKING:  # a name is accepted, an instance is stored

        def __init__(
            self,
            *,
            bits: int = 8,
            symmetric: bool = True,
            symmetric_range: bool = False,
            pot_scale: bool = False,
            granularity: Granularity | GranularityName = ...,
            dynamic: bool = False,
        ) -> None: ...

    def __post_init__(self) -> None:
        _check_fields("QScheme", self)
        if isinstance(self.granularity, PerToken) and not self.dynamic:
            because = "the scale of a token is computed from that token"
            raise ConfigError(
                explain("QScheme", "PerToken() without dynamic is not possible", because=because, fix="dynamic=True")
            )

    def __repr__(self) -> str:
        shown = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "bits" or value != field.default:  # the width always, other fields where they differ
                shown[field.name] = value
        return f"QScheme({_spelled(shown)})"

    @property
    def qmin(self) -> int:
        """Smallest code."""
        if not self.symmetric:
            return 0
        lowest = -(1 << self.bits - 1)
        return lowest + 1 if self.symmetric_range else lowest

    @property
    def qmax(self) -> int:
        """Largest code."""
        value_bits = self.bits - 1 if self.symmetric else self.bits
        return (1 << value_bits) - 1


def _spelled(values: Mapping[str, object]) -> str:
    """Keyword arguments as Python writes them."""
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


SCHEME_FIELDS = tuple(f.name for f in fields(QScheme))
"""Names of the fields of a :class:`QScheme`."""


@constructor
@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """The settings of one quantizer.

    Attributes:
      scheme: the grid.
      observer: the statistic that gives the range, as returned by ``sq.observers.*``; or a name, ``"mse"``.
      fake_quantize: the arithmetic, as returned by ``sq.fake_quantize.*``; or a name, ``"fixed"``.
      observe_only: the quantizer has a state and qparams like all others, but leaves values unchanged.
      optional: a run that does not reach the quantized value is no error.
    """

    scheme: QScheme
    observer: Spec
    fake_quantize: Spec
    observe_only: bool = False
    optional: bool = False

    if TYPE_CHECKING:  # a name is accepted, a spec is stored

        def __init__(
            self,
            *,
            scheme: QScheme,
            observer: Spec | str,
            fake_quantize: Spec | str,
            observe_only: bool = False,
            optional: bool = False,
        ) -> None: ...

    def __post_init__(self) -> None:
        _check_fields("QuantizerConfig", self)


PIECES: Mapping[str, Factories[Any]] = {"observer": OBSERVERS, "fake_quantize": FAKE_QUANTIZERS}
"""By field of a :class:`QuantizerConfig`, the registry whose names it may have."""


def checked(where: str, values: Mapping[str, object]) -> dict[str, Option]:
    """Fields of a scheme or of a quantizer's config, with names and digits replaced by what they stand for.

    Args:
      where: the class or function that an error names.
      values: the fields.

    Raises:
      ConfigError: values of wrong types; all problems in one message.

    Example:
      >>> checked("override", {"bits": "4", "granularity": "per_channel"})
      {'bits': 4, 'granularity': PerChannel(axis=None)}
    """
    found, problems = {}, []
    for name, value in values.items():
        try:
            found[name] = _checked_field(where, name, value)
        except ConfigError as error:
            problems.append(str(error))
    raise_all(problems)
    return found


def _checked_field(where: str, name: str, value: object) -> Option:
    if name == "bits":
        return as_bits(value, where)
    if name == "granularity":
        return as_granularity(value, where)
    if name in PIECES:
        return _as_spec(where, name, value)
    if name == "scheme":
        if not isinstance(value, QScheme):
            raise ConfigError(explain(where, "scheme must be a QScheme", got=value, allowed="a QScheme"))
    elif not isinstance(value, bool):
        raise ConfigError(explain(where, f"{name} must be a bool", got=value, allowed="True or False"))
    return value


def _as_spec(where: str, name: str, value: object) -> Spec:
    """The spec of an observer or fake quantizer, from a spec or a registered name."""
    registry = PIECES[name]
    if isinstance(value, str):
        if value not in registry:
            raise ConfigError(unknown(where, registry.kind, value, registry.names()))
        return registry.spec(value)
    room, example = ("observers", "minmax") if name == "observer" else ("fake_quantize", "fixed")
    allowed, fix = f"what sq.{room}.* returns, or its name", f'{name}="{example}"'
    called = getattr(value, "__name__", None)
    if called in registry:  # the function itself, which was to be called
        fix = f"{name}=sq.{room}.{called}()"
    # a name that nobody registered is reported with the plan: a stored config may name a piece that is registered later
    is_of_another = isinstance(value, Spec) and value.name not in registry and any(value.name in r for r in PIECES.values())
    if not isinstance(value, Spec) or is_of_another:
        raise ConfigError(explain(where, f"{name} is no {registry.kind}", got=value, allowed=allowed, fix=fix))
    return value


def _check_fields(where: str, instance: QScheme | QuantizerConfig) -> None:
    """Replace the fields of a new instance by what :func:`checked` makes of them."""
    for name, value in checked(where, {f.name: getattr(instance, f.name) for f in fields(instance)}).items():
        object.__setattr__(instance, name, value)


OVERRIDE_FIELDS = (*SCHEME_FIELDS, *(f.name for f in fields(QuantizerConfig)))
"""The names that :func:`override` takes."""


@dataclass(frozen=True)
class Override:
    """New values for some fields of a :class:`QuantizerConfig` or of its scheme; made by :func:`override`."""

    values: tuple[tuple[str, Option], ...]

    def names(self) -> list[str]:
        """Names of the fields that it sets; a whole scheme sets each of its fields."""
        names: list[str] = []
        for name, _ in self.values:
            names.extend(SCHEME_FIELDS if name == "scheme" else (name,))
        return names

    def __call__(self, config: QuantizerConfig) -> QuantizerConfig:
        """``config`` with these fields replaced."""
        values = dict(self.values)
        scheme = values.pop("scheme", config.scheme)
        of_scheme = {name: values.pop(name) for name in SCHEME_FIELDS if name in values}
        return replace(config, scheme=replace(scheme, **of_scheme), **values)

    def __repr__(self) -> str:
        return f"override({_spelled(dict(self.values))})"


@constructor_for(ELSEWHERE)
def override(
    *,
    bits: int = UNSAID,
    symmetric: bool = UNSAID,
    symmetric_range: bool = UNSAID,
    pot_scale: bool = UNSAID,
    granularity: Granularity | GranularityName = UNSAID,
    dynamic: bool = UNSAID,
    scheme: QScheme = UNSAID,
    observer: Spec | str = UNSAID,
    fake_quantize: Spec | str = UNSAID,
    observe_only: bool = UNSAID,
    optional: bool = UNSAID,
) -> Override:
    """Change some fields of a scheme or of a quantizer's config, and leave the others as they are.

    Args:
      bits, symmetric, symmetric_range, pot_scale, granularity, dynamic: fields of :class:`QScheme`.
      scheme, observer, fake_quantize, observe_only, optional: fields of :class:`QuantizerConfig`.

    Returns:
      A function from a :class:`QuantizerConfig` to a changed one.

    Raises:
      ConfigError: unknown fields, or values of wrong types; all problems in one message.

    Example:
      >>> override(bits=4, granularity="per_channel", fake_quantize="lsq")
      override(bits=4, fake_quantize=learnable(use_grad_scaling=True), granularity=PerChannel(axis=None))
    """
    given = {name: new for name, new in locals().items() if new is not UNSAID}
    return Override(tuple(sorted(checked("override", given).items())))


def to_data(value: object) -> Data:
    """A config, or a value in one, as data for JSON; :func:`config_from_data` reads a :class:`QuantizerConfig` back."""
    if isinstance(value, Spec):
        return {"name": value.name, "options": dict(value.options)}
    if isinstance(value, Granularity):
        return {"name": type(value).__name__, **dataclasses.asdict(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_data(getattr(value, f.name)) for f in fields(value)}
    return value


def config_from_data(data: Mapping[str, Data]) -> QuantizerConfig:
    """The config that :func:`to_data` wrote."""
    scheme = dict(data["scheme"])
    granularity = dict(scheme.pop("granularity"))
    cls = GRANULARITIES[granularity.pop("name")]
    return QuantizerConfig(
        scheme=QScheme(granularity=cls(**granularity), **scheme),
        observer=_spec_from_data(data["observer"]),
        fake_quantize=_spec_from_data(data["fake_quantize"]),
        observe_only=data["observe_only"],
        optional=data["optional"],
    )


def _spec_from_data(data: Mapping[str, Data]) -> Spec:
    options: Mapping[str, Data] = data["options"]
    return Spec(data["name"], tuple(sorted((name, _option(value)) for name, value in options.items())))


def _option(value: Data) -> Option:
    """The value of an option from JSON, which has lists in the place of tuples.

    Raises:
      TypeError: it is an object of JSON, which no option is.
    """
    if isinstance(value, list):
        return tuple(map(_option, value))
    if isinstance(value, dict):
        raise TypeError(f"no option is {value!r}")
    return value
