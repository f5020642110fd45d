"""Write and read tensors and text in one safetensors file with checksums; a damaged file is refused.

The file is a plain safetensors file: eight bytes with the length of a JSON header, the header, the data. Two entries of the
header's text hold the checksums, called seals here: ``tensors`` a SHA-256 of each tensor with its dtype and shape,
``sha256`` one of all the text. They find damage, not forgery: whoever can write the file can compute new ones. So
everything in the header is checked before it is used, and no code in a file is ever run.

Tensors are written, read and hashed one by one, so that neither needs the memory of more than one further tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn, TypeGuard

import torch
from torch import Tensor

from sophq_func.core.errors import CheckpointError, explain
from sophq_func.core.files import replacing
from sophq_func.core.modes import is_plain

LONGEST_HEADER = 100_000_000
"""In bytes; the limit of safetensors itself."""

LONGEST_REASON = 4000
"""In characters: errors quote texts from a file, which may have any length."""

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SEAL, SEALS = "sha256", "tensors"

ORDER = "U64 I64 F64 C64 F32 U32 I32 BF16 F16 U16 I16 F8_E4M3 F8_E5M2 I8 U8 BOOL".split()
"""The order of dtypes in a file, that of safetensors: wide ones first, so that each tensor is aligned."""

CHANGED = "it was written to while it was read"

UNSEALED = "0" * 64
"""Placeholder in the header until the data have been hashed, as long as a SHA-256 in hexadecimal."""


class Entry(NamedTuple):
    """A header's entry for one tensor; ``begin`` and ``end`` are byte offsets from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """A checked header.

    Attributes:
      length: where the data start, in bytes from the start of the file.
      entries: of the tensors, by name.
      metadata: the text without the checksums.
      seals: the checksum of each tensor, by name.
    """

    length: int
    entries: dict[str, Entry]
    metadata: dict[str, str]
    seals: dict[str, object]


def refuse(path: Path, sentence: str, because: str, fix: str) -> NoReturn:
    """Raise :class:`CheckpointError` for a file that cannot be written or read; long reasons are truncated."""
    because = because if len(because) <= LONGEST_REASON else f"{because[:LONGEST_REASON]}..."
    raise CheckpointError(explain(str(path), sentence, because=because, fix=fix)) from None


def short(value: object) -> str:
    """An untrusted value from a file, escaped and truncated, for an error sentence."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file with checksums at ``path``; at every moment, and after a failure, it is the old or the whole new one."""
    try:
        names = _in_order(tensors)
        entries = _entries({name: tensors[name] for name in names})
        head = _head(entries, metadata, dict.fromkeys(names, UNSEALED))
        # Checked as a reader will check it, before anything is written.
        _read_header(head[: _length(head[:8], len(head))], len(head) + max((e.end for e in entries.values()), default=0))
    except ValueError as error:
        refuse(path, "the checkpoint cannot be written", str(error), "save plain, dense tensors by their names in the model")
    seals = {}
    with replacing(str(path), path) as file:
        file.write(head)
        for name in names:
            data = _bytes(tensors[name])
            seals[name] = _seal(entries[name].dtype, entries[name].shape, data)
            file.write(data)
        file.seek(0)
        file.write(_head(entries, metadata, seals))  # as long as the first one


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the text of a file that :func:`write` wrote.

    Raises:
      CheckpointError: the file is truncated or damaged, has no checksums, or breaks a rule of the format.
      OSError: there is no such file, or no permission.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for, and a device may never end
        because, fix = "it is a folder, a device, a pipe or a socket", "give the path of a file that sq.save wrote"
        refuse(path, "the checkpoint cannot be read", because, fix)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            head += file.read(_length(head, size) - 8)
            header = _read_header(head, size)
            places = sorted(header.entries.items(), key=lambda item: (item[1].begin, item[1].end))
            tensors = {name: _read_tensor(file, name, entry, header.seals[name]) for name, entry in places}
            now = os.fstat(file.fileno()).st_size, os.pread(file.fileno(), len(head), 0)
        if now != (size, head):
            raise ValueError(CHANGED)
        return tensors, header.metadata
    except (RecursionError, ValueError) as error:
        fix = "take another copy of the file, or save it again"
        refuse(path, "the checkpoint cannot be read", str(error), fix)


# Writing


def _in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors in the order of the file.

    Raises:
      ValueError: a file cannot hold a tensor or its name.
    """
    for name, tensor in tensors.items():
        problem = name_problem(name)
        if problem:
            raise ValueError(f"the name {short(name)} {problem}")
        if not is_plain([tensor]) or tensor.layout != torch.strided or tensor.dtype not in CODES:
            found = f"{type(tensor).__name__}, {tensor.dtype}, {tensor.layout}, {tensor.device}"
            raise ValueError(
                f"{short(name)} cannot be stored, only plain dense tensors of dtypes that safetensors has: {found}"
            )
    return sorted(tensors, key=lambda name: (ORDER.index(CODES[tensors[name].dtype]), name))


def _entries(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """The header's entry for each tensor; their data follow each other without gaps."""
    entries, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = Entry(CODES[tensor.dtype], tuple(tensor.shape), begin, end)
    return entries


