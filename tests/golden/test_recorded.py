"""What this library computed before: plans, qparams, outputs, gradients, states and files of small models, bit for bit.

``recorded/cases.py`` says what is recorded, ``recorded/record.py`` writes it. A plan or checkpoint is compared by what is
read from it, never by its text, so that its format may change as long as the old one is read.

Which numbers have the same bits:

* An exact case, everywhere: no sum in it is rounded, and what is rounded beside sums (quotients, steps) is rounded
  correctly by every CPU. ``test_exact_cases_are_exact`` computes them in float64, where nothing of this size is rounded.
* Another case where this CPU adds in the order of the one that recorded it. It does if the float model has the recorded
  bits, with those of the functions and sums that observers use.
* Elsewhere numbers are near, for these reasons. A range is the largest of some sums. Float32 rounds a sum of ``TERMS``
  products, in any order, to ``TERMS * 2 ** -24`` of the sum of their sizes, which is at most 16 times as large as the
  range, for at most ``DEPTH`` layers one behind the other: ``RANGE``. Values, outputs and gradients are moved by no more as
  long as all codes are the same. A code changes where its value lies that near to a tie, which few of the hundreds of codes
  of a case do: at most one in 50, and they are counted. A changed code moves by a step, and rounding moves each code by
  ``step / sqrt(12)`` on average, so that a share ``c`` of changed codes has ``sqrt(12 c)`` of the norm of all the noise of
  quantization, twice that where they weigh more than others. That noise is known: of outputs it is the distance to the
  recorded float model; gradients of steps are made of rounding errors, they are such noise themselves.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import sophq_func as sq
from tests.golden.recorded.cases import (
    CASES,
    Made,
    Results,
    Subject,
    digest,
    doubled,
    float_results,
    names_of,
    prepared,
    results,
)

HERE = Path(__file__).parent / "recorded"
INDEX: Mapping[str, Any] = json.loads((HERE / "cases.json").read_text(encoding="utf-8"))
TEXTS: Mapping[str, Any] = json.loads((HERE / "texts.json").read_text(encoding="utf-8"))
CHECKPOINTS = sorted(TEXTS["inspect"])

TERMS, DEPTH = 64, 16
RANGE = 16 * DEPTH * TERMS * 2.0**-24
CHANGED = 1 / 50

each = pytest.mark.parametrize("name", CASES)
exact = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.exact])


class Run(NamedTuple):
    """A case as it is computed now."""

    subject: Subject
    made: Made
    found: Results


@functools.cache
def run(name: str) -> Run:
    subject = CASES[name].make()
    made = prepared(subject)
    return Run(subject, made, results(subject, made))


@functools.cache
def tensors() -> Results:
    return load_file(HERE / "tensors.safetensors")


def recorded(name: str) -> Results:
    """The tensors of a case that are there in full."""
    return {key.partition(":")[2]: x for key, x in tensors().items() if key.partition(":")[0] == name}


def recorded_plan(name: str) -> sq.Plan:
    return sq.Plan.from_json(INDEX[name]["plan"])


def adds_alike(name: str) -> bool:
    """Whether this CPU rounds the sums of the float model as the recording one did."""
    now = {key: digest(x) for key, x in float_results(CASES[name].make()).items()}
    return now == INDEX[name]["float"]


def test_the_cases_are_those_recorded() -> None:
    assert CASES.keys() == INDEX.keys()
    assert sum(case.exact for case in CASES.values()) >= 10


@each
def test_plan(name: str) -> None:
    now, before = run(name).made.q.plan, recorded_plan(name)
    assert list(now) == list(before) == list(INDEX[name]["reasons"])
    assert dict(now) == dict(before)
    assert now == before
    assert names_of(now) == INDEX[name]["reasons"]
    assert sq.Plan.from_json(now.to_json()) == before


@each
def test_numbers(name: str) -> None:
    found, before = run(name).found, INDEX[name]["digests"]
    assert found.keys() == before.keys()
    if CASES[name].exact or adds_alike(name):
        assert differences(found, before, recorded(name)) == []
    else:
        compare_as_rounded(found, recorded(name))


@each
def test_the_recorded_plan_builds_the_same_model(name: str) -> None:
    before = run(name)
    subject = CASES[name].make()
    again = results(subject, prepared(subject, recorded_plan(name)))
    assert again.keys() == before.found.keys()
    assert differences(again, {key: digest(x) for key, x in before.found.items()}, before.found) == []


@exact
def test_exact_cases_are_exact(name: str) -> None:
    """A sum that float32 rounds has other digits in float64; steps are float32 in both."""
    subject, made, found = run(name)
    again = results(subject, doubled(made))
    assert again["output/0"].dtype == torch.float64
    for key, x in found.items():
        torch.testing.assert_close(x.double(), again[key].double(), rtol=0, atol=0, msg=lambda m, key=key: f"{key}: {m}")


def test_a_change_is_noticed() -> None:
    """One changed bit is a difference; where sums are rounded, a shifted output, range or gradient is."""
    name = "attention_by_dataflow"
    before = recorded(name)
    compare_as_rounded(before, before)
    step = "qparams/fc2.post_act_fake_quantizer.0"
    assert len(differences({step: before[step].nextafter(torch.tensor(9.0))}, INDEX[name]["digests"], before)) == 1
    for key in (step, "output/0", "gradient/qkv.weight", "captured/x.post_act_fake_quantizer"):
        with pytest.raises(AssertionError):
            compare_as_rounded({**before, key: before[key] * 1.01}, before)


def differences(found: Results, digests: Mapping[str, str], full: Results) -> list[str]:
    """Names of tensors with other bits, and how far off they are where that is known."""
    return [f"{key}: {_distance(x, full.get(key))}" for key, x in found.items() if digest(x) != digests[key]]


def _distance(x: Tensor, before: Tensor | None) -> str:
    if before is None:
        return f"other bits ({tuple(x.shape)}, {x.dtype})"
    if (x.shape, x.dtype) != (before.shape, before.dtype):
        return f"{tuple(x.shape)} {x.dtype}, recorded {tuple(before.shape)} {before.dtype}"
    off = (x.double() - before.double()).abs()
    return f"{int((off > 0).sum())} of {off.numel()} differ, by up to {float(off.max()):.3g}"


def compare_as_rounded(found: Results, before: Results) -> None:
    """Near, as the top of this file says why."""
    for key in before:
        if key.startswith(("qparams/", "ostate/")):
            compare_range(key, found[key], before[key])
    changed = changed_codes(found, before)
    assert changed <= CHANGED
    share = 2 * (12 * changed) ** 0.5
    floats = {key.removeprefix("float/"): x for key, x in before.items() if key.startswith("float/")}
    noise = distance(floats, before, "output/")
    assert distance(found, before, "output/") <= share * noise + RANGE
    for start in sorted({key.rpartition("/")[0] for key in before if key.startswith(("gradient/", "more/"))}):
        assert distance(found, before, start) <= share + RANGE, start


def changed_codes(found: Results, before: Results) -> float:
    """The share of quantized values that are moved by more than rounding: 8 bits have steps of at least ``4 * RANGE``."""
    pairs = [(found[key], x) for key, x in before.items() if key.startswith("captured/")]
    moved = sum(int(((new - old).abs() > 2 * RANGE * size(old)).sum()) for new, old in pairs)
    return moved / sum(old.numel() for _, old in pairs)


def compare_range(key: str, found: Tensor, before: Tensor) -> None:
    """Steps and ranges within rounding, integers within one, and of counts at most one in a hundred elsewhere."""
    assert (found.shape, found.dtype) == (before.shape, before.dtype), key
    if not before.is_floating_point():
        assert int((found.long() - before.long()).abs().max()) <= 1, key
    elif before.numel() > 64 and bool((before == before.round()).all()):
        assert float((found - before).abs().sum()) <= 0.02 * float(before.sum()), key
    else:
        torch.testing.assert_close(found, before, rtol=RANGE, atol=RANGE * size(before), msg=lambda m: f"{key}: {m}")


def size(x: Tensor) -> float:
    """The largest finite magnitude."""
    return float(torch.where(x.isfinite(), x, 0).abs().max())


def distance(found: Results, before: Results, start: str) -> float:
    """Of all tensors whose names begin so, taken as one vector: the norm of the difference, relative to the recorded."""
    keys = [key for key in before if key.startswith(start) and key in found]
    assert keys, start
    old = torch.cat([before[key].double().reshape(-1) for key in keys])
    new = torch.cat([found[key].double().reshape(-1) for key in keys])
    return float((new - old).norm() / old.norm())


# Files


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint(name: str) -> None:
    made, known = run(name).made, INDEX[name]["digests"]
    checkpoint = sq.load(HERE / f"{name}.safetensors").check(made.q)
    assert checkpoint.plan == made.q.plan
    assert checkpoint.qparams is not None and checkpoint.ostate is not None
    params = checkpoint.params if checkpoint.params is not None else made.params
    loaded = results(run(name).subject, made._replace(params=params, qparams=checkpoint.qparams, ostate=checkpoint.ostate))
    held = {key: x for key, x in loaded.items() if key.startswith(("qparams/", "ostate/"))}
    assert differences(held, known, recorded(name)) == []
    if CASES[name].exact or adds_alike(name):
        assert differences(loaded, known, recorded(name)) == []


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_inspection_of_a_checkpoint(name: str, tmp_path: Path) -> None:
    from tests.golden.recorded.files import inspections

    path = shutil.copy(HERE / f"{name}.safetensors", tmp_path)
    for way, text in inspections(Path(path), recorded_plan(name)).items():
        assert text.splitlines() == TEXTS["inspect"][name][way].splitlines(), way


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "bert"])
def test_onnx(name: str, tmp_path: Path) -> None:
    """Node by node where the packages that write the file are those of the recording; else quantizers and constants."""
    for package in ("onnx", "onnxscript", {"digits": "sklearn", "bert": "transformers"}[name]):
        pytest.importorskip(package)
    from tests.golden.recorded.files import NETWORKS, onnx_lines, quantizers, versions

    lines, before = onnx_lines(NETWORKS[name](), tmp_path), TEXTS["onnx"][name]
    assert quantizers(lines) == quantizers(before)
    assert len(quantizers(lines)) >= 20
    if versions() == TEXTS["versions"]:
        # nodes that do not depend on one another may come in any order, which numbers their results
        assert sorted(map(_without_numbers, lines)) == sorted(map(_without_numbers, before))


def _without_numbers(line: str) -> str:
    """A line of the description of a file without the numbers of values."""
    return re.sub(r"%\w+", "%", line)


def test_integers_and_tables(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from tests.golden.recorded.files import artifact, digits, tables

    made = digits()
    found = json.loads(json.dumps(artifact(made)))
    assert found["metadata"] == TEXTS["artifact"]["metadata"]
    assert found["tensors"] == TEXTS["artifact"]["tensors"]
    assert tables(made, tmp_path) == TEXTS["tables"]
