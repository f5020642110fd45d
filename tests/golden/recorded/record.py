"""Write the recorded data: ``OMP_NUM_THREADS=1 python -m tests.golden.recorded.record``.

Run this on purpose alone: what is there says what earlier versions computed. Plans and checkpoints stay in the format of
the version that recorded them, so that later ones show that they still read it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import sophq_func as sq
from tests.golden.recorded.cases import CASES, Case, Made, Results, digest, float_results, names_of, prepared, results
from tests.golden.recorded.files import NETWORKS, artifact, inspections, onnx_lines, tables, versions

HERE = Path(__file__).parent
LONGEST = 1024
"""Tensors of more elements are recorded by their digest alone."""
CHECKPOINTS = {"residual_by_dataflow": True, "observers_of_every_family": False}
"""Cases of which a checkpoint is kept, and whether params are in it. The second one has states of every observer."""


def kept(x: Tensor) -> bool:
    """Whether the elements of a tensor are recorded beside its digest."""
    return 0 < x.numel() <= LONGEST


def record_case(case: Case) -> tuple[dict[str, Any], Results, Made]:
    """What is written of a case: the entry in the index, tensors, and what a checkpoint is made of."""
    subject = case.make()
    made = prepared(subject)
    found = results(subject, made)
    own = {} if case.exact else float_results(subject)
    entry = {
        "plan": made.q.plan.to_json(),
        "digest": made.q.plan.digest(),
        "reasons": names_of(made.q.plan),
        "digests": {name: digest(x) for name, x in found.items()},
        "float": {name: digest(x) for name, x in own.items()},
    }
    noise = {name: x for name, x in own.items() if name.startswith(("float/output", "float/gradient"))}
    tensors = {f"{case.name}:{name}": x.detach().clone() for name, x in (found | noise).items() if kept(x)}
    return entry, tensors, made


def main() -> None:
    """Write all data anew."""
    torch.set_num_threads(1)
    index: dict[str, Any] = {}
    tensors: Results = {}
    texts: dict[str, Any] = {"versions": versions(), "onnx": {}, "inspect": {}}
    for case in CASES.values():
        index[case.name], own, made = record_case(case)
        tensors |= own
        if case.name in CHECKPOINTS:
            path = HERE / f"{case.name}.safetensors"
            params = made.params if CHECKPOINTS[case.name] else None
            sq.save(path, plan=made.q.plan, qparams=made.qparams, ostate=made.ostate, params=params)
            texts["inspect"][case.name] = inspections(path, made.q.plan)
    with tempfile.TemporaryDirectory() as folder:
        for name, make in NETWORKS.items():
            texts["onnx"][name] = onnx_lines(make(), Path(folder))
        network = NETWORKS["digits"]()
        texts["artifact"], texts["tables"] = artifact(network), tables(network, Path(folder))
    save_file({name: tensors[name].contiguous() for name in sorted(tensors)}, HERE / "tensors.safetensors")
    write("cases.json", index)
    write("texts.json", texts)


def write(name: str, data: Any) -> None:
    """JSON, one line for each entry, so that a change can be read."""
    (HERE / name).write_text(json.dumps(data, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