def _head(entries: Mapping[str, Entry], metadata: Mapping[str, str], seals: Mapping[str, str]) -> bytes:
    """The first bytes of a file: the length of the header, and the header, filled with spaces up to a multiple of eight."""
    sealed = {**metadata, SEALS: json.dumps(seals, sort_keys=True)}
    header: dict[str, object] = {"__metadata__": {**sealed, SEAL: _seal_of_text(sealed)}}
    for name, (dtype, shape, begin, end) in entries.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def name_problem(name: str) -> str:
    """What is wrong with a tensor's name, to continue an error sentence; empty for a valid name.

    Names that look like paths are refused because other tools unpack such files into folders.
    """
    if any(not part for part in name.split(".")):
        return "has an empty part between its dots"
    if not name.isprintable():
        return "holds characters that cannot be printed"
    return "starts like a path" if name.startswith(("/", "\\")) or name.partition(".")[2].startswith(("/", "\\")) else ""


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, copied only if it is not contiguous on the CPU."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else memoryview(b"")


# Reading

ZIP = b"PK\x03\x04"
"""What a zip file begins with. Read as the length of a header, it and what follows in it are longer than any file."""


def _length(head: bytes, size: int) -> int:
    """Where the data start, from the first eight bytes."""
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > size - 8:
        if head.startswith(ZIP):
            raise ValueError("it is a zip file, as torch.save writes one, which torch.load reads")
        raise ValueError(f"it ends before its header does: {size} bytes, truncated or no safetensors file")
    if length > LONGEST_HEADER:
        raise ValueError(f"a header of {length} bytes is longer than the {LONGEST_HEADER} that the format allows")
    return 8 + length


def _read_header(head: bytes, size: int) -> Header:
    """The header, after everything is checked that can be checked without the data; also the checksum of the text."""
    header = parse(head[8:].decode("utf-8"), "the header")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("it has no text in its header, so that sq.save did not write it")
    if SEAL not in metadata or SEALS not in metadata:
        raise ValueError("it has no checksums, so that sq.save did not write it")
    if metadata.pop(SEAL) != _seal_of_text(metadata):
        raise ValueError("the text in its header is not what its checksum says: it was damaged")
    entries = {name: _entry(name, value) for name, value in header.items()}
    _check_places(entries, size - len(head))
    seals = parse(metadata.pop(SEALS), "the list of checksums")
    different = sorted(seals.keys() ^ entries.keys())
    if different:
        raise ValueError(f"its checksums and its tensors have different names: {short(different[0])}")
    return Header(len(head), entries, metadata, seals)


def parse(text: str, what: str) -> dict[str, object]:
    """A JSON object; repeated names, and numbers that JSON does not have, are errors."""
    value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no JSON object")
    return value


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The pairs as a dict, for :func:`json.loads`, which keeps the last of repeated names without a word."""
    values = dict(pairs)
    if len(values) != len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the name {short(name)} is there twice")
    return values


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _entry(name: str, value: object) -> Entry:
    """One tensor's entry in the header, checked: its shape and dtype take as many bytes as its offsets span."""
    problem = name_problem(name)
    if problem:
        raise ValueError(f"the tensor name {short(name)} {problem}")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {short(name)} is {short(value)}")
    dtype, shape, place = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{short(name)} has the unknown dtype {short(dtype)}")
    if not _are_sizes(shape) or len(shape) > 64 or math.prod(n for n in shape if n) >= 1 << 59:
        raise ValueError(f"{short(name)} has the shape {short(shape)}")
    if not _are_sizes(place) or len(place) != 2 or place[1] - place[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{short(name)}, {dtype} {short(tuple(shape))}, does not fit the bytes {short(place)}")
    return Entry(dtype, tuple(shape), *place)


def _are_sizes(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in values)


def _check_places(entries: Mapping[str, Entry], size: int) -> None:
    """Raise ValueError unless the tensors fill the data without gaps or overlaps."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise ValueError(f"the data of {short(name)} starts at byte {entry.begin}, and the one before ends at {end}")
        end = entry.end
    if end != size:
        raise ValueError(f"its tensors take {end} bytes, and it holds {size}: it was cut or added to")


def _read_tensor(file: BinaryIO, name: str, entry: Entry, seal: object) -> Tensor:
    """The tensor whose bytes are next in a file, after its checksum is checked."""
    size = entry.end - entry.begin
    raw = torch.empty(size, dtype=torch.uint8)
    data = raw.numpy().data
    if size and file.readinto(data) != size:  # type: ignore[attr-defined]
        raise ValueError(CHANGED)
    if seal != _seal(entry.dtype, entry.shape, data):
        raise ValueError(f"the tensor {short(name)} is not what its checksum says: it was damaged")
    if entry.dtype == "BOOL" and size and int(raw.max()) > 1:
        raise ValueError(f"the boolean tensor {short(name)} holds bytes other than 0 and 1")
    return raw.view(DTYPES[entry.dtype]).reshape(entry.shape)


def _seal(dtype: str, shape: tuple[int, ...], data: memoryview) -> str:
    digest = hashlib.sha256(f"{dtype} {list(shape)}\n".encode())
    digest.update(data)
    return digest.hexdigest()


def _seal_of_text(metadata: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode()).hexdigest()
