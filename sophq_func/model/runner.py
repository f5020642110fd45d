"""The frame in which a planned model runs: acts at the planned values, and counts, so that none is missed or mistaken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from sophq_func.capture.frame import Frame, unwatched
from sophq_func.core.errors import StateError
from sophq_func.core.operations import LAYERS, called
from sophq_func.core.pytree import flatten, has_floating, tensors
from sophq_func.model.schedule import OPTIONAL, Actions, Pair, Schedule

Effect = Callable[[str, Tensor], Tensor]
"""What happens to a planned value: told the quantizer's name and the tensor, it returns the tensor to go on with."""


class Runner(Frame):
    """Acts at each planned call of one run."""

    def __init__(self, schedule: Schedule, effect: Effect) -> None:
        super().__init__()
        self.schedule, self.effect = schedule, effect
        self.counts: dict[Pair, int] = dict.fromkeys(schedule.actions, 0)
        self.given: dict[str, tuple[Tensor, Tensor]] = {}
        self.done: dict[str, tuple[Tensor, Tensor]] = {}
        self.inner = ""

    @property
    def takes_inputs(self) -> bool:
        """Whether :meth:`input` wants to see the model's arguments."""
        return bool(self.schedule.inputs)

    def input(self, name: str, tensor: Tensor) -> Tensor:
        """An argument of the model, which goes on as what is returned."""
        quantizer = self.schedule.inputs.get(name)
        if quantizer is None:
            return tensor
        self.given[name] = (tensor, self.effect(quantizer, tensor))
        return self.given[name][1]

    def repeated_input(self, name: str, tensor: Tensor) -> Tensor:
        """An argument that is another one once more; that one has been through :meth:`input`."""
        first = self.schedule.same.get(name)
        if first is None:
            return tensor
        before, after = self.given.get(first, (None, None))
        if after is None or tensor is not before:
            what = f"input {name!r} was the same tensor as {first!r} in the example, and here it is another"
            raise StateError(f"{what}. Fix: plan with an example in which they differ.")
        return after

    def before_module(self, path: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        actions = self._actions((path, ""))
        if actions is None:
            return args, kwargs
        self.inner = actions.inner
        return self._on_operands(actions.operands, args, kwargs)

    def after_module(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        self.inner = ""
        return self._on_output((path, ""), output, (path, "") in self.counts and has_floating(args, kwargs))

    def function(self, name: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        pair = (self.scope, name)
        if pair not in self.counts:
            return self.compute(func, args, kwargs)
        floating = has_floating(args, kwargs)
        actions = self._actions(pair) if floating else None
        if actions is not None:
            args, kwargs = self._on_operands(actions.operands, args, kwargs)
        output = self.compute(func, args, kwargs)
        if name == "setitem":
            self._on_output(pair, args[0], floating)
            return output
        return self._on_output(pair, output, floating)

    def inner_function(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.inner and called(func) in LAYERS:
            args, kwargs = self._on_operands({1: self.inner}, args, kwargs)
        return self.compute(func, args, kwargs)

    def looks_inside(self) -> bool:
        return bool(self.inner)

    def compute(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Make the call itself, of a function inside or outside leaf modules, with quantized operands."""
        return func(*args, **kwargs)

    def check(self) -> None:
        """Raise a :class:`StateError` unless the run made the calls of one of the examples."""
        schedule = self.schedule
        for name in schedule.inputs:
            if name not in self.given and name not in schedule.optional:
                raise StateError(f"input {name!r} has a quantizer, but this run was not given it. Fix: {OPTIONAL}.")
        if not any(self._fits(counts) for counts in schedule.counts):
            raise StateError(self._mismatch(schedule.counts[0]))

    def _fits(self, expected: Mapping[Pair, int]) -> bool:
        return all(self.counts[pair] == count or self._skippable(pair) for pair, count in expected.items())

    def _skippable(self, pair: Pair) -> bool:
        hidden = self.mode.compiling and pair in self.schedule.hidden
        return self.counts[pair] == 0 and pair in self.schedule.optional and not hidden

    def _mismatch(self, expected: Mapping[Pair, int]) -> str:
        wrong = [pair for pair, count in expected.items() if self.counts[pair] != count and not self._skippable(pair)]
        path, function = wrong[0]
        place = ".".join([part for part in (path, function) if part])
        now, then = self.counts[path, function], expected[path, function]
        text = f"{place}: this run calls it {now} times, the example {then} times"
        if self.mode.compiling and (path, function) in self.schedule.hidden:
            why = f"torch.compile hides this spelling of {function}"
            return f"{text}, because {why}. Fix: write torch.{function}(x) or a module."
        return f"{text}, so its quantizers cannot be told apart. Fix: plan with examples of both ways, or {OPTIONAL}."

    def _actions(self, pair: Pair) -> Actions | None:
        planned = self.schedule.actions.get(pair)
        return None if planned is None else planned.get(self.counts[pair])

    def _on_output(self, pair: Pair, output: Any, floating: bool) -> Any:
        """A call's result, after what happens to it; only calls with a floating tensor, in or out, are counted."""
        if pair not in self.counts or not (isinstance(output, Tensor) or tensors(output)):
            return output
        if not (floating or has_floating(output)):
            return output
        actions = self._actions(pair)
        self.counts[pair] += 1
        return output if actions is None else self._on_tensors(actions.outputs, output)

    def _on_operands(self, names: Mapping[int, str], args: Any, kwargs: Any) -> tuple[Any, Any]:
        if args and isinstance(args[0], Tensor) and names.keys() == {0}:
            return (self._on_tensors(names, args[0]), *args[1:]), kwargs
        args, kwargs = self._on_tensors(names, (args, kwargs))
        return args, kwargs

    def _on_tensors(self, names: Mapping[int, str], tree: Any) -> Any:
        """``tree`` with the effect on some of its tensors; what the effect computes is not watched."""
        if not names:
            return tree
        with self.aside(), unwatched():
            return self._acted(names, tree)

    def _acted(self, names: Mapping[int, str], tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return self._act(names[0], tree)
        found, rebuild = flatten(tree)
        slots = [i for i, item in enumerate(found) if isinstance(item, Tensor)]
        for index, name in names.items():
            found[slots[index]] = self._act(name, found[slots[index]])
        return rebuild(found)

    def _act(self, name: str, tensor: Tensor) -> Tensor:
        """The effect on a tensor, which is had once where several calls share it."""
        if name not in self.schedule.shared:
            return self.effect(name, tensor)
        before, after = self.done.get(name, (None, None))
        if after is None or before is not tensor:
            after = self.effect(name, tensor)
            self.done[name] = (tensor, after)
        return after
