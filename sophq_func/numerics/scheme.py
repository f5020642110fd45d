"""Frozen values that say *what* a quantizer is: granularity, scheme, observer, fake quantizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from sophq_func.core.errors import ConfigError, explain, unknown
from sophq_func.core.registry import Spec


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: ``(...)`` has a scale of shape ``()``."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each index along ``axis``: ``(O, I, H, W)`` with ``axis=0`` has a scale of shape ``(O,)``.

    Without an axis it is that of a weight's output channels, which a plan knows; alone, it is 0.
    """

    axis: int | None = None

    def __post_init__(self) -> None:
        _check_axis(self)


@dataclass(frozen=True)
class PerGroup:
    """One scale for each ``size`` consecutive elements of a channel.

    ``axis`` is the channel axis, as in :class:`PerChannel`; what is left of the tensor is flattened in its own order and
    cut into groups. ``(O, I)`` with ``axis=0, size=32`` has a scale of shape ``(O, I // 32)``; ``(O, I, H, W)`` one of
    shape ``(O, I * H * W // 32)``. The size must divide the channel.
    """

    axis: int | None = None
    size: int = 128

    def __post_init__(self) -> None:
        _check_axis(self)
        if not isinstance(self.size, int) or self.size < 1:
            raise ConfigError(explain("PerGroup", "this size is not possible", got=self.size, allowed="an int >= 1"))


@dataclass(frozen=True)
class PerBlock:
    """One scale for each block of ``rows`` by ``columns`` elements.

    The tensor is seen as a matrix: its first axis, and the others flattened. ``(O, I)`` with ``rows=128, columns=128`` has
    a scale of shape ``(O // 128, I // 128)``. The block must divide the matrix.
    """

    rows: int = 128
    columns: int = 128

    def __post_init__(self) -> None:
        for size in (self.rows, self.columns):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ConfigError(explain("PerBlock", "this size is not possible", got=size, allowed="an int >= 1"))


@dataclass(frozen=True)
class PerToken:
    """One scale for each row along the last axis: ``(B, T, C)`` has a scale of shape ``(B, T)``.

    Tokens come and go, so that no statistic of one outlives its tensor: it needs ``QScheme(dynamic=True)``.
    """


def _check_axis(granularity: PerChannel | PerGroup) -> None:
    if not isinstance(granularity.axis, int | None):
        where = type(granularity).__name__
        raise ConfigError(explain(where, "this axis is not possible", got=granularity.axis, allowed="an int, or None"))


Granularity = PerTensor | PerChannel | PerGroup | PerBlock | PerToken
GRANULARITIES: Mapping[str, type[Granularity]] = {
    cls.__name__: cls for cls in (PerTensor, PerChannel, PerGroup, PerBlock, PerToken)
}


def as_bits(value: object, where: str) -> int:
    """A bit width from an int or a string of digits, checked to lie in 2..16.

    Example:
      >>> as_bits("8", "a_qscheme")
      8
    """
    number = int(value) if isinstance(value, str) and value.strip().isdigit() else value
    if isinstance(number, bool) or not isinstance(number, int) or not 2 <= number <= 16:
        raise ConfigError(explain(where, "this bit width is not possible", got=value, allowed="2..16", fix="bits=8"))
    return number


@dataclass(frozen=True, kw_only=True)
class QScheme:
    """An integer grid and how many scales a tensor has.

    Attributes:
      bits: width of the codes, 2..16.
      symmetric: the zero point is 0 and codes are signed; otherwise (affine) codes start at 0.
      symmetric_range: leave out the most negative code, so that the grid is symmetric too.
      pot_scale: scales are powers of two, ``2 ** round(log2(scale))``.
      granularity: per tensor, channel, group, block or token.
      dynamic: scale and zero point are computed from the tensor at hand instead of from observed statistics.

    Source: semantics of ``QuantizeScheme`` (semantics.md 1.3).

    Example:
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", as_bits(self.bits, "QScheme"))
        for name in ("symmetric", "symmetric_range", "pot_scale", "dynamic"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    explain("QScheme", f"{name} is not possible", got=getattr(self, name), allowed="True or False")
                )
        if not isinstance(self.granularity, Granularity):
            allowed = " or ".join(GRANULARITIES)
            raise ConfigError(explain("QScheme", "this granularity is not possible", got=self.granularity, allowed=allowed))
        if isinstance(self.granularity, PerToken) and not self.dynamic:
            because = "the scale of a token is computed from that token"
            raise ConfigError(
                explain("QScheme", "PerToken() without dynamic is not possible", because=because, fix="dynamic=True")
            )

    def __repr__(self) -> str:
        changed = (f.name for f in fields(self) if f.name == "bits" or getattr(self, f.name) != f.default)
        return f"QScheme({', '.join(f'{name}={getattr(self, name)!r}' for name in changed)})"

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return int(self.symmetric_range) - (1 << self.bits - 1) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << self.bits - self.symmetric) - 1


SCHEME_FIELDS = tuple(f.name for f in fields(QScheme))


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Everything that one quantizer is told.

    Attributes:
      scheme: the grid.
      observer: which statistic gives the range, as returned by ``sq.observers.*``.
      fake_quantize: which arithmetic quantizes, as returned by ``sq.fake_quantize.*``.
      observe_only: it has a state and qparams like all others, but values pass unchanged.
      optional: a run that does not reach the value is accepted.
    """

    scheme: QScheme
    observer: Spec
    fake_quantize: Spec
    observe_only: bool = False
    optional: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_field("QuantizerConfig", field.name, getattr(self, field.name))


