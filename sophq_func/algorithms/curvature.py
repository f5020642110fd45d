"""Curvature of a loss by Hessian-vector products: the trace and the top eigenvalue of each weight's Hessian.

The loss is any function of a flat dict of tensors: params of a float or of a quantized model, or the scales that
``q.split`` gives. For a quantized model it is the Hessian of the surrogate, whose codes inside the range are constants.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from sophq_func.core.arguments import check_counts, is_count
from sophq_func.core.errors import ConfigError, StateError, explain, raise_all, unknown
from sophq_func.core.modes import is_plain
from sophq_func.core.public import public
from sophq_func.core.pytree import sorted_dict
from sophq_func.numerics.contracts import QParams

Tensors: TypeAlias = Mapping[str, Tensor]
"""Tensors by name."""

Loss: TypeAlias = Callable[[dict[str, Tensor]], Tensor]
"""From a dict like the params to a scalar."""

Product: TypeAlias = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""From vectors to their products with a Hessian, both shaped like the params that they name."""


class HessianTrace(NamedTuple):
    """An estimate of the trace of one tensor's Hessian; tensors of shape ``()``.

    Attributes:
      trace: the mean over the samples.
      error: its standard error, from the spread of the samples; NaN for a single one.
    """

    trace: Tensor
    error: Tensor


class TopEigenvalue(NamedTuple):
    """The eigenvalue of largest magnitude of one tensor's Hessian, as power iteration estimates it.

    Attributes:
      value: ``v H v``, of shape ``()``; it keeps its sign.
      vector: ``v``, of length 1, shaped like the tensor; a later call may start from it.
      residual: ``|H v - value v|``, of shape ``()``: some eigenvalue is no farther than this from ``value``.
    """

    value: Tensor
    vector: Tensor
    residual: Tensor


