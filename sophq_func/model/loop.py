"""The one loop in which a planned model runs, whatever happens to its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from sophq_func.capture.arguments import Arguments, map_inputs
from sophq_func.capture.skeleton import Skeleton
from sophq_func.core.modes import is_compiling
from sophq_func.core.types import Args, Kwargs, Output
from sophq_func.model.runner import Effect, Runner
from sophq_func.model.schedule import Schedule

Later = Mapping[str, Callable[[], Tensor]]
"""By name, parameters that are computed when the layer that reads them starts."""

MakeRunner = Callable[[Schedule], Runner]
"""Makes the runner of one run."""


@dataclass(frozen=True)
class Loop:
    """A skeleton and a schedule, ready to run.

    ``apply``, ``observe``, ``capture``, ``tap``, the integer executor and every export are this loop with another effect
    on the planned values, or with a runner that does more than apply an effect.

    Attributes:
      skeleton: the model without its weights.
      schedule: at which calls quantizers act.
      arguments: names of the model's arguments.
      copied: names of the arguments that are cloned first, because the model writes into them; ``None``: all, where it is
        not known which.
      late: paths of the layers whose parameters may be computed when they start.
      bare: the skeleton of runs that only apply an effect, where hooks would have nothing to report; ``None``: there is
        none, see :meth:`bared`.
    """

    skeleton: Skeleton
    schedule: Schedule
    arguments: Arguments
    copied: frozenset[str] | None
    late: frozenset[str]
    bare: Skeleton | None = None

    def on(self, skeleton: Skeleton) -> Loop:
        """The same loop over another skeleton of the same model."""
        return replace(self, skeleton=skeleton, bare=None)

    def bared(self) -> Loop:
        """The same loop, with a skeleton that reports only where something happens, if the model is a chain of modules."""
        if not self.skeleton.calls_leaves_alone or self.skeleton.keeps_state or self.schedule.tells_apart:
            return self
        return replace(self, bare=self.skeleton.bare(self.schedule.acting_leaves | self.late))

    def run(
        self,
        params: Mapping[str, Tensor],
        effect: Effect,
        args: Args,
        kwargs: Kwargs,
        later: Later | None = None,
        watch: MakeRunner | None = None,
    ) -> tuple[Output, dict[str, Tensor]]:
        """Run the model once.

        Args:
          params: every parameter and buffer, as the layers shall read them.
          effect: what happens to a planned value.
          args, kwargs: of the model.
          later: parameters of the layers :attr:`late` that are computed when these start. They need a schedule or a runner.
          watch: makes the runner, which sees each call; by default one that applies the effect and does nothing else.

        Returns:
          The model's output, and its buffers afterwards.

        Raises:
          StateError: the run made other calls than the examples.
        """
        own = _Own(self.copied)
        # a module writes into what it is given, such as a cache; only an argument with a quantizer is replaced
        only = self.schedule.arguments if self.skeleton.keeps_state else None
        if watch is None and not self.schedule:  # nothing to do at any call: run without a frame, which is faster
            args, kwargs = map_inputs(self.arguments, args, kwargs, own, only)
            skeleton = self.skeleton if self.bare is None or is_compiling() else self.bare
            return skeleton.run(None, params, args, kwargs)
        runner = Runner.of(self.schedule, effect) if watch is None else watch(self.schedule)
        skeleton = self.bare if self.bare is not None and runner.sees_leaves_alone else self.skeleton
        takes = (lambda name, x: runner.input(name, own(name, x))) if runner.takes_inputs else own
        args, kwargs = map_inputs(self.arguments, args, kwargs, takes, only)
        if self.schedule.same:  # only now, as these arguments become what the effect made of the first one
            args, kwargs = map_inputs(self.arguments, args, kwargs, runner.repeated_input, only)
        output, buffers = skeleton.run(runner, params, args, kwargs, later)
        runner.check()
        return output, buffers


class _Own:
    """Tensors among the arguments of one run as the model may have them: clones of those that it writes into.

    A tensor that is given as several arguments has one clone.
    """

    def __init__(self, copied: frozenset[str] | None) -> None:
        self._copied = copied
        self._clones: list[tuple[Tensor, Tensor]] = []

    def __call__(self, name: str, x: Tensor) -> Tensor:
        for given, clone in self._clones:
            if given is x:
                return clone
        if self._copied is not None and name not in self._copied:
            return x
        self._clones.append((x, x.clone()))
        return self._clones[-1][1]
