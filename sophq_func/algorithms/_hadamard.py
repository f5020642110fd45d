"""Hadamard matrices: entries of one size, and orthogonal rows, so that a rotation spreads a large channel over all."""

from __future__ import annotations

import torch
from torch import Tensor


def rotation(n: int, generator: torch.Generator | None = None) -> Tensor:
    """An orthogonal matrix ``(n, n)``, float64; its entries are ``+-1 / sqrt(n)`` where such a matrix is known here.

    Sizes ``2**k``, ``2**k (p + 1)`` and ``2**k 2 (p + 1)`` are, ``p`` a prime that is 3 or 1 modulo 4 (Sylvester's and
    Paley's constructions): among them 576, 768, 896, 1536, 2048, 4096, 5120 and 8192. Elsewhere it is random.

    Args:
      n: the size.
      generator: for random signs of the rows, and for a random matrix; without one the signs are +1, and a matrix that must
        be random has a fixed seed.

    Example:
      >>> rotation(2) * 2**0.5
      tensor([[ 1.,  1.],
              [ 1., -1.]], dtype=torch.float64)
      >>> q = rotation(12)
      >>> torch.allclose(q @ q.T, torch.eye(12, dtype=torch.float64))
      True
    """
    known = hadamard(n)
    matrix: Tensor
    if known is not None:
        matrix = known / n**0.5
    else:
        source = generator or torch.Generator().manual_seed(0)
        matrix, _ = torch.linalg.qr(torch.randn(n, n, generator=source, dtype=torch.float64))
    if generator is None:
        return matrix
    signs = torch.randint(0, 2, (n, 1), generator=generator, dtype=torch.float64) * 2 - 1
    return signs * matrix


def hadamard(n: int) -> Tensor | None:
    """A matrix of +1 and -1 with orthogonal rows; ``None`` where no construction is known here."""
    doublings = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    rest = n
    while rest > 1:
        core = _paley(rest)
        if core is not None:
            return torch.kron(core, doublings)
        if rest % 2:
            return None
        rest //= 2
        doublings = torch.kron(pair, doublings)
    return doublings


def _paley(n: int) -> Tensor | None:
    """Paley's matrix of order ``p + 1`` for a prime ``p = 3 mod 4``, or ``2 (p + 1)`` for ``p = 1 mod 4``; else ``None``."""
    if n % 4:
        return None
    if _is_prime(n - 1):
        return _bordered(n - 1, antisymmetric=True) + torch.eye(n, dtype=torch.float64)
    if _is_prime(n // 2 - 1) and (n // 2 - 1) % 4 == 1:
        core, half = _bordered(n // 2 - 1, antisymmetric=False), torch.eye(n // 2, dtype=torch.float64)
        across = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        along = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(across, core) + torch.kron(along, half)
    return None


def _bordered(p: int, antisymmetric: bool) -> Tensor:
    """Jacobsthal's matrix of a prime with a border: 1 where the difference of two indices is a square, else -1."""
    squares = {x * x % p for x in range(1, p)}
    symbol = torch.tensor([0.0 if not d else 1.0 if d in squares else -1.0 for d in range(p)], dtype=torch.float64)
    index = torch.arange(p)
    matrix = torch.zeros(p + 1, p + 1, dtype=torch.float64)
    matrix[1:, 1:] = symbol[(index[:, None] - index) % p]
    matrix[0, 1:] = 1
    matrix[1:, 0] = -1 if antisymmetric else 1
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
