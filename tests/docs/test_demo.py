"""What the digits demo says about its ONNX file."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import sophq_func as sq
from tests.docs.pages import ROOT

pytestmark = pytest.mark.slow

for needed in ("matplotlib", "onnx", "onnxruntime", "onnxscript", "rich", "sklearn"):
    pytest.importorskip(needed)


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The demo, imported as it is when it runs."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    yield importlib.import_module("demo")
    for name in ("demo", "digits", "pictures", "qat", "runtime"):
        sys.modules.pop(name, None)


def test_what_is_deployed_is_compared_with_apply(demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits, runtime = sys.modules["digits"], sys.modules["runtime"]
    monkeypatch.setattr(runtime, "ROUNDS", 3)
    model = digits.trained(epochs=1)
    train, _, x, y = digits.load()
    q, params = demo.uniform(8, 8)(model, train[:2]), sq.params_of(model)
    qparams = q.calibrate(params, [train[:64]], progress=False)
    found = runtime.deploy(model, q, params, qparams, x, y, tmp_path / "w8a8.onnx")
    assert found.total == len(x) and found.same >= 0.99 * len(x) and found.steps < 3
    exact = digits.accuracy(model, x, y)
    assert found.accuracy["float, ONNX Runtime"] == pytest.approx(exact, abs=0.2)
    assert found.accuracy["W8A8, q.apply"] == digits.accuracy(lambda images: q.apply(params, qparams, images), x, y)
    assert all(value > 0 for value in found.milliseconds.values()) and found.kib[0] < 0.6 * found.kib[1]

    coarse = sq.with_bits(qparams, q.plan, {"*weight_fake_quant": 2})
    other = runtime.deploy(model, q, params, coarse, x, y, tmp_path / "coarse.onnx")
    assert other.accuracy["W8A8, ONNX Runtime"] < found.accuracy["W8A8, ONNX Runtime"] - 10  # the file has what was given
    shown = demo.runtime_table(found)
    assert f"{found.same} of {found.total}" in shown.caption and shown.row_count == 3
