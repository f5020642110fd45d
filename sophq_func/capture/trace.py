"""Record one run of a model as a :class:`~sophq_func.capture.graph.Graph`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import AsyncGeneratorType, CoroutineType, GeneratorType

import torch
from torch import Tensor, nn

from sophq_func.capture.arguments import Arguments, arguments, map_inputs
from sophq_func.capture.calls import restoring
from sophq_func.capture.contents import params_of, registered_tensors
from sophq_func.capture.functions import as_module, name_of, signature
from sophq_func.capture.graph import Graph
from sophq_func.capture.recorder import Recorder
from sophq_func.capture.skeleton import Skeleton
from sophq_func.core.errors import PlanError, explain
from sophq_func.core.modes import writes_into
from sophq_func.core.public import public
from sophq_func.core.pytree import flatten, tensors
from sophq_func.core.randomness import kept_generators
from sophq_func.core.types import Args, Kwargs, Output, Tree

UNFINISHED = (GeneratorType, CoroutineType, AsyncGeneratorType, map, filter)
"""Objects that compute later."""


@public
@restoring
def trace(
    model: nn.Module | Callable[..., Output],
    args: Tree = (),
    kwargs: Kwargs | None = None,
    *,
    params: Tree = None,
    leaf_module: tuple[type, ...] = (),
) -> Graph:
    """Run ``model`` once on an example and record its calls and dataflow; the model is not changed.

    The example runs in the grad mode of the caller, since a model may ask for derivatives in its forward. Parameters are
    detached, so that autograd keeps nothing for a model that does not.

    Args:
      model: any module, or a function of params and inputs. Python control flow takes the branches that the example takes.
      args: positional arguments of the example; a single tensor counts as a tuple of it.
      kwargs: keyword arguments of the example.
      params: of a function, the tree that it takes first; see :func:`sophq_func.quantize`.
      leaf_module: further module classes that are recorded as one call, without the calls inside.

    Returns:
      The :class:`~sophq_func.capture.graph.Graph` of leaf modules and functions, in execution order.

    Raises:
      PlanError: the example does not fit ``forward``, or the model cannot be copied, or writes in place into a tensor that
        is an attribute but no buffer, or returns a generator or a coroutine.

    Example:
      >>> graph = trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), (torch.ones(1, 2),))
      >>> graph
      Graph(input: 2 calls)
      >>> print(graph)
      Graph(input):
        0(input)
        1(0)
    """
    if isinstance(model, torch.jit.ScriptModule):
        fix = "quantize the module from which it was scripted or traced"
        raise PlanError(explain("trace", "a ScriptModule runs where no call of it can be seen", fix=fix))
    model = as_module(model, params, "trace")
    given = params_of(model)
    args, kwargs = _checked_call(model, args, kwargs)
    opaque = tuple(path for path, module in model.named_modules() if leaf_module and isinstance(module, leaf_module))
    skeleton = Skeleton(model, opaque)
    frame = Recorder(skeleton, {id(tensor): name for name, tensor in registered_tensors(model).items()})
    versions = [writes_into(constant) for constant in skeleton.constants]
    versions_of_params = {name: writes_into(tensor) for name, tensor in given.items()}
    with kept_generators([*given.values(), *tensors((args, kwargs))]):
        args, kwargs = map_inputs(arguments(model), args, kwargs, frame.input)
        try:
            output, _ = skeleton.run(frame, given, args, kwargs)
        except Exception as error:
            if any(tensor.is_meta for tensor in given.values()) and not _on_meta((args, kwargs)):
                raise _offloaded(model, given) from error
            raise
    # that it ran with numbers, though its parameters have none, was the work of hooks
    if not _on_meta(output) and any(given[name].is_meta for name in frame.reached()):
        raise _offloaded(model, given)
    if versions != [writes_into(constant) for constant in skeleton.constants]:
        sentence = "forward must not write in place into a tensor that is a plain attribute"
        because = "a run is a pure function of parameters and buffers"
        fix = "self.register_buffer(name, tensor)"
        raise PlanError(explain(name_of(model), sentence, because=because, fix=fix))
    if skeleton.structure is not None:
        written = [name for name, version in versions_of_params.items() if writes_into(given[name]) != version]
        if written:
            sentence, because = "a function must not write into its params", "a run is a pure function of them"
            fix = "write into a clone, and return it if it is a new state"
            raise PlanError(explain(name_of(model), sentence, got=written, because=because, fix=fix))
    _check_finished(output, model)
    graph = frame.graph(output, model, opaque)
    graph.example = _without_numbers(args, kwargs)
    return graph


def _check_finished(output: Output, model: nn.Module) -> None:
    """Raise a :class:`PlanError` for an output that computes when somebody asks for its items: then the run is over."""
    for leaf in flatten(output)[0]:
        if not isinstance(leaf, UNFINISHED):
            continue
        if isinstance(leaf, CoroutineType):
            leaf.close()  # else Python warns that nobody has awaited it
        sentence, got = "forward returns what it has not computed yet", type(leaf).__name__
        because = "quantizers act during a run alone, which ends with forward"
        fix = "return tensors, as in list(...) of a generator; await around q.apply, not in forward"
        raise PlanError(explain(name_of(model), sentence, got=got, because=because, fix=fix))


def _without_numbers(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
    """The arguments of a call with tensors on ``meta``; ``None`` where some are neither tensors nor plain values."""
    leaves, rebuild = flatten((args, kwargs))
    if not all(isinstance(leaf, Tensor | str | int | float | bool | None) for leaf in leaves):
        return None
    empty = [torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    example: tuple[Args, Kwargs] = rebuild(empty)
    return example


def _on_meta(tree: Tree) -> bool:
    """Whether a tree holds tensors on the ``meta`` device, or none at all."""
    found = tensors(tree)
    return not found or any(tensor.is_meta for tensor in found)


def _offloaded(model: nn.Module, params: Mapping[str, Tensor]) -> PlanError:
    """The error for parameters without numbers, in a model that is given numbers."""
    names = [name for name, tensor in params.items() if tensor.is_meta]
    sentence = "parameters are on the meta device, and the example is not"
    because = "hooks that load them when a layer starts, as those of offloading do, would replace the params of a run"
    fix = (
        "load the model whole, or take the hooks off (accelerate.hooks.remove_hook_from_module(model, recurse=True)); "
        "or plan with an example on meta, and give the numbers as params"
    )
    shown = names[:3] + ["..."] * (len(names) > 3)
    return PlanError(explain(name_of(model), sentence, got=shown, because=because, fix=fix))


@restoring
def retrace(skeleton: Skeleton, params: Mapping[str, Tensor], args: Args, kwargs: Kwargs, names: Arguments) -> Graph:
    """Like :func:`trace`, for a skeleton and given parameters; ``names`` are the names of the model's arguments."""
    frame = Recorder(skeleton)
    with kept_generators([*params.values(), *tensors((args, kwargs))]):
        args, kwargs = map_inputs(names, args, kwargs, frame.input)
        output, _ = skeleton.run(frame, params, args, kwargs)
    return frame.graph(output, skeleton.module, ())


def _checked_call(model: nn.Module, args: object, kwargs: object) -> tuple[Args, dict[str, Tree]]:
    """The example as positional and keyword arguments, checked against the signature of ``forward``."""
    fix = "example_args=(x,) and example_kwargs={'name': x}, as in model(x, name=x)"
    if not isinstance(args, Tensor | tuple | list):
        raise _example_error("args", args, "a tuple", fix)
    if not isinstance(kwargs, Mapping | None):
        raise _example_error("kwargs", kwargs, "a dict", fix)
    positional = (args,) if isinstance(args, Tensor) else tuple(args)
    keywords = dict(kwargs or {})
    try:
        signature(model).bind(*positional, **keywords)
    except TypeError as error:
        sentence = f"{name_of(model)} cannot be called with this example"
        raise PlanError(explain("trace", sentence, because=str(error), fix=fix)) from error
    return positional, keywords


def _example_error(argument: str, got: object, allowed: str, fix: str) -> PlanError:
    sentence = f"{argument} of the example must be {allowed}"
    return PlanError(explain("trace", sentence, got=type(got).__name__, allowed=allowed, fix=fix))
