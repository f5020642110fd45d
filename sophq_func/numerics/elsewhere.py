"""Keywords that people try, as a field has that name one level below, or another library says it so."""

from __future__ import annotations

from types import MappingProxyType

from sophq_func.core.public import Meant

WEIGHT_BITS = ("weight", "weight=sq.override(bits=4)")
ACTIVATION_BITS = ("activation", "activation=sq.override(bits=8)")
GROUPS = ("granularity", "granularity=sq.PerGroup(32)")

ELSEWHERE: Meant = MappingProxyType(
    {
        "bits": WEIGHT_BITS,
        "weight_bits": WEIGHT_BITS,
        "w_bits": WEIGHT_BITS,
        "activation_bits": ACTIVATION_BITS,
        "act_bits": ACTIVATION_BITS,
        "a_bits": ACTIVATION_BITS,
        "observer": ("weight", "weight=sq.override(observer=...)"),
        "fake_quantize": ("weight", "weight=sq.override(fake_quantize=...)"),
        "granularity": ("weight", "weight=sq.override(granularity=...)"),
        "dtype": ("bits", "bits=8"),
        "group_size": GROUPS,
        "per_channel": ("granularity", "granularity=sq.PerChannel()"),
        "unsigned": ("symmetric", "symmetric=False"),
    }
)
"""By keyword, the one that says it here, and how. It counts where the signature has the latter."""
