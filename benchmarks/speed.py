"""How fast whole models are, against plain float and against every peer that is installed, in one run.

    pip install -c constraints.txt ".[bench]"
    python benchmarks/speed.py --modes eager compiled --json benchmarks/speed.json
    python benchmarks/speed_page.py

ResNet-18 at 4x3x224x224 and a BERT shaped like MiniLM at 8x128, one thread, random weights: W8A8 with int8 weights per
channel and int8 activations per tensor at the inputs of convolutions and linear layers, learned scales. Forward,
training step, calibration, making the quantized model, peak memory of a training step, eager and under inductor.
Candidates take turns; figures are medians, as ratios to float. 16 settings of the weights of ResNet-18 at 1x3x32x32 are
swept beside them. Freed memory is kept by the process (glibc's thresholds are raised before anything runs), as
allocators for servers do, so that no candidate pays for the pages of another.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from measure import medians, write
from peers import CANDIDATES, Candidate, made
from subjects import SUBJECTS, Subject
from sweeps import report_sweep

KEEP = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000", "OMP_NUM_THREADS": "1"}
"""What the process is started with."""

ROWS = ("forward", "step", "inner", "calibrate", "frozen", "empty")
COMPILED = ("forward", "step", "inner", "frozen")


def prepared(subject: Subject, names: list[str], compiled: bool) -> tuple[dict[str, Candidate], dict[str, Any]]:
    """The candidates that can be made; and for each the seconds that took, or why it can't."""
    candidates: dict[str, Candidate] = {}
    notes: dict[str, Any] = {}
    for name in names:
        start = time.perf_counter()
        found = made(name, subject, compiled)
        if isinstance(found, str):
            notes[name] = found
        else:
            candidates[name], notes[name] = found, time.perf_counter() - start
    return candidates, notes


def measured(candidates: Mapping[str, Candidate], rounds: int, compiled: bool) -> dict[str, dict[str, float]]:
    """Median seconds by row and candidate."""
    found = {}
    for row in COMPILED if compiled else ROWS:
        calls: dict[str, Callable[[], object]] = {}
        for name, candidate in candidates.items():
            call = getattr(candidate, row)
            if name == "float":
                call = candidate.step if row in ("step", "inner") else candidate.forward
            if call:
                calls[name] = call
        if len(calls) > 1:
            found[row] = medians(calls, rounds)
    return found


def peaks(subject: str, names: list[str]) -> dict[str, float]:
    """Peak MiB of making the candidate and two training steps beyond the imports, each in a process of its own."""
    found = {}
    for name in names:
        plain = {key: value for key, value in os.environ.items() if key not in KEEP} | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--peak", subject, name]
        result = subprocess.run(command, env=plain, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            found[name] = float(result.stdout.strip().splitlines()[-1])
    return found


def print_peak(subject: str, name: str) -> None:
    """The peak of this process while a candidate trains, in MiB."""
    SUBJECTS[subject]().make()  # imports what making a model imports
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    candidate = CANDIDATES[name](SUBJECTS[subject]())
    Path("/proc/self/clear_refs").write_text("5")
    candidate.step()
    candidate.step()
    print(memory("VmHWM") - before)


def memory(field: str) -> float:
    """A field of the status of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def report(title: str, found: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Print ratios to float; and return them."""
    ratios = {row: {name: value / values["float"] for name, value in values.items()} for row, values in found.items()}
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    print(f"\n{title}\n{'':<14}" + "".join(f"{row:>11}" for row in ratios))
    for name in names:
        cells = (f"{ratios[row][name]:11.2f}" if name in ratios[row] else f"{'-':>11}" for row in ratios)
        print(f"{name:<14}" + "".join(cells), flush=True)
    return ratios


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that is asked for."""
    rows: dict[str, Any] = {}
    names = [name for name in CANDIDATES if not options.only or name in ("float", *options.only)]
    for key in options.models:
        for compiled in [mode == "compiled" for mode in options.modes]:
            subject, label = SUBJECTS[key](), f"{key}{', compiled' if compiled else ''}"
            candidates, notes = prepared(subject, names, compiled)
            found = measured(candidates, options.rounds, compiled)
            if not compiled and options.memory:
                found["memory"] = peaks(key, list(candidates))
            ratios = report(label, found)
            for name, note in notes.items():
                print(f"{name:<14} {note if isinstance(note, str) else f'{note:.1f} s to make and warm up'}")
            rows[label] = {"ratios": ratios, "medians": found, "notes": notes}
    if options.sweep:
        rows["sweep"] = report_sweep(options.rounds)
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--only", nargs="*", choices=list(CANDIDATES), help="candidates beside float; all by default")
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager"])
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--no-sweep", dest="sweep", action="store_false")
    parser.add_argument("--json", type=Path, help="rows of an earlier run that this one did not measure stay in the file")
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "CANDIDATE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        return print_peak(*options.peak)
    if not KEEP.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    rows = run(options)
    if options.json:
        earlier = json.loads(options.json.read_text())["rows"] if options.json.exists() else {}
        write(options.json, {**earlier, **rows})
    return None


if __name__ == "__main__":
    main()
