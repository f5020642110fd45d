"""Rewrite the graph that torch.onnx makes into the patterns that runtimes fuse into integer kernels.

* A weight that is transposed behind its DequantizeLinear is stored transposed instead.
* An embedding looks up codes instead of real numbers, so that only the rows of a batch are dequantized.
* A linear layer of a MatMul and an Add becomes a Gemm with an int32 bias.
* A layer whose weight has no grid is kept apart from the grid of its input, so that its weight is not rounded.
* Codes of up to four bits become INT4 or UINT4.
* The mean over an image becomes GlobalAveragePool.
* A guard of a softmax against NaN is removed where the mask before it is finite.
* Tensors get the names of parameters and quantizers; metadata about the machine and the code that made the file go.
* Marker nodes, which carry the name of a tensor, are removed, and the tensor gets the name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from sophq_func.codes import LIMIT
from sophq_func.core.errors import ConfigError, explain

NARROW = {np.dtype(np.int8): ml_dtypes.int4, np.dtype(np.uint8): ml_dtypes.uint4}
"""The 4-bit dtype for codes that are held in bytes."""

BYTES = (ir.DataType.INT8, ir.DataType.UINT8)
FLOAT8 = {ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2}

MARK = "Named"
"""Op type of marker nodes."""

MOVES = frozenset(("Flatten", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"))
"""Op types whose results are values of their input, so that they are on its grid."""

INVALID = onnx.checker.ValidationError, onnx.shape_inference.InferenceError
"""What ``onnx.checker`` raises."""

BIASED = frozenset(("Conv", "ConvTranspose", "Gemm"))
"""Op types whose third input is a bias."""

LARGEST = 2**31 - 1
"""Bytes in a protobuf message at most."""


def finished(
    model: ir.Model,
    names: Mapping[str, str],
    narrow: frozenset[str],
    inputs: Sequence[str],
    outputs: Sequence[str],
    sizes: Mapping[str, str] = MappingProxyType({}),
) -> tuple[onnx.ModelProto, dict[str, ir.Value]]:
    """The checked file, and its marked tensors by name.

    Args:
      model: from torch.onnx; it is changed.
      names: new names of initializers, by present name.
      narrow: present names of the initializers that are 4-bit codes.
      inputs, outputs: new names of the model's inputs and outputs.
      sizes: new names of dynamic sizes, by present symbol.

    Raises:
      ConfigError: the model is too large for one file.
    """
    graph = model.graph
    # Rewrites come first: they match the pattern of torch.onnx, and leave DequantizeLinear where codes are narrowed.
    for node in list(graph):
        rewrite = REWRITES.get(node.op_type)
        if rewrite is not None:
            rewrite(graph, node)
    marked = _unmarked(graph)
    for node in list(graph):
        if node.op_type in BIASED and _would_be_rounded(node):
            _kept_real(graph, node)
        elif node.op_type in BIASED and len(node.inputs) > 2 and _is_beyond_int32(node):
            _added_behind(graph, node)
        if node.op_type in MOVES:
            _still_codes(graph, node)
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is not None and _base(codes.name) in narrow:
            _narrowed(graph, node)
    RemoveUnusedNodesPass()(model)
    _named(graph, names, inputs, outputs)
    NameFixPass()(model)
    _sized(graph, sizes)
    _anonymous(model)
    size = sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)
    if size > LARGEST:
        raise ConfigError(
            explain("export.onnx", "the model is too large for one file", got=size, allowed=f"up to {LARGEST} bytes")
        )
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto, {name: value for name, value in marked.items() if _is_in_file(value)}


def _is_in_file(value: ir.Value) -> bool:
    """Whether a tensor was not removed as unused."""
    return value.producer() is None or bool(value.uses()) or value.is_graph_output()


def _unmarked(graph: ir.Graph) -> dict[str, ir.Value]:
    """Remove marker nodes, and return the marked tensors by name; a tensor with several marks gets the first name."""
    marked: dict[str, ir.Value] = {}
    for node in [node for node in graph if node.op_type == MARK]:
        value, name = node.inputs[0], node.attributes["name"].as_string()
        assert value is not None
        if value not in marked.values() and value.producer() is not None:
            value.name = name
            product = product_of(value)
            if product is not value:
                product.name = f"{name}.matmul"
        marked[name] = value
        ir.convenience.replace_all_uses_with(node.outputs[0], value, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    return marked


def product_of(value: ir.Value) -> ir.Value:
    """The MatMul's result in ``Add(MatMul, bias)``, a linear layer with more than two axes; else the value itself."""
    node = value.producer()
    if node is None or node.op_type != "Add":
        return value
    terms = [term for term in node.inputs if term is not None]
    has_bias = any(term.const_value is not None for term in terms)
    makers = {term: term.producer() for term in terms}
    products = [term for term, maker in makers.items() if maker is not None and maker.op_type == "MatMul"]
    return products[0] if has_bias and products else value


