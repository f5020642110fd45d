"""Names of quantizers in a chip's tables: ``<tensor>_<op type>`` of the ONNX node that computes the tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from sophq_func.config.names import value_quantizer
from sophq_func.config.patterns import PATTERNS
from sophq_func.config.site import Site
from sophq_func.core.errors import ConfigError, explain, near, quoted, raise_all
from sophq_func.core.operations import canonical, family
from sophq_func.numerics.granularity import PerChannel
from sophq_func.planning.plan import Plan

OP_TYPES: Mapping[str, str] = {
    "abs": "Abs",
    "adaptive_avg_pool2d": "GlobalAveragePool",
    "add": "Add",
    "avg_pool1d": "AveragePool",
    "avg_pool2d": "AveragePool",
    "batch_norm": "BatchNormalization",
    "bmm": "MatMul",
    "cat": "Concat",
    "celu": "Celu",
    "clamp": "Clip",
    "conv1d": "Conv",
    "conv2d": "Conv",
    "conv3d": "Conv",
    "conv_transpose1d": "ConvTranspose",
    "conv_transpose2d": "ConvTranspose",
    "conv_transpose3d": "ConvTranspose",
    "div": "Div",
    "elu": "Elu",
    "embedding": "Gather",
    "exp": "Exp",
    "flatten": "Flatten",
    "gelu": "Gelu",
    "hardsigmoid": "HardSigmoid",
    "hardswish": "HardSwish",
    "interpolate": "Resize",
    "layer_norm": "LayerNormalization",
    "leaky_relu": "LeakyRelu",
    "linear": "Gemm",
    "matmul": "MatMul",
    "max_pool1d": "MaxPool",
    "max_pool2d": "MaxPool",
    "mean": "ReduceMean",
    "mish": "Mish",
    "mul": "Mul",
    "pad": "Pad",
    "permute": "Transpose",
    "prelu": "PRelu",
    "relu": "Relu",
    "relu6": "Clip",
    "reshape": "Reshape",
    "selu": "Selu",
    "sigmoid": "Sigmoid",
    "softmax": "Softmax",
    "softplus": "Softplus",
    "sub": "Sub",
    "sum": "ReduceSum",
    "t": "Transpose",
    "tanh": "Tanh",
    "transpose": "Transpose",
    "view": "Reshape",
}
"""The op type of the ONNX node for an operation, by the operation's canonical name."""


class FileNames(NamedTuple):
    """Names in an ONNX file, by call of the traced model.

    Attributes:
      values: of the result of each call, ``<tensor>_<op type>``; of each input of the model, its name.
      layers: of each call two names, ``<tensor>_<op type>``: that of the node with the layer's weight, and that of a ReLU
        which is the first to take its result; without a ReLU both are the same.
      tensors: of the result of each call, and of each input of the model, the tensor.
      products: of each call, the result of the node with the layer's weight.
    """

    values: Mapping[str, str]
    layers: Mapping[str, tuple[str, str]]
    tensors: Mapping[str, str]
    products: Mapping[str, str]


def check_unicode(where: str, names: Iterable[str]) -> None:
    """Refuse names that no file can hold: halves of a surrogate pair.

    Raises:
      ConfigError: with all of them.
    """
    wrong = [name for name in dict.fromkeys(names) if any("\ud800" <= sign <= "\udfff" for sign in name)]
    because, fix = "it is no Unicode", "rename the module"
    raise_all([explain(where, f"a file cannot hold the name {name!r}", because=because, fix=fix) for name in wrong])


