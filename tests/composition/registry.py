"""The registry: rows of checks, and the limits of torch and transformers that some cells meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree

from tests.composition.subjects import SUBJECTS, Subject, bert

Check = Callable[..., None]
"""Takes a subject, compares values, and raises where they differ."""


@dataclass(frozen=True)
class Limit:
    """What torch or transformers forbids.

    Attributes:
      key: of the footnote.
      error: its class.
      message: its words, a part of them.
      cell: what the table says.
      instead: what to write instead.
      ways: by name, how to make a check that meets the limit one that does not.
    """

    key: str
    error: type[Exception]
    message: str
    cell: str
    instead: str
    ways: Mapping[str, Callable[[Check, Subject], None]]


@dataclass(frozen=True)
class Row:
    """A transform: what a check of it compares with (the first words of its docstring), and within what."""

    name: str
    check: Check
    within: str
    limits: Mapping[str, Limit]
    needs_cuda: bool

    @property
    def compared(self) -> str:
        """The check's docstring as one line."""
        return " ".join((self.check.__doc__ or "").split()).removesuffix(".")


ROWS: dict[str, Row] = {}


def row(name: str, within: str, *, needs_cuda: bool = False, **limits: Limit) -> Callable[[Check], Check]:
    """Register a check as the row ``name``; ``limits`` by column, ``every`` for all of them."""

    def register(check: Check) -> Check:
        assert name not in ROWS, name
        every = dict.fromkeys(SUBJECTS, limits["every"]) if "every" in limits else limits
        ROWS[name] = Row(name, check, within, every, needs_cuda)
        return check

    return register


def math_attention(check: Check, s: Subject) -> None:
    """The attention of torch in its unfused form."""
    with sdpa_kernel(SDPBackend.MATH):
        check(s)


def eager_attention(check: Check, _: Subject) -> None:
    """The attention of transformers in its unfused form."""
    check(bert("eager"))


def whole_mask(check: Check, s: Subject) -> None:
    """The mask as attention takes it: ``(batch, 1, length, length)``, boolean."""
    mask = s.batch["attention_mask"].bool()
    check(replace(s, batch={**s.batch, "attention_mask": mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)}))


def no_mask(check: Check, s: Subject) -> None:
    """No mask at all."""
    check(replace(s, batch={"input_ids": s.batch["input_ids"]}))


def whole_mask_math(check: Check, s: Subject) -> None:
    """Both."""
    whole_mask(lambda s: math_attention(check, s), s)


def functional(check: Check, s: Subject) -> None:
    """The function without its in-place operations."""
    check(s, functionalize)


UNFUSED = {"math attention": math_attention, "eager attention": eager_attention}
MASKS = {"whole mask": whole_mask, "no mask": no_mask}
FUSED_WORDS = (
    "torch has neither forward-mode nor second derivatives of its fused attention for the CPU. Write "
    "`with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):` around the call, or load the model with "
    '`attn_implementation="eager"`.'
)
MASK_WORDS = (
    "transformers asks whether a mask of shape `(batch, length)` masks anything. Give the mask as attention takes it, "
    "`mask.bool()[:, None, None, :].expand(-1, 1, length, -1)`, or none."
)
FORWARD_OVER_FUSED = Limit(
    "forward",
    NotImplementedError,
    "Trying to use forward AD with _scaled_dot_product_flash_attention_for_cpu",
    "yes, attention not fused",
    FUSED_WORDS,
    UNFUSED,
)
REVERSE_OVER_FUSED = Limit(
    "reverse",
    RuntimeError,
    "derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward is not implemented",
    "yes, attention not fused",
    FUSED_WORDS,
    UNFUSED,
)
MASK_UNDER_VMAP = Limit(
    "vmap",
    RuntimeError,
    "attempting to use a Tensor in some data-dependent control flow",
    "yes, mask of four axes or none",
    MASK_WORDS + " torch maps its fused attention by a loop, and warns of it.",
    MASKS,
)
MASK_WHILE_TRACING = Limit(
    "make_fx",
    RuntimeError,
    "It appears that you're trying to get value out of a tracing tensor",
    "yes, mask of four axes or none",
    MASK_WORDS + ' For `make_fx`, `tracing_mode="fake"` does, too.',
    MASKS,
)
MASK_IN_LINEARIZE = replace(
    MASK_WHILE_TRACING,
    key="linearize",
    cell="yes, mask of four axes and attention not fused",
    instead=MASK_WORDS + " Then forward mode, which `linearize` is, asks for attention that is not fused.",
    ways={"whole mask, math attention": whole_mask_math},
)
IN_PLACE = Limit(
    "in-place",
    AssertionError,
    "are not close",
    "yes, functionalized",
    "No error, but wrong numbers: what `linearize` returns is right when it is first called, and adds up from call to call "
    "where the model has written in place into something that does not depend on the tangent, as the ResNet of transformers "
    "does (`hidden_state += residual`). Write `torch.func.linearize(torch.func.functionalize(f), x)`.",
    {"functionalize": functional},
)
COMPILED_INSIDE = Limit(
    "inside",
    torch._dynamo.exc.Unsupported,
    "Calling torch.func.grad(compiled_fn) function from eager mode is not supported",
    "no",
    "torch.compile goes outermost: `torch.compile(torch.func.grad(f))`, not `torch.func.grad(torch.compile(f))`. "
    "`loss.backward()` through a compiled forward works.",
    {},
)


def same(actual: Any, expected: Any, tolerance: float) -> None:
    """Two trees agree, within ``tolerance`` of each tensor's largest value; 0 means bit for bit."""
    pairs = list(zip(_pytree.tree_leaves(actual), _pytree.tree_leaves(expected), strict=True))
    assert pairs
    for a, e in pairs:
        largest = float(e.detach().abs().max()) if e.is_floating_point() and e.numel() else 1.0
        torch.testing.assert_close(a, e, rtol=0, atol=tolerance * largest + (1e-12 if tolerance else 0))


def some(tree: Any) -> None:
    """Not all of a tree is zero, so that comparing it says something."""
    assert any(bool((leaf != 0).any()) for leaf in _pytree.tree_leaves(tree))


def each(tree: Any, i: int) -> Any:
    """The ``i``-th of a batch of trees."""
    return _pytree.tree_map(lambda leaf: leaf[i], tree)


def stacked(trees: list[Any]) -> Any:
    """Trees as a batch."""
    return _pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)


def like(tree: Any, seed: int) -> Any:
    """A direction: normal numbers, for each leaf about its own size."""
    generator = torch.Generator().manual_seed(seed)

    def make(leaf: Tensor) -> Tensor:
        size = leaf.abs().mean()
        return torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) * torch.where(size == 0, 1, size)

    return _pytree.tree_map(make, tree)


def dot(a: Any, b: Any) -> Tensor:
    """The inner product of two trees, in float64."""
    pairs = zip(_pytree.tree_leaves(a), _pytree.tree_leaves(b), strict=True)
    return torch.stack([(x.double() * y.double()).sum() for x, y in pairs]).sum()


def differences(f: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    """The Jacobian of ``f``, by central differences; the axes of ``x``, a vector, come last."""
    steps = step * torch.eye(len(x), dtype=x.dtype)
    return torch.stack([(f(x + d) - f(x - d)) / (2 * step) for d in steps], dim=-1)