@public
def rademacher(params: Tensors, names: Iterable[str], samples: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random signs, +1 or -1 with equal probability, in the shapes of some tensors.

    Drawn in sorted order of the names: the same generator state gives the same signs.

    Args:
      params: the tensors that give shapes, dtypes and devices.
      names: which of them.
      samples: how many signs for each element.
      generator: the source of randomness; its state advances.

    Returns:
      ``{name: Tensor}``, sorted; shape ``(samples, *shape)``.

    Raises:
      ConfigError: ``samples`` below 1.
      StateError: a name that is unknown or names no floating tensor; a generator that is none.

    Example:
      >>> noise = rademacher({"w": torch.zeros(2)}, ["w"], 3, torch.Generator().manual_seed(0))
      >>> noise["w"].shape, noise["w"].abs().unique()
      (torch.Size([3, 2]), tensor([1.]))
    """
    if isinstance(names, str):
        raise StateError(
            explain("rademacher", "names must be a list", got=names, allowed="a list of names", fix=f"[{names!r}]")
        )
    check_counts("rademacher", {"samples": samples})
    if not isinstance(generator, torch.Generator):
        got, fix = type(generator).__name__, "torch.Generator().manual_seed(0)"
        raise StateError(
            explain("rademacher", "generator must be a torch.Generator", got=got, allowed="a torch.Generator", fix=fix)
        )
    chosen = sorted(set(names))
    _check_names("rademacher", chosen, params)
    signs = {}
    for name in chosen:
        shape = (samples, *params[name].shape)
        # on the generator's device, which may be another than that of the params
        bits = torch.randint(0, 2, shape, generator=generator, device=generator.device)
        signs[name] = (2 * bits - 1).to(params[name])
    return signs


@public
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
      ConfigError: a chunk of no size.

    Example:
      >>> params = {"w": torch.tensor([1.0, 2.0])}
      >>> noise = rademacher(params, ["w"], 4, torch.Generator().manual_seed(0))
      >>> hessian_trace(lambda p: (p["w"] ** 3).sum(), params, noise)["w"]
      HessianTrace(trace=tensor(18.), error=tensor(0.))
    """
    if chunk_size is not None and not is_count(chunk_size, most=sys.maxsize):
        allowed = "an int >= 1, or None for all at once"
        raise ConfigError(explain("hessian_trace", "no chunk has this size", got=chunk_size, allowed=allowed))
    _check_vectors("hessian_trace", noise, params, batched=True)
    product = _hessian("hessian_trace", loss, params, sorted(noise))

    def quadratic_forms(signs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: (signs[name] * image).sum() for name, image in product(signs).items()}

    samples = vmap(quadratic_forms, chunk_size=chunk_size)(sorted_dict(noise))
    return {name: _mean_and_error(values) for name, values in samples.items()}


def _mean_and_error(values: Tensor) -> HessianTrace:
    """The mean of some samples and its standard error, from their unbiased variance."""
    count, mean = len(values), values.mean()
    # a tensor divided by 0 samples less one is NaN, as promised for a single one
    variance = (values - mean).square().sum() / (count - 1)
    return HessianTrace(mean, (variance / count).sqrt())


@public
def top_eigenvalue(loss: Loss, params: Tensors, start: Tensors, steps: int = 20) -> dict[str, TopEigenvalue]:
    """The eigenvalue of largest magnitude of each tensor's Hessian, the other tensors being constants.

    Power iteration ``v <- H v / |H v|``, as HAWQ ranks layers (Dong et al., arXiv:1905.03696). The error falls as
    ``|second / first| ** (2 steps)`` for the two largest eigenvalues; the residual bounds what is left.

    Args:
      loss: from a dict like ``params`` to a scalar.
      params: where to take the Hessian.
      start: ``{name: Tensor}``, the vectors to start from, shaped like the params; not 0. For example one of
        :func:`rademacher`'s samples, or the ``vector`` of an earlier call.
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
    check_counts("top_eigenvalue", {"steps": steps})
    _check_vectors("top_eigenvalue", start, params, batched=False)
    return {name: _power_iteration(loss, params, name, start[name], steps) for name in sorted(start)}


def _power_iteration(loss: Loss, params: Tensors, name: str, start: Tensor, steps: int) -> TopEigenvalue:
    """Power iteration on one tensor's Hessian."""
    product = _hessian("top_eigenvalue", loss, params, [name])
    vector = start / start.norm()
    for _ in range(steps):
        image = product({name: vector})[name]
        length = image.norm()
        # H v = 0: v is an eigenvector of the eigenvalue 0, and stays
        vector = torch.where(length == 0, vector, image / torch.where(length == 0, 1, length))
    image = product({name: vector})[name]
    value = (vector * image).sum()
    return TopEigenvalue(value, vector, (image - value * vector).norm())


def _hessian(where: str, loss: Loss, params: Tensors, names: list[str]) -> Product:
    """Multiplication with the Hessian in the tensors named.

    Reverse mode over reverse mode: the Hessian is symmetric, so ``v^T H`` of a vector-Jacobian product of the gradient is
    ``H v``, and the gradient itself is computed once for all vectors.
    """

    def value(chosen: dict[str, Tensor]) -> Tensor:
        result = loss({name: chosen.get(name, tensor) for name, tensor in params.items()})
        if not isinstance(result, Tensor) or result.ndim:
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise StateError(
                explain(where, "loss must return a scalar", got=got, allowed="a scalar tensor", fix="loss.mean()")
            )
        return result

    pull_back = vjp(grad(value), {name: params[name] for name in names})[1]

    def product(vectors: dict[str, Tensor]) -> dict[str, Tensor]:
        (images,) = pull_back(vectors)
        return dict(images)

    return product


def _check_names(where: str, names: Iterable[str], params: Tensors) -> None:
    if not isinstance(params, Mapping) or not all(isinstance(tensor, Tensor) for tensor in params.values()):
        is_qparams = isinstance(params, Mapping) and any(isinstance(entry, QParams) for entry in params.values())
        fix = "learned, rest = q.split(qparams); a loss of learned calls q.apply with sq.merge(learned, rest)"
        because = "qparams hold integers, too, and nothing is differentiable in those" if is_qparams else ""
        sentence, allowed = "a loss is differentiated in a flat dict of tensors", "a dict {name: Tensor}"
        got = "a dict of QParams" if is_qparams else type(params).__name__
        raise StateError(explain(where, sentence, got=got, allowed=allowed, because=because, fix=fix if is_qparams else ""))
    floating = sorted(name for name, tensor in params.items() if tensor.is_floating_point())
    problems = [unknown(where, "floating tensor", name, floating) for name in names if name not in floating]
    raise_all(problems, StateError)


def _check_vectors(where: str, vectors: Tensors, params: Tensors, batched: bool) -> None:
    """Raise unless vectors are shaped like the params that they name, behind a common first axis where ``batched``."""
    if not isinstance(vectors, Mapping) or not vectors:
        fix = "sq.rademacher(params, names, samples, generator)"
        raise StateError(
            explain(where, "these vectors cannot be used", got=vectors, allowed="a dict {name: Tensor}", fix=fix)
        )
    _check_names(where, vectors, params)
    problems = []
    samples = next(iter(vectors.values())).shape[:1] if batched else torch.Size()
    for name, vector in vectors.items():
        like = params[name]
        is_alike = vector.dtype == like.dtype and vector.device == like.device
        if vector.shape != samples + like.shape or not is_alike or 0 in samples:
            places = (vector.device, like.device)
            ours, theirs = ("", "") if places[0] == places[1] else (f" on {place}" for place in places)
            got = f"{vector.dtype} {tuple(vector.shape)}{ours}"
            shape = ("samples", *like.shape) if batched else tuple(like.shape)
            sentence = f"the vector of {name!r} does not fit"
            problems.append(explain(where, sentence, got=got, allowed=f"{like.dtype} {shape}{theirs}"))
        elif not batched and is_plain([vector]) and not bool(vector.any()):
            problems.append(explain(where, f"a start of 0 for {name!r} leads nowhere", because="a Hessian maps 0 to 0"))
    raise_all(problems, StateError)
