"""Functions recorded once for each kind of arguments, and from then on run as flat programs, as ``jax.jit`` does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Generic, Literal, NamedTuple, ParamSpec, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor, nn

from sophq_func.capture._torch import compiled_by_inductor, metadata_guard
from sophq_func.capture.outside import GONE, Places, places
from sophq_func.capture.program import record, source
from sophq_func.core.errors import ConfigError, PlanError, explain, raise_all, unknown
from sophq_func.core.modes import is_plain_eager, recording_for_compiler
from sophq_func.core.public import public
from sophq_func.core.pytree import Structure, flatten, node_of, refilled, steps_to_leaves, taken_apart
from sophq_func.core.types import Output, Tree

P = ParamSpec("P")
R = TypeVar("R")

Backend: TypeAlias = Literal["eager", "inductor"]
"""What runs a program: torch's operators one by one, or what inductor makes of them."""

AUTOCAST = ("cpu", "cuda")
"""Devices whose autocast is a part of what a program was recorded for."""


class CacheInfo(NamedTuple):
    """How often a staged function found a program.

    Attributes:
      hits: calls for which there was one.
      misses: calls for which one was recorded.
      size: how many there are.
    """

    hits: int
    misses: int
    size: int


class Lowered:
    """The program for one kind of arguments, to look at."""

    def __init__(self, text: str) -> None:
        self._text = text

    def text(self) -> str:
        """A line for each input, and the program: Python that calls torch's operators."""
        return self._text

    def __repr__(self) -> str:
        return f"Lowered({len(self._text.splitlines())} lines)"


class Staged(Generic[P, R]):
    """A function that runs as flat programs, see :func:`sophq_func.stage`."""

    def __init__(self, f: Callable[P, R], backend: Backend) -> None:
        functools.update_wrapper(self, f, updated=())
        self._function = f
        self._backend: Backend = backend
        self._programs: list[_Program] = []
        self._hits = self._misses = 0

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        # transforms, compilers and recorders see through: the function itself composes with them
        if not is_plain_eager():
            return self._function(*args, **kwargs)
        leaves, structure = taken_apart((args, kwargs))
        found = self._found(leaves, structure)
        if found is None:
            self._misses += 1
            found = _recorded(self._function, leaves, structure, self._backend)
            self._programs.insert(0, found[0])
        else:
            self._hits += 1
        program, inputs = found
        return program.run(inputs)  # type: ignore[no-any-return]

    def lower(self, *args: P.args, **kwargs: P.kwargs) -> Lowered:
        """The program that a call with these arguments would run."""
        leaves, structure = taken_apart((args, kwargs))
        program, _ = self._found(leaves, structure) or _recorded(self._function, leaves, structure, "eager")
        return Lowered(program.text)

    def cache_info(self) -> CacheInfo:
        """How many calls found a program, for how many one was recorded, and how many there are."""
        return CacheInfo(self._hits, self._misses, len(self._programs))

    def cache_clear(self) -> None:
        """Forget all programs."""
        self._programs = []
        self._hits = self._misses = 0

    def __reduce__(self) -> tuple[type[Staged], tuple[Callable[P, R], Backend]]:
        """A copy records its own programs, which cannot be pickled."""
        return Staged, (self._function, self._backend)

    def __repr__(self) -> str:
        name = getattr(self._function, "__qualname__", type(self._function).__name__)
        return f"Staged({name}, backend={self._backend!r}, programs={len(self._programs)})"

    def _found(self, leaves: list[Tree], structure: Structure) -> tuple[_Program, list[Tensor]] | None:
        """The program for these arguments, if there is one, and its inputs."""
        around = _around()
        for program in self._programs:
            inputs = program.inputs(leaves, structure, around)
            if inputs is not None:
                return program, inputs
        return None