def _base(name: str | None) -> str:
    """The name of the initializer that a transposed one comes from."""
    return (name or "").removesuffix("_transposed")


def _transposed(graph: ir.Graph, node: ir.Node) -> None:
    """Rewrite ``Transpose(DequantizeLinear(w))`` as ``DequantizeLinear(transposed w)``."""
    source = _dequantized(node.inputs[0])
    if source is None or "perm" not in node.attributes:
        return
    perm = list(node.attributes["perm"].as_ints())
    codes, scale, zero = (_array(value) for value in source.inputs)
    arrays = [codes.transpose(perm), scale, zero]
    if scale.ndim > 1:  # one scale for each block of a row
        arrays[1:] = [scale.transpose(perm), zero.transpose(perm)]
    stored = [
        _initializer(graph, f"{value.name}_transposed", array) for value, array in zip(source.inputs, arrays, strict=True)
    ]
    attributes = {name: attribute.value for name, attribute in source.attributes.items()}
    if "axis" in attributes:
        attributes["axis"] = perm.index(attributes["axis"] % len(perm))
    _replace(graph, node, [ir.node("DequantizeLinear", stored, attributes)])


def _looked_up(graph: ir.Graph, node: ir.Node) -> None:
    """Rewrite ``Gather(DequantizeLinear(w), rows)`` as ``DequantizeLinear(Gather(w, rows))``.

    Scales of one tensor, or of the columns, stay as they are. Scales of rows, or of blocks of a row, are looked up like the
    codes; looked-up rows have their scales as blocks along the last axis.
    """
    source = _dequantized(node.inputs[0])
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    rows = node.inputs[1]
    if source is None or axis != 0 or rows is None or rows.shape is None:
        return
    codes, scale, zero = source.inputs
    gathered = ir.node("Gather", [codes, rows], {"axis": 0})
    has_one_scale = "axis" not in source.attributes
    if has_one_scale:
        _replace(graph, node, [gathered, ir.node("DequantizeLinear", [gathered.outputs[0], scale, zero])])
        return
    if len(_array(codes).shape) != 2:
        return
    width, last = _array(codes).shape[-1], len(rows.shape)
    has_scales_of_columns = source.attributes["axis"].as_int() == 1 and "block_size" not in source.attributes
    if has_scales_of_columns:
        _replace(graph, node, [gathered, ir.node("DequantizeLinear", [gathered.outputs[0], scale, zero], {"axis": last})])
        return
    shape = _array(scale).shape
    blocks = shape[1] if len(shape) > 1 else 1
    tables = [_initializer(graph, f"{value.name}_rows", _array(value).reshape(shape[0], -1)) for value in (scale, zero)]
    parts = [ir.node("Gather", [table, rows], {"axis": 0}) for table in tables]
    inputs = [gathered.outputs[0], *(part.outputs[0] for part in parts)]
    dequantize = ir.node("DequantizeLinear", inputs, {"axis": last, "block_size": width // blocks})
    _replace(graph, node, [gathered, *parts, dequantize])


def _linear(graph: ir.Graph, node: ir.Node) -> None:
    """Rewrite ``Add(MatMul(x, w), b)`` with stored ``w`` and ``b`` as ``Gemm``, whose kernels add an int32 bias.

    A Gemm takes matrices, so that ``x`` is reshaped to rows before it, and the result back behind it.
    """
    for product, bias in (node.inputs, node.inputs[::-1]):
        matmul, stored = None if product is None else product.producer(), _dequantized(bias)
        if matmul is None or stored is None or matmul.op_type != "MatMul" or len(product.uses()) != 1:
            continue
        x, weight = matmul.inputs
        shape = None if x is None else x.shape
        if _dequantized(weight) is None or len(weight.shape) != 2 or shape is None:
            continue
        if len(bias.shape) != 1:
            continue
        width = weight.shape[1]
        flat = ir.node("Reshape", [x, _initializer(graph, f"rows_of_{weight.shape[0]}", np.array([-1, weight.shape[0]]))])
        gemm = ir.node("Gemm", [flat.outputs[0], weight, bias])
        shaping, back = _shape_of_rows(graph, x, width)
        _replace(graph, node, [flat, gemm, *shaping, ir.node("Reshape", [gemm.outputs[0], back])])
        return


def _shape_of_rows(graph: ir.Graph, x: ir.Value, width: int) -> tuple[list[ir.Node], ir.Value]:
    """The shape of ``x`` with a last axis of ``width``, and the nodes that compute it if more than one size is unknown.

    It is computed from the codes of ``x``, if ``x`` has codes, because runtimes fuse a DequantizeLinear only if nothing
    else reads its result.
    """
    lead = [dim if isinstance(dim, int) else -1 for dim in (x.shape or ())[:-1]]
    if lead.count(-1) <= 1:
        back = np.array([*lead, width])
        return [], _initializer(graph, "shape_" + "_".join(map(str, back)), back)  # Reshape fills in a single -1
    source = x.producer()
    measured = x if source is None or source.op_type != "DequantizeLinear" else source.inputs[0]
    sizes = ir.node("Shape", [measured], {"start": 0, "end": -1})
    joined = ir.node("Concat", [sizes.outputs[0], _initializer(graph, f"width_{width}", np.array([width]))], {"axis": 0})
    return [sizes, joined], joined.outputs[0]


def _pooled(graph: ir.Graph, node: ir.Node) -> None:
    """Rewrite ``ReduceMean`` over both axes of images as ``GlobalAveragePool``."""
    x, axes = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    keeps = "keepdims" not in node.attributes or node.attributes["keepdims"].as_int() == 1
    if x is None or x.shape is None or len(x.shape) != 4 or axes is None or axes.const_value is None or not keeps:
        return
    if sorted(int(axis) % 4 for axis in axes.const_value.numpy()) == [2, 3]:
        _replace(graph, node, [ir.node("GlobalAveragePool", [x])])


def _rectified(graph: ir.Graph, node: ir.Node) -> None:
    """Rewrite ``Relu`` before a grid in a form that runtimes fuse correctly.

    Before a uint8 grid with a zero point above 0 it becomes ``max(code, zero_point)`` behind the grid. Before an FP8 grid
    it becomes ``Max(x, 0)``, because ONNX Runtime 1.32 takes FP8 for unsigned and drops a ``Relu`` there.
    """
    users = [user for user, _ in node.outputs[0].uses()]
    if not users or any(user.op_type != "QuantizeLinear" or user.inputs[2] is None for user in users):
        return
    x, kinds = node.inputs[0], {user.inputs[2].dtype for user in users}
    if kinds <= FLOAT8:
        _replace(graph, node, [ir.node("Max", [x, _initializer(graph, "zero", np.zeros((), np.float32))])])
    elif kinds == {ir.DataType.UINT8} and all(_array(user.inputs[2]).shape == () for user in users):
        if not all(_array(user.inputs[2]) for user in users):
            return
        for user in users:
            codes, zero = user.outputs[0], user.inputs[2]
            clipped = ir.node("Clip", [codes, zero])
            clipped.outputs[0].shape, clipped.outputs[0].type = codes.shape, codes.type
            for consumer, index in list(codes.uses()):
                consumer.replace_input_with(index, clipped.outputs[0])
            clipped.replace_input_with(0, codes)
            graph.insert_after(user, [clipped])
            user.replace_input_with(0, x)
        graph.remove(node, safe=True)


def _would_be_rounded(node: ir.Node) -> bool:
    """Whether ONNX Runtime would round a layer's weight, which has no grid, to int8, because the layer's input has one."""
    if _dequantized(node.inputs[1]) is not None:
        return False
    x = node.inputs[0]
    source = None if x is None else x.producer()
    while source is not None and source.op_type in MOVES:  # the runtime repeats a grid behind these
        x = source.inputs[0]
        source = None if x is None else x.producer()
    return source is not None and source.op_type == "DequantizeLinear"


def _kept_real(graph: ir.Graph, node: ir.Node) -> None:
    """Put a ``Sum`` of one term, which is that term, between a layer and its input.

    ONNX Runtime 1.32 makes an integer kernel of each layer right behind a grid, and rounds a real weight to int8 and a real
    bias to int32 for it. It removes an ``Identity``; a ``Sum`` it leaves alone.
    """
    x = node.inputs[0]
    assert x is not None
    same = ir.node("Sum", [x])
    same.outputs[0].shape, same.outputs[0].type = x.shape, x.type
    graph.insert_before(node, [same])
    node.replace_input_with(0, same.outputs[0])


def _is_beyond_int32(node: ir.Node) -> bool:
    """Whether a layer on two grids has a real bias that is too large for int32 at the step of its integer sums."""
    x, weight, bias = node.inputs
    given, stored = None if x is None else x.producer(), _dequantized(weight)
    if stored is None or given is None or given.op_type != "DequantizeLinear" or bias is None or bias.const_value is None:
        return False
    scale = given.inputs[1]
    if scale is None or scale.const_value is None:
        return False
    values, step = np.abs(_array(bias).astype(np.float64)), _array(stored.inputs[1])
    # one scale for each output channel, or scales along other axes, of which the smallest is taken
    steps = (step if step.shape in ((), values.shape) else step.min()) * _array(scale).astype(np.float64).min()
    return bool((values / steps > LIMIT).any())


def _added_behind(graph: ir.Graph, node: ir.Node) -> None:
    """Rewrite a layer with a bias as the layer without it, less the negative bias.

    ONNX Runtime 1.32 turns a real bias into int32 where it makes an integer kernel of the layer, and one that does not fit
    becomes 0. An ``Add`` it makes a bias again; a ``Sub`` it leaves alone.
    """
    bias = node.inputs[2]
    assert bias is not None
    values = _array(bias)
    # the channels are axis 1 of an image, and the last axis of a Gemm's result
    trailing = 0 if node.op_type == "Gemm" else len(_shape_of(node.inputs[1])) - 2
    shaped = _initializer(graph, f"{bias.name}_negative", -values.reshape(-1, *(1,) * trailing))
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    layer = ir.node(node.op_type, list(node.inputs[:2]), attributes)
    layer.outputs[0].shape, layer.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    _replace(graph, node, [layer, ir.node("Sub", [layer.outputs[0], shaped])])


def _shape_of(value: ir.Value | None) -> ir.Shape:
    assert value is not None and value.shape is not None
    return value.shape


def _unguarded(graph: ir.Graph, node: ir.Node) -> None:
    """Rewrite ``Where(IsNaN(s), 0, s)`` as ``s`` in torch's own attention, if the mask before the Softmax ``s`` is finite.

    torch.onnx adds this guard against rows of minus infinity in boolean masks, but writes the smallest float for minus
    infinity, so that no row is NaN.
    """
    test, _, guarded = (None if value is None else value.producer() for value in node.inputs)
    if not _comes_from(node, "aten.scaled_dot_product_attention") or test is None or guarded is None:
        return
    masked = guarded.inputs[0].producer() if guarded.op_type == "Softmax" and guarded.inputs[0] is not None else None
    if test.op_type != "IsNaN" or test.inputs[0] is not guarded.outputs[0] or masked is None or masked.op_type != "Add":
        return
    masks = [term.producer() for term in masked.inputs if term is not None]
    if any(mask is not None and mask.op_type == "Where" and _is_finite(mask.inputs[1:]) for mask in masks):
        ir.convenience.replace_all_uses_with(node.outputs[0], guarded.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _comes_from(node: ir.Node, function: str) -> bool:
    """Whether torch.onnx made a node from this function of torch."""
    return function in node.metadata_props.get("pkg.torch.onnx.fx_node", "")


def _is_finite(values: Sequence[ir.Value | None]) -> bool:
    """Whether all values are stored finite numbers."""
    return all(v is not None and v.const_value is not None and np.isfinite(v.const_value.numpy()).all() for v in values)


REWRITES = {
    "Add": _linear,
    "Transpose": _transposed,
    "Gather": _looked_up,
    "ReduceMean": _pooled,
    "Relu": _rectified,
    "Where": _unguarded,
}
"""By op type of the node that a pattern ends with."""


def _still_codes(graph: ir.Graph, node: ir.Node) -> None:
    """Repeat a grid behind an operation that only moves data, because runtimes match a grid right before a kernel."""
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    moved = node.outputs[0]
    if source is None or source.op_type != "DequantizeLinear" or "axis" in source.attributes or moved.is_graph_output():
        return
    _, scale, zero = source.inputs
    if zero is None or zero.dtype not in BYTES or all(user.op_type == "QuantizeLinear" for user, _ in moved.uses()):
        return
    uses = list(moved.uses())
    quantize = ir.node("QuantizeLinear", [moved, scale, zero])
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero])
    dequantize.outputs[0].shape, dequantize.outputs[0].type = moved.shape, moved.type
    graph.insert_after(node, [quantize, dequantize])
    for user, index in uses:
        # The shape of the codes is the same: the result of a DequantizeLinear should have no second user.
        replacement = quantize if user.op_type == "Shape" else dequantize
        user.replace_input_with(index, replacement.outputs[0])


def _dequantized(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear of stored codes that computes a value; ``None`` if another node does."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear" or any(v is None or v.const_value is None for v in node.inputs):
        return None
    return node


def _array(value: ir.Value | None) -> Any:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


def _initializer(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    """The initializer of this name; made from ``array`` if there is none."""
    if name not in graph.initializers:
        tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
        graph.register_initializer(
            ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        )
    return graph.initializers[name]


def _replace(graph: ir.Graph, node: ir.Node, new: Sequence[ir.Node]) -> None:
    """Put ``new`` nodes in the place of a node; the result of the last one replaces its result."""
    old, result = node.outputs[0], new[-1].outputs[0]
    result.shape, result.type = old.shape, old.type
    graph.insert_before(node, list(new))
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _narrowed(graph: ir.Graph, node: ir.Node) -> None:
    """Store the codes and zero points of a DequantizeLinear in four bits each."""
    for index in (0, 2):
        value = node.inputs[index]
        array = _array(value)
        kind = NARROW[array.dtype]
        node.replace_input_with(index, _initializer(graph, f"{value.name}_4bit", array.astype(kind)))


def _named(graph: ir.Graph, names: Mapping[str, str], inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Rename initializers, results of quantizers, inputs and outputs after the model."""
    for value in list(graph.initializers.values()):
        stem, _, suffix = str(value.name).partition("_")
        if stem in names:
            value.name = names[stem] if names[stem] not in graph.initializers else f"{names[stem]}_{suffix}"
    for node in graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.inputs[1] is not None:
            stem = str(node.inputs[1].name).removesuffix("_scale")
            node.outputs[0].name = f"{stem}_{node.op_type.replace('Linear', 'd').lower()}"
    for values, new_names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        if len(values) == len(new_names):
            for value, name in zip(values, new_names, strict=True):
                value.name = name


def _sized(graph: ir.Graph, names: Mapping[str, str]) -> None:
    """Rename the dynamic sizes in the shapes of all tensors, also inside expressions."""

    def renamed(dim: int | ir.SymbolicDim) -> int | str | None:
        size = dim if isinstance(dim, int) else dim.value
        if not isinstance(size, str):
            return size
        return re.sub(r"\w+", lambda symbol: names.get(symbol[0], symbol[0]), size)

    for value in _values(graph):
        if value.shape is not None:
            value.shape = ir.Shape([renamed(dim) for dim in value.shape])


def _anonymous(model: ir.Model) -> None:
    """Remove what only tells how the file was made, such as stack traces with paths."""
    for value in _values(model.graph):
        value.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    model.graph.metadata_props.clear()
    model.graph.name, model.graph.doc_string = "model", None
    model.metadata_props.clear()


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
