"""Run campaigns one after the other, with new seeds, for as long as one likes: ``python -m tests.fuzz --seconds 3600``.

Each runs at least once. The exit code is 1 where one found a fault; the line of its summary says with which seeds.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
STARTS = 'if __name__ == "__main__":'
"""The line of a file that can be run."""


def campaigns(folder: Path = FOLDER) -> list[str]:
    """Names of the campaigns of a folder; other files hold what several of them need."""
    files = sorted(path for path in folder.glob("*.py") if not path.name.startswith("__"))
    return [path.stem for path in files if STARTS in path.read_text(encoding="utf-8")]


def passes(name: str, count: int, seed: int) -> bool:
    """Run a campaign."""
    print(f"== {name} --count {count} --seed {seed}", flush=True)
    command = [sys.executable, "-m", f"tests.fuzz.{name}", "--count", str(count), "--seed", str(seed)]
    return subprocess.run(command, cwd=FOLDER.parents[1], check=False).returncode == 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run them until the time is over; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", help="default: all")
    parser.add_argument("--seconds", type=float, default=0, help="no round begins later than this; default: one round")
    parser.add_argument("--count", type=int, default=200, help="cases of each campaign in a round")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; each further one adds 1")
    options = parser.parse_args(argv)
    names = options.names or campaigns()
    end = time.monotonic() + options.seconds
    failing: dict[str, list[int]] = {name: [] for name in names}
    for seed in itertools.count(options.seed):
        for name in names:
            if not passes(name, options.count, seed):
                failing[name].append(seed)
        if time.monotonic() >= end:
            break
    for name, seeds in failing.items():
        found = f"a fault with the seeds {seeds}" if seeds else "no fault"
        print(f"{name:16} {seed + 1 - options.seed} rounds of {options.count}: {found}")
    return int(any(failing.values()))


if __name__ == "__main__":
    sys.exit(main())
