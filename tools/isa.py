"""Run the tests marked ``isa`` as other CPUs would: with other instruction sets, threads, and orders of summation.

``python tools/isa.py`` runs every setting, ``--few`` the one that differs most from a plain run. A setting that this CPU
cannot do is skipped. All settings run, whichever of them fail; the exit status is 1 where one did.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

CAPABILITIES = ("default", "avx2", "avx512")
"""Of torch's own kernels, weakest first; ``default`` is what every x86-64 CPU has."""

INSTRUCTIONS = ("SSE41", "AVX2", "AVX512_CORE")
"""Of oneDNN's kernels, weakest first."""


class Setting(NamedTuple):
    """How torch, oneDNN and MKL shall compute."""

    capability: str
    instructions: str
    threads: int
    mkl: str = ""

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.variables.items())

    @property
    def variables(self) -> dict[str, str]:
        """As environment variables, which torch reads when it is imported."""
        own = {
            "ATEN_CPU_CAPABILITY": self.capability,
            "ONEDNN_MAX_CPU_ISA": self.instructions,
            "OMP_NUM_THREADS": str(self.threads),
        }
        return own | ({"MKL_CBWR": self.mkl} if self.mkl else {})

    @property
    def level(self) -> int:
        """How much of :data:`CAPABILITIES` the CPU must have."""
        return max(CAPABILITIES.index(self.capability), INSTRUCTIONS.index(self.instructions))


EVERY = [Setting(*parts) for parts in itertools.product(CAPABILITIES, INSTRUCTIONS, (1, 2))]
FEW = [Setting("default", "SSE41", 2, mkl="COMPATIBLE")]
"""The weakest instructions, two threads, and the one order of MKL that all CPUs share: far from ``make test`` in each."""


def has() -> int:
    """How much of :data:`CAPABILITIES` this CPU has; 0 where it is no x86-64."""
    found = torch.backends.cpu.get_cpu_capability().lower()
    return CAPABILITIES.index(found) if found in CAPABILITIES else 0


def files() -> list[str]:
    """Those with marked tests: to collect all the others would take longer than to run these."""
    return sorted(str(path) for path in Path("tests").rglob("test_*.py") if "pytest.mark.isa" in path.read_text())


def passes(setting: Setting, options: list[str]) -> bool:
    """Run the marked tests under a setting, in processes of their own."""
    # a thread that waits for work sleeps: two processes of two threads share two cores
    environment = {**os.environ, **setting.variables, "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "isa", "-n", "2", *files(), *options]
    return subprocess.run(command, env=environment, check=False).returncode == 0


def main() -> int:
    """Run, and print what became of each setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--few", action="store_true", help="the setting that differs most from a plain run")
    given, options = parser.parse_known_args()
    strength, outcomes = has(), {}
    for setting in FEW if given.few else EVERY:
        if setting.level > strength:
            outcomes[setting] = "skipped: this CPU cannot do it"
            continue
        print(f"== {setting}", flush=True)
        start = time.perf_counter()
        outcome = "passed" if passes(setting, options) else "FAILED"
        outcomes[setting] = f"{outcome} in {time.perf_counter() - start:.0f} s"
    for setting, outcome in outcomes.items():
        print(f"{outcome:32} {setting}")
    return int(any(outcome.startswith("FAILED") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
