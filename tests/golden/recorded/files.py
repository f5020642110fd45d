"""What leaves the library as a file or text, in a form that can be compared: ONNX, tables, integers, the command line."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import re
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import sophq_func as sq
from tests.golden.recorded.cases import Made, Subject, by, digest, fixed_range, images, prepared, weights
from tests.golden.recorded.models import fill, fill_exact, integers

EXAMPLES = Path(__file__).parents[3] / "examples"
WRITERS = ("torch", "onnx", "onnxscript")
"""Packages that decide how a graph is written down in ONNX."""


def versions() -> dict[str, str]:
    """Of the packages in :data:`WRITERS`, without what says how torch was built."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in WRITERS}


def example(name: str) -> ModuleType:
    """A module of the folder ``examples``, which is no package."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digits() -> Made:
    """The network of the examples. Every step is a power of two, so that each number in its file is exact."""
    model = fill_exact(example("digits").Digits(), 40)
    config = sq.QuantConfig(chip="BM1690", weight=weights(), activation=fixed_range())
    return prepared(Subject(model, by(config), [images(41, 2, 1, 8, 8)]))


class Encoder(nn.Module):
    """A small BERT with one tensor as the result."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config = transformers.BertConfig(**shape, vocab_size=30, max_position_embeddings=16)
        self.bert = transformers.BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def bert() -> Made:
    """Steps of weights are those of their extremes, those of activations are given: no number depends on a sum."""
    model = fill(Encoder(), 42)
    activation = fixed_range(symmetric=False, fake_quantize=sq.fake_quantize.fixed())
    config = sq.QuantConfig(
        strategy="Layers", weight_layers=(nn.Embedding,), weight=sq.override(bits=8), activation=activation
    )
    tokens = integers(43, 0, 29, 2, 6).long()
    return prepared(Subject(model, by(config), [(tokens, torch.ones_like(tokens))]))


NETWORKS = {"bert": bert, "digits": digits}


# ONNX


def onnx_lines(made: Made, folder: Path) -> list[str]:
    """The graph of the ONNX file, one line for each input, node and output; constants by their type, shape and digest.

    Names of nodes and of values between them, texts for people, and the order of what is stored play no part.
    """
    import onnx

    path = folder / "network.onnx"
    sq.export.onnx(made.q, made.params, made.qparams, made.batch, path)
    proto = onnx.load(path)
    assert not proto.functions
    names = {"": "-"} | {entry.name: constant(entry) for entry in proto.graph.initializer}
    lines = [f"opset {entry.domain or 'onnx'} {entry.version}" for entry in proto.opset_import]
    lines += [f"meta {entry.key} {entry.value}" for entry in sorted(proto.metadata_props, key=lambda entry: entry.key)]
    for value in proto.graph.input:
        names[value.name] = value.name
        lines.append(f"input {value.name} {typed(value)}")
    for node in proto.graph.node:
        for output in node.output:
            names.setdefault(output, f"%{len(names)}")
        outputs, inputs = (", ".join(names[name] for name in group) for group in (node.output, node.input))
        options = "".join(f" {entry.name}={attribute(entry)}" for entry in sorted(node.attribute, key=lambda a: a.name))
        lines.append(f"{outputs} = {node.domain}{node.op_type}({inputs}){options}")
    return lines + [f"output {value.name} {names[value.name]} {typed(value)}" for value in proto.graph.output]


def constant(entry: Any) -> str:
    """An ONNX tensor by what it holds."""
    import onnx

    kind = onnx.TensorProto.DataType.Name(entry.data_type).lower()
    array = onnx.numpy_helper.to_array(entry)
    return f"{kind}{list(entry.dims)}:{hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


def typed(value: Any) -> str:
    """Element type and sizes of an input or output."""
    kind = value.type.tensor_type
    return f"{kind.elem_type} {[dim.dim_param or dim.dim_value for dim in kind.shape.dim]}"


def attribute(entry: Any) -> str:
    """The value of a node's attribute."""
    import onnx

    found = onnx.helper.get_attribute_value(entry)
    return constant(found) if isinstance(found, onnx.TensorProto) else str(found)


def quantizers(lines: list[str]) -> list[str]:
    """The nodes that quantize or dequantize, with their constants: what remains when another writer orders a graph anew."""
    found = [re.sub(r"%\d+", "%", line.partition(" = ")[2]) for line in lines if "uantizeLinear(" in line]
    return sorted(found)


# Integers, tables, the command line

MADE_BY = ("digest", "torch", "version")
"""Entries of an artifact's metadata that name what wrote it."""


def artifact(made: Made) -> dict[str, Any]:
    """The integers of a model: digests of the tensors, and the metadata."""
    found = sq.convert(made.q, made.params, made.qparams)
    told = {key: value for key, value in found.metadata.items() if key not in MADE_BY}
    return {"metadata": told, "tensors": {name: digest(tensor) for name, tensor in found.tensors.items()}}


def tables(made: Made, folder: Path) -> dict[str, str]:
    """The texts for a chip's compiler, by file name."""
    written = sq.export.tables(made.q, made.params, made.qparams, folder, name="network", compiler="sophgo-mq")
    return {path.name: path.read_text(encoding="utf-8") for path in written if path is not None}


def inspected(path: Path, *options: str) -> str:
    """What ``python -m sophq_func inspect`` says of a checkpoint, without digests and the versions that wrote it."""
    said, before = io.StringIO(), sys.argv
    sys.argv = ["sophq_func", "inspect", str(path), *options]
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_module("sophq_func", run_name="__main__")
    except SystemExit as end:
        assert not end.code
    finally:
        sys.argv = before
    lines = [line for line in said.getvalue().splitlines() if not re.match(r"(digest|library|torch|version): ", line)]
    return re.sub(r"digest \w+", "digest", "\n".join(lines))


def inspections(path: Path, plan: Mapping[str, Any]) -> dict[str, str]:
    """The three ways to look at a checkpoint."""
    first = next(iter(plan))
    return {"all": inspected(path), "tree": inspected(path, "--tree"), "one": inspected(path, "--name", first)}
