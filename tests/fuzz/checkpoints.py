"""Checkpoints that were changed, with checksums that are right again: refused in words, or right, in little memory.

A file is read, its plan built, and its parts are used. Errors of the library may come out of it, and no others; and
reading takes at most :data:`TIMES` times the size of a large file.

``python -m tests.fuzz.checkpoints --count 5000 --seed 0`` prints a table of outcomes, and exits 1 on a fault.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import resource
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

import sophq_func as sq
from tests.fuzz import plans
from tests.fuzz.subjects import SUBJECTS, Subject

TIMES = 3
"""Most memory that reading a large file may take at its peak, in sizes of the file."""

ROOM = 2**28
"""Bytes that a small file may take, whatever is written in it: a thousand times its size, and less than a machine has."""

LARGE = 2**22
"""Numbers in a large file."""

EVERY = 50
"""One of so many cases is a large file."""

SECONDS = 20
"""After which a case hangs."""

GARBLED = (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError)
"""What a look into a changed header may raise."""

NUMBERS = (0.0, -1.0, 1e-45, 3e38, -3e38, float("nan"), float("inf"), float("-inf"))

Header = dict[str, Any]
Change = Callable[[Header, bytearray, random.Random], None]
"""Changes the header or the data of a file; the checksums are made right afterwards."""


def opened(data: bytes) -> tuple[Header, bytearray]:
    """Header and tensor data of a file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])


def sealed(header: Header, data: bytes) -> bytes:
    """A file of a header and data, with checksums as somebody who forges a file would make them."""
    text = {key: value for key, value in header.get("__metadata__", {}).items() if key not in ("sha256", "tensors")}
    seals = {}
    for name, entry in header.items():
        with suppress(*GARBLED):  # what is no entry of a tensor has no checksum
            start, stop = entry["data_offsets"]
            seals[name] = hashlib.sha256(f"{entry['dtype']} {entry['shape']}\n".encode() + data[start:stop]).hexdigest()
    text["tensors"] = json.dumps(seals, sort_keys=True)
    text["sha256"] = hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()
    raw = json.dumps({**header, "__metadata__": text}).encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + data


def _tensor(header: Header, chance: random.Random) -> str:
    return chance.choice([name for name in header if name != "__metadata__"])


def rename(header: Header, data: bytearray, chance: random.Random) -> None:
    """Another name for a tensor: that of another one, or nearly its own."""
    name, other = _tensor(header, chance), _tensor(header, chance)
    new = chance.choice(
        (other, f"{name}x", name.rpartition(".")[0], f"{name}\x1b[2J", name.replace("qparams", "ostate"), "x" * 9999)
    )
    header[new] = header.pop(name)


def drop(header: Header, data: bytearray, chance: random.Random) -> None:
    """A tensor less, with its data."""
    name = _tensor(header, chance)
    start, stop = header.pop(name)["data_offsets"]
    del data[start:stop]
    for one, entry in header.items():
        if one != "__metadata__" and entry["data_offsets"][0] >= stop:
            entry["data_offsets"] = [place - (stop - start) for place in entry["data_offsets"]]


