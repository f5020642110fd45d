"""A KeyboardInterrupt at every line of the library that a run executes, and at every function that Python enters on its way.

``python -m tests.fuzz.interrupts --count 20000 --seed 0`` prints a table of outcomes, and exits with 1 where anything was
left behind: a function mode, a tensor in a skeleton, a replaced function of torch, a lock, other bits afterwards.
"""

from __future__ import annotations

import argparse
import dis
import functools
import math
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _python_dispatch

import sophq_func
from sophq_func.capture import hidden
from sophq_func.capture.interrupts import Waiting
from sophq_func.capture.turns import TURNS
from sophq_func.core.modes import level
from sophq_func.core.pytree import leaves
from tests.fuzz._scenes import Scene, plain_torch, scenes

ROOT = Path(sophq_func.__file__).parent
CORE = (str(ROOT / "capture"), *(str(ROOT / "model" / f"{name}.py") for name in ("runner", "loop", "watching")))
"""Where runs are made; of these files, later visits of a line are interrupted, too."""

HITS = 4
"""How often a line of :data:`CORE` is interrupted at most: at its first visit, and at some of the later ones."""

SHARE_OF_CORE = 0.8
"""Of the cases of a campaign."""

ON_CTRL_C = signal.getsignal(signal.SIGINT)
"""Of this program."""

NOP = dis.opmap["NOP"]

SECOND = 120
"""How many times Python looks for signals, at most, between an interrupt and a second one: to end a run takes that many."""

POINTS_OF_SLOW = 150
"""How many points of a slow scene a campaign chooses from, inside and outside of :data:`CORE`."""


class Point(NamedTuple):
    """Where an interrupt comes.

    Attributes:
      kind: ``"line"``: before a line of the library; ``"call"``: when Python enters a function, of whatever package, on the
        way from the library; ``"done"``: when a function in C that the library has called returns. At the last two Python
        looks for signals, and not where the library lets a Ctrl-C wait; the first is stricter.
      file, line: of the line, of the function, or of the call.
      visit: the how manieth time a run comes there, from 1.
    """

    kind: str
    file: str
    line: int
    visit: int

    def __str__(self) -> str:
        path = Path(self.file)
        name = path.relative_to(ROOT.parent) if path.is_relative_to(ROOT.parent) else Path(*path.parts[-3:])
        return f"{self.kind} {name}:{self.line} #{self.visit}"


@functools.cache
def _starts(code: CodeType) -> dict[int, int]:
    """The first instruction of each line."""
    found: dict[int, int] = {}
    for start, _, line in code.co_lines():
        if line is not None:
            found.setdefault(line, start)
    return found


@functools.cache
def _withs(file: str) -> frozenset[int]:
    """Numbers of the lines with which a context begins."""
    lines = Path(file).read_text().splitlines()
    return frozenset(number for number, line in enumerate(lines, 1) if line.strip().startswith("with "))


def _takes_no_signal(frame: FrameType) -> bool:
    """Whether the line that comes next is one that a tracer can interrupt, and a signal cannot.

    That is the line of a ``with`` whose block is done, before ``__exit__``, and that of a ``try``, which is an instruction
    of its own that does nothing. Both lie outside of what the statement protects; Python looks for signals at neither.
    """
    code, line = frame.f_code, frame.f_lineno
    if code.co_code[frame.f_lasti] == NOP:
        return True
    return line in _withs(code.co_filename) and frame.f_lasti != _starts(code).get(line)


def _is_torchs(frame: FrameType) -> bool:
    """Whether an interrupt when this function begins ends the wrong one of two transforms, as it does in torch alone."""
    if frame.f_code.co_filename.endswith("torch/_functorch/predispatch.py"):  # begins and ends them
        return True
    caller = frame.f_back
    return caller is not None and caller.f_code.co_name == "custom_function_call_vmap_helper" and level() > 0


def _waits() -> bool:
    """Whether the library lets a Ctrl-C wait, so that none can come here. A line of its own is interrupted all the same."""
    return isinstance(getattr(signal.getsignal(signal.SIGINT), "__self__", None), Waiting)


