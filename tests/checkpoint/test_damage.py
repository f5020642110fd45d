"""Checkpoints that were damaged or forged, and processes that were killed while they saved."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sophq_func as sq
from sophq_func.checkpoint import sealed
from tests.checkpoint.test_io import same_bits, says, small
from tests.fuzz import checkpoints
from tests.helpers import Ready

Header = dict[str, Any]
Saved = tuple[bytes, Ready, dict[str, Any]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The bytes of a checkpoint with all parts, and what is in it."""
    torch.manual_seed(0)
    r, ostate, _ = small()
    qparams = sq.enabled(r.qparams, True)
    path = tmp_path_factory.mktemp("saved") / "a"
    sq.save(path, plan=r.q.plan, qparams=qparams, ostate=ostate, params=r.params)
    return path.read_bytes(), r._replace(qparams=qparams), ostate


def opened(data: bytes) -> tuple[Header, bytes]:
    """Header and tensor data of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def closed(header: Header | str, data: bytes) -> bytes:
    """The reverse of :func:`opened`; a header that is text is written as it is."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def resealed(header: Header, data: bytes) -> bytes:
    """As :func:`closed`, with checksums that are right again, as somebody who forges a file would make them."""
    text = {key: value for key, value in header["__metadata__"].items() if key not in ("sha256", "tensors")}
    seals = {}
    for name, entry in header.items():
        if name != "__metadata__":
            place = entry["data_offsets"]
            own = data[place[0] : place[1]] if isinstance(place[0], int) and place[0] >= 0 else b""
            seals[name] = hashlib.sha256(f"{entry['dtype']} {entry['shape']}\n".encode() + own).hexdigest()
    text["tensors"] = json.dumps(seals, sort_keys=True)
    text["sha256"] = hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()
    return closed({**header, "__metadata__": text}, data)


def refused(data: bytes, path: Path, *words: str) -> str:
    """The message with which a file of these bytes is refused: it names the file, says why, and is not endless."""
    path.write_bytes(data)
    text = says(sq.CheckpointError, lambda: sq.load(path), str(path), "Fix: ", *words)
    assert len(text) < 5000
    return text


def test_the_format_is_what_its_page_says(saved: Saved) -> None:
    data, r, _ = saved
    header, rest = opened(data)
    assert json.loads(resealed(header, rest)[8 : 8 + len(json.dumps(header))]) == header
    assert set(header["__metadata__"]) == set("format version library torch parts plan digest tensors sha256".split())
    assert header["__metadata__"]["parts"] == "params qparams ostate plan"
    assert "qparams.conv.weight_fake_quant.enabled" in header
    assert {f"params.{name}" for name in r.params} < set(header)


# Damage


def flip(data: bytes, source: random.Random) -> bytes:
    place, bit = source.randrange(len(data)), 1 << source.randrange(8)
    return data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]


def flip_header(data: bytes, source: random.Random) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    return flip(data[:end], source) + data[end:]


def flip_data(data: bytes, source: random.Random) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    return data[:end] + flip(data[end:], source)


def flip_length(data: bytes, source: random.Random) -> bytes:
    return flip(data[:8], source) + data[8:]


def truncate(data: bytes, source: random.Random) -> bytes:
    return data[: source.randrange(len(data))]


def remove(data: bytes, source: random.Random) -> bytes:
    place = source.randrange(len(data))
    return data[:place] + data[place + source.randint(1, 64) :]


def insert(data: bytes, source: random.Random) -> bytes:
    place = source.randrange(len(data) + 1)
    return data[:place] + source.randbytes(source.randint(1, 64)) + data[place:]


def overwrite(data: bytes, source: random.Random) -> bytes:
    place, size = source.randrange(len(data)), source.randint(1, 64)
    return (data[:place] + source.randbytes(size) + data[place + size :])[: len(data)]


