"""The grid and the codes of a quantizer, for everything that stores or reports them.

A weight has codes if its fake quantizer encodes them (:attr:`FakeQuantize.encode`), or if its values are found to be codes
times a scale. A quantizer of activations has a grid if it computes what a runtime computes with that grid. Every other
quantizer is refused with one reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.codes._probe import reached_bounds, zero_code
from sophq_func.codes._slices import Slice, slices
from sophq_func.codes.grid import Grid, integer_format
from sophq_func.config.site import Site
from sophq_func.core.pytree import sorted_dict
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.model.weight_quantizer import Params, WeightQuantizer, arranged
from sophq_func.numerics import affine
from sophq_func.numerics.contracts import NO_CODES, Codes, FakeQuantize, QParams
from sophq_func.numerics.formats import code_bits, value_table
from sophq_func.numerics.pieces import in_force
from sophq_func.numerics.ranges import EPS, bounds, positive
from sophq_func.numerics.scheme import QScheme

LEAST = EPS**2
"""The smallest scale of a format that is no integer grid."""

BY_BLOCKS = ("exponent", "block_scale")
"""The parts of a grid that are computed from the weight, one number for each block."""

NOT_FINITE = "its scale is not finite"
HOLDS_NAN = "the weight holds NaN"
OFF_GRID = "its values do not lie on the grid of these qparams"
MORE_THAN_ROUNDING = "it computes more than rounding to a grid"
FROM_THE_TENSOR = "its scale is computed from the tensor at hand"

ROUNDINGS = 4
"""How far a frozen value may be from its grid, in units of the last place.

It was rounded when it was put on the grid and when a BatchNorm was divided out, and is rounded when that is folded in again.
"""

NUDGE = 2
"""Units of the last place by which frozen values are enlarged before the exponents of their blocks are computed again.

A power of two that was rounded down by one unit would give its block the next smaller exponent. Elements of a
block have far fewer bits than their dtype, so that two units of the last place move no value to another code.
"""


class Refusal(NamedTuple):
    """A quantizer has no stored form.

    Attributes:
      because: the reason, a clause that continues a sentence after "because".
    """

    because: str


class Stored(NamedTuple):
    """A weight as codes.

    Attributes:
      codes: in the layout of the parameter, in the dtype of the grid.
      grid: in the layout in which the quantizer sees the weight.
      site: of the quantizer, which says how both layouts are related.
    """

    codes: Tensor
    grid: Grid
    site: Site

    def read(self, codes: Tensor | None = None, parts: Mapping[str, Tensor] | None = None) -> Tensor:
        """The real numbers of the codes, float32, BatchNorm folded in, in the layout of the parameter.

        Args:
          codes, parts: equal tensors to use instead of these codes and the parts of the grid.
        """
        seen = arranged(self.codes if codes is None else codes, self.site)
        return arranged(self.grid.read(seen, parts), self.site)


def stored_form(
    quantizer: WeightQuantizer | RunQuantizer,
    qparams: QParams,
    params: Params | None = None,
    *,
    frozen: bool = False,
    wide: bool = False,
) -> Stored | Grid | Refusal:
    """The codes and the grid of a weight, or the grid of an activation's quantizer; or why there is none.

    Args:
      quantizer: from the engine of a :class:`~sophq_func.model.quantized.Quantized`.
      qparams: of this quantizer.
      params: of the model; needed for a weight.
      frozen: whether the params hold quantized weights already.
      wide: encode 16-bit floats as float32; otherwise in their own precision, as ``apply`` does.
    """
    if isinstance(quantizer, RunQuantizer):
        return value_grid(quantizer, qparams)
    assert params is not None
    return weight_codes(quantizer, params, qparams, frozen=frozen, wide=wide)


def share_on(qparams: QParams) -> float:
    """The mask ``extras["enabled"]`` as a number: 1 for a quantizer that acts or has no mask, 0 for one that is off."""
    mask = qparams.extras.get("enabled")
    return 1.0 if mask is None else float(mask)


def grid_of(fake: FakeQuantize, qparams: QParams, scheme: QScheme) -> Grid | Refusal:
    """The grid of a quantizer's values, without the parts that depend on the tensor; or why there is none."""
    why = _uncoded(fake, qparams, scheme)
    if why:
        return Refusal(why)
    if not scheme.dynamic and not bool(qparams.scale.isfinite().all()):
        return Refusal(NOT_FINITE)
    return _grid(fake, qparams, scheme, scheme.dynamic)


