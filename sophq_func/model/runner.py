"""Applies quantizers at planned calls; checks call counts against the example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor, nn

from sophq_func.capture.frame import Frame, unwatched
from sophq_func.core.errors import StateError
from sophq_func.core.operations import LAYERS, called, is_operation
from sophq_func.core.pytree import flatten, has_floating, tensors
from sophq_func.core.types import Args, Kwargs, Output, Tree
from sophq_func.model.schedule import OPTIONAL, Actions, Pair, Schedule

Effect = Callable[[str, Tensor], Tensor]
"""What happens to a planned value: takes the quantizer's name and the tensor, returns the tensor that replaces it."""

Function = Callable[..., Output]
"""A torch function that the model calls."""

T = TypeVar("T", bound=Tree)


class Runner(Frame):
    """Applies an effect at each planned call of one run.

    Calls are counted by *pair*: a module's path, and the function called in that module, empty for the module's own call.

    Attributes:
      schedule: at which calls.
      effect: what happens there.
      counts: how many calls of each pair the run has made so far.
      quantized_inputs: by argument, the tensor that the run was given, and what the effect made of it.
      shared_results: by quantizer that acts before several calls, the last tensor that it acted on, and what the effect
        made of that.
      inner: quantizer of the weight that the running leaf module computes inside; empty elsewhere.
    """

    def __init__(self, schedule: Schedule, effect: Effect) -> None:
        super().__init__()
        self.schedule = schedule
        self.effect = effect
        self.counts: dict[Pair, int] = dict.fromkeys(schedule.actions, 0)
        self.quantized_inputs: dict[str, tuple[Tensor, Tensor]] = {}
        self.shared_results: dict[str, tuple[Tensor, Tensor]] = {}
        self.inner = ""
        self.sees_functions = schedule.functions

    @property
    def takes_inputs(self) -> bool:
        """Whether :meth:`input` must see the model's arguments."""
        return bool(self.schedule.inputs)

    def input(self, name: str, tensor: Tensor) -> Tensor:
        """Take one argument of the model; returns what the model is called with instead."""
        quantizer = self.schedule.inputs.get(name)
        if quantizer is None:
            return tensor
        result = self.effect(quantizer, tensor)
        self.quantized_inputs[name] = (tensor, result)
        return result

    def repeated_input(self, name: str, tensor: Tensor) -> Tensor:
        """Take one argument that must be the same tensor as another one, which :meth:`input` has seen."""
        first = self.schedule.same.get(name)
        if first is None:
            return tensor
        before, after = self.quantized_inputs.get(first, (None, None))
        if after is None or tensor is not before:
            what = f"input {name!r} was the same tensor as {first!r} in the example, and here it is another"
            raise StateError(f"{what}. Fix: plan with an example in which they differ.")
        return after

    def again(self) -> Frame:
        self.shared_results.clear()
        other = Runner(self.schedule, self.effect)
        other.counts = dict(self.counts)
        self.begin_again(other)
        return other

    def before_module(self, path: str, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        actions = self._actions((path, ""))
        if actions is None:
            return args, kwargs
        self.inner = actions.inner
        return self._on_operands(actions.operands, args, kwargs)

    def after_module(self, path: str, module: nn.Module, args: Args, kwargs: Kwargs, output: Output) -> Output:
        self.inner = ""
        pair = (path, "")
        floating = pair in self.counts and has_floating(args, kwargs)
        return self._on_output(pair, output, floating)

    def function(self, name: str, func: Function, args: Args, kwargs: Kwargs) -> Output:
        pair = (self.scope, name)
        if pair not in self.counts:
            return self.compute(func, args, kwargs)
        floating = has_floating(args, kwargs)
        actions = self._actions(pair) if floating else None
        if actions is not None:
            args, kwargs = self._on_operands(actions.operands, args, kwargs)
        output = self.compute(func, args, kwargs)
        if name == "setitem":  # x[i] = y returns nothing; what it makes is its first operand, written into
            # No tensor can be put in the place of that operand, so no plan quantizes it: this counts, or observes.
            self._on_output(pair, args[0], floating)
            return output
        return self._on_output(pair, output, floating)

    def inner_function(self, func: Function, args: Args, kwargs: Kwargs) -> Output:
        function = called(func) if self.inner else ""
        if function in LAYERS:
            args, kwargs = self._on_operands({LAYERS[function]: self.inner}, args, kwargs)
        return self.compute(func, args, kwargs)

    def looks_inside(self) -> bool:
        return bool(self.inner)

    def compute(self, func: Function, args: Args, kwargs: Kwargs) -> Output:
        """Call a function, inside or outside leaf modules, with operands on which the effect has acted."""
        return func(*args, **kwargs)

    def check(self) -> None:
        """Raise a :class:`StateError` unless the run made the calls of one of the examples."""
        schedule = self.schedule
        for name in schedule.inputs:
            if name not in self.quantized_inputs and name not in schedule.optional:
                raise StateError(f"input {name!r} has a quantizer, but this run was not given it. Fix: {OPTIONAL}.")
        if not any(self._fits(counts) for counts in schedule.counts):
            raise self._mismatch()

    def check_so_far(self) -> None:
        """Raise a :class:`StateError` unless the calls of the run, up to here, fit one of the examples.

        They do if the run has made no more calls of any pair than the example.
        """
        if not any(self._fits_within(counts) for counts in self.schedule.counts):
            raise self._mismatch()

    def _fits(self, expected: Mapping[Pair, int]) -> bool:
        return all(self.counts[pair] == count or self._is_skipped(pair) for pair, count in expected.items())

    def _fits_within(self, expected: Mapping[Pair, int]) -> bool:
        return all(self.counts[pair] <= count for pair, count in expected.items())

    def _is_skipped(self, pair: Pair) -> bool:
        """Whether the run made no call of a pair, and the plan allows it to leave that pair out."""
        # where torch.compile may have hidden the calls, 0 does not mean that there were none
        hidden = self.mode.compiling and pair in self.schedule.hidden
        return self.counts[pair] == 0 and pair in self.schedule.optional and not hidden

    def _mismatch(self) -> StateError:
        """The error for the first pair whose count differs from that of the first example."""
        expected = self.schedule.counts[0]
        wrong = [pair for pair, count in expected.items() if self.counts[pair] != count and not self._is_skipped(pair)]
        path, function = wrong[0]
        place = f"{path}.{function}".strip(".")
        in_run, in_example = self.counts[path, function], expected[path, function]
        text = f"{place}: this run calls it {in_run} times, the example {in_example} times"
        if self.mode.compiling and (path, function) in self.schedule.hidden:
            why = f"torch.compile hides this spelling of {function}"
            return StateError(f"{text}, because {why}. Fix: write torch.{function}(x) or a module.")
        hidden = [name for at, name in expected if at == path and name and not is_operation(name)]
        if self.mode.compiling and hidden:
            why = f"torch.compile looks into autograd.Function {hidden[0]}, and shows no call of it"
            return StateError(f"{text}, because {why}. Fix: run it without torch.compile.")
        why = "so its quantizers cannot be told apart"
        return StateError(f"{text}, {why}. Fix: plan with examples of both ways, or {OPTIONAL}.")

    def _actions(self, pair: Pair) -> Actions | None:
        """What happens at the call of a pair that is made now, and not counted yet; ``None`` for nothing."""
        planned = self.schedule.actions.get(pair)
        return None if planned is None else planned.get(self.counts[pair])

    def _on_output(self, pair: Pair, output: Output, floating: bool) -> Output:
        """Count a call, and apply the effect to its result.

        Only calls that return tensors are counted, with a floating tensor among operands (``floating``) or results:
        arithmetic on indices differs between ways of running, and is never quantized.
        """
        if pair not in self.counts or not (isinstance(output, Tensor) or tensors(output)):
            return output
        if not (floating or has_floating(output)):
            return output
        actions = self._actions(pair)  # before the count: the number of this call is that of the calls before it
        self.counts[pair] += 1
        return output if actions is None else self._on_tensors(actions.outputs, output)

    def _on_operands(self, names: Mapping[int, str], args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The arguments of a call, with the effect on some of their tensors: quantizers by the tensor's index."""
        if args and isinstance(args[0], Tensor) and names.keys() == {0}:  # the usual case, without flattening
            return (self._on_tensors(names, args[0]), *args[1:]), kwargs
        return self._on_tensors(names, (args, kwargs))

    def _on_tensors(self, names: Mapping[int, str], tree: T) -> T:
        """``tree`` with the effect on some of its tensors: quantizers by the tensor's index.

        What the effect computes is no call of the model, so it is not watched.
        """
        if not names:
            return tree
        with self.aside(), unwatched():
            result: T = self._acted(names, tree)
        return result

    def _acted(self, names: Mapping[int, str], tree: Tree) -> Tree:
        """:meth:`_on_tensors`, while nothing is watched."""
        if isinstance(tree, Tensor):
            return self._act(names[0], tree)
        leaves, rebuild = flatten(tree)
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for index, name in names.items():
            place = places[index]
            leaves[place] = self._act(name, leaves[place])
        return rebuild(leaves)

    def _act(self, name: str, tensor: Tensor) -> Tensor:
        """The effect on one tensor, computed once where several calls read the same tensor."""
        if name not in self.schedule.shared:
            return self.effect(name, tensor)
        before, after = self.shared_results.get(name, (None, None))
        if after is None or before is not tensor:
            after = self.effect(name, tensor)
            self.shared_results[name] = (tensor, after)
        return after
