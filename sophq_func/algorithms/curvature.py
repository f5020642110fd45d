"""Curvature of a loss by Hessian-vector products: the trace and the top eigenvalue of each weight's Hessian.

The loss is any function of a flat dict of tensors: params of a float or of a quantized model, or the scales that
``q.split`` gives. Of a quantized model it is the Hessian of the surrogate, whose codes inside the range are constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from sophq_func.core.errors import ConfigError, StateError, explain, raise_all, unknown
from sophq_func.core.modes import is_plain
from sophq_func.core.pytree import sorted_dict

Tensors = Mapping[str, Tensor]
Loss = Callable[[dict[str, Tensor]], Tensor]


class HessianTrace(NamedTuple):
    """An estimate of the trace of one tensor's Hessian; tensors of shape ``()``.

    Attributes:
      trace: the mean over the samples.
      error: its standard error, from the spread of the samples; NaN for a single one.
    """

    trace: Tensor
    error: Tensor


class TopEigenvalue(NamedTuple):
    """The eigenvalue of largest magnitude of one tensor's Hessian, as power iteration found it.

    Attributes:
      value: ``v H v``, of shape ``()``; it keeps its sign.
      vector: ``v``, of length 1, shaped like the tensor; a later call may start from it.
      residual: ``|H v - value v|``, of shape ``()``: some eigenvalue is at most as far from ``value``.
    """

    value: Tensor
    vector: Tensor
    residual: Tensor


def rademacher(params: Tensors, names: Iterable[str], samples: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random signs, +1 or -1 with equal probability, in the shapes of some tensors.

    Drawn in sorted order of the names: the same generator state gives the same signs.

    Args:
      params: the tensors that give shapes, dtypes and devices.
      names: which of them.
      samples: how many signs for each element.
      generator: the source of randomness; its state moves on.

    Returns:
      ``{name: Tensor}``, sorted; shape ``(samples, *shape)``.

    Raises:
      ConfigError: ``samples`` below 1.
      StateError: a name that is unknown or names no floating tensor, no generator.

    Example:
      >>> noise = rademacher({"w": torch.zeros(2)}, ["w"], 3, torch.Generator().manual_seed(0))
      >>> noise["w"].shape, noise["w"].abs().unique()
      (torch.Size([3, 2]), tensor([1.]))
    """
    if isinstance(names, str):
        raise StateError(
            explain("rademacher", "these names is not possible", got=names, allowed="a list of names", fix=f"[{names!r}]")
        )
    _check_count("rademacher", "samples", samples)
    if not isinstance(generator, torch.Generator):
        got, fix = type(generator).__name__, "torch.Generator().manual_seed(0)"
        raise StateError(
            explain("rademacher", "this generator is not possible", got=got, allowed="a torch.Generator", fix=fix)
        )
    chosen = sorted(set(names))
    _check_names("rademacher", chosen, params)
    signs = {}
    for name in chosen:
        shape = (samples, *params[name].shape)
        bits = torch.randint(0, 2, shape, generator=generator, device=generator.device)
        signs[name] = (2 * bits - 1).to(params[name])
    return signs


def hessian_trace(loss: Loss, params: Tensors, noise: Tensors, *, chunk_size: int | None = None) -> dict[str, HessianTrace]:
    """The trace of the Hessian of each tensor, estimated from random signs.

    Hutchinson's estimator: ``trace(H) = E[v H v]`` for independent signs ``v``, as HAWQ-V2 uses it (Dong et al.,
    arXiv:1911.03852). One Hessian-vector product with a sample serves all tensors, ``v_w (H v)_w`` for the tensor ``w``.
    Its variance is ``2 sum H_ij**2`` over pairs ``i != j`` inside ``w``, plus ``sum H_ij**2`` over ``i`` inside and ``j`` in
    the other tensors of ``noise``: 0 where the Hessian is diagonal, and smaller where ``noise`` names fewer tensors.

    Args:
      loss: from a dict like ``params`` to a scalar.
      params: where to take the Hessian; tensors that ``noise`` does not name are constants.
      noise: ``{name: Tensor}`` of signs, shape ``(samples, *shape)``, from :func:`rademacher`.
      chunk_size: how many samples are mapped at once; by default all. Less takes less memory.

    Returns:
      ``{name: HessianTrace}``, sorted, for the names of ``noise``.

    Raises:
      StateError: noise of other names, shapes or dtypes than the params, or with another number of samples; a loss that
        is no scalar.

    Example:
      >>> params = {"w": torch.tensor([1.0, 2.0])}
      >>> noise = rademacher(params, ["w"], 4, torch.Generator().manual_seed(0))
      >>> hessian_trace(lambda p: (p["w"] ** 3).sum(), params, noise)["w"]
      HessianTrace(trace=tensor(18.), error=tensor(0.))
    """
    _check_vectors("hessian_trace", noise, params, batched=True)
    product = _hessian("hessian_trace", loss, params, sorted(noise))

    def forms(signs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: (signs[name] * found).sum() for name, found in product(signs).items()}

    found = vmap(forms, chunk_size=chunk_size)(sorted_dict(noise))
    return {name: _mean(values) for name, values in found.items()}