def exchange(data: bytes, source: random.Random) -> bytes:
    a, b = sorted(source.sample(range(len(data) - 64), 2))
    return (
        data[:a] + data[b : b + 8] + data[a + 8 : b] + data[a : a + 8] + data[b + 8 :] if b - a >= 8 else flip(data, source)
    )


def edit_header(data: bytes, source: random.Random) -> bytes:
    """One entry of the header, or of its text, taken out, renamed, or given the value of another."""
    header, rest = opened(data)
    where = header if source.random() < 0.7 else header["__metadata__"]
    one, other = source.sample(sorted(where), 2)
    match source.randrange(3):
        case 0:
            del where[one]
        case 1:
            where[f"{one}x"] = where.pop(one)
        case _:
            where[one] = where[other]
    return closed(header, rest)


MUTATIONS = (flip, flip_header, flip_data, flip_length, truncate, remove, insert, overwrite, exchange, edit_header)
EACH = 120


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_a_damaged_file_is_refused_or_holds_the_same(
    mutate: Callable[[bytes, random.Random], bytes], saved: Saved, tmp_path: Path
) -> None:
    data, r, ostate = saved
    source = random.Random(f"{mutate.__name__}")
    count = 0
    for _ in range(EACH):
        damaged = mutate(data, source)
        path = tmp_path / "damaged"
        path.write_bytes(damaged)
        try:
            found = sq.load(path)
        except sq.CheckpointError as error:
            assert str(path) in str(error)
            assert "Fix: " in str(error)
            count += damaged != data
        else:
            assert found.plan.to_json() == r.q.plan.to_json()
            same_bits((found.params, found.qparams, found.ostate), (r.params, r.qparams, ostate))
    assert count > 0.9 * EACH


