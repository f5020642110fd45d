"""The script that checks an accelerator runs on a CPU, which it compares with itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sophq_func as sq

ROOT = Path(sq.__file__).parents[1]


@pytest.mark.slow
def test_the_script_for_accelerators_agrees_with_itself(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--small", "--sections", "models", "graphs", "--json", str(tmp_path / "gpu.json")]
    command = [sys.executable, "benchmarks/gpu.py", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"]["wrong"] == []
    assert "cosines of outputs 1.000000" in done.stdout