def _uncoded(fake: FakeQuantize, qparams: QParams, scheme: QScheme) -> str:
    """Why a quantizer's values have no codes; empty if they have, or if rounding to the grid may find them."""
    why = fake.uncoded(qparams, scheme)
    return affine.uncoded(qparams, scheme) if _is_looked_for(fake) and why == NO_CODES else why


def _is_looked_for(fake: FakeQuantize) -> bool:
    return fake.encode is None and fake.integer


def _grid(fake: FakeQuantize, qparams: QParams, scheme: QScheme, dynamic: bool) -> Grid:
    """The grid of the qparams, without the parts that depend on the tensor; of a dynamic grid these are all parts."""
    element = fake.element
    if element is None:
        return integer_grid(fake, qparams, scheme, dynamic)
    parts: dict[str, Tensor] = {}
    if fake.scaled and not dynamic:
        parts["scale"] = qparams.scale.detach().abs().clamp(min=LEAST)
    if isinstance(element, torch.dtype):
        name, bits = str(element).removeprefix("torch."), torch.finfo(element).bits
    else:
        name, bits = "table", code_bits(element)
        parts["table"] = value_table(element, qparams.scale.device)
    return Grid(
        format=name,
        bits=bits,
        granularity=scheme.granularity,
        parts=parts,
        block_size=fake.block_size,
        block_axis=fake.block_axis,
        dynamic=dynamic,
    )


def integer_grid(fake: FakeQuantize, qparams: QParams, scheme: QScheme, dynamic: bool = False) -> Grid:
    """The grid of scale, zero point and bounds; it does not check that the quantizer computes nothing else."""
    effective = fake.grid(qparams, scheme)
    low, high = (
        torch.as_tensor(bound, device=effective.scale.device).detach().to(torch.int32) for bound in bounds(effective, scheme)
    )
    name, bits = integer_format(int(low.min()), int(high.max()))
    parts: dict[str, Tensor] = {}
    if not dynamic:
        parts["scale"] = positive(effective.scale.detach())
        parts["zero_point"] = zero_code(effective, low, high, scheme).detach()
    return Grid(
        format=name,
        bits=bits,
        granularity=scheme.granularity,
        parts=parts,
        low=low,
        high=high,
        dynamic=dynamic,
    )


def value_grid(piece: RunQuantizer, qparams: QParams) -> Grid | Refusal:
    """The grid of an activation's quantizer; or why there is none."""
    fake, scheme = piece.fake_quantize, piece.scheme
    grid = grid_of(fake, qparams, scheme)
    if isinstance(grid, Refusal) or not grid.is_integer:
        return grid
    reached = reached_bounds(piece, grid, fake.grid(qparams, scheme))
    return Refusal(MORE_THAN_ROUNDING) if reached is None else replace(grid, low=reached[0], high=reached[1])


