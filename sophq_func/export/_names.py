"""What a chip's compiler calls the places of quantizers: ``<tensor>_<op type>`` of the ONNX node that makes a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from sophq_func.config.names import value_quantizer
from sophq_func.config.patterns import PATTERNS
from sophq_func.config.site import Site
from sophq_func.core.errors import ConfigError, explain, near, raise_all
from sophq_func.core.operations import canonical, family
from sophq_func.numerics.scheme import PerChannel
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
"""Op type of the ONNX node that does an operation, by the operation's canonical name."""


class FileNames(NamedTuple):
    """What is called how in an ONNX file, by call of the traced model.

    Attributes:
      values: ``<tensor>_<op type>``, of inputs the name alone.
      layers: the same of the node that takes a layer's weight; and of the ReLU that is the first behind it, if there is one.
    """

    values: Mapping[str, str]
    layers: Mapping[str, tuple[str, str]]


def ops(plan: Plan, names: Mapping[str, str], file: FileNames | None = None) -> dict[str, str]:
    """For each quantizer what the tables call its place; see :func:`sophq_func.export.tables` for ``names``.

    Without a file, tensors are called as the plan calls values.

    Raises:
      ConfigError: a name for a quantizer that is not in the plan; a quantizer whose op type is not known.
    """
    unknown = [name for name in names if name not in plan]
    raise_all([f"tables: names has {name!r}, which is not in the plan; {near(name, plan)}." for name in unknown])
    found, problems = {}, []
    for name in plan:
        find = _weight_op if plan.site(name).role == "weight" else _op
        op = names.get(name) or find(plan, name, file)
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
        found[name] = op
    raise_all(problems, ConfigError)
    return found


def _op(plan: Plan, name: str, file: FileNames | None) -> str:
    """Of a value: the tensor behind the last call of its group, and that call's op type; of an input, its name.

    A quantizer before a call is named after the call that makes what it takes.
    """
    site = plan.site(name)
    if site.argument:
        return site.value if file is None else file.values[site.value]
    if site.operand >= 0:
        source = next((edge.source for edge in plan.edges if name in edge.through), "")
        return call_op(plan, source, file)
    tensor = site.members[-1] if site.members else site.value
    return _joined(tensor, last_operation(site), file)


def call_op(plan: Plan, name: str, file: FileNames | None) -> str:
    """The same for a call of the traced model; empty where the op type is not known."""
    call = next((call for call in plan.calls if call.name == name), None)
    if call is None:
        return ""
    if not call.does:
        return name if file is None else file.values.get(name, "")
    quantizers = (*call.weights, value_quantizer(name))
    members = next((plan.site(own).members for own in quantizers if own in plan), ())
    return _joined(members[-1] if members else name, operation(call.does), file)


def _weight_op(plan: Plan, name: str, file: FileNames | None) -> str:
    """Of a weight: its layer's tensor; per channel, that of a ReLU which is the first to take it."""
    site = plan.site(name)
    call = next((call.name for call in plan.calls if name in call.weights), site.members[0] if site.members else site.path)
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
    word = next((own.does for own in plan.calls if own.name == call), "")
    return operation(word)


def operation(word: str) -> str:
    """The operation that makes the result of a call: of a class of torch.nn, a function, or the last of a pattern.

    Example:
      >>> operation("ReLU"), operation("relu"), operation("ConvBnReLU2d")
      ('relu', 'relu', 'relu')
    """
    part = PATTERNS.get(word).parts[-1] if word in PATTERNS else getattr(nn, word, word)
    return family(part) if isinstance(part, type) else canonical(part)


def last_operation(site: Site) -> str:
    """What makes the tensor of a site: the operation of its only call, or of the last of its group."""
    return operation(site.pattern) if site.pattern else site.operation


def _joined(tensor: str, does: str, file: FileNames | None) -> str:
    if file is not None:
        return file.values.get(tensor, "")
    kind = OP_TYPES.get(does, "")
    return f"{tensor}_{kind}" if kind else ""
