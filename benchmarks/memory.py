"""What ``convert``, ``save`` and ``load`` hold beside what they are given, in MiB, at their peak.

``python benchmarks/memory.py [--mib 64] [--json FILE]``. Each case runs in a process of its own, a small one of its kind
first; then the kernel's mark of the largest resident size is reset (``/proc/self/clear_refs``), and read after the call
(``VmHWM``): Linux only. The limit is 1.3 times the largest tensor that is given, plus the result.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from measure import write
from torch import Tensor, nn

import sophq_func as sq

MIB = 2**20
T = TypeVar("T")
LAYERS = 4
"""How many weights a model with several has; a checkpoint holds so many of the size that is asked for."""

WEIGHTS = {
    "int8": sq.override(bits=8),
    "int4": sq.override(bits=4),
    "int4 in groups of 128": sq.override(bits=4, granularity=sq.PerGroup(size=128)),
    "int8 in blocks of 128 by 128": sq.override(granularity=sq.PerBlock(128, 128)),
    "mxfp4": sq.override(fake_quantize=sq.fake_quantize.mxfp4()),
    "nvfp4": sq.override(fake_quantize=sq.fake_quantize.nvfp4()),
    "e4m3": sq.override(fake_quantize=sq.fake_quantize.e4m3()),
}


class Peak(NamedTuple):
    """Of one call, in bytes: its peak beside what was there before, its result, and the largest tensor it was given."""

    beside: int
    result: int
    largest: int

    def row(self) -> dict[str, float]:
        """In MiB, with the limit."""
        limit = 1.3 * self.largest + self.result
        named = {"beside": self.beside, "result": self.result, "largest": self.largest, "limit": limit}
        return {name: round(value / MIB, 1) for name, value in named.items()}


def status(field: str) -> int:
    """A line of ``/proc/self/status``, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def peak_of(call: Callable[[], T]) -> tuple[int, T]:
    """How far the resident size rises above what it is now, and what is returned."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    made = call()
    return status("VmHWM") - before, made


def converted(mib: int, weight: sq.Override) -> Callable[[], Peak]:
    """``convert`` of one linear layer whose bfloat16 weight has this size."""
    width = 1024
    model = nn.Linear(width, max(mib * MIB // (2 * width), 128), bias=False).to(torch.bfloat16).eval()
    x = torch.randn(2, width, dtype=torch.bfloat16)
    q = sq.quantize(model, sq.QuantConfig(weight=weight, activation=None), example_args=(x,))
    params = sq.params_of(model)
    qparams = q.calibrate(params, [x], progress=False)

    def measure() -> Peak:
        peak, artifact = peak_of(lambda: sq.convert(q, params, qparams))
        return Peak(peak, artifact.size_bytes, params["weight"].nbytes)

    return measure


def tensors(mib: int) -> dict[str, Tensor]:
    """Params of four weights of this size each."""
    return {f"layer{i}.weight": torch.randn(mib * MIB // 4) for i in range(LAYERS)}


def saved(mib: int, folder: Path) -> Peak:
    """``save``, whose result is on the disk."""
    params, path = tensors(mib), folder / "params.safetensors"
    return Peak(peak_of(lambda: sq.save(path, params=params))[0], 0, mib * MIB)


def loaded(mib: int, folder: Path) -> Peak:
    """``load``."""
    path = folder / "params.safetensors"
    sq.save(path, params=tensors(mib))
    return Peak(peak_of(lambda: sq.load(path))[0], LAYERS * mib * MIB, mib * MIB)


def measured(case: str, mib: int) -> dict[str, float]:
    """One case in this process; what is loaded and allocated once is so before."""
    kind, _, weight = case.partition(" ")
    with tempfile.TemporaryDirectory() as folder:
        for size in (1, mib):
            if kind == "convert":
                found = converted(size, WEIGHTS[weight])()
            else:
                found = (saved if kind == "save" else loaded)(size, Path(folder))
    return found.row()


def main() -> None:
    """Measure each case in a process of its own, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=64, help="size of a weight")
    parser.add_argument("--case", help="measure this one here, and print it as JSON")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measured(options.case, options.mib)))
        return
    rows = {}
    for case in [*(f"convert {name}" for name in WEIGHTS), "save", "load"]:
        command = [sys.executable, __file__, "--case", case, "--mib", str(options.mib)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows[case] = json.loads(done.stdout)
        print(f"{case:40}", "  ".join(f"{name} {value:7.1f}" for name, value in rows[case].items()))
    if options.json:
        write(options.json, rows)


if __name__ == "__main__":
    main()