def _mean(values: Tensor) -> HessianTrace:
    count, mean = len(values), values.mean()
    return HessianTrace(mean, ((values - mean).square().sum() / (count - 1) / count).sqrt())


def top_eigenvalue(loss: Loss, params: Tensors, start: Tensors, steps: int = 20) -> dict[str, TopEigenvalue]:
    """The eigenvalue of largest magnitude of each tensor's Hessian, the other tensors being constants.

    Power iteration ``v <- H v / |H v|``, as HAWQ ranks layers (Dong et al., arXiv:1905.03696). The error falls as
    ``|second / first| ** (2 steps)``; the residual tells how far it has come.

    Args:
      loss: from a dict like ``params`` to a scalar.
      params: where to take the Hessian.
      start: ``{name: Tensor}``, the vectors to start from, shaped like the params; not 0. One of :func:`rademacher`'s
        samples will do, or the ``vector`` of an earlier call.
      steps: how many Hessian-vector products for each tensor; one more gives the value.

    Returns:
      ``{name: TopEigenvalue}``, sorted, for the names of ``start``.

    Raises:
      ConfigError: ``steps`` below 1.
      StateError: vectors of other names, shapes or dtypes than the params, or 0; a loss that is no scalar.

    Example:
      >>> params = {"w": torch.tensor([1.0, 2.0])}
      >>> found = top_eigenvalue(lambda p: -(p["w"] ** 3).sum(), params, {"w": torch.ones(2)}, steps=30)
      >>> found["w"].value
      tensor(-12.)
    """
    _check_count("top_eigenvalue", "steps", steps)
    _check_vectors("top_eigenvalue", start, params, batched=False)
    return {name: _iterated(loss, params, name, start[name], steps) for name in sorted(start)}


def _iterated(loss: Loss, params: Tensors, name: str, start: Tensor, steps: int) -> TopEigenvalue:
    """Power iteration on one tensor's Hessian."""
    product = _hessian("top_eigenvalue", loss, params, [name])
    vector = start / start.norm()
    for _ in range(steps):
        image = product({name: vector})[name]
        length = image.norm()
        vector = torch.where(length == 0, vector, image / torch.where(length == 0, 1, length))
    image = product({name: vector})[name]
    value = (vector * image).sum()
    return TopEigenvalue(value, vector, (image - value * vector).norm())


def _hessian(where: str, loss: Loss, params: Tensors, names: list[str]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Multiplication with the Hessian in the tensors named: reverse over reverse, the inner pass made once."""

    def value(chosen: dict[str, Tensor]) -> Tensor:
        found = loss({name: chosen.get(name, tensor) for name, tensor in params.items()})
        if not isinstance(found, Tensor) or found.ndim:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise StateError(
                explain(where, "this loss is not possible", got=got, allowed="a scalar tensor", fix="loss.mean()")
            )
        return found

    pull = vjp(grad(value), {name: params[name] for name in names})[1]
    return lambda vectors: dict(pull(vectors)[0])


def _check_names(where: str, names: Iterable[str], params: Tensors) -> None:
    known = sorted(name for name, tensor in params.items() if tensor.is_floating_point())
    raise_all([unknown(where, "floating tensor", name, known) for name in names if name not in known], StateError)


def _check_count(where: str, what: str, count: Any) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigError(explain(where, f"{what} is not possible", got=count, allowed="a whole number from 1"))


def _check_vectors(where: str, vectors: Tensors, params: Tensors, batched: bool) -> None:
    """Vectors are shaped like the params that they name, with a common first axis where they are batched."""
    if not isinstance(vectors, Mapping) or not vectors:
        fix = "sq.rademacher(params, names, samples, generator)"
        raise StateError(
            explain(where, "these vectors is not possible", got=vectors, allowed="a dict {name: Tensor}", fix=fix)
        )
    _check_names(where, vectors, params)
    problems = []
    samples = next(iter(vectors.values())).shape[:1] if batched else torch.Size()
    for name, vector in vectors.items():
        like = params[name]
        if vector.shape != samples + like.shape or vector.dtype != like.dtype or 0 in samples:
            allowed = f"{like.dtype} {('samples',) * batched + tuple(like.shape)}"
            problems.append(
                explain(
                    where,
                    f"the vector of {name!r} is not possible",
                    got=f"{vector.dtype} {tuple(vector.shape)}",
                    allowed=allowed,
                )
            )
        elif not batched and is_plain([vector]) and not bool(vector.any()):
            problems.append(
                explain(where, f"a start of 0 for {name!r} is not possible", because="the Hessian leaves 0 where it is")
            )
    raise_all(problems, StateError)
