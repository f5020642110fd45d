"""Runs the compiler of a chip, tpu-mlir, and its interpreter, in an environment of their own.

The compiler needs CPython 3.10 and old packages, so it is not imported: each step is a process. ``CHIP_HOME`` names the
folder with its environment, in which ``env.sh`` sets the paths.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

INTERPRET = """
import sys
import numpy as np
from tools.model_runner import mlir_inference
lowered, given, results = sys.argv[1:]
np.savez(results, **mlir_inference(dict(np.load(given)), lowered, dump_all=True))
"""
"""Runs the lowered network, with the numbers of the chip, and keeps every value."""


def home() -> Path | None:
    """The folder of the compiler's environment; ``None`` where there is none."""
    folder = os.environ.get("CHIP_HOME", "")
    return Path(folder) if folder and (Path(folder) / "env.sh").is_file() else None


def compiled(folder: Path, commands: Path, inputs: Mapping[str, np.ndarray]) -> Path:
    """Compile a network, run it in the interpreter, and return the file of its values.

    Args:
      folder: with the ONNX file and the tables.
      commands: the file of :func:`sophq_func.export.tables` with the compiler's commands.
      inputs: of the network, by name.

    Raises:
      RuntimeError: the compiler failed; with the end of what it printed.
    """
    values: dict[str, Any] = dict(inputs)
    np.savez(folder / "inputs.npz", **values)
    lines = [line for line in commands.read_text().splitlines() if line.startswith("model_")]
    for line in lines:
        debugged = f"{line} --debug" if line.startswith("model_deploy") else line
        _run(folder, debugged)
    (lowered,) = folder.glob("*_tpu.mlir")
    results = folder / f"{lowered.stem}_outputs.npz"
    _run(folder, shlex.join(["python3.10", "-c", INTERPRET, lowered.name, "inputs.npz", results.name]))
    return results


def _run(folder: Path, command: str) -> None:
    """Run one command in the compiler's environment."""
    at = home()
    if at is None:
        raise RuntimeError("CHIP_HOME does not name the folder of the compiler's environment")
    script = f". {shlex.quote(str(at / 'env.sh'))} && {command}"
    # the compiler prints tens of thousands of lines
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command.split()[0]} failed:\n{(done.stdout + done.stderr)[-2000:]}")