@public
def stage(f: Callable[P, R], backend: Backend = "eager") -> Staged[P, R]:
    """``f`` as flat programs: recorded at the first call with arguments of one kind, and run without Python around.

    A program holds the operators that torch ran for ``f``, and nothing of models, quantizers and transforms: a small
    network takes a fraction of the time, above all under ``grad``, ``vmap`` and ``jvp``. With the backend ``"eager"`` it
    gives the same bits as ``f``. Recording takes as long as a few hundred calls; ``"inductor"`` takes longer still, adds up
    in another order as ``torch.compile`` does, and has no guards of Dynamo at each call.

    Arguments are of one kind if they have the same structure, and their tensors the same shapes, strides, dtypes, devices
    and ``requires_grad``; other leaves, such as numbers, must be equal. The grad mode and autocast are a part of it, too.

    Tensors that ``f`` reads from its closure, its globals or what these hold are read again at each call, however they
    were changed or bound anew. All else that Python reads there (numbers, flags such as ``model.training``) is what it was
    when the program was recorded. Random numbers of torch are drawn anew at each run, by the same operators.

    A program records no gradient: stage what computes one, ``sq.stage(torch.func.grad(loss))``. A staged function under a
    transform or ``torch.compile`` is ``f`` itself.

    Args:
      f: a function of trees of tensors: dicts, lists, tuples and NamedTuples.
      backend: what runs the programs.

    Returns:
      A function that is called as ``f`` is, with ``lower(*args).text()``, ``cache_info()`` and ``cache_clear()``.

    Raises:
      PlanError: at a call, if what ``f`` computes depends on numbers in tensors (``.item()``, ``if x > 0``,
        ``x[x > 0]``), if it draws random numbers of Python or numpy or from a generator, if its output requires a
        gradient, if it writes into an argument, or if it reads a tensor that is neither an argument nor found in its
        closure.

    Example:
      >>> def loss(w, x):
      ...     return (x @ w).relu().sum()
      >>> step = stage(torch.func.grad(loss))
      >>> w, x = torch.ones(2, 1), torch.ones(3, 2)
      >>> step(w, x).flatten(), step(2 * w, x).flatten(), step.cache_info()
      (tensor([3., 3.]), tensor([3., 3.]), CacheInfo(hits=1, misses=1, size=1))
      >>> print(stage(loss).lower(w, x).text())
      # arg0_1: 0, float32[2, 1]
      # arg1_1: 1, float32[3, 2]
      def program(arg0_1, arg1_1):
          mm = _aten_mm_default(arg1_1, arg0_1)
          arg1_1 = arg0_1 = None
          relu = _aten_relu_default(mm)
          mm = None
          sum_1 = _aten_sum_default(relu)
          relu = None
          return [sum_1]
    """
    if backend not in get_args(Backend):
        raise ConfigError(unknown("stage", "backend", backend, get_args(Backend)))
    if not callable(f):
        raise ConfigError(explain("stage", "it takes a function", got=type(f).__name__, fix="sq.stage(q.apply)"))
    return Staged(f, backend)


class _Outputs(NamedTuple):
    """What a function returned, without its tensors.

    Attributes:
      leaves: of the output; ``None`` in the place of each tensor.
      tensors: where the tensors are among them.
      structure: of the output, where it consists of dicts, lists and tuples; else
      shell: the output itself, with the leaves above.
    """

    leaves: list[Tree]
    tensors: list[int]
    structure: Structure | None
    shell: Output

    def filled(self, tensors: Sequence[Tensor]) -> Output:
        leaves: list[Tree] = list(self.leaves)
        for index, tensor in zip(self.tensors, tensors, strict=True):
            leaves[index] = tensor
        return refilled(self.shell, leaves) if self.structure is None else self.structure.unflatten(leaves)


class _Program(NamedTuple):
    """A program, and what it was recorded for.

    Attributes:
      structure: of the arguments.
      around: see :func:`_around`.
      tensors: where the tensors are among the leaves of the arguments.
      others: where the other leaves are, and what they were.
      outside: where the tensors are held that are no arguments.
      guard: whether the tensors of the arguments and from outside have the metadata of those of the recording.
      read: which of these the program reads: of others it may need no more than the shape.
      function: the program.
      outputs: what is made of these.
      text: the program, to look at.
    """

    structure: Structure
    around: tuple[object, ...]
    tensors: list[int]
    others: list[tuple[int, object]]
    outside: Places
    guard: Callable[..., bool]
    read: list[int]
    function: Callable[..., Sequence[Tensor]]
    outputs: _Outputs
    text: str

    def inputs(self, leaves: list[Tree], structure: Structure, around: tuple[object, ...]) -> list[Tensor] | None:
        """The tensors of the arguments and from outside; ``None`` if it was recorded for another kind of arguments."""
        if structure != self.structure or around != self.around:
            return None
        if not all(type(leaves[i]) is type(other) and leaves[i] == other for i, other in self.others):
            return None
        try:
            inputs = [leaves[i] for i in self.tensors] + self.outside.read()
        except GONE:
            return None
        # before the guard, which takes nothing but tensors
        is_fitting = all(isinstance(tensor, Tensor) for tensor in inputs) and self.guard(*inputs)
        return inputs if is_fitting else None

    def run(self, inputs: list[Tensor]) -> Output:
        """The output. What was recorded is below autograd and autocast, and so must not go through them again."""
        is_grad = torch.is_grad_enabled()
        cast = [device for device, (is_cast, _) in zip(AUTOCAST, self.around[-1], strict=True) if is_cast]  # type: ignore[call-overload]
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                for device in cast:
                    stack.enter_context(torch.autocast(device, enabled=False))
                return self.outputs.filled(self.function(*[inputs[i] for i in self.read]))
        except BaseException:  # an interrupt when a context begins to end keeps it from ending
            torch.set_grad_enabled(is_grad)
            for device in cast:
                torch.set_autocast_enabled(device, True)
            raise