def _is_inside(frame: FrameType | None) -> bool:
    """Whether the library is on the way to a call: what torch does before and after is none of its."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(str(ROOT)):
            return True
        frame = frame.f_back
    return False


@contextmanager
def traced(visit: Callable[[str, str, int], None]) -> Iterator[None]:
    """Call ``visit(kind, file, line)`` at each point of the block."""

    def at_line(frame: FrameType, event: str, arg: object) -> Any:
        if event == "line" and not _takes_no_signal(frame):
            visit("line", frame.f_code.co_filename, frame.f_lineno)
        return at_line

    def at_call(frame: FrameType, event: str, arg: object) -> Any:
        file = frame.f_code.co_filename
        if file == __file__ or file.startswith("<") or _is_torchs(frame):
            return None
        if not _waits() and _is_inside(frame):
            visit("call", file, frame.f_code.co_firstlineno)
        return at_line if file.startswith(str(ROOT)) else None

    def at_return(frame: FrameType, event: str, arg: object) -> None:
        if event == "c_return" and frame.f_code.co_filename.startswith(str(ROOT)) and not _waits():
            visit("done", frame.f_code.co_filename, frame.f_lineno)

    sys.setprofile(at_return)
    sys.settrace(at_call)
    try:
        yield
    finally:
        sys.settrace(None)
        sys.setprofile(None)


def interrupt_after(times: int) -> Callable[[FrameType, str, object], None]:
    """A profiler that interrupts when Python has looked for signals so many times."""
    left = times

    def profile(frame: FrameType, event: str, arg: object) -> None:
        nonlocal left
        if event in ("call", "c_return") and frame.f_code.co_filename != __file__:
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

    return profile


def visits(act: Callable[[], object]) -> Counter[tuple[str, str, int]]:
    """How often a call comes to each point."""
    found: Counter[tuple[str, str, int]] = Counter()

    def count(*place: Any) -> None:
        found[place] += 1

    with traced(count):
        act()
    return found


def interrupted(act: Callable[[], object], point: Point, again: int = 0) -> str:
    """What comes of a call that is interrupted: ``"interrupt"``, ``"finished"``, or another error.

    Args:
      act: the call.
      point: of the first interrupt.
      again: of a second one, how often Python looks for signals between the two; 0: there is none.
    """
    left = point.visit

    def interrupt(*place: Any) -> None:
        nonlocal left
        if place == point[:3]:
            left -= 1
            if left == 0:
                sys.settrace(None)
                sys.setprofile(interrupt_after(again) if again else None)
                raise KeyboardInterrupt

    unraisable = sys.unraisablehook
    sys.unraisablehook = _unraised
    try:
        with traced(interrupt):
            act()
    except KeyboardInterrupt:
        return "interrupt"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    finally:
        sys.unraisablehook = unraisable
    return "finished"


def _unraised(unraisable: Any) -> None:
    """Python says, and goes on, where an interrupt comes while an object is deleted; the call then goes to its end."""
    if unraisable.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(unraisable)


def _same(actual: object, expected: object) -> bool:
    some, others = ([leaf for leaf in leaves(tree) if isinstance(leaf, torch.Tensor)] for tree in (actual, expected))
    return len(some) == len(others) and all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


class World(NamedTuple):
    """What a call may not change, as values that can be compared."""

    function_modes: int
    dispatch_modes: int
    in_dispatch_mode: bool
    on_ctrl_c: object
    saved_tensors_hooks: object
    transform: bool
    dual_level: int
    grad: bool
    inference: bool
    dtype: torch.dtype
    device: torch.device
    autocast: bool
    stance: str
    generator: bytes
    parts: tuple[object, ...]

    @staticmethod
    def now() -> World:
        return World(
            function_modes=len(_get_current_function_mode_stack()),
            dispatch_modes=len(_python_dispatch._get_current_dispatch_mode_stack()),
            in_dispatch_mode=_python_dispatch.is_in_torch_dispatch_mode(),
            on_ctrl_c=signal.getsignal(signal.SIGINT),
            saved_tensors_hooks=torch._C._autograd._top_saved_tensors_default_hooks(True),
            transform=torch._C._functorch.peek_interpreter_stack() is not None,
            dual_level=torch.autograd.forward_ad._current_level,
            grad=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            dtype=torch.get_default_dtype(),
            device=torch.get_default_device(),
            autocast=torch.is_autocast_enabled("cpu"),
            stance=torch._dynamo.eval_frame._stance.stance,
            generator=torch.get_rng_state().numpy().tobytes(),
            parts=(
                torch.autograd.Function.__dict__["apply"],
                torch.jit.ScriptFunction.__call__,
                torch.utils.checkpoint._checkpoint_without_reentrant_generator,
                torch.utils.checkpoint.CheckpointFunction,
                nn.Module.__call__,
                nn.Module.__getattr__,
                torch.fx._symbolic_trace.is_fx_symbolic_tracing(),
            ),
        )


def left_behind(before: World, scene: Scene) -> list[str]:
    """What an interrupted call has left, in a word or two each."""
    found = [name for name, old, new in zip(World._fields, before, World.now(), strict=True) if old != new]
    for turn in list(TURNS):
        found += ["undo"] * bool(turn._undo) + ["depth"] * bool(turn.depth) + ["lock"] * turn.lock._is_owned()
    found += ["shared change"] * bool(hidden.STANCES or hidden.CHECKPOINTS._runs or hidden.FUNCTIONS._runs)
    for skeleton in scene.skeletons:
        found += ["slot"] * (skeleton._slot.watch is not None)
        if not skeleton.keeps_state:
            tensors = [*skeleton.module.parameters(), *skeleton.module.buffers()]
            found += ["tensor in the skeleton"] * any(not tensor.is_meta for tensor in tensors)
        found += ["attribute"] * any(getattr(m, "steps", 0) for m in skeleton.module.modules() if not skeleton.keeps_state)
    return list(dict.fromkeys(found))


def _state_of(module: nn.Module) -> list[object]:
    """Flags, hooks, attributes and the identities of the tensors of a user's module."""
    return [
        (path, m.training, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks), _held_by(m))
        for path, m in module.named_modules()
    ]


