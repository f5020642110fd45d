"""One quantizer of a report, as data."""

from __future__ import annotations

from dataclasses import dataclass

from sophq_func.core.texts import printable


@dataclass(frozen=True, kw_only=True)
class ReportRow:
    """One quantizer of a report: where it sits, what it does to its values, and what that does to the model's output.

    Attributes:
      quantizer: its name.
      position: its place in execution order, from 0.
      role: ``"weight"`` or ``"activation"``.
      grid: the integer grid, or the name of the number format.
      where: the place where it sits, in words.
      observe_only: values pass it unchanged; clipping and noise are those that it would cause.
      low, high: smallest and largest value that it sees; a weight with the BatchNorm folded in.
      clip_low, clip_high: values of the outermost codes, of all channels the widest; ``None`` for formats that are not
        integer grids and for ranges taken from each tensor.
      step: distance of two codes, of all channels the largest; ``None`` as above.
      clipped: share of the values that lie more than half a step beyond their outermost code; ``None`` as above.
      sqnr_db: signal-to-quantization-noise ratio of its values, in dB.
      cosine: cosine of the angle between its values before and after quantization.
      error: squared error of the model's output with this quantizer alone switched on, divided by the squared output.
      share: that error, divided by the sum over all quantizers.
      bytes_before, bytes_after: size of its weight as it is, and as codes with their scales; 0 for activations.
      histogram: how many values lie in each of 64 equal bins from ``low`` to ``high``; approximate where a later batch
        widened the range, so that bins were split.
    """

    quantizer: str
    position: int
    role: str
    grid: str
    where: str
    observe_only: bool
    low: float
    high: float
    clip_low: float | None
    clip_high: float | None
    step: float | None
    clipped: float | None
    sqnr_db: float
    cosine: float
    error: float
    share: float
    bytes_before: int
    bytes_after: int
    histogram: tuple[int, ...]

    def __repr__(self) -> str:
        return f"ReportRow({printable(self.quantizer)}, {self.grid}, sqnr_db={self.sqnr_db:.1f}, share={self.share:.3f})"
