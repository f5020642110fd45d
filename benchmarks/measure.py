"""What the benchmarks share: interleaved medians, and a file of figures with the machine they came from."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def medians(
    candidates: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each candidate by a clock, called in turn, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    for _ in range(rounds):
        for name, call in candidates.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def write(path: Path, rows: Mapping[str, Any]) -> None:
    """Write figures as JSON, first to a temporary name."""
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    write_text(path, json.dumps({"machine": machine, "threads": torch.get_num_threads(), "rows": rows}, indent=1))


def write_text(path: Path, text: str) -> None:
    """Write a file, first to a temporary name."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
