"""Which elements of a tensor share a scale, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, overload

from sophq_func.core.errors import ConfigError, explain, unknown
from sophq_func.core.public import constructor


@constructor
@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: ``(...)`` has a scale of shape ``()``."""


class _Unsaid:
    """The type of ``UNSAID``."""

    def __repr__(self) -> str:
        return "..."


UNSAID: Any = _Unsaid()
"""Default of an argument that changes nothing where it is not given, or for which ``None`` is a value."""

Axis: TypeAlias = int | tuple[int, ...]
"""One axis, counted from either end; or several, counted from the front, in ascending order."""


@constructor
@dataclass(frozen=True)
class PerChannel:
    """One scale for each index along ``axis``: ``(O, I, H, W)`` with ``axis=0`` has a scale of shape ``(O,)``.

    With several axes there is one scale for each combination of indices: the weight ``(E, I, O)`` of ``E`` experts with
    ``axis=(0, 2)`` has a scale of shape ``(E, O)``.

    ``None`` means the axes along which a weight is not summed over, which the plan fills in; outside a plan it means 0.
    """

    axis: Axis | None = None

    def __post_init__(self) -> None:
        _check_axis(self)


@constructor
@dataclass(frozen=True, init=False)
class PerGroup:
    """One scale for each ``size`` consecutive elements of a channel.

    ``axis`` is the channel axis, as in :class:`PerChannel`; the other axes are flattened in their order and cut into
    groups. ``(O, I)`` with ``axis=0, size=32`` has a scale of shape ``(O, I // 32)``; ``(O, I, H, W)`` one of shape
    ``(O, I * H * W // 32)``; ``(E, I, O)`` with ``axis=(0, 2)`` one of shape ``(E, O, I // 32)``. The size must divide the
    number of elements of a channel.

    A number alone is the size, two are the axis and the size.

    Example:
      >>> PerGroup(32), PerGroup(0, 32), PerGroup(size=32, axis=0)
      (PerGroup(axis=None, size=32), PerGroup(axis=0, size=32), PerGroup(axis=0, size=32))
    """

    axis: Axis | None = None
    size: int = 128

    @overload
    def __init__(self, size: int = 128, /, *, axis: Axis | None = None) -> None: ...
    @overload
    def __init__(self, axis: Axis | None, size: int, /) -> None: ...
    @overload
    def __init__(self, *, size: int = 128, axis: Axis | None = None) -> None: ...
    def __init__(self, *given: Any, size: Any = UNSAID, axis: Any = UNSAID) -> None:
        axes, sizes = _by_position(given, has_size=size is not UNSAID)
        axes += [axis] if axis is not UNSAID else []
        sizes += [size] if size is not UNSAID else []
        if len(axes) > 1 or len(sizes) > 1:
            sentence, fix = "it takes one size and one axis", "PerGroup(32, axis=0)"
            raise ConfigError(explain("PerGroup", sentence, got=(*axes, *sizes), fix=fix))
        object.__setattr__(self, "axis", axes[0] if axes else None)
        object.__setattr__(self, "size", sizes[0] if sizes else 128)
        _check_axis(self)
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            sentence, fix = "size must be a positive int", "PerGroup(32), or PerGroup(32, axis=0)"
            raise ConfigError(explain("PerGroup", sentence, got=self.size, allowed="an int >= 1", fix=fix))
        if given == (1,) and not axes:
            because, fix = "a group of one element shares nothing", "PerGroup(axis=1), or PerGroup(size=1)"
            raise ConfigError(
                explain("PerGroup", "this is more likely an axis than a size", got=1, because=because, fix=fix)
            )


def _by_position(given: tuple[Any, ...], has_size: bool) -> tuple[list[Any], list[Any]]:
    """The axes and the sizes among the positional arguments of :class:`PerGroup`.

    One int is a size, unless a size is given by keyword; two arguments are an axis and a size.
    """
    if len(given) == 1 and isinstance(given[0], int) and not has_size:
        return [], list(given)
    return list(given[:1]), list(given[1:])


