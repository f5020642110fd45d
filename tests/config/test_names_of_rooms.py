"""Completion shows what a user may use of a room, and nothing of how it is made."""

from __future__ import annotations

import pytest

import sophq_func as sq

ROOMS = ("export", "formats", "patterns", "presets", "register", "rules", "strategies", "testing")


@pytest.mark.parametrize("room", ROOMS)
def test_dir_lists_the_public_names_of_a_room(room: str) -> None:
    module = getattr(sq, room)
    assert sorted(module.__all__) == dir(module)
    assert all(hasattr(module, name) for name in module.__all__)