def weight_codes(
    weight: WeightQuantizer, params: Params, qparams: QParams, *, frozen: bool = False, wide: bool = False
) -> Stored | Refusal:
    """A quantized weight as codes, BatchNorm folded in; or why it has none.

    It is encoded in slices, so that only the codes and a few slices are in memory at once.
    """
    fake, scheme, parameter = weight.fake_quantize, weight.scheme, params[weight.site.parameter]
    grid = grid_of(fake, qparams, scheme)
    if isinstance(grid, Refusal):
        return grid
    dtype = torch.float32 if wide and parameter.is_floating_point() and parameter.element_size() < 4 else None
    if scheme.dynamic:  # the weight is a constant, and so is its range
        effective = in_force(fake, weight.seen_part(params, dtype=dtype), qparams, scheme)
        grid = _grid(fake, effective, scheme, False)
    codes = torch.empty(_shape_seen(weight, parameter), dtype=grid.dtype, device=parameter.device)
    parts_of_slices: list[Mapping[str, Tensor]] = []
    axis = 0
    for part in slices(weight, params, qparams, dtype):
        coded = _encoded_again(fake, part, scheme, parameter.dtype) if frozen else _encoded(fake, part, scheme)
        if isinstance(coded, Refusal):
            return coded
        axis = part.axis
        place = codes if codes.ndim == 0 else codes.narrow(axis, part.start, part.seen.shape[axis])
        place.copy_(coded.values)
        parts_of_slices.append({name: coded.parts[name] for name in BY_BLOCKS if name in coded.parts})
    names = parts_of_slices[0] if parts_of_slices else ()
    by_blocks = {name: torch.cat([parts[name] for parts in parts_of_slices], axis) for name in names}
    grid = replace(grid, parts=sorted_dict({**grid.parts, **by_blocks}))
    return Stored(arranged(codes, weight.site), grid, weight.site)


def _shape_seen(weight: WeightQuantizer, parameter: Tensor) -> torch.Size:
    return arranged(torch.empty(parameter.shape, device="meta"), weight.site).shape


def _encoded(fake: FakeQuantize, part: Slice, scheme: QScheme) -> Codes | Refusal:
    """The codes of a slice: encoded by its fake quantizer, or found by rounding its quantized values to the grid."""
    if _holds_nan(fake, part):
        return Refusal(HOLDS_NAN)
    if fake.encode is not None:
        return fake.encode(part.seen, part.qparams, scheme)
    made = fake.apply(part.seen, part.qparams, scheme)
    codes, value = _nearest(fake, made, part, scheme)
    return codes if _is_near(value, made, made.dtype) else Refusal(OFF_GRID)


def _encoded_again(fake: FakeQuantize, part: Slice, scheme: QScheme, dtype: torch.dtype) -> Codes | Refusal:
    """The codes of a slice that is quantized already, and was stored in ``dtype`` since."""
    if _holds_nan(fake, part):
        return Refusal(HOLDS_NAN)
    if fake.element is None or fake.encode is None or fake.decode is None:
        codes, value = _nearest(fake, part.seen, part, scheme)
    else:
        nudge = 1 + NUDGE * torch.finfo(dtype).eps if fake.block_size else 1
        codes = fake.encode(part.seen * nudge, part.qparams, scheme)
        value = fake.decode(codes, part.qparams, scheme)
    return codes if _is_near(value, part.seen, dtype) else Refusal(OFF_GRID)


def _holds_nan(fake: FakeQuantize, part: Slice) -> bool:
    """Whether a slice holds NaN and the format has no code for NaN, as only floating-point formats have."""
    return not isinstance(fake.element, torch.dtype) and bool(part.seen.isnan().any())


def _nearest(fake: FakeQuantize, y: Tensor, part: Slice, scheme: QScheme) -> tuple[Codes, Tensor]:
    """The integer codes nearest to ``y``, the quantized slice, and their real numbers."""
    effective = fake.grid(in_force(fake, part.seen, part.qparams, scheme), scheme)
    effective = effective._replace(scale=positive(effective.scale))
    codes = affine.nearest(y, effective, scheme)
    return codes, affine.decode(codes, effective, scheme)


def _is_near(value: Tensor, y: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``y``, which was stored in ``dtype``, equals ``value`` up to :data:`ROUNDINGS`."""
    return bool(((value - y).abs() <= ROUNDINGS * torch.finfo(dtype).eps * y.abs()).all())
