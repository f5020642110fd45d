"""The registries of observers and fake quantizers, apart from what they hold, so that a config can look up names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sophq_func.core.registry import Factories

if TYPE_CHECKING:  # their signatures name the scheme, which looks names up here
    from sophq_func.numerics.contracts import FakeQuantize, Observer

OBSERVERS: Factories[Observer] = Factories("observer")
"""Every observer, by the name that a config uses; each file of ``observers`` registers its own."""

FAKE_QUANTIZERS: Factories[FakeQuantize] = Factories("fake quantizer")
"""Every fake quantizer, by the name that a config uses; each file of ``fake_quantize`` registers its own."""
