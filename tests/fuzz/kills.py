"""Processes that are killed while they save: what is left is the old file or the new one, and no other file for long.

``python -m tests.fuzz.kills --count 200 --seed 0`` prints a table of outcomes, and exits 1 on a fault.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import sophq_func as sq
from sophq_func.core.files import ENDING, write_text

SIZE = 2**16
"""Numbers in the tensor of each checkpoint: a save takes long enough to be hit in the middle."""

NUMBER = "number"
"""What tells one version of a file from another."""


def save_checkpoint(path: Path, number: int) -> None:
    """Write a checkpoint whose every number is the same."""
    sq.save(path, params={"w": torch.full((SIZE,), float(number))}, extra={NUMBER: number})


def check_checkpoint(path: Path) -> None:
    """Raise unless a checkpoint is whole, and of one save."""
    found = sq.load(path)
    assert bool((found.params["w"] == found.extra[NUMBER]).all()), "two saves in one file"


def save_text(path: Path, number: int) -> None:
    """Write a text in which every line is the same."""
    write_text("kills", path, f"{number}\n" * SIZE)


def check_text(path: Path) -> None:
    """Raise unless a text is whole, and of one save."""
    lines = path.read_text().splitlines()
    assert len(lines) == SIZE and len(set(lines)) == 1, "a part of a file"


KINDS: dict[str, tuple[Callable[[Path, int], None], Callable[[Path], None]]] = {
    "checkpoint": (save_checkpoint, check_checkpoint),
    "text": (save_text, check_text),
}
"""By kind of file, how it is saved and checked."""


def _save_for_ever(kind: str, path: Path, ready: Connection) -> None:
    torch.set_num_threads(1)
    save, _ = KINDS[kind]
    ready.send(True)
    number = 0
    while True:
        number += 1
        save(path, number)


def leftovers(folder: Path) -> list[str]:
    """Names of temporary files."""
    return [entry.name for entry in folder.iterdir() if entry.name.endswith(ENDING)]


def kills(count: int, seed: int) -> Iterator[str]:
    """Kill processes until so many were killed in a save; what came of each."""
    chance = random.Random(seed)
    # forked, as a process that imports torch anew takes a second
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hits = 0
        while hits < count:
            kind = chance.choice(list(KINDS))
            save, check = KINDS[kind]
            path = folder / kind
            save(path, 0)
            here, there = context.Pipe()
            process = context.Process(target=_save_for_ever, args=(kind, path, there))
            process.start()
            here.recv()
            time.sleep(chance.uniform(0, 0.02))
            process.kill()
            process.join()
            left = len(leftovers(folder))
            hits += bool(left)
            try:
                check(path)
            except Exception as error:
                yield f"FAULT {kind}: broken: {error}"
                continue
            save(path, 0)  # the next save collects what is left
            after = leftovers(folder)
            if after:
                yield f"FAULT {kind}: left over after the next save: {len(after)}"
            else:
                yield f"{kind}: whole, {'killed in a save' if left else 'killed between two saves'}"


def main() -> int:
    """Run a campaign."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="kills in the middle of a save; others come on top")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcomes = Counter(kills(options.count, options.seed))
    for outcome, number in sorted(outcomes.items()):
        sys.stdout.write(f"{number:6}  {outcome}\n")
    return int(any(outcome.startswith("FAULT") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
