"""Applies quantizers at planned calls; checks call counts against the example."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor, nn

from sophq_func.capture.frame import Frame, is_watched, item, unwatched
from sophq_func.capture.graph import function_of, step
from sophq_func.core.errors import StateError, explain
from sophq_func.core.operations import CONTRACTIONS, LAYERS, called, is_operation
from sophq_func.core.pytree import flatten, has_floating, tensors
from sophq_func.core.types import Args, Kwargs, Output, Tree
from sophq_func.model.schedule import OPTIONAL, OTHER_WAY, SHARE, Actions, Pair, Schedule, place_name

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
      items: the parameters of which examples take items by number, as this run has them.
      inner: quantizer of the weight that the running leaf module computes inside; empty elsewhere.
    """

    def __init__(self, schedule: Schedule, effect: Effect) -> None:
        super().__init__()
        self.schedule = schedule
        self.effect = effect
        self.counts: dict[Pair, int] = dict.fromkeys(schedule.actions, 0)
        self.quantized_inputs: dict[str, tuple[Tensor, Tensor]] = {}
        self.shared_results: dict[str, tuple[Tensor, Tensor]] = {}
        self.items: list[tuple[str, Tensor]] = []
        self.inner = ""
        self.sees_functions = schedule.functions

    @staticmethod
    def of(schedule: Schedule, effect: Effect) -> Runner:
        """A runner that applies an effect and does nothing else, so that it need not see most functions."""
        runner = Runner(schedule, effect)
        if not runner.mode.compiling:
            runner.idle, runner.acts_at = schedule.idle, schedule.acting_leaves
            runner.sees_leaves_alone = not schedule.looks_inside
        return runner

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

    def enter_scope(self, path: str, args: Args, kwargs: Kwargs) -> None:
        if path in self.schedule.unreached:
            raise self.schedule.unknown(path, "", self.counts)

    def again(self) -> Frame:
        self.shared_results.clear()
        other = Runner(self.schedule, self.effect)
        other.counts, other.items, other.idle, other.acts_at = dict(self.counts), self.items, self.idle, self.acts_at
        self.begin_again(other)
        return other

    def before_module(self, path: str, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        actions = self._actions(self._pair(path, ""))
        if actions is None:
            return args, kwargs
        self.inner = actions.inner
        return self._on_operands(actions.operands, args, kwargs)

    def after_module(self, path: str, module: nn.Module, args: Args, kwargs: Kwargs, output: Output) -> Output:
        self.inner = ""
        # only now, as a call that fails is in no example, though it may have been made in one
        if path in self.schedule.unreached:
            raise self.schedule.unknown(path, "", self.counts)
        pair = self._pair(path, "")
        floating = pair in self.counts and has_floating(args, kwargs)
        return self._on_output(pair, output, floating)

    def function(self, name: str, func: Function, args: Args, kwargs: Kwargs) -> Output:
        pair = self._pair(self.scope, name)
        if name == "getitem" and self.items:
            self._note_item(args)
        if pair not in self.counts:
            may_act = name in CONTRACTIONS or (self.scope, name) in self.schedule.known.acting
            if may_act and has_floating(args, kwargs):
                self._check_known(pair)
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
        # a parametrization may call such a function, too, to compute the weight
        function = called(func) if self.inner and not self.computing else ""
        if function in LAYERS:
            args, kwargs = self._on_operands({LAYERS[function]: self.inner}, args, kwargs)
        return self.compute(func, args, kwargs)

    def looks_inside(self) -> bool:
        return bool(self.inner)

    def compute(self, func: Function, args: Args, kwargs: Kwargs) -> Output:
        """Call a function, inside or outside leaf modules, with operands on which the effect has acted."""
        return func(*args, **kwargs)

    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        self.items = [(name, tensors[name]) for name in self.schedule.known.items if name in tensors]

    def _note_item(self, args: Args) -> None:
        """Note a parameter's item that is taken by its number, as a trace does."""
        parameter = next((name for name, tensor in self.items if tensor is args[0]), "")
        number = item("getitem", args) if parameter else None
        if number is not None:
            self.before[-1] = f"{parameter}[{number}]"

    def _pair(self, path: str, function: str) -> Pair:
        """By what a call that is made now is counted."""
        pair = (path, function)
        return pair if pair not in self.schedule.known.told_apart else (path, step(function, self.before[-1]))

    def _check_known(self, pair: Pair) -> None:
        """Raise a :class:`StateError` for a call that no example makes, and no rule leaves float."""
        known = self.schedule.known
        if self.schedule and known.pairs and pair not in known.pairs and not self.schedule.excludes(*pair):
            raise self.schedule.unknown(*pair, self.counts)

    def check(self) -> None:
        """Raise a :class:`StateError` unless the run made the calls of the examples; see :class:`Schedule`."""
        schedule = self.schedule
        for name in schedule.inputs:
            if name not in self.quantized_inputs and name not in schedule.optional and not schedule.may_lack(name):
                raise StateError(f"input {name!r} has a quantizer, but this run was not given it. Fix: {OPTIONAL}.")
        # the usual case, without a look at each
        if self.counts in schedule.counts:
            return
        for pairs, allowed in schedule.groups:
            if not any(self._fits(dict(zip(pairs, counts, strict=True))) for counts in allowed):
                raise self._mismatch(pairs)

    def check_so_far(self) -> None:
        """Raise a :class:`StateError` unless the calls of the run, up to here, fit the examples.

        They do if the run has made no more calls of any pair than an example.
        """
        for pairs, allowed in self.schedule.groups:
            if not any(self._fits_within(dict(zip(pairs, counts, strict=True))) for counts in allowed):
                raise self._mismatch(pairs)

    def _fits(self, expected: Mapping[Pair, int]) -> bool:
        return all(self.counts[pair] == count or self._is_skipped(pair) for pair, count in expected.items())

    def _fits_within(self, expected: Mapping[Pair, int]) -> bool:
        return all(self.counts[pair] <= count for pair, count in expected.items())

    def _is_skipped(self, pair: Pair) -> bool:
        """Whether the run made no call of a pair, and the plan allows it to leave that pair out."""
        # where torch.compile may have hidden the calls, 0 does not mean that there were none
        hidden = self.mode.compiling and pair in self.schedule.hidden
        return self.counts[pair] == 0 and pair in self.schedule.optional and not hidden

    def _mismatch(self, pairs: Sequence[Pair]) -> StateError:
        """The error for the first of some pairs whose count differs from that of the first example."""
        expected = self.schedule.counts[0]
        path, function = next(pair for pair in pairs if self.counts[pair] != expected[pair] and not self._is_skipped(pair))
        in_run, in_example = self.counts[path, function], expected[path, function]
        text = f"{place_name(path, function)}: this run calls it {in_run} times, the example {in_example} times"
        if self.mode.compiling and (path, function) in self.schedule.hidden:
            name = function_of(function)
            why = f"torch.compile hides this spelling of {name}"
            return StateError(f"{text}, because {why}. Fix: write torch.{name}(x) or a module.")
        hidden = [name for at, name in expected if at == path and name and not is_operation(function_of(name))]
        if self.mode.compiling and hidden:
            why = f"torch.compile looks into autograd.Function {hidden[0]}, and shows no call of it"
            return StateError(f"{text}, because {why}. Fix: run it without torch.compile.")
        why = "so its quantizers cannot be told apart"
        return StateError(f"{text}, {why}. Fix: {OTHER_WAY}, {SHARE}, or {OPTIONAL}.")

    def _check_way(self, pair: Pair) -> None:
        """Raise a :class:`StateError` where a call comes after another module than that of its number in the examples."""
        ways = self.schedule.known.after[pair]
        number, before = self.counts[pair], self.before[-1]
        if number < len(ways) and before not in ways[number]:
            expected = " or ".join(repr(way) if way else "the start" for way in sorted(ways[number]))
            got = repr(before) if before else "the start"
            text = f"{place_name(*pair)}: this run makes call {number} after {got}, the example after {expected}"
            why = "so its quantizers cannot be told apart"
            raise StateError(f"{text}, {why}. Fix: {OTHER_WAY}.")

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
        if pair in self.schedule.known.after:
            self._check_way(pair)
        actions = self._actions(pair)  # before the count: the number of this call is that of the calls before it
        self.counts[pair] = 1 if pair in self.schedule.every else self.counts[pair] + 1
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
        if not self.mode.compiling and not is_watched():
            return self._acted(names, tree)
        with self.aside(), unwatched():
            return self._acted(names, tree)

    def _acted(self, names: Mapping[int, str], tree: T) -> T:
        """:meth:`_on_tensors`, while nothing is watched."""
        if isinstance(tree, Tensor):
            if 0 not in names:
                raise _no_tensor(names, 1)
            return self._act(names[0], tree)  # type: ignore[return-value]
        leaves, rebuild = flatten(tree)
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for index, name in names.items():
            if index >= len(places):
                raise _no_tensor(names, len(places))
            place = places[index]
            leaves[place] = self._act(name, leaves[place])
        changed: T = rebuild(leaves)
        return changed

    def _act(self, name: str, tensor: Tensor) -> Tensor:
        """The effect on one tensor, computed once where several calls read the same tensor."""
        if name not in self.schedule.shared:
            return self.effect(name, tensor)
        before, after = self.shared_results.get(name, (None, None))
        if after is None or before is not tensor:
            after = self.effect(name, tensor)
            self.shared_results[name] = (tensor, after)
        return after


def _no_tensor(names: Mapping[int, str], count: int) -> StateError:
    """The error for a quantizer at a call that has fewer tensors than the plan says."""
    index = max(names)
    sentence, fix = f"this run has {count} tensors where the quantizer acts on number {index}", "plan this model anew"
    return StateError(explain(names[index], sentence, fix=fix))
