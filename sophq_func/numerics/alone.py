"""Observers and fake quantizers used alone: what a model would have checked is checked at each call.

Inside a transform or a compiler nothing is checked; there the functions are those that models use.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sophq_func.core.arguments import check_reals, not_real
from sophq_func.core.errors import ConfigError, StateError, explain, raise_all
from sophq_func.core.modes import is_plain, is_plain_eager
from sophq_func.core.public import public_as
from sophq_func.core.pytree import tensors
from sophq_func.numerics.contracts import FakeQuantize, Observer, QParams, State
from sophq_func.numerics.entries import check_entry
from sophq_func.numerics.kinds import Kind, KindCheck
from sophq_func.numerics.layout import scale_axes
from sophq_func.numerics.scheme import QScheme


def observer_alone(name: str, built: Observer) -> Observer:
    """An observer whose functions check what they are given.

    Args:
      name: what errors call it.
      built: the observer.
    """
    where = f"observer {name!r}"

    @public_as(f"{where}.init")
    def init(x: Tensor, scheme: QScheme) -> State:
        _check(f"{where}.init", x, scheme)
        return built.init(x, scheme)

    @public_as(f"{where}.update")
    def update(state: State, x: Tensor, scheme: QScheme) -> State:
        _check(f"{where}.update", x, scheme)
        if is_plain_eager():  # an empty tensor, whatever its shape, changes no state
            _check_state(f"{where}.update", state, built.init(x, scheme) if x.numel() else state)
        return built.update(state, x, scheme)

    @public_as(f"{where}.merge")
    def merge(a: State, b: State) -> State:
        if is_plain_eager():
            _check_state(f"{where}.merge", a, a)
            _check_state(f"{where}.merge", b, a)
        return built.merge(a, b)

    @public_as(f"{where}.qparams")
    def qparams(state: State, scheme: QScheme) -> QParams:
        _check_scheme(f"{where}.qparams", scheme)
        _check_state(f"{where}.qparams", state, state)
        result = built.qparams(state, scheme)
        _check_axes(f"{where}.qparams", state, result, scheme)
        if is_plain(tensors(state)) and bool(result.scale.isnan().any()):
            sentence, allowed = "this state gives no scale", "finite statistics of at least one value"
            raise StateError(explain(where, sentence, got=state, allowed=allowed, fix="update it with finite tensors"))
        return result

    return built._replace(
        init=_named(init, built.init),
        update=_named(update, built.update),
        merge=_named(merge, built.merge),
        qparams=_named(qparams, built.qparams),
    )


def fake_quantizer_alone(name: str, built: FakeQuantize) -> FakeQuantize:
    """A fake quantizer whose ``init`` and ``apply`` check what they are given.

    Args:
      name: what errors call it.
      built: the fake quantizer.
    """
    where = f"fake quantizer {name!r}"
    # A scheme comes with each call, so that the number of axes is no part of the kind. Most fake quantizers take a scale of
    # 0 for the smallest that they divide by; no observer gives it to a model.
    kind = Kind(
        axes=None, extras=frozenset(built.learnable), is_read=True, is_signed="scale" in built.learnable, has_floor=True
    )
    check_kind = KindCheck({where: kind})

    def check(function: str, x: Tensor, qparams: QParams, scheme: QScheme) -> None:
        _check(f"{where}.{function}", x, scheme)
        if is_plain_eager():
            check_entry(f"{where}.{function}: qparams", qparams)
            _check_device(f"{where}.{function}", x, qparams)
            if not scheme.dynamic:
                check_kind({where: qparams})

    @public_as(f"{where}.init")
    def init(qparams: QParams, x: Tensor, scheme: QScheme) -> QParams:
        check("init", x, qparams, scheme)
        return built.init(qparams, x, scheme)

    @public_as(f"{where}.apply")
    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        check("apply", x, qparams, scheme)
        return built.apply(x, qparams, scheme, noise)

    return built._replace(init=_named(init, built.init), apply=_named(apply, built.apply))


def _named(function: Any, like: Any) -> Any:
    """A function under the name of another one, which says where it is defined."""
    for attribute in ("__module__", "__name__", "__qualname__"):
        setattr(function, attribute, getattr(like, attribute, getattr(function, attribute)))
    return function


def _check(where: str, x: object, scheme: object) -> None:
    """Raise unless this is a tensor that can be quantized, and a scheme."""
    _check_scheme(where, scheme)
    check_reals(where, {"x": x})


def _check_device(where: str, x: Tensor, qparams: QParams) -> None:
    if x.device != qparams.scale.device:
        allowed, fix = f"{qparams.scale.device}, that of the scale", "x and qparams on one device"
        raise StateError(explain(where, "x is on another device", got=x.device, allowed=allowed, fix=fix))


def _check_scheme(where: str, scheme: object) -> None:
    if not isinstance(scheme, QScheme):
        raise ConfigError(explain(where, "this is no scheme", got=scheme, allowed="sq.QScheme", fix="sq.QScheme(bits=8)"))


def _check_axes(where: str, state: State, result: QParams, scheme: QScheme) -> None:
    """Raise a :class:`StateError` where a state is that of another granularity."""
    axes = scale_axes(scheme.granularity)
    if not scheme.dynamic and axes is not None and result.scale.ndim != axes:
        got, allowed = tuple(result.scale.shape), f"{axes} axes for {scheme.granularity}"
        fix = "the state that init or update returned for this scheme"
        raise StateError(explain(where, "this state gives scales of another shape", got=got, allowed=allowed, fix=fix))


def _check_state(where: str, state: State, like: State) -> None:
    """Raise a :class:`StateError` unless a state has the class, and its tensors the shapes and dtypes, of another one."""
    fix = "the state that init or update of this observer returned"
    if not isinstance(state, tuple) or not hasattr(state, "_fields") or type(state) is not type(like):
        got, allowed = type(state).__name__, type(like).__name__
        raise StateError(explain(where, "this is no state of it", got=got, allowed=allowed, fix=fix))
    problems = []
    for field, tensor, other in zip(state._fields, state, like, strict=True):
        unfit = not_real(where, field, tensor)
        if unfit:
            problems.append(unfit)
        elif tensor.shape != other.shape or tensor.dtype != other.dtype or tensor.device != other.device:
            got, allowed = (f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (tensor, other))
            problems.append(explain(where, f"{field} does not fit", got=got, allowed=allowed, fix=fix))
    if not problems and len({tensor.device for tensor in state}) > 1:
        problems.append(explain(where, "its tensors are on several devices", got=[t.device for t in state], fix=fix))
    raise_all(problems, StateError)
