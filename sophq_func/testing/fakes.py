"""Fake quantizers to hold to laws: those of the library, what each claims, and its qparams as leaves of a tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sophq_func.core.pytree import sorted_dict
from sophq_func.core.registry import Spec
from sophq_func.fake_quantize import fake_quantizer
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, FakeQuantize, QParams
from sophq_func.numerics.scheme import QScheme
from sophq_func.testing.pieces import Piece, named
from sophq_func.testing.subjects import (
    SHAPE,
    calibrated,
    sample,
)

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "adaround_hard": ("adaround", {"rounding": "hard"}),
    "dorefa_tanh": ("dorefa", {"mapping": "tanh"}),
    "e5m2_max": ("e5m2", {"scaling": "max"}),
    "fp4_nf4": ("fp4", {"data_type": "nf4"}),
    "fpxgroup_double": ("fpxgroup", {"group_size": 4, "double_quant": True}),
    "gptq_columns": ("gptq", {"group_size": 0}),
    "mxfp6_e2m3": ("mxfp6", {"element": "e2m3"}),
    "mxfp8_e5m2": ("mxfp8", {"element": "e5m2"}),
    "qdrop_half": ("qdrop", {"prob": 0.5}),
}
"""Options that lead to other arithmetic than the defaults."""


def made(piece: Piece, **options: Any) -> FakeQuantize:
    """A fake quantizer or one of ``VARIANTS``."""
    name, more = (piece.name, dict(piece.options)) if isinstance(piece, Spec) else VARIANTS.get(piece, (piece, {}))
    return fake_quantizer(name, **(more | options))


TANH = dict.fromkeys(("dorefa", "dorefa_tanh"), "maps by tanh and the largest element of the tensor")
LEARNED = dict.fromkeys(("adaround", "adaround_hard"), "rounds as was learned, here for another tensor")
BLOCKS = dict.fromkeys(
    [name for name in (*FAKE_QUANTIZERS.names(), *VARIANTS) if name.startswith(("mx", "nvfp4", "fpxgroup"))],
    "a scale for each block of the tensor at hand",
)


EXCEPT: dict[str, dict[str, str]] = {
    "idempotent": TANH | LEARNED,
    "monotone": TANH | BLOCKS,
    "zero": {"dorefa": "0 lies between two values of a grid of an even number of values"} | LEARNED,
    "local": TANH | BLOCKS,
    "odd": LEARNED | {"fp4_nf4": "a lopsided table", "nnie": "one value less below 0"},
    "grid": TANH | {"adaround": "soft rounding leaves the grid", "qdrop_half": "lets elements pass"},
}
"""Which quantizers do not claim a property, and why; all others do."""


def ready(piece: Piece, scheme: QScheme, seed: int = 0, **options: Any) -> tuple[FakeQuantize, QParams]:
    """A fake quantizer, and qparams that clip a part of ``sample(1)``."""
    fq = made(piece, **options)
    qparams = calibrated(fq, sample(seed) * 0.7, scheme)
    noise = {"noise": torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed))} if fq.noise else {}
    return fq, with_extras(qparams, **noise)


def with_extras(qparams: QParams, **extras: Tensor) -> QParams:
    """``qparams`` with further extras."""
    return qparams._replace(extras=sorted_dict(qparams.extras | extras))


CONSTANT = ("noise", "qmin", "qmax")
"""Extras that no gradient is taken of."""

SIZES = {f"values about {size}": size for size in (1e-44, 1e-38, 1e-20, 1e20, 1e38)}


def floating(qparams: QParams) -> dict[str, Tensor]:
    """The leaves that torch can differentiate."""
    named = {"scale": qparams.scale, "zero_point": qparams.zero_point} | qparams.extras
    return {name: leaf for name, leaf in named.items() if leaf.is_floating_point() and name not in CONSTANT}


def put(qparams: QParams, leaves: dict[str, Tensor]) -> QParams:
    """``qparams`` with these leaves, which :func:`floating` named."""
    extras = {name: leaf for name, leaf in leaves.items() if name not in ("scale", "zero_point")}
    scale, zero_point = leaves.get("scale", qparams.scale), leaves.get("zero_point", qparams.zero_point)
    return with_extras(QParams(scale, zero_point, qparams.extras), **extras)


def objective(fq: FakeQuantize, qparams: QParams, scheme: QScheme) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
    """A scalar of ``x`` and the floating leaves, curved so that no derivative is a constant."""

    def f(x: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        y = fq.apply(x, put(qparams, leaves), scheme)
        return (y.square() * torch.arange(1, y.numel() + 1, dtype=y.dtype).reshape(y.shape) / y.numel()).sum()

    return f


def eighths(x: Tensor) -> Tensor:
    """``x``, rounded to numbers that every format of half precision and FP8 keeps."""
    return (8 * x).round() / 8


def claims(claim: str) -> Callable[[Piece], bool]:
    """Whether a fake quantizer claims a property: all do but those of ``EXCEPT``."""
    return lambda piece: named(piece) not in EXCEPT[claim]


def is_integer(piece: Piece) -> bool:
    """Whether values are integers times a scale."""
    return made(piece).integer


def prepares(piece: Piece) -> bool:
    """Whether a fake quantizer has a ``prepare`` of its own."""
    return made(piece).prepare is not None


def is_rowwise(piece: Piece) -> bool:
    """Whether a fake quantizer claims ``rowwise``."""
    return made(piece).rowwise


def has_many(piece: Piece) -> bool:
    """Whether a fake quantizer has ``many``."""
    return made(piece).many is not None
