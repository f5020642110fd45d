"""What every test starts from."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.quick import chosen


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="no slow tests, and few cases of the others: see tests/quick.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("quick"):
        kept = chosen(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


@pytest.fixture(autouse=True)
def _same_threads_and_seed() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """For tests that compile: nothing is left from those before, and nothing is left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
