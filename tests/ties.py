"""Comparing codes on any CPU: a value within float32's rounding of a tie may take either code, no other value may.

The reference is the simulation in float64, on the codes that the weights have. Its sums round to less than a millionth of
a step, in whatever order a CPU adds. Another run is led: behind each quantizer it goes on from the reference's codes, so
that what differs at a tie is counted there, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

import sophq_func as sq
from sophq_func.integers._integers import Integers
from tests.helpers import Ready

ROUNDINGS = 32
"""How many units in the last place, of a tensor's largest value, a sum of some hundred float32 products is off at most.

Such a sum is off by a random walk of as many steps as it has terms, each of a third of a unit in the last place of a partial
sum: the root of 288, the most terms of a sum in these tests, is 17, and partial sums may be some times larger than the sum.
"""
EACH = 4
"""The same of a value that comes from exact sums: a multiplier, the product with it, a bias added, a mean of few values."""

OUTPUT = 1e-3
"""Of the last quantizer's step: the same of an output that has no quantizer, and is up to 1,000 steps large."""


def wide(tree: Any) -> Any:
    """A tree with its floating tensors in float64."""
    return _pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, tree)


class Reference(NamedTuple):
    """A run in float64.

    Attributes:
      output: what the model returns.
      seen: by quantizer of an activation, what it saw and what it made of that.
    """

    output: Any
    seen: dict[str, tuple[Tensor, Tensor]]


def reference(r: Ready, *args: Any, moved: Mapping[str, set[int]] | None = None, **kwargs: Any) -> Reference:
    """``r`` in float64, with the codes that ``r`` has for weights and biases.

    Args:
      moved: by quantizer, the values, counted through, that take the other code of two.
    """
    q, seen = r.q.eval(), {}
    _, frozen = q.freeze(r.params, r.qparams)

    def effect(name: str, x: Tensor) -> Tensor:
        if q.plan[name].observe_only:
            return x
        y = q.quantize_value(name, x, r.qparams[name])
        seen[name] = x.clone(), y
        if not moved or name not in moved:
            return y.clone()  # the model may write into it
        at, (low, high) = list(moved[name]), choices(r, name, x, ROUNDINGS)
        flat = y.flatten()
        flat[at] = (low + high - y).flatten()[at]
        return flat.reshape(y.shape)

    # quantized once more: what lies on a grid is rounded to itself, now to 53 bits
    output, _ = q.engine.run_quantized(wide(frozen), r.qparams, effect, wide(args), wide(kwargs))
    return Reference(output, seen)


def follows(r: Ready, x: Tensor, recorded: Tensor, tolerance: float, roundings: float = 8) -> bool:
    """Whether choices at ties lead to a recorded output: those that bring it nearer are made, one by one.

    The sums of the recorded models have at most 72 terms, so 8 roundings are three times the root of 72, by three.
    """
    moved: dict[str, set[int]] = {}

    def tried(name: str, i: int) -> dict[str, set[int]]:
        return {**moved, name: {*moved.get(name, ()), i}}

    def error(found: Reference) -> float:
        return float((found.output - recorded).norm())

    found = reference(r, x)
    while error(found) > tolerance:
        there = {name: undecided(r, name, seen, roundings).flatten().nonzero() for name, (seen, _) in found.seen.items()}
        candidates = [(n, int(i)) for n, places in there.items() for i in places if int(i) not in moved.get(n, ())]
        runs = {at: reference(r, x, moved=tried(*at)) for at in candidates}
        best = min(runs, key=lambda at: error(runs[at]), default=None)
        if best is None or error(runs[best]) >= error(found):
            return False
        moved, found = tried(*best), runs[best]
    return True


def choices(r: Ready, name: str, x: Tensor, roundings: float) -> tuple[Tensor, Tensor]:
    """What the quantizer makes of each value at least, and at most, where so many roundings of float32 may move it."""
    reach = roundings * 2.0**-24 * float(x.abs().max())
    low, high = (r.q.quantize_value(name, x.double() + move, r.qparams[name]) for move in (-reach, reach))
    return low, high