def _around() -> tuple[object, ...]:
    """What else decides which operators a function runs."""
    autocast = tuple((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in AUTOCAST)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), autocast


def _recorded(
    f: Callable[..., Output], leaves: list[Tree], structure: Structure, backend: Backend
) -> tuple[_Program, list[Tensor]]:
    """A program for these arguments, and its inputs."""
    _check_arguments(leaves, structure)
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    outputs: list[_Outputs] = []

    def flat(*inputs: Tensor) -> list[Tensor]:
        filled = list(leaves)
        for index, tensor in zip(tensors, inputs, strict=True):
            filled[index] = tensor
        args, kwargs = structure.unflatten(filled)
        found, made = _taken_apart(f(*args, **kwargs))
        outputs.append(made)
        return found

    given = [leaves[i] for i in tensors]
    with recording_for_compiler(backend == "inductor"):
        module, outside, read = record(flat, given)
    held, lost = places(f, outside)
    _check_outside(lost)
    inputs = [*given, *outside]
    steps = steps_to_leaves(structure)
    names = [*(_argument(steps[i]) for i in tensors), *held.names]
    program = source(module, [f"{names[i]}, {_described(inputs[i])}" for i in read])
    function: Callable[..., Sequence[Tensor]] = program.function
    if backend == "inductor":
        function = compiled_by_inductor(module, [inputs[i].detach() for i in read])
    made = _Program(
        structure=structure,
        around=_around(),
        tensors=tensors,
        others=[(i, leaf) for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)],
        outside=held,
        guard=metadata_guard(inputs),
        read=read,
        function=function,
        outputs=outputs[-1],
        text=program.text,
    )
    return made, inputs


def _check_arguments(leaves: list[Tree], structure: Structure) -> None:
    """Raise a :class:`PlanError` about arguments that cannot be inputs of a program."""
    problems = []
    for step, leaf in zip(steps_to_leaves(structure), leaves, strict=True):
        kind = type(leaf).__name__
        if isinstance(leaf, Tensor) and (type(leaf) not in (Tensor, nn.Parameter) or leaf.layout != torch.strided):
            sentence = f"argument {_argument(step)} must be a plain tensor"
            problems.append(explain("stage", sentence, got=kind, fix="call the function itself with it"))
        elif not isinstance(leaf, Tensor) and not isinstance(leaf, nn.Module) and node_of(leaf) is not None:
            sentence = f"argument {_argument(step)} cannot be taken apart"
            problems.append(explain("stage", sentence, got=kind, allowed="dicts, lists, tuples and NamedTuples of tensors"))
    raise_all(problems, PlanError)


def _argument(step: str) -> str:
    """The name of an argument's leaf, whose path starts with 0 for one by position, and with 1 for one by keyword."""
    return step.partition(".")[2]


def _check_outside(lost: list[Tensor]) -> None:
    """Raise a :class:`PlanError` about tensors that are read from places which cannot be read again."""
    if lost:
        shapes = ", ".join(map(_described, lost[:3])) + ", ..." * (len(lost) > 3)
        sentence = f"the function reads tensors that are neither arguments nor found in its closure ({shapes})"
        because = "a program would not notice that they were replaced"
        raise PlanError(explain("stage", sentence, because=because, fix="pass them as arguments"))


def _described(tensor: Tensor) -> str:
    """The dtype and shape of a tensor."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _taken_apart(output: Output) -> tuple[list[Tensor], _Outputs]:
    """The tensors of what a function returned, and the rest."""
    leaves, found = taken_apart(output)
    structure: Structure | None = found
    if any(not isinstance(leaf, Tensor) and node_of(leaf) is not None for leaf in leaves):
        structure = None
        leaves, _ = flatten(output)
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    # filled with these, the shell keeps no tensor alive
    shell = None if structure else refilled(output, rest)
    return [leaves[i] for i in tensors], _Outputs(rest, tensors, structure, shell)