def ops(plan: Plan, names: Mapping[str, str], file: FileNames | None = None) -> dict[str, str]:
    """The name of each quantizer in the tables, by quantizer.

    Args:
      plan: of the quantizers.
      names: names that the user gives; see :func:`sophq_func.export.tables`.
      file: names of the ONNX file; without one, tensors are named as in the plan.

    Raises:
      ConfigError: a name for a quantizer that is not in the plan; a quantizer whose op type is not known.
    """
    unknown = [name for name in names if name not in plan]
    sentence, listed = "it is not in the plan", "list(q.plan) has the names"
    raise_all([explain(f"tables: names[{quoted(name)}]", sentence, fix=near(name, plan) or listed) for name in unknown])
    named, problems = {}, []
    for name in plan:
        name_of = _weight_op if plan.site(name).role == "weight" else _op
        op = names.get(name) or name_of(plan, name, file)
        if not op:
            does = plan.site(name).operation or plan.site(name).pattern or "its call"
            if file is None:
                because = f"no op type of ONNX is known for {does!r}"
            else:
                because = "no tensor of the ONNX file is its value"
            problems.append(
                explain(
                    name,
                    "the tables have no name for this quantizer",
                    because=because,
                    fix=f'names={{{name!r}: "<tensor>_<op type>"}}',
                )
            )
        named[name] = op
    raise_all(problems, ConfigError)
    return named


def _op(plan: Plan, name: str, file: FileNames | None) -> str:
    """The name of an activation's quantizer: that of the result of its call, or of the last call of its group."""
    site = plan.site(name)
    if site.argument:
        return site.value if file is None else file.values[site.value]
    if site.operand >= 0:  # it quantizes an operand, which is the result of the call before
        source = next((edge.source for edge in plan.edges if name in edge.through), "")
        return call_op(plan, source, file)
    tensor = site.members[-1] if site.members else site.value
    return _joined(tensor, last_operation(site), file)


def call_op(plan: Plan, name: str, file: FileNames | None) -> str:
    """The name of the result of a call of the traced model; empty where the op type is not known."""
    call = next((call for call in plan.calls if call.name == name), None)
    if call is None:
        return ""
    if not call.does:
        return name if file is None else file.values.get(name, "")
    quantizers = (*call.weights, value_quantizer(name))
    members = next((plan.site(quantizer).members for quantizer in quantizers if quantizer in plan), ())
    return _joined(members[-1] if members else name, operation(call.does), file)


def _weight_op(plan: Plan, name: str, file: FileNames | None) -> str:
    """The name of a weight's quantizer: that of its layer's result; per channel, that of a ReLU right behind it.

    So sophgo-mq names them, and so the compilers look them up.
    """
    site = plan.site(name)
    layer = site.members[0] if site.members else site.path
    call = next((call.name for call in plan.calls if name in call.weights), layer)
    tensor = site.members[0] if site.members else call
    per_channel = isinstance(plan[name].scheme.granularity, PerChannel)
    if file is not None:
        return file.layers.get(tensor, ("", ""))[per_channel]
    if per_channel:
        if site.members and last_operation(site) == "relu":
            return _joined(site.members[-1], "relu", file)
        takers = [edge.target for edge in plan.edges if edge.source == call]
        if not site.members and takers and _does(plan, takers[0]) == "relu":
            return _joined(takers[0], "relu", file)
    return _joined(tensor, site.operation, file)


def _does(plan: Plan, call: str) -> str:
    """The operation of a call of the traced model."""
    word = next((planned.does for planned in plan.calls if planned.name == call), "")
    return operation(word)


def operation(word: str) -> str:
    """The canonical name of the operation that computes a call's result.

    Args:
      word: what is called: a class of torch.nn, a function, or a pattern, whose last operation counts.

    Example:
      >>> operation("ReLU"), operation("relu"), operation("ConvBnReLU2d")
      ('relu', 'relu', 'relu')
    """
    if word in PATTERNS:
        part = PATTERNS.get(word).parts[-1]
    else:
        part = getattr(nn, word, word)
    return family(part) if isinstance(part, type) else canonical(part)


def last_operation(site: Site) -> str:
    """The operation that computes the tensor of a site: that of its only call, or of the last call of its group."""
    return operation(site.pattern) if site.pattern else site.operation


def _joined(tensor: str, does: str, file: FileNames | None) -> str:
    """The file's name for a tensor; without a file ``<tensor>_<op type>``. Empty where there is none."""
    if file is not None:
        return file.values.get(tensor, "")
    op_type = OP_TYPES.get(does, "")
    return f"{tensor}_{op_type}" if op_type else ""