def undecided(r: Ready, name: str, x: Tensor, roundings: float) -> Tensor:
    """Which values have two codes to choose from."""
    low, high = choices(r, name, x, roundings)
    return low != high


def are_decided(r: Ready, expected: Reference) -> Tensor:
    """By example: no value on its way lies so near a tie that float32 outside of sums may move it across."""
    found = [undecided(r, name, x, EACH).flatten(1).any(1) for name, (x, _) in expected.seen.items()]
    return ~torch.stack(found).any(0)


def shown(r: Ready, images: Tensor) -> Tensor:
    """Images with noise, on the grid of the input.

    Noise, because one background in all images means one value in all of them, and one tie near it leaves none decided.
    On the grid, because a grid made for pixels in eighths has ties at pixels.
    """
    first = next(name for name in r.q.plan if r.q.plan.site(name).role == "activation")
    noise = 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return r.q.quantize_value(first, images + noise, r.qparams[first])


def check_codes(r: Ready, name: str, found: Tensor, x: Tensor) -> None:
    """What a quantizer made of values is what it makes of the reference's ``x``, or there was a choice."""
    low, high = choices(r, name, x, ROUNDINGS)
    rounding = 2.0**-22 * high.abs()  # of a code times its scale, in float32
    off = torch.maximum(low - rounding - found, found - high - rounding)
    assert float(off.max()) <= 0, (name, float(off.max()))


def simulated(r: Ready, expected: Reference, *args: Any, **kwargs: Any) -> Any:
    """The output of ``apply`` in float32, led by the reference."""

    def effect(name: str, x: Tensor) -> Tensor:
        if name not in expected.seen:
            return x
        check_codes(r, name, r.q.quantize_value(name, x, r.qparams[name]), expected.seen[name][0])
        return expected.seen[name][1].to(x.dtype)

    return r.q.eval().engine.run_quantized(r.params, r.qparams, effect, args, kwargs)[0]


def executed(r: Ready, expected: Reference, *args: Any, **kwargs: Any) -> Any:
    """The output of the artifact's run on integers, led by the reference."""
    artifact = sq.convert(r.q, r.params, r.qparams)

    class Led(Integers):
        def _quantized(self, name: str, x: Tensor) -> Tensor:
            own = super()._quantized(name, x)
            whole = self._lookup(own)
            if whole is None or name not in expected.seen:
                return own
            check_codes(r, name, own, expected.seen[name][0])
            level = (expected.seen[name][1] / whole.scale).round().to(torch.int32)
            led = whole._replace(level=level)
            return self._noted(led.real(x.dtype), led, "led")

    with torch.no_grad():
        given = artifact._given()
        watch: Callable[..., Integers] = lambda schedule: Led(schedule, given)  # noqa: E731
        return artifact._q.engine.loop.run(artifact._parameters(given), given.other, args, kwargs, watch=watch)[0]


def last_step(r: Ready) -> Tensor:
    """The step of the last quantizer of an activation."""
    names = [name for name in r.q.plan if r.q.plan.site(name).role == "activation" and not r.q.plan[name].observe_only]
    return r.qparams[names[-1]].scale


def check_both(r: Ready, *args: Any, pick: Callable[[Any], Tensor] = lambda out: out, **kwargs: Any) -> None:
    """The simulation and the executor find the reference's codes, and from these its output."""
    expected = reference(r, *args, **kwargs)
    either = [undecided(r, name, x, ROUNDINGS).flatten() for name, (x, _) in expected.seen.items()]
    assert float(torch.cat(either).double().mean()) < 1 / 3, "too few values are compared"
    for run in (simulated, executed):
        found = pick(run(r, expected, *args, **kwargs))
        steps = (found.double() - pick(expected.output)).abs() / last_step(r)
        assert float(steps.max()) <= OUTPUT, (run.__name__, float(steps.max()))
