"""Runs that see the result of each planned call by its name in the plan, and what attention computes inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sophq_func.capture.frame import unwatched
from sophq_func.core.pytree import has_floating, tensors
from sophq_func.core.types import Args, Kwargs, Output
from sophq_func.model.runner import Effect, Function, Runner
from sophq_func.model.schedule import Schedule

Key = tuple[str, str, int]
"""A call: path of its module, function (empty for the module itself), and how often it was called before."""

Seen = Callable[[str, Tensor], Tensor]
"""Takes the name of a value and the value; returns what replaces it."""

SCORES, PROBABILITIES = ".scores", ".probabilities"
"""Behind the name of an attention: its first product, and the result of its softmax."""


class Watching(Runner):
    """Shows the result of each planned call.

    Args:
      names: of the calls.
      seen: is shown each result.
      opens: whether attention is computed in steps, two of which are shown, too.
    """

    def __init__(self, names: Mapping[Key, str], seen: Seen, opens: bool, effect: Effect, schedule: Schedule) -> None:
        super().__init__(schedule, effect)
        self._names, self._seen, self._opens = names, seen, opens
        self._calls = dict[tuple[str, str], int]()
        self._function = ""

    def after_module(self, path: str, module: nn.Module, args: Args, kwargs: Kwargs, output: Output) -> Output:
        return self._shown((path, ""), args, kwargs, super().after_module(path, module, args, kwargs, output))

    def function(self, name: str, func: Function, args: Args, kwargs: Kwargs) -> Output:
        self._function = name
        return self._shown((self.scope, name), args, kwargs, super().function(name, func, args, kwargs))

    def compute(self, func: Function, args: Args, kwargs: Kwargs) -> Output:
        name = self._name((self.scope, self._function))
        if not self._opens or func is not F.scaled_dot_product_attention or name is None:
            return super().compute(func, args, kwargs)
        with self.aside(), unwatched():
            return attention(lambda what, x: self._seen(name + what, x), *args, **kwargs)

    def _name(self, pair: tuple[str, str]) -> str | None:
        """The name of the call that is made now."""
        return self._names.get((*pair, self._calls.get(pair, 0)))

    def _shown(self, pair: tuple[str, str], args: Args, kwargs: Kwargs, output: Output) -> Output:
        if not tensors(output) or not has_floating(args, kwargs, output):  # as the plan counts calls
            return output
        name = self._name(pair)
        self._calls[pair] = self._calls.get(pair, 0) + 1
        if name is None or not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        with self.aside(), unwatched():
            return self._seen(name, output)


def attention(
    seen: Seen,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``softmax(scale Q K^T + mask) V`` in steps; arguments as of torch's ``scaled_dot_product_attention``, without dropout.

    The scale comes behind the product, so that the product reads its operands on their grids.
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = seen(SCORES, query @ key.transpose(-2, -1))
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # the smallest number, not minus infinity: a row that sees nothing is uniform then, not NaN
        attn_mask = torch.where(attn_mask, 0.0, torch.finfo(scores.dtype).min).to(scores.dtype)
    if attn_mask is not None:
        scores = scores + attn_mask
    return seen(PROBABILITIES, scores.softmax(-1)) @ value
