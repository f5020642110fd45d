"""Integers on their way from one grid to another, as a chip computes them: a multiplier of 7 bits, a shift, a rounding.

A value that the chip has as integers ``c`` on a grid of step ``a`` goes to a grid of step ``s`` as ``round(c m / 2 ** r)``,
where ``m / 2 ** r`` stands for ``a / s``. Ties go up. What a model computes in floating point is ``c a``, from which ``c``
is read back; from there on everything is exact. Which quantizers are concerned is in their sites (``ValueSite.requant``).

Source: the files to which tpu-mlir 1.30 lowers networks, and its interpreter; see ``docs/chips.md``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sophq_func.config.site import Requant
from sophq_func.core.errors import StateError, explain
from sophq_func.core.modes import as_constant
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.ranges import positive

LIMIT = 127
"""Multipliers are smaller, as the compiler has them; with the largest shift that allows it."""

SHIFTS = 31
"""The largest shift is 30, as the compiler has it."""


SLACK = 2.0**-22
"""The share by which a number may lie below a tie and still count as one: steps and values are rounded to float32."""


def multiplier(ratio: Tensor, truncates: bool, shift_of: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The integer ``m`` and the power ``2 ** r`` with ``m / 2 ** r`` close to a ratio of steps, each shaped ``()``.

    Args:
      ratio: shaped ``()``, above 0.
      truncates: ``m`` is rounded toward 0; else to the nearest.
      shift_of: the ratio whose shift is taken; ``None`` for ``ratio`` itself.

    Example:
      >>> multiplier(torch.tensor(0.92982), truncates=False), multiplier(torch.tensor(0.44247), truncates=True)
      ((tensor(119., dtype=torch.float64), tensor(128., dtype=torch.float64)), ...)
    """
    # float64, in which a ratio of float32 times a power of two is exact
    wide = ratio.double()
    leading = wide if shift_of is None else shift_of.double()
    powers = torch.exp2(torch.arange(SHIFTS, dtype=torch.float64, device=wide.device))
    scaled = leading * powers
    fits = scaled < LIMIT if truncates else (scaled + 0.5).floor() < LIMIT
    power = torch.exp2((fits.sum() - 1).clamp(min=0).double())
    product = wide * power
    return (product.floor() if truncates else (product + 0.5).floor()), power


def long_multiplier(ratio: Tensor) -> Tensor:
    """``m / 2 ** 30`` close to the ratios of steps of a layer: its ``m`` has up to 31 bits.

    Example:
      >>> long_multiplier(torch.tensor([2.0**-31, 2.0**-32]))
      tensor([9.3132e-10, 0.0000e+00], dtype=torch.float64)
    """
    power = 2.0 ** (SHIFTS - 1)
    return half_up(ratio.float().double() * power) / power  # the compiler has the ratio in float32


def in_two_shifts(sums: Tensor, ratio: Tensor) -> Tensor:
    """``sums`` times the ratio of steps of a layer, rounded after a shift by 31 bits and after the rest of the shift.

    Example:
      >>> in_two_shifts(torch.tensor([639.0, 640.0], dtype=torch.float64), torch.tensor(2.0**-8 * 0.999))
      tensor([2., 2.], dtype=torch.float64)
    """
    wide = ratio.double()
    power = torch.exp2(torch.floor(torch.log2(wide)) + 1)  # the least power of two above the ratio
    fraction = half_up(wide / power * 2.0**31) / 2.0**31
    first = half_up(sums * fraction)
    return half_away(first * power)


def half_away(x: Tensor) -> Tensor:
    """The nearest whole number, ties away from 0."""
    return x.sign() * half_up(x.abs())


def half_up(x: Tensor) -> Tensor:
    """The nearest whole number, ties up."""
    return (x + 0.5).floor()


class Requantizer:
    """How one quantizer brings integers onto its grid.

    Attributes:
      sources: names of the quantizers whose grids the integers come from.
      result: name of the quantizer of the sum of which this one acts on a term; empty where it acts on a result.

    Args:
      requants: those of its site, one for each grid that integers come from.
    """

    def __init__(self, requants: tuple[Requant, ...]) -> None:
        first = requants[0]
        self.sources = tuple(requant.source for requant in requants)
        self.result = first.result
        self._rule, self._number, self._truncates, self._axis = first.rule, first.number, first.truncates, first.axis

    def in_force(self, own: QParams, qparams: Mapping[str, QParams]) -> QParams:
        """The qparams that act: a term has the step of the result, or a fraction of it where the sum is shifted.

        Args:
          own: of the quantizer.
          qparams: of all quantizers.
        """
        if not self.result:
            return own
        step = qparams[self.result].scale
        if self._rule == "unrounded term":
            _, power = self._of_largest(_step(self.result, qparams), qparams)
            step = step / power.to(step.dtype)
        return own._replace(scale=step, zero_point=torch.zeros_like(step, dtype=torch.int32))

    def integers(self, x: Tensor, grid: QParams, qparams: Mapping[str, QParams]) -> Tensor:
        """``x`` as the chip has it: whole multiples of the step of a grid. No gradient.

        Args:
          x: computed in floating point from values that are on the grids of the sources.
          grid: from :meth:`in_force`.
          qparams: of all quantizers.

        Raises:
          StateError: the sources have other channels than ``x``, as in a plan that was changed.
        """
        step = positive(as_constant(grid.scale)).double()
        codes = self._codes(as_constant(x).double(), step, qparams)
        if codes.shape != x.shape:  # the steps of channels along another axis than the value has
            sentence, got = f"integers do not come from the grids of {' and '.join(self.sources)}", tuple(x.shape)
            raise StateError(explain("apply", sentence, got=got, because="they have other channels", fix="plan anew"))
        return (codes * step).to(x.dtype)

    def _codes(self, x: Tensor, step: Tensor, qparams: Mapping[str, QParams]) -> Tensor:
        """The integers on the grid with this step, before they saturate."""
        if self._rule == "quotient":
            return half_away(x / step * (1 + SLACK))
        if self._rule == "sum":
            _, power = self._of_largest(step, qparams)
            return half_up((x / step * power).round() / power)
        if self._rule == "unrounded term":
            result, own = _step(self.result, qparams), _step(self.sources[0], qparams)
            factor, _ = multiplier(own / result, self._truncates, self._largest(qparams) / result)
            return (x / own).round() * factor
        came = _step(self.sources[0], qparams)
        for name in self.sources[1:]:
            came = came * _step(name, qparams)
        if self._rule.startswith("layer"):
            came = came.reshape(*came.shape, *(1,) * (-1 - self._axis)) if came.ndim else came
            sums = (x / came).round()
            if self._rule == "layer":
                return half_up(sums * long_multiplier(came / step))
            return in_two_shifts(sums, came / step)
        factor, power = multiplier(came / (step * self._number), self._truncates)
        return half_up((x * self._number / came).round() * factor / power)

    def _largest(self, qparams: Mapping[str, QParams]) -> Tensor:
        return torch.stack([_step(name, qparams) for name in self.sources]).amax(0)

    def _of_largest(self, step: Tensor, qparams: Mapping[str, QParams]) -> tuple[Tensor, Tensor]:
        """Multiplier and power of the largest term, whose shift all terms have."""
        return multiplier(self._largest(qparams) / step, self._truncates)


def _step(name: str, qparams: Mapping[str, QParams]) -> Tensor:
    """The step of a quantizer's grid, float64; no gradient."""
    return positive(as_constant(qparams[name].scale)).double()
