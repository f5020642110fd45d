"""Layers as algorithms see them: one input, one weight, an axis of output channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from sophq_func.capture.graph import Graph
from sophq_func.core.types import Args, Kwargs
from sophq_func.model.runner import Function
from sophq_func.model.weight_quantizer import WeightQuantizer, arranged, is_regrouped

SPATIAL: Mapping[str, int] = {
    "linear": 0,
    "conv1d": 1,
    "conv2d": 2,
    "conv3d": 3,
    "conv_transpose1d": 1,
    "conv_transpose2d": 2,
    "conv_transpose3d": 3,
}
"""By operation of a layer, how many axes a sample has behind its channels."""


BIAS = ("2", "bias")
"""Roles of the operand that a layer's function adds, given by position or by keyword."""


def biases_of(graph: Graph) -> dict[str, str]:
    """By weight of a function that the model calls outside of layers, the bias that the same call adds."""
    found = {}
    for node in graph:
        if node.operation in SPATIAL and node.function:
            biases = [operand.parameter for operand in node.operands if operand.role in BIAS and operand.parameter]
            found.update({operand.parameter: bias for operand in node.operands for bias in biases if operand.parameter})
    return found


class Product(NamedTuple):
    """A call of a layer's function.

    Attributes:
      func: of torch.
      args, kwargs: as the layer gave them.
    """

    func: Function
    args: Args
    kwargs: Kwargs

    @property
    def x(self) -> Tensor:
        """What the layer reads."""
        x: Tensor = self.args[0] if self.args else self.kwargs["input"]
        return x

    def of(self, x: Tensor, replaced: Mapping[str, Tensor]) -> Tensor:
        """The result for another input.

        Args:
          x: the input.
          replaced: ``"weight"`` and ``"bias"``, where they are others than in the call.
        """
        # the functions of all layers take these three first, by these names; a layer without bias gives None
        names = ("input", "weight", "bias")
        given = {**dict(zip(names, self.args, strict=False)), **self.kwargs, "input": x, **replaced}
        output: Tensor = self.func(*(given.pop(name) for name in names), *self.args[len(names) :], **given)
        return output


def outputs_first(weight: Tensor, quantizer: WeightQuantizer) -> Tensor:
    """A layer's weight with its output channels along axis 0 and its input channels, of one group, along axis 1."""
    site = quantizer.site
    rows = arranged(weight, site)
    return rows if is_regrouped(site) else rows.movedim(_axis(quantizer), 0)


def as_stored(rows: Tensor, quantizer: WeightQuantizer) -> Tensor:
    """The inverse of :func:`outputs_first`."""
    site = quantizer.site
    return arranged(rows if is_regrouped(site) else rows.movedim(0, _axis(quantizer)), site)


def _axis(quantizer: WeightQuantizer) -> int:
    """The axis of the output channels of a weight that has one."""
    axis = quantizer.site.axis
    assert isinstance(axis, int), "the weight of a layer has one output axis"
    return axis
