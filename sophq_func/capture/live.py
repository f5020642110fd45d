"""A skeleton whose modules are a model of its own: they hold tensors between runs, and keep what a run changes.

It is what a bound model runs with. A run puts quantized weights in the place of the parameters, and puts these back when
it ends; what the model writes into buffers and attributes stays, as it does in any module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from sophq_func.capture._torch import links
from sophq_func.capture.aliases import filled
from sophq_func.capture.frame import Frame, ModuleInfo, enter, leave, unhook
from sophq_func.capture.lazy import Deferred
from sophq_func.capture.skeleton import Result, Skeleton, bind
from sophq_func.capture.turns import Turn
from sophq_func.core import modes
from sophq_func.core.errors import StateError, explain
from sophq_func.core.types import Args, Kwargs, Output, Tree

ANEW = "plan the changed model, and bind it anew"
"""The fix in errors about a bound model that was changed."""


class Live(Skeleton):
    """A skeleton around a module that has the structure of its model, and hooks.

    Attributes: see :class:`~sophq_func.capture.skeleton.Skeleton`; ``entry`` shares the attributes of the given module, and
    is of the model's own class, so that a run calls the model's own forward.

    Args:
      skeleton: the names and places are its.
      root: a copy of the skeleton's module, with tensors, and maybe further submodules.
      kind: the class of the model.
      forward: what the model has in the place of the forward of its class, if anything.
    """

    keeps_state = True

    def __init__(
        self, skeleton: Skeleton, root: nn.Module, kind: type[nn.Module], forward: Callable[..., Output] | None = None
    ) -> None:
        inner = _of_class(kind, root)
        vars(self).update(skeleton.__getstate__())
        self.module = inner
        self._forward = partial(kind.forward, inner) if forward is None else forward
        self._module_at = dict(inner.named_modules())
        self._links = list(links(inner))
        info: ModuleInfo = inner._sophq_info  # type: ignore[assignment]
        self._slot = info.slot
        self._turn = Turn()
        alone = {name: holders[0][0] for name, holders in self._holders.items() if len(holders) == 1}
        layers = {name for name, path in alone.items() if self.deferrable(path, name)}
        self._read_by_layers = [place[:3] for place in self._stored() if place.name in layers]

    def close(self, errors: Mapping[str, str]) -> None:
        """Let modules refuse to be called outside of a run: by path, what their errors say."""
        self._slot.closed = errors

    def alone(self) -> AbstractContextManager[object]:
        """A context in which no other thread runs the model; Dynamo cannot trace a lock."""
        if modes.is_compiling():
            return nullcontext()
        self._turn.settle_left()
        return self._turn.lock

    def is_training(self, path: str) -> bool:
        """Whether the module at a path is in training mode."""
        return bool(self._module_at[path].training)

    def tensors(self) -> dict[str, Tensor]:
        """The parameters and buffers that the modules hold, by canonical name.

        Raises:
          StateError: a module, or a tensor that two of them share, was replaced in one place.
        """
        for children, name, child in self._links:
            if children.get(name) is not child:
                raise _changed(name, "this module was replaced or removed after the model was bound")
        found: dict[str, Tensor] = {}
        for store, attribute, name in self._stores():
            tensor = store.get(attribute)
            if tensor is None:
                raise _changed(name, "this parameter was removed after the model was bound")
            if found.setdefault(name, tensor) is not tensor:
                raise _changed(name, "two modules share this tensor in the plan, and now hold different ones")
        return found

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors into the modules, and into attributes that hold them a second time."""
        for store, attribute, name in self._stores():
            store[attribute] = tensors[name]
        for path, attribute, template in self._aliases:
            self._module_at[path].__dict__[attribute] = filled(template, tensors)

    def write(self, buffers: Mapping[str, Tensor]) -> None:
        """Write numbers into buffers, in place; in a compiled run, bind the buffers to new tensors."""
        if not buffers:
            return
        with torch.no_grad():
            for store, attribute, name in self._stores():
                if name not in buffers:
                    continue
                # of a buffer that a program writes into, its backward pass takes the new numbers for the old ones
                if modes.is_compiling():
                    store[attribute] = buffers[name].detach()
                else:
                    store[attribute].copy_(buffers[name])

    def run(
        self,
        frame: Frame | None,
        params: Mapping[str, Tensor],
        args: Args,
        kwargs: Kwargs,
        later: Mapping[str, Callable[[], Tensor]] | None = None,
    ) -> Result:
        """Call the model, see :meth:`Skeleton.run`; returns its output, and the buffers into which it has written.

        A buffer that the model has bound to another tensor stays so, without its derivative.
        """
        compiling = modes.is_compiling() if frame is None else frame.mode.compiling
        if frame is None and not compiling:
            frame = Frame()  # a checkpoint, which computes again in the backward pass, needs one
        if frame is not None and not compiling:
            params, later = self._deferred(params, later or {})
            frame.deferred = Deferred(later, params) if later else None
        run = partial(self._run, partial(self._call_bound, self._call_entry), frame, params, args, kwargs)
        return run() if compiling else self._turn.take(run)

    def _deferred(
        self, params: Mapping[str, Tensor], later: Mapping[str, Callable[[], Tensor]]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Callable[[], Tensor]]]:
        """Parameters as the modules hold them, and functions that return what their layers shall read instead.

        A hook on a layer, such as one for gradients of single examples, then finds the parameters that are learned.
        """
        own = {name: store[attribute] for store, attribute, name in self._read_by_layers}
        own = {name: tensor for name, tensor in own.items() if params[name] is not tensor}
        now = {name: partial(_itself, params[name]) for name in own}
        return {**params, **own}, {**now, **later}

    def _run(
        self,
        call: Callable[[Mapping[str, Tensor], Args, Kwargs], Result],
        frame: Frame | None,
        params: Mapping[str, Tensor],
        args: Args,
        kwargs: Kwargs,
    ) -> Result:
        held = [(self._module_at[path].__dict__, attribute) for path, attribute, _ in self._aliases]
        before = [attributes[attribute] for attributes, attribute in held]
        try:
            return super()._run(call, frame, params, args, kwargs)
        finally:
            for (attributes, attribute), value in zip(held, before, strict=True):
                attributes[attribute] = value

    def _rerun(
        self, now: Mapping[str, Tensor], frame: Frame, fn: Callable[..., Output], args: Args, kwargs: Kwargs
    ) -> Output:
        output, _ = self._turn.take(partial(self._run, partial(super()._call_bound, fn), frame, now, args, kwargs))
        return output

    def _call_bound(self, fn: Callable[..., Output], now: Mapping[str, Tensor], args: Args, kwargs: Kwargs) -> Result:
        held = list(self._stored())
        try:
            output, buffers = super()._call_bound(fn, now, args, kwargs)
        finally:
            bind(held)
        rebound = {name: tensor.detach() for name, tensor in buffers.items() if tensor is not now[name]}
        if rebound:
            for store, attribute, name in self._stores():
                store[attribute] = rebound.get(name, store[attribute])
        return output, {name: now[name] for name in buffers.keys() - rebound.keys() if self._may_be_written(name, now[name])}

    def _may_be_written(self, name: str, buffer: Tensor) -> bool:
        """Whether a run has written into a buffer, as far as torch tells."""
        # a compiler does not say, and a norm in training mode writes without being counted
        if modes.is_compiling() or any(self.is_training(path) for path, _ in self._holders[name]):
            return True
        return modes.writes_into(buffer) != 0  # a run begins with clones, into which nobody has written

    def _call_entry(self, *args: Tree, **kwargs: Tree) -> Output:
        """Call the model's forward, and report the call; hooks of the model itself run around the bound model."""
        root = self.entry
        given, named = enter(root, args, kwargs) or (args, kwargs)
        output = None
        try:
            output = self._forward(*given, **named)
        finally:
            replaced = leave(root, given, named, output)
        return output if replaced is None else replaced


def without_hooks(module: nn.Module, inside: bool) -> None:
    """Take the hooks of a skeleton off a module, and off those inside it if these are to report nothing either."""
    for part in module.modules() if inside else [module]:
        unhook(part)


def _itself(value: Tensor) -> Tensor:
    return value


def _of_class(kind: type[nn.Module], module: nn.Module) -> nn.Module:
    """Another object with the same attributes, in the same dict, of another class."""
    other: nn.Module = object.__new__(kind)
    object.__setattr__(other, "__dict__", vars(module))
    return other


def _changed(name: str, sentence: str) -> StateError:
    return StateError(explain(name, sentence, fix=ANEW))
