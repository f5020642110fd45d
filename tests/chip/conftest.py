"""Tests that run the compiler of the chips: ``make test-chip``."""

from __future__ import annotations

import pytest

from tools.chip import home


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = "CHIP_HOME names no folder with the compiler; make test-chip sets one up"
    for item in items:
        if item.get_closest_marker("chip") and home() is None:
            item.add_marker(pytest.mark.skip(reason=reason))
