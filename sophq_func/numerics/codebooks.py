"""The values of the 4-, 6- and 8-bit data types of sophgo-mq, by name.

NF4 is that of QLoRA (arXiv:2305.14314), AF4 that of Yoshida 2023 (arXiv:2306.06965).
"""

from __future__ import annotations

import statistics

from sophq_func.core.errors import ConfigError, unknown
from sophq_func.numerics.formats import E2M1, E2M3, E3M2, Codebook, codebook


def _nf8() -> Codebook:
    """Quantiles of the normal distribution divided by the outermost: NF4 of arXiv:2305.14314 with 8 bits.

    128 values above 0 and 127 below, evenly spaced in probability. The outermost probability is as the paper's: the mean
    of ``1 - 1 / (2 * 255)`` and ``1 - 1 / (2 * 256)``, so that no quantile is infinite.
    """
    normal, offset = statistics.NormalDist(), (2 - 1 / 510 - 1 / 512) / 2
    upper = [normal.inv_cdf(offset + (0.5 - offset) * i / 128) for i in range(128)]
    lower = [-normal.inv_cdf(offset + (0.5 - offset) * i / 127) for i in range(127)]
    return codebook([v / upper[0] for v in (*lower, 0.0, *upper)])


# fmt: off
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
AF4 = (-1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0, 0.04273164, 0.12934483,
       0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0)
# fmt: on
FP4_BNB = codebook([sign * v for sign in (-1.0, 1.0) for v in (0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)] + [0.0])

CODEBOOKS = {
    "af4": codebook(AF4),
    "fp4": FP4_BNB,
    "fp4_e2m1": codebook(E2M1.values().tolist()),
    "fp4_e2m1_bnb": FP4_BNB,
    "fp6_e2m3": codebook(E2M3.values().tolist()),
    "fp6_e3m2": codebook(E3M2.values().tolist()),
    "int4": codebook([float(k) for k in range(-8, 8)]),
    "nf4": codebook(NF4),
    "nf8": _nf8(),
}
"""Codebook by the ``data_type`` of sophgo-mq.

``fp4`` and ``fp4_e2m1_bnb`` are the values of bitsandbytes' FP4 times twelve; a scale takes the factor up.

Differs from sophgo-mq: ``fp4_e2m1`` has 0.5 as in OCP MX v1.0, not 0.0625.
"""


def codebook_named(where: str, data_type: str, allowed: tuple[str, ...] = tuple(CODEBOOKS)) -> Codebook:
    """The codebook of a ``data_type``; raises a :class:`ConfigError` that names ``where`` if it is not ``allowed``."""
    if data_type not in allowed:
        raise ConfigError(unknown(where, "data_type", data_type, allowed))
    return CODEBOOKS[data_type]