@constructor
@dataclass(frozen=True)
class PerBlock:
    """One scale for each block of ``rows`` by ``columns`` elements.

    The tensor is viewed as a matrix: its first axis, and the others flattened. ``(O, I)`` with ``rows=128, columns=128``
    has a scale of shape ``(O // 128, I // 128)``. Rows and columns must divide the matrix.
    """

    rows: int = 128
    columns: int = 128

    def __post_init__(self) -> None:
        for name, size in (("rows", self.rows), ("columns", self.columns)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ConfigError(explain("PerBlock", f"{name} must be a positive int", got=size, allowed="an int >= 1"))


@constructor
@dataclass(frozen=True)
class PerToken:
    """One scale for each row along the last axis: ``(B, T, C)`` has a scale of shape ``(B, T)``.

    Token scales cannot be carried over to another tensor, hence ``QScheme(dynamic=True)``.
    """


def _check_axis(granularity: PerChannel | PerGroup) -> None:
    """Check the axis of a granularity; a list, as JSON has it, becomes a tuple."""
    axis = granularity.axis
    if axis is None or type(axis) is int:  # ``isinstance`` would take a bool for an int
        return
    if isinstance(axis, list | tuple) and _is_ascending(axis):
        object.__setattr__(granularity, "axis", tuple(axis))
        return
    where = type(granularity).__name__
    allowed = "an int, None, or a tuple of ints from 0 in ascending order"
    raise ConfigError(explain(where, "this is no axis", got=axis, allowed=allowed, fix=f"{where}(axis=0)"))


def _is_ascending(axis: object) -> bool:
    """Whether this is a list or tuple of different axes, counted from the front, in ascending order."""
    if not isinstance(axis, list | tuple) or not all(type(item) is int and item >= 0 for item in axis):
        return False
    return list(axis) == sorted(set(axis))


Granularity = PerTensor | PerChannel | PerGroup | PerBlock | PerToken
"""Which elements of a tensor share a scale."""

GRANULARITIES: Mapping[str, type[Granularity]] = {
    cls.__name__: cls for cls in (PerTensor, PerChannel, PerGroup, PerBlock, PerToken)
}
"""By name, as JSON and error messages have it."""

GranularityName: TypeAlias = Literal["per_tensor", "per_channel", "per_group", "per_block", "per_token"]
"""What a type checker accepts for a granularity beside an instance."""

SPELLINGS: Mapping[str, type[Granularity]] = {
    "per_tensor": PerTensor,
    "per_channel": PerChannel,
    "per_group": PerGroup,
    "per_block": PerBlock,
    "per_token": PerToken,
}
"""By the name that a config may have instead of an instance with the default fields."""

_FOLDED = {name.casefold(): cls for name, cls in {**SPELLINGS, **GRANULARITIES}.items()}


def as_granularity(value: object, where: str) -> Granularity:
    """A granularity from an instance or a name.

    Args:
      value: an instance, ``"per_channel"`` or ``"PerChannel"``, in upper or lower case.
      where: the class or key that an error names.

    Raises:
      ConfigError: neither of these.

    Example:
      >>> as_granularity("per_group", "QScheme")
      PerGroup(axis=None, size=128)
    """
    if isinstance(value, Granularity):
        return value
    if isinstance(value, str):
        cls = _FOLDED.get(value.casefold())
        if cls is None:
            raise ConfigError(unknown(where, "granularity", value, tuple(SPELLINGS)))
        return cls()
    sentence, allowed = "granularity must be an instance of a granularity class, or its name", " or ".join(GRANULARITIES)
    name = value.__name__ if isinstance(value, type) and value.__name__ in GRANULARITIES else "PerTensor"
    fix = f"granularity={name}()"
    raise ConfigError(explain(where, sentence, got=value, allowed=allowed, fix=fix))