def reshape(header: Header, data: bytearray, chance: random.Random) -> None:
    """Another shape or dtype of as many bytes."""
    entry = header[_tensor(header, chance)]
    size = entry["data_offsets"][1] - entry["data_offsets"][0]
    wide = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1, "BOOL": 1, "C64": 8, "F8_E4M3": 1}
    if chance.random() < 0.5:
        dtype = chance.choice(sorted(wide))
        entry["dtype"], entry["shape"] = dtype, [size // wide[dtype]]
    else:
        shape = list(entry["shape"])
        entry["shape"] = chance.choice(
            (shape[::-1], [1, *shape], shape[1:], [*shape, 1], [size // 4], [0], [1] * 70, [2**40, 0])
        )


def refer(header: Header, data: bytearray, chance: random.Random) -> None:
    """An entry of the header that is another one, or none."""
    path = chance.choice([path for path in plans.paths(header) if path[0] != "__metadata__"])
    plans.put(header, path, copy.deepcopy(chance.choice(plans.ODD)))


def revalue(header: Header, data: bytearray, chance: random.Random) -> None:
    """Other numbers in a tensor: one of them, or all."""
    entry = header[_tensor(header, chance)]
    start, stop = entry["data_offsets"]
    if entry["dtype"] == "F32" and stop > start:
        new = torch.tensor(chance.choice(NUMBERS)).view(torch.int32).item().to_bytes(4, "little", signed=True)
        at = range(start, stop, 4) if chance.random() < 0.5 else [chance.randrange(start, stop, 4)]
        for place in at:
            data[place : place + 4] = new
    elif stop > start:
        data[start:stop] = chance.randbytes(stop - start)


def replan(header: Header, data: bytearray, chance: random.Random) -> None:
    """Another plan, with the digest that it has."""
    text = header["__metadata__"]
    tree = json.loads(text["plan"])
    chance.choice(plans.MUTATIONS)(tree, chance)
    text["plan"] = json.dumps(tree)
    with suppress(*plans.OURS):
        text["digest"] = sq.Plan.from_json(text["plan"]).digest()


def restate(header: Header, data: bytearray, chance: random.Random) -> None:
    """Other text: a part less, a version, a tree of extra that is another one."""
    text = header["__metadata__"]
    key = chance.choice(sorted(text))
    if key == "extra" or chance.random() < 0.3:
        tree = {"root": json.loads(text["extra"])}
        chance.choice((plans.remove, plans.retype, plans.swap, plans.rename))(tree, chance)
        text["extra"] = json.dumps(tree.get("root"))
    elif key in ("parts", "version"):
        text[key] = chance.choice(("", "0", "1", "3", "params", "plan", "qparams ostate", "plan plan", f"{text[key]} extra"))
    else:
        text[key] = chance.choice((text.pop(key), "", "\x1b[2J", "{}", "[" * 5000, "null"))


CHANGES: tuple[Change, ...] = (rename, drop, reshape, refer, revalue, revalue, replan, replan, restate)


def damage(data: bytes, chance: random.Random) -> bytes:
    """A file with a byte changed, cut, or added; its checksums are wrong then."""
    at = chance.randrange(len(data))
    return chance.choice((data[:at], data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :], data + b"x"))


def changed(data: bytes, chance: random.Random) -> bytes:
    """A mutated file."""
    if chance.random() < 0.1:
        return damage(data, chance)
    header, rest = opened(data)
    for _ in range(chance.choice((1, 1, 2))):
        with suppress(*GARBLED):  # an earlier change left nothing to change
            chance.choice(CHANGES)(header, rest, chance)
    return sealed(header, bytes(rest))


def outcome(path: Path, subject: Subject) -> str:
    """What comes of a file: where it was refused, or that it is used."""
    stage = "load"
    try:
        found = sq.load(path)
        repr(found)
        stage = "build"
        q = subject.q if found.plan is None else sq.build(subject.model, found.plan)
        stage = "check"
        found.check(q)
        stage = "qparams"
        params = subject.params if found.params is None else found.params
        if found.ostate is not None:
            q.qparams(params, found.ostate)
        stage = "apply"
        q.apply(params, subject.qparams if found.qparams is None else found.qparams, *subject.batch)
        return "used"
    except Exception as error:
        return plans.refused(stage, error)


def _status(key: str) -> int:
    """A figure of this process's memory, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def large(path: Path, chance: random.Random) -> str:
    """Read a large file that was changed; whether the memory that it takes is in proportion."""
    extra = {"steps": [torch.zeros(4)] * 3, "many": torch.zeros(LARGE // 4)}
    sq.save(path, params={"a": torch.zeros(LARGE // 2), "b": torch.zeros(LARGE // 4)}, extra=extra)
    path.write_bytes(changed(path.read_bytes(), chance))
    size = path.stat().st_size
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here on
    before, found = _status("VmRSS"), None
    with suppress(*plans.OURS):
        found = sq.load(path)
    times = (_status("VmHWM") - before) / size
    kind = "refused" if found is None else "read"
    return f"large file {kind}" if times <= TIMES else f"FAULT large file {kind}: {times:.1f} times its memory"


@contextmanager
def little_memory() -> Iterator[None]:
    """Let this process have :data:`ROOM` more than it has; more is a MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _alarm(*_: object) -> None:
    raise TimeoutError("it hangs")


def checkpoints(count: int, seed: int) -> Iterator[str]:
    """Mutate checkpoints; what came of each."""
    subjects = {name: make() for name, make in SUBJECTS.items()}
    signal.signal(signal.SIGALRM, _alarm)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path, whole = Path(folder) / "a", {}
        for name, subject in subjects.items():
            _, ostate = subject.q.observe(subject.params, subject.q.init(subject.params), *subject.batch)
            extra = {"step": 3, "rates": (0.1, float("inf")), "state": {"exp_avg": torch.ones(3)}, "size": torch.Size([2])}
            sq.save(path, plan=subject.q.plan, qparams=subject.qparams, ostate=ostate, params=subject.params, extra=extra)
            whole[name] = path.read_bytes()
            assert outcome(path, subject) == "used"
        for i in range(count):
            chance = random.Random(f"{seed} {i}")
            signal.alarm(SECONDS)
            if i % EVERY == EVERY - 1:
                yield large(path, chance)
            else:
                name = chance.choice(list(subjects))
                path.write_bytes(changed(whole[name], chance))
                with little_memory():
                    yield outcome(path, subjects[name])
            signal.alarm(0)


def main() -> int:
    """Run a campaign."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    outcomes = Counter(checkpoints(options.count, options.seed))
    for found, number in outcomes.most_common():
        sys.stdout.write(f"{number:6}  {found}\n")
    return int(any(found.startswith("FAULT") for found in outcomes))


if __name__ == "__main__":
    sys.exit(main())
