"""What every test starts from."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sophq_func.config.algorithms import ALGORITHMS
from sophq_func.config.chips import CHIPS
from sophq_func.config.patterns import PATTERNS
from sophq_func.config.strategies import PLACEMENTS
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, OBSERVERS
from sophq_func.numerics.formats import FORMATS
from tests.helpers import Digits
from tests.quick import chosen


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="no slow tests, and few cases of the others: see tests/quick.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("quick"):
        kept = chosen(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


def pytest_collection_finish() -> None:
    # collecting leaves millions of objects, which are there to the end: without this, Python's collector looks at them again
    # and again, a tenth of the time of a test that compiles
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def is_quick(pytestconfig: pytest.Config) -> bool:
    """Whether this is ``pytest --quick``: for tests that loop over their cases themselves."""
    return bool(pytestconfig.getoption("quick"))


@pytest.fixture(autouse=True)
def _same_threads_and_seed() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    # of the CPU alone: torch.manual_seed keeps a formatted stack for each kind of device that is absent, 1 ms a test
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _composed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Quantizers are composed, whatever kernel this machine has compiled before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_table_of_translations() -> Iterator[None]:
    """torch.onnx reads its translations of all operations anew for each export, which is most of what a small export takes:
    those of a session share one table. It is only read, since no test adds a translation of its own.
    """
    if importlib.util.find_spec("onnxscript") is None:
        yield
        return
    table = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "from_torchlib", staticmethod(functools.cache(table.from_torchlib)))
        yield


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """For tests that compile: nothing is left from those before, and nothing is left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def in_float64() -> Iterator[None]:
    """For tests that compare two orders of summation: what they make is in float64, where these differ by less than moves a
    code from one side of a tie to the other.
    """
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    """Trained once: processes of one session share the weights by a file."""
    pytest.importorskip("sklearn")
    folder = str(Path(__file__).parents[1] / "examples")
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module("digits")
    finally:
        sys.path.remove(folder)
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "digits.pt"
    if not shared.exists():
        written = own / "digits.pt.new"
        torch.save(module.trained(0, epochs=4).state_dict(), written)
        written.replace(shared)  # whole or not at all, whoever else is at it
    model = module.Digits()
    model.load_state_dict(torch.load(shared))
    train, _, test, labels = module.load(0)
    return Digits(model.eval(), train, test, labels)


@pytest.fixture
def scratch_registries() -> Iterator[None]:
    """For tests that register pieces: what they add is gone afterwards."""
    registries = (OBSERVERS, FAKE_QUANTIZERS, FORMATS, CHIPS, PLACEMENTS, PATTERNS, ALGORITHMS)
    tables = [
        (table, dict(table)) for registry in registries for table in vars(registry).values() if isinstance(table, dict)
    ]
    yield
    for table, kept in tables:
        table.clear()
        table.update(kept)
