"""The laws of fake quantizers under transforms, of several at once, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sophq_func.core.pytree import leaves
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.granularity import PerChannel, PerTensor
from sophq_func.numerics.scheme import QScheme
from sophq_func.testing.fakes import (
    eighths,
    floating,
    has_many,
    is_rowwise,
    made,
    objective,
    put,
    ready,
)
from sophq_func.testing.laws import Law, law
from sophq_func.testing.pieces import Piece
from sophq_func.testing.subjects import (
    KINDS,
    SHAPE,
    STATIC_SCHEMES,
    assert_same,
    compiled,
    observed,
    pick,
    sample,
    scheme_of,
    stack,
)


@law(STATIC_SCHEMES)
def vmap_over_tensors_equals_the_loop(piece: Piece, scheme: QScheme) -> None:
    """``vmap`` over tensors equals the loop."""
    fq, qparams = ready(piece, scheme)
    xs = torch.stack([sample(1), sample(2)])
    batch = torch.vmap(lambda x: fq.apply(x, qparams, scheme))(xs)
    for x, y in zip(xs, batch, strict=True):
        assert_same(y, fq.apply(x, qparams, scheme))


@law(STATIC_SCHEMES)
def vmap_over_qparams_equals_the_loop(piece: Piece, scheme: QScheme) -> None:
    """``vmap`` over qparams equals the loop, in ``init``, too."""
    x, (fq, a), (_, b) = sample(1), ready(piece, scheme, 0), ready(piece, scheme, 2)
    batch = torch.vmap(lambda qp: fq.apply(x, qp, scheme))(stack([a, b]))
    assert_same(batch[0], fq.apply(x, a, scheme))
    assert_same(batch[1], fq.apply(x, b, scheme))
    fresh = torch.vmap(lambda qp: fq.init(qp, x, scheme))(stack([observed(x, scheme), observed(2 * x, scheme)]))
    assert_same(pick(fresh, 1), fq.init(observed(2 * x, scheme), x, scheme))


@law(STATIC_SCHEMES)
def vmap_of_a_gradient_equals_the_loop(piece: Piece, scheme: QScheme) -> None:
    """``vmap`` of the gradient equals the loop."""
    fq, qparams = ready(piece, scheme)
    gradient = torch.func.grad(objective(fq, qparams, scheme), argnums=(0, 1))
    xs = torch.stack([sample(1), sample(2)])
    over_x = torch.vmap(gradient, in_dims=(0, None))(xs, floating(qparams))
    leaves = stack([floating(qparams), floating(ready(piece, scheme, 2)[1])])
    over_leaves = torch.vmap(gradient, in_dims=(None, 0))(xs[0], leaves)
    for i in range(2):  # sums may be taken in another order
        assert_same(pick(over_x, i), gradient(xs[i], floating(qparams)), rtol=1e-5, atol=1e-5)
        assert_same(pick(over_leaves, i), gradient(xs[0], pick(leaves, i)), rtol=1e-5, atol=1e-5)


@law(STATIC_SCHEMES)
def forward_mode_agrees_with_reverse_mode(piece: Piece, scheme: QScheme) -> None:
    """``jvp`` and ``vjp`` are transposes of one another."""
    fq, qparams = ready(piece, scheme)
    x, leaves = sample(1, dtype=torch.float64), {k: v.double() for k, v in floating(qparams).items()}
    # eighths: casts round derivatives to their format, and these they keep
    direction, cotangent = eighths(sample(2, dtype=torch.float64)), eighths(sample(4, dtype=torch.float64))
    tangents = (direction, {k: eighths(torch.sin(9 * v)) for k, v in leaves.items()})

    def f(x: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        return fq.apply(x, put(qparams, leaves), scheme)

    y, pushed, *_ = torch.func.jvp(f, (x, leaves), tangents)
    pulled = torch.func.vjp(f, x, leaves)[1](cotangent)
    assert_same(y, f(x, leaves))
    dot = (pulled[0] * tangents[0]).sum() + sum((pulled[1][k] * tangents[1][k]).sum() for k in leaves)
    torch.testing.assert_close((pushed * cotangent).sum(), dot, rtol=1e-10, atol=1e-10)


@law(STATIC_SCHEMES)
def hessian_vector_products_keep_float32(piece: Piece, scheme: QScheme) -> None:
    """Products with the Hessian are finite, and float32 for float32."""
    fq, qparams = ready(piece, scheme)
    primals = (sample(1), floating(qparams))
    gradient = torch.func.grad(objective(fq, qparams, scheme), argnums=(0, 1))
    found, product, *_ = torch.func.jvp(gradient, primals, primals)
    for tree in (found, product):
        assert tree[0].dtype == torch.float32
        assert all(leaf.dtype == torch.float32 and leaf.isfinite().all() for leaf in (tree[0], *tree[1].values()))


Rounds = Callable[[list[Tensor], list[QParams]], Tensor]


@law({kind: scheme_of(kind, PerChannel(0)) for kind in KINDS}, only=is_rowwise)
def channels_of_several_weights_may_be_rounded_as_one(piece: Piece, scheme: QScheme) -> None:
    """The channels of two weights may be rounded as the rows of one matrix, with the same gradients."""
    fq = made(piece)

    def as_one(weights: list[Tensor], own: list[QParams]) -> Tensor:
        rows = torch.cat([x.reshape(len(x), -1) for x in weights])
        scale, zero_point = (torch.cat([getattr(one, field) for one in own]) for field in ("scale", "zero_point"))
        return fq.apply(rows, QParams(scale, zero_point, {}), scheme).reshape(2, *SHAPE)

    _agrees_with_apply(piece, scheme, as_one, [sample(1), sample(3)])


@law({kind: scheme_of(kind, PerTensor()) for kind in KINDS}, {"small": 1, "large": 1000}, only=has_many)
def many_tensors_may_be_prepared_together(piece: Piece, scheme: QScheme, copies: int) -> None:
    """``many`` gives for each tensor what ``apply`` gives, with the same gradients."""
    many = made(piece).many
    assert many is not None

    def together(values: list[Tensor], own: list[QParams]) -> Tensor:
        scales, zero_points = (torch.stack([getattr(one, field) for one in own]) for field in ("scale", "zero_point"))
        functions = many(QParams(scales, zero_points, {}), scheme)
        return torch.stack([function(x) for function, x in zip(functions, values, strict=True)])

    _agrees_with_apply(piece, scheme, together, [sample(1).repeat(copies, 1, 1), sample(3).repeat(copies, 1, 1)])


def _agrees_with_apply(piece: Piece, scheme: QScheme, f: Rounds, tensors: list[Tensor]) -> None:
    """A function that rounds two tensors gives what ``apply`` gives for each, and the gradients."""
    fq, first = ready(piece, scheme)
    own = [first, ready(piece, scheme, seed=2)[1]]

    def alone(tensors: list[Tensor], own: list[QParams]) -> Tensor:
        return torch.stack([fq.apply(x, one, scheme) for x, one in zip(tensors, own, strict=True)])

    def loss(rounds: Rounds) -> Callable[..., Tensor]:
        return lambda tensors, leaves: rounds(tensors, [put(*pair) for pair in zip(own, leaves, strict=True)]).square().sum()

    assert_same(f(tensors, own), alone(tensors, own))
    given = (tensors, [floating(one) for one in own])
    (to_x, to_leaves), (x_alone, leaves_alone) = (torch.func.grad(loss(g), (0, 1))(*given) for g in (f, alone))
    assert_same(to_x, x_alone)
    # the same terms in another order: their sum differs by their count times eps times the sum of their sizes
    bound = tensors[0].numel() * torch.finfo(torch.float32).eps
    for leaf, expected in zip(leaves(to_leaves), leaves(leaves_alone), strict=True):
        torch.testing.assert_close(leaf, expected, rtol=bound, atol=bound * float(expected.abs().max() + 1))


@law({str(item): item for item in (PerTensor(), PerChannel(1))}, slow=True)
def compiled_forward_and_gradient_equal_the_eager_ones(piece: Piece, granularity: Any) -> None:
    """``apply`` and its gradient compile as one graph and compute the same."""
    scheme = QScheme(bits=4, symmetric=False, granularity=granularity)
    fq, qparams = ready(piece, scheme)
    x, leaves = sample(1), floating(qparams)
    gradient = torch.func.grad(objective(fq, qparams, scheme), argnums=(0, 1))

    def both(x: Tensor, leaves: dict[str, Tensor]) -> Any:
        return fq.apply(x, put(qparams, leaves), scheme), gradient(x, leaves)

    (forward, backward), expected = compiled(both)(x, leaves), both(x, leaves)
    assert_same(forward, expected[0])
    assert_same(backward, expected[1], rtol=1e-5, atol=1e-5)


LAWS = tuple(one for one in list(globals().values()) if isinstance(one, Law))
"""In the order in which they are tried."""