def test_every_bit_of_the_tensors_is_watched(saved: Saved, tmp_path: Path) -> None:
    data, *_ = saved
    header, rest = opened(data)
    begin, end = header["params.first.bias"]["data_offsets"]
    for bit in range(8 * begin, 8 * end):
        bent = bytearray(rest)
        bent[bit // 8] ^= 1 << bit % 8
        refused(closed(header, bytes(bent)), tmp_path / "a", "'params.first.bias'", "checksum", "damaged")


@pytest.mark.parametrize("change", ["shorter", "another header"])
def test_a_file_that_is_written_to_while_it_is_read_is_refused(
    change: str, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, check = tmp_path / "a", sealed._read_header

    def interfering(head: bytes, size: int) -> Any:
        found = check(head, size)
        with path.open("r+b") as file:
            file.truncate(size - 1) if change == "shorter" else file.write(b"12345678")
        return found

    monkeypatch.setattr(sealed, "_read_header", interfering)
    refused(saved[0], path, "while it was read")


# Forged files, with right checksums


def forge(saved: Saved, edit: Callable[[Header, bytes], Any]) -> bytes:
    """A file whose header was edited in place, sealed again; ``edit`` may return other tensor data."""
    header, rest = opened(saved[0])
    changed = edit(header, rest)
    return resealed(header, changed if isinstance(changed, bytes) else rest)


def put(name: str, values: Tensor) -> Callable[[Header, bytes], bytes]:
    """Other values for a tensor, of the same size."""

    def edit(header: Header, data: bytes) -> bytes:
        begin, end = header[name]["data_offsets"]
        new = values.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert len(new) == end - begin
        return data[:begin] + new + data[end:]

    return edit


def text(**entries: str | None) -> Callable[[Header, bytes], None]:
    """Other text; ``None`` takes an entry out."""

    def edit(header: Header, data: bytes) -> None:
        for key, value in entries.items():
            header["__metadata__"].pop(key, None)
            header["__metadata__"].update({} if value is None else {key: value})

    return edit


def entry(name: str, **fields: Any) -> Callable[[Header, bytes], None]:
    """Other fields for a tensor's entry."""
    return lambda header, data: header[name].update(fields)


def rename(name: str, other: str) -> Callable[[Header, bytes], None]:
    return lambda header, data: header.update({other: header.pop(name)})


def add(name: str) -> Callable[[Header, bytes], None]:
    return lambda header, data: header.update({name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}})


W, X = "conv.weight_fake_quant", "x.post_act_fake_quantizer"
Q = f"qparams.{W}"
SCALE, ZERO, ON = f"{Q}.scale", f"{Q}.zero_point", f"{Q}.enabled"
LO = f"ostate.{W}.lo"
FORGED: dict[str, tuple[Callable[[Header, bytes], Any], tuple[str, ...]]] = {
    "NaN scale": (put(SCALE, torch.full((4,), torch.nan)), ("qparams of conv.weight_fake_quant", "scale", "NaN")),
    "infinite scale": (put(SCALE, torch.full((4,), torch.inf)), ("conv.weight_fake_quant", "scale", "infinity")),
    "negative scale": (put(SCALE, -torch.ones(4)), ("conv.weight_fake_quant", "scale", "0 or less")),
    "a boolean that is 7": (put(ON, torch.tensor(7, dtype=torch.uint8)), (repr(ON), "0 and 1")),
    "a scale of another shape": (entry(SCALE, shape=[2, 2]), ("scale is torch.float32 (2, 2)",)),
    "a scale of another dtype": (entry(SCALE, dtype="I32"), ("scale is torch.int32 (4,)",)),
    "a zero point of another dtype": (entry(ZERO, dtype="U32"), ("zero_point is torch.uint32 (4,)",)),
    "a state of another shape": (entry(LO, shape=[4, 1]), ("ostate of conv.weight_fake_quant", "(4, 1)")),
    "a state of another dtype": (entry(LO, dtype="I32"), ("torch.int32",)),
    "a dtype that is none": (entry(SCALE, dtype="F33"), (repr(SCALE), "'F33'")),
    "a dtype that is a list": (entry(SCALE, dtype=["F32"]), (repr(SCALE), "dtype")),
    "a dtype of another size": (entry(SCALE, dtype="F64"), (repr(SCALE), "does not fit")),
    "a shape of another size": (entry(SCALE, shape=[5]), (repr(SCALE), "does not fit")),
    "a negative shape": (entry(SCALE, shape=[-2, -2]), (repr(SCALE), "shape")),
    "a shape that overflows": (entry(SCALE, shape=[1 << 62, 1 << 62]), (repr(SCALE), "shape")),
    "a shape that overflows and is empty": (
        entry(SCALE, shape=[0, 1 << 62, 1 << 62], data_offsets=[0, 0]),
        (repr(SCALE), "shape"),
    ),
    "a shape of fractions": (entry(SCALE, shape=[4.0]), (repr(SCALE), "shape")),
    "a shape of truths": (entry(SCALE, shape=[True, 4]), (repr(SCALE), "shape")),
    "a hundred axes": (entry(SCALE, shape=[1] * 100 + [4]), (repr(SCALE), "shape")),
    "offsets in the wrong order": (entry(SCALE, data_offsets=[16, 0]), (repr(SCALE), "does not fit")),
    "negative offsets": (entry(SCALE, data_offsets=[-16, 0]), (repr(SCALE), "does not fit")),
    "three offsets": (entry(SCALE, data_offsets=[0, 8, 16]), (repr(SCALE), "does not fit")),
    "offsets that are text": (entry(SCALE, data_offsets="ab"), (repr(SCALE), "does not fit")),
    "offsets beyond the file": (entry(SCALE, data_offsets=[10**9, 10**9 + 16]), ("starts at byte",)),
    "offsets that overlap": (
        lambda header, data: header[SCALE].update(data_offsets=header["params.first.bias"]["data_offsets"]),
        ("starts at byte",),
    ),
    "a hole": (lambda header, data: header.pop(SCALE), ("starts at byte",)),
    "data behind the last tensor": (lambda header, data: data + b"more", ("cut or added to",)),
    "a field too many": (entry(SCALE, offset=5), (repr(SCALE), "entry")),
    "an unknown name": (add("tail"), ("'tail'", "none of its parts")),
    "a part's name alone": (add("params"), ("'params'", "none of its parts")),
    "a quantizer that the plan has not": (rename(SCALE, "qparams.tail.scale"), ("qparams lack",)),
    "qparams that the plan has not": (
        lambda header, data: [
            rename(f"{Q}.{f}", f"qparams.tail.{f}")(header, data) for f in ("scale", "zero_point", "enabled")
        ],
        (W,),
    ),
    "a state that the plan has not": (rename(LO, "ostate.tail.lo"), ("ostate lacks",)),
    "a state's field that is none": (add("ostate.conv.weight_fake_quant.mid"), ("ostate holds", "mid")),
    "qparams without a scale": (rename(SCALE, "qparams.conv.weight_fake_quant.step"), (f"qparams lack '{W}.scale'",)),
    "a way up": (add("params.../../etc/passwd"), ("empty part",)),
    "an absolute path": (add("params./etc/passwd"), ("starts like a path",)),
    "a device path": (add("params.\\\\server\\share"), ("starts like a path",)),
    "a name with a NUL": (add("params.a\0b"), ("printed", "\\x00")),
    "a name that clears the screen": (add("params.\x1b[2J"), ("printed", "\\x1b")),
    "half a character": (add("params.\ud800"), ("printed", "\\ud800")),
    "a name of a megabyte": (add("tail" * 250_000), ("none of its parts", "...")),
    "another format": (text(format="pt"), ("'pt'", "sq.save")),
    "no format": (text(format=None), ("None", "sq.save")),
    "text too much": (text(more="x"), ("'more'",)),
    "no digest": (text(digest=None), ("'digest'",)),
    "another digest": (text(digest="0" * 64), ("digest",)),
    "no parts": (text(parts=None), ("parts",)),
    "a part that is none": (text(parts="params qparams ostate plan code"), ("code",)),
    "a part twice": (text(parts="params params qparams ostate plan"), ("parts",)),
    "a part less than there is": (text(parts="params ostate plan"), ("none of its parts",)),
    "states without a plan": (text(parts="params qparams ostate", plan=None, digest=None), ("plan",)),
    "a plan that is no JSON": (text(plan="import os"), ("JSONDecodeError", "Expecting")[1:]),
    "a plan that is a list": (text(plan="[]"), ("the plan is no JSON object",)),
    "a plan that is empty": (text(plan="{}"), ("Plan.from_json", "version")),
    "a deep plan": (text(plan='{"a":' * 100_000), ("recursion",)),
    "a wide plan": (text(plan='{"version": 2, "quantizers": [' + "0," * 1_000_000 + "0]}"), ("Plan.from_json",)),
    "a plan with a long number": (text(plan='{"version": ' + "1" * 10_000 + "}"), ("digits",)),
    "a plan with a huge number": (text(plan='{"version": 1e999}'), ("version", "inf")),
    "a plan with NaN": (text(plan='{"version": NaN}'), ("NaN",)),
    "a plan with one name twice": (text(plan='{"version": 2, "version": 2}'), ("'version'", "twice")),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_file_is_refused(case: str, saved: Saved, tmp_path: Path) -> None:
    edit, words = FORGED[case]
    refused(forge(saved, edit), tmp_path / "a", *words)


def test_a_file_that_was_only_sealed_again_loads(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(forge(saved, lambda header, data: None))
    same_bits(sq.load(tmp_path / "a").params, saved[1].params)


def planned(saved: Saved, change: Callable[[Any], None]) -> bytes:
    """A file whose plan was changed, with the digest of that plan."""

    def edit(header: Header, data: bytes) -> None:
        own = header["__metadata__"]
        plan = json.loads(own["plan"])
        change(plan)
        own["plan"] = json.dumps(plan).replace("Infinity", "1e999")
        with contextlib.suppress(sq.ConfigError):
            own["digest"] = sq.Plan.from_json(own["plan"]).digest()

    return forge(saved, edit)


def config(name: str, key: str, value: Any) -> Callable[[Any], None]:
    def change(plan: Any) -> None:
        for own in plan["quantizers"]:
            if own["name"] == name:
                own["config"].update({key: value})

    return change


def site(name: str, key: str, value: Any) -> Callable[[Any], None]:
    def change(plan: Any) -> None:
        for own in plan["quantizers"]:
            if own["name"] == name:
                own["site"].update({key: value})

    return change


def scheme(name: str, key: str, value: Any) -> Callable[[Any], None]:
    def change(plan: Any) -> None:
        for own in plan["quantizers"]:
            if own["name"] == name:
                own["config"]["scheme"].update({key: value})

    return change


PLANS: dict[str, tuple[Callable[[Any], None], tuple[str, ...]]] = {
    "an observer that is not registered": (config(W, "observer", {"name": "os.system", "options": {}}), (W, "'os.system'")),
    "an option that is none": (config(W, "observer", {"name": "minmax", "options": {"a": 1}}), (W, "'a'")),
    "an observer that wants a terabyte": (
        config(W, "observer", {"name": "histogram", "options": {"bins": 10**12, "levels": 256}}),
        (W, "bins"),
    ),
    "an observer that wants all memory": (
        config(W, "observer", {"name": "histogram", "options": {"bins": 10**30, "levels": 256}}),
        (W, "no quantizer"),
    ),
    "a fake quantizer that is not registered": (config(W, "fake_quantize", {"name": "eval", "options": {}}), (W, "'eval'")),
    "another observer": (config(W, "observer", {"name": "rms", "options": {"factor": 3.0}}), ("ostate",)),
    "a shape of a terabyte": (
        lambda plan: [
            site(X, "shape", [1 << 40, 3])(plan),
            scheme(X, "granularity", {"name": "PerChannel", "axis": 0})(plan),
        ],
        (X, "(1099511627776,)"),
    ),
    "a negative shape": (site(X, "shape", [-4, 3]), (X, "no quantizer")),
    "an axis beyond the shape": (scheme(X, "granularity", {"name": "PerChannel", "axis": 9}), (X, "no quantizer", "9")),
    "an axis beyond all shapes": (scheme(W, "granularity", {"name": "PerChannel", "axis": 1 << 40}), (W, "no quantizer")),
    "another granularity": (scheme(W, "granularity", {"name": "PerGroup", "axis": 0, "size": 9}), (W, "(any, any)")),
    "a number that is endless": (lambda plan: plan["counts"][0].append(["a", "b", 1e999]), ("no number of calls",)),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_forged_plan_is_refused(case: str, saved: Saved, tmp_path: Path) -> None:
    change, words = PLANS[case]
    refused(planned(saved, change), tmp_path / "a", *words)


def test_an_entry_or_a_text_of_the_wrong_type_is_refused(saved: Saved, tmp_path: Path) -> None:
    header, rest = opened(saved[0])
    for value in (5, None, [], "a", {"dtype": "F32"}):
        refused(closed({**header, "params.first.bias": value}, rest), tmp_path / "a", "'params.first.bias'", "entry")
    for value in (None, 5, [], "a", {"format": 5}, {"format": None}):
        refused(closed({**header, "__metadata__": value}, rest), tmp_path / "a", "no text")
    refused(closed({key: own for key, own in header.items() if key != "__metadata__"}, rest), tmp_path / "a", "no text")
    for key in ("sha256", "tensors"):
        less = {name: own for name, own in header["__metadata__"].items() if name != key}
        refused(closed({**header, "__metadata__": less}, rest), tmp_path / "a", "no checksums")


HEADERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "empty": ("", ("Expecting value",)),
    "a list": ("[]", ("no JSON object",)),
    "a number": ("5", ("no JSON object",)),
    "deep": ("[" * 200_000, ("recursion",)),
    "deep objects": ('{"a":' * 200_000, ("recursion",)),
    "a name twice": ('{"__metadata__": {}, "a": 1, "a": 1}', ("'a'", "twice")),
    "text twice": ('{"__metadata__": {"b": "1", "b": "2"}}', ("'b'", "twice")),
    "no JSON number": ('{"a": Infinity}', ("Infinity",)),
    "a long number": ('{"a": ' + "9" * 10_000 + "}", ("digits",)),
    "not closed": ('{"a": ', ("Expecting value",)),
    "more behind it": ("{} {}", ("Extra data",)),
    "not UTF-8": ('{"\ud800": 1}', ("utf-8",)),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_is_none_is_refused(case: str, tmp_path: Path) -> None:
    header, words = HEADERS[case]
    refused(closed(header, b""), tmp_path / "a", *words)


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 7, b"\0" * 8, b"\xff" * 8, b"\xff" * 100, b"\x80\x02}q\0.", b"PK\x03\x04" * 9]
)
def test_a_file_that_is_none_is_refused(data: bytes, tmp_path: Path) -> None:
    refused(data, tmp_path / "a")


def test_a_header_longer_than_the_format_allows_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.write((sealed.LONGEST_HEADER + 1).to_bytes(8, "little"))
        file.truncate(sealed.LONGEST_HEADER + 100)  # a hole on the disk: it takes no space
    says(sq.CheckpointError, lambda: sq.load(path), str(path), "longer than")


def test_a_safetensors_file_of_others_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save

    refused(save({"a": torch.ones(2)}), tmp_path / "a", "sq.save")
    refused(save({"a": torch.ones(2)}, {"format": "pt"}), tmp_path / "a", "sq.save")


def test_loading_never_unpickles_or_evaluates(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("this is not to be called")

    path = tmp_path / "a"
    path.write_bytes(saved[0])
    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "builtins.eval", "builtins.exec", "torch.load"):
        monkeypatch.setattr(name, never)
    sq.load(path).check(saved[1].q)


# Killed


def save_for_ever(path: Path, versions: list[dict[str, Tensor]]) -> None:
    while True:
        for params in versions:
            sq.save(path, params=params)


def identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def wait_for_another_file(path: Path, before: tuple[int, int]) -> None:
    """Until a child has saved at least once."""
    deadline = time.monotonic() + 30
    while identity(path) == before:
        assert time.monotonic() < deadline, "the child does not save"
        time.sleep(0.0005)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_process_that_is_killed_while_it_saves_leaves_a_file_that_loads(tmp_path: Path) -> None:
    path, source = tmp_path / "a", random.Random(0)
    versions = [{"a": torch.full((50_000,), n), "b": torch.tensor(n)} for n in (1.0, 2.0)]
    sq.save(path, params=versions[0])
    interrupted = 0  # the next save takes away what a killed one has left
    for _ in range(100):
        before = identity(path)
        child = os.fork()
        if not child:
            try:
                save_for_ever(path, versions)
            finally:
                os._exit(1)
        try:
            wait_for_another_file(path, before)
            time.sleep(source.uniform(0, 0.01))
        finally:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        found = sq.load(path).params
        same_bits(found, versions[int(found["b"].item()) - 1])
        interrupted += any(tmp_path.glob(".a.*.sophq-tmp"))
    assert interrupted, "no kill came between the beginning and the end of a save"


def test_a_file_of_torch_save_is_called_one(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, tmp_path / "model.pt")
    with pytest.raises(sq.CheckpointError, match=r"a zip file, as torch\.save writes one, which torch\.load reads"):
        sq.load(tmp_path / "model.pt")


# Campaigns


def test_mutated_checkpoints_are_refused_in_words_or_right() -> None:
    assert [found for found in checkpoints.checkpoints(60, seed=5) if found.startswith("FAULT")] == []


def test_what_is_not_a_file_of_the_library_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null")):
        says(sq.CheckpointError, lambda path=path: sq.load(path), "a folder, a device, a pipe or a socket")