FIELD_TYPES: Mapping[str, type] = {
    "scheme": QScheme,
    "observer": Spec,
    "fake_quantize": Spec,
    "observe_only": bool,
    "optional": bool,
}


def _check_field(where: str, name: str, value: object) -> None:
    """Raise a :class:`ConfigError` for a field of a :class:`QuantizerConfig` of the wrong type."""
    cls = FIELD_TYPES[name]
    if not isinstance(value, cls):
        raise ConfigError(explain(where, f"this {name} is not possible", got=value, allowed=f"a {cls.__name__}"))


OVERRIDE_FIELDS = (*SCHEME_FIELDS, *(f.name for f in fields(QuantizerConfig)))


@dataclass(frozen=True)
class Override:
    """Some fields of a :class:`QuantizerConfig`; made by :func:`override`."""

    values: tuple[tuple[str, Any], ...]

    def names(self) -> list[str]:
        """Names of the fields that it sets; a whole scheme sets each of its fields."""
        return [field for name, _ in self.values for field in (SCHEME_FIELDS if name == "scheme" else (name,))]

    def __call__(self, config: QuantizerConfig) -> QuantizerConfig:
        """``config`` with these fields replaced."""
        values = dict(self.values)
        scheme = replace(values.pop("scheme", config.scheme), **{k: values.pop(k) for k in SCHEME_FIELDS if k in values})
        return replace(config, scheme=scheme, **values)

    def __repr__(self) -> str:
        return f"override({', '.join(f'{k}={v!r}' for k, v in self.values)})"


def override(**values: Any) -> Override:
    """Fields of a scheme or of a quantizer's config to change, leaving the others as they are.

    Args:
      **values: fields of :class:`QScheme` (``bits=4``) or of :class:`QuantizerConfig` (``observer=...``).

    Raises:
      ConfigError: an unknown field.

    Example:
      >>> override(bits=4)
      override(bits=4)
    """
    for name in values:
        if name not in OVERRIDE_FIELDS:
            raise ConfigError(unknown("override", "field", name, OVERRIDE_FIELDS))
        if name in FIELD_TYPES:
            _check_field("override", name, values[name])
    if "bits" in values:
        values["bits"] = as_bits(values["bits"], "override")
    return Override(tuple(sorted(values.items())))


def to_data(value: Any) -> Any:
    """A config as JSON-able data; :func:`config_from_data` is the inverse for a :class:`QuantizerConfig`."""
    if isinstance(value, Spec):
        return {"name": value.name, "options": dict(value.options)}
    if isinstance(value, Granularity):
        return {"name": type(value).__name__, **dataclasses.asdict(value)}
    if dataclasses.is_dataclass(value):
        return {f.name: to_data(getattr(value, f.name)) for f in fields(value)}
    return value


def config_from_data(data: Mapping[str, Any]) -> QuantizerConfig:
    """Read a config back from what :func:`to_data` wrote."""
    scheme = dict(data["scheme"])
    granularity = dict(scheme.pop("granularity"))
    cls = GRANULARITIES[granularity.pop("name")]
    specs = {k: Spec(data[k]["name"], tuple(sorted(data[k]["options"].items()))) for k in ("observer", "fake_quantize")}
    return QuantizerConfig(
        scheme=QScheme(granularity=cls(**granularity), **scheme),
        observe_only=data["observe_only"],
        optional=data["optional"],
        **specs,
    )
