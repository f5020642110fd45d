"""Every kind of file, written by processes with other hash seeds: the same content gives the same bytes.

``python -m tests.fuzz.same_bytes --count 4`` prints a line for each file, and exits 1 on a fault.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import sophq_func as sq
from tests.fuzz.subjects import SUBJECTS


def write_small(folder: Path) -> None:
    """Write each kind of file of a small network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()
    x = torch.randn(2, 1, 2, 2)
    q = sq.quantize(model, sq.QuantConfig(chip="BM1690", strategy="CNN"), example_args=(x,))
    params = sq.params_of(model)
    write(folder, q, params, q.calibrate(params, [x], progress=False), x)


def write_large(folder: Path) -> None:
    """Write each kind of file of a network with every kind of layer, and the tables of the other compiler as well."""
    _, q, params, qparams, (x,) = SUBJECTS["convolutions on a chip"]()
    write(folder, q, params, qparams, x)
    sq.export.tables(q, params, qparams, folder, name="net", example_args=x)


def write(
    folder: Path, q: sq.Quantized, params: dict[str, torch.Tensor], qparams: dict[str, sq.QParams], x: torch.Tensor
) -> None:
    """Write each kind of file."""
    _, ostate = q.observe(params, q.init(params), x)
    extra = {"step": 3, "names": {"b": torch.ones(2), "a": None}}
    sq.save(folder / "checkpoint", plan=q.plan, qparams=qparams, ostate=ostate, params=params, extra=extra)
    (folder / "plan.json").write_text(q.plan.to_json())
    (folder / "config.json").write_text(q.plan.origin.config.to_json())  # type: ignore[union-attr]
    (folder / "plan.txt").write_text(q.plan.table())
    (folder / "plan.dot").write_text(q.plan.to_dot())
    report = sq.report(q, params, qparams, [x], progress=False)
    report.to_html(folder / "report.html")
    report.to_csv(folder / "report.csv")
    for ending in ("svg", "png", "pdf"):
        sq.draw(q.plan, folder / f"plan.{ending}")
    sq.export.tables(q, params, qparams, folder, name="net", compiler="sophgo-mq")
    sq.export.onnx(q, params, qparams, x, folder / "model.onnx")


WRITERS = {"small": write_small, "large": write_large}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder."""
    return {entry.name: hashlib.sha256(entry.read_bytes()).hexdigest() for entry in sorted(folder.iterdir())}


def in_process(size: str, seed: int) -> dict[str, str]:
    """The digests of the files that a new process writes."""
    with tempfile.TemporaryDirectory() as folder:
        # one thread: sums may have another order with another number of them
        environment = {**os.environ, "PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.fuzz.same_bytes", "--write", folder, "--size", size]
        subprocess.run(command, check=True, env=environment, capture_output=True)
        return digests(Path(folder))


def compared(found: list[dict[str, str]]) -> Iterator[str]:
    """For each file, whether all processes wrote the same."""
    for name in sorted(set().union(*found)):
        versions = {digest.get(name) for digest in found}
        yield f"{'same ' if len(versions) == 1 else 'FAULT'}  {name}"


def main() -> int:
    """Run a campaign."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=sorted(WRITERS), default="large")
    parser.add_argument("--write", type=Path, help="only write the files into a folder")
    options = parser.parse_args()
    if options.write:
        WRITERS[options.size](options.write)
        return 0
    lines = list(compared([in_process(options.size, options.seed + i) for i in range(options.count)]))
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return int(any(line.startswith("FAULT") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