def _held_by(module: nn.Module) -> list[int]:
    """Identities of the tensors that a module holds itself."""
    return [id(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())]


class Case:
    """One scene, with what it must give."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self._x = torch.arange(16.0).reshape(4, 4) / 16
        for _ in range(2):  # twice, for what is cached
            self._expected = self._act()
        self._plain = plain_torch(self._x)
        self._before, self._modules = World.now(), [_state_of(module) for module in scene.modules]

    def _act(self) -> object:
        self.scene.reset()
        return self.scene.act()

    def points(self) -> Counter[tuple[str, str, int]]:
        """How often the scene comes to each point."""
        visits(self.scene.act)  # once more for what is cached
        self.scene.reset()
        return visits(self.scene.act)

    def faults(self, point: Point, again: int = 0) -> tuple[str, list[str]]:
        """What comes of an interrupt, and what is wrong afterwards.

        After a second one, while the first is dealt with, something may be left. It must do nothing, and the next run must
        take it away.
        """
        self.scene.reset()
        outcome = interrupted(self.scene.act, point, again)
        faults = [] if outcome in ("interrupt", "finished") else [f"another error: {outcome}"]
        faults += [] if again else left_behind(self._before, self.scene)
        if self._modules != [_state_of(module) for module in self.scene.modules]:
            faults.append("the user's module")
        try:
            faults += ["the user's own torch"] * (not _same(plain_torch(self._x), self._plain))
            faults += ["the next run"] * (not _same(self._act(), self._expected))
            faults += [f"{what}, after the next run" for what in left_behind(self._before, self.scene)]
        except BaseException as error:
            faults.append(f"the next run raises {type(error).__name__}: {str(error)[:100]}")
        return outcome, faults


def clean() -> None:
    """Take away what a fault has left, so that it is counted once."""
    while _get_current_function_mode_stack():
        torch._C._pop_torch_function_stack()
    while torch._C._len_torch_dispatch_stack():
        torch._C._pop_torch_dispatch_stack(None)
    vars(_python_dispatch).update(_is_in_torch_dispatch_mode=False, _is_in_non_infra_torch_dispatch_mode=False)
    signal.signal(signal.SIGINT, ON_CTRL_C)
    while torch._C._functorch.peek_interpreter_stack() is not None:
        torch._C._functorch.pop_dynamic_layer_stack()
    while torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
    for shared in (hidden.CHECKPOINTS, hidden.FUNCTIONS):
        shared._runs.clear()
        shared._undo()
    while torch.autograd.forward_ad._current_level >= 0:
        torch.autograd.forward_ad.exit_dual_level()
    torch.set_grad_enabled(True)


def points_of(case: Case, seed: int) -> tuple[list[Point], list[Point]]:
    """The points at which a scene is interrupted: those of :data:`CORE`, and others."""
    random_hits = random.Random(seed)
    core, others = [], []
    for (kind, file, line), times in sorted(case.points().items()):
        if file.startswith(CORE):
            later = random_hits.sample(range(2, times + 1), min(HITS - 1, times - 1))
            core += [Point(kind, file, line, visit) for visit in (1, *sorted(later))]
        else:
            others.append(Point(kind, file, line, random_hits.randint(1, times)))
    if case.scene.slow:
        core, others = (random_hits.sample(points, min(POINTS_OF_SLOW, len(points))) for points in (core, others))
    return core, others


class Outcomes(NamedTuple):
    """Of a campaign: how often each outcome, the faults, and how many points there are."""

    counts: Counter[str]
    faults: list[str]
    points: int


def campaign(
    count: int | None,
    seed: int,
    kernels: str = "off",
    only: str = "",
    twice: bool = False,
    seconds: float = math.inf,
    tell: Callable[[str], object] = lambda fault: None,
) -> Outcomes:
    """Interrupt many calls.

    Args:
      count: how many, ``None`` for one at each point; points are chosen by
      seed: and the second time, if any, after a number of steps that it chooses, too.
      kernels: see :func:`~tests.fuzz._scenes.scenes`.
      only: in scenes whose name begins so.
      twice: interrupt each of them twice.
      seconds: after which no further one is interrupted.
      tell: is given each fault when it is found.
    """
    chosen, end = random.Random(seed), time.monotonic() + seconds
    cases = _Cases(kernels)
    core: list[tuple[str, Point]] = []
    others: list[tuple[str, Point]] = []
    for name in cases.names(only):
        inside, outside = points_of(cases[name], seed)
        core += [(name, point) for point in inside]
        others += [(name, point) for point in outside]
    chosen.shuffle(core)
    chosen.shuffle(others)
    count = len(core) + len(others) if count is None else count
    in_core = min(len(core), max(int(count * SHARE_OF_CORE), count - len(others)))
    plan = [*core[:in_core], *others[: count - in_core]]
    chosen.shuffle(plan)
    counts, faults = Counter[str](), []
    for name, point in plan:
        if time.monotonic() > end:
            break
        again = chosen.randint(1, SECOND) if twice else 0
        outcome, found = cases[name].faults(point, again)
        counts[outcome] += 1
        counts.update(f"left: {fault}" for fault in found)
        if found:
            faults.append(f"{name}, {point}{f', again after {again}' if again else ''}: {', '.join(found)}")
            tell(faults[-1])
            clean()
            cases = _Cases(kernels)
    return Outcomes(counts, faults, len(core) + len(others))


class _Cases(dict[str, Case]):
    """Cases by the name of their scene, made when they are needed."""

    def __init__(self, kernels: str) -> None:
        super().__init__()
        self._scenes = scenes(kernels)

    def names(self, only: str) -> list[str]:
        return [name for name in self._scenes if name.startswith(only)]

    def __missing__(self, name: str) -> Case:
        self[name] = Case(self._scenes[name])
        return self[name]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="instead of a count, how long")
    parser.add_argument("--kernels", default="auto", help="of the scenes with a compiled kernel: auto, compiled or off")
    parser.add_argument("--twice", action="store_true", help="interrupt again while the first interrupt is dealt with")
    parser.add_argument("--only", default="", help="scenes whose name begins so")
    options = parser.parse_args()
    start = time.process_time()

    def tell(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    count, seconds = (None, options.seconds) if options.seconds else (options.count, math.inf)
    outcomes = campaign(count, options.seed, options.kernels, options.only, options.twice, seconds, tell)
    for outcome, times in outcomes.counts.most_common():
        tell(f"{times:8}  {outcome}")
    tell(
        f"{len(outcomes.faults):8}  cases with a fault; {outcomes.points} points, {time.process_time() - start:.0f} s of CPU"
    )
    return int(bool(outcomes.faults))


if __name__ == "__main__":
    sys.exit(main())
