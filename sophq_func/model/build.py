"""From a model and a config, or the three dictionaries, to a :class:`~sophq_func.model.quantized.Quantized`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from sophq_func.capture.functions import as_module, signature
from sophq_func.capture.skeleton import Skeleton
from sophq_func.capture.trace import trace
from sophq_func.config.dicts import from_dicts
from sophq_func.config.rules import QuantConfig
from sophq_func.core.errors import ConfigError, PlanError, explain
from sophq_func.core.public import public
from sophq_func.core.types import Kwargs, Output, Tree
from sophq_func.model.bound import Bound
from sophq_func.model.fits import check_fits
from sophq_func.model.quantized import Quantized
from sophq_func.numerics.kernels import Kernels
from sophq_func.planning.make import plan as make_plan
from sophq_func.planning.plan import Plan

Model: TypeAlias = nn.Module | Callable[..., Output]
"""A module, or a function of params and inputs."""

ExampleArgs: TypeAlias = Tree
"""Positional arguments of one call of a model: a tuple or list of them, or a tensor that is the only one."""

Example: TypeAlias = tuple[ExampleArgs, Kwargs | None]
"""One call of a model."""


Shapes: TypeAlias = Sequence[Sequence[int]] | Mapping[str, Sequence[int]]
"""Shapes of a model's inputs, in order or by name."""


@public
def build(model: Model, plan: Plan, *, params: Tree = None, kernels: Kernels = "auto") -> Quantized:
    """Bind a plan to a model. The model is copied without its weights and never changed.

    Args:
      model: the traced model, or one of the same structure.
      plan: from :func:`sophq_func.plan` or :meth:`Plan.from_json`.
      params: of a function, the tree that it takes first, see :func:`quantize`; its numbers are not read.
      kernels: whether a compiled kernel does the work of quantizers on integer grids, in eager on a CPU. ``"auto"``: if an
        earlier call has compiled it; nothing is waited for. ``"compiled"``: it is compiled now if it is not there, which
        takes half a minute once for each version of torch and of this library. ``"off"``: never. Values and gradients of
        tensors are the same, bit for bit; gradients of scales differ by the order of a sum.

    Raises:
      PlanError: the plan does not fit the model: it names parameters, modules, arguments or quantizers that are not there,
        axes or groups that a weight does not have, or other calls than its examples make.
      ConfigError: ``kernels="compiled"`` without a C++ compiler, or another value than these.

    Example:
      >>> import torch, sophq_func as sq
      >>> model, x = nn.Linear(2, 3), torch.ones(1, 2)
      >>> build(model, sq.plan(sq.trace(model, (x,)), sq.QuantConfig()))
      Quantized(Linear, Plan(1 weight and 1 activation quantizers, digest ...), training=True)
    """
    _refuse_quantized(model, "build")
    model = as_module(model, params, "build")
    if not isinstance(plan, Plan):
        sentence, fix = "a model is built from a plan", "plan = sq.plan(sq.trace(model, (x,)), sq.QuantConfig())"
        raise PlanError(explain("build", sentence, got=type(plan).__name__, allowed="a sq.Plan", fix=fix))
    skeleton = Skeleton(model, plan.opaque)
    check_fits(skeleton, plan)
    return Quantized(skeleton, plan, kernels=kernels)


@public
def quantize(
    model: Model,
    config: QuantConfig,
    *,
    params: Tree = None,
    example_args: ExampleArgs = (),
    example_kwargs: Kwargs | None = None,
    examples: Sequence[Example] | None = None,
    kernels: Kernels = "auto",
) -> Quantized:
    """Trace, plan and build in one call.

    Args:
      model: any ``nn.Module``, or a function ``f(params, *args, **kwargs)``; it is not changed.
      config: how values and weights are quantized, and where.
      params: of a function, the tree that it takes first: nested dicts, lists, tuples, dataclasses, and what else torch's
        pytree takes apart. Its tensors are the parameters, named by their paths, as in ``{"l1": {"w": ...}}`` the tensor
        ``l1.w``. ``None``, numbers, strings and functions among the leaves are constants.
      example_args: positional arguments of one call of the model, a tuple or a single tensor.
      example_kwargs: keyword arguments of that call.
      examples: instead, several calls ``[(args, kwargs), ...]``; the plan is the union of their traces.
      kernels: see :func:`build`.

    Raises:
      ConfigError, PlanError: see :func:`sophq_func.plan` and :func:`sophq_func.trace`.

    Example:
      >>> import torch, sophq_func as sq
      >>> model, x = nn.Linear(2, 3), torch.ones(1, 2)
      >>> q = quantize(model, sq.QuantConfig(), example_args=(x,))
      >>> params = sq.params_of(model)
      >>> q.apply(params, q.calibrate(params, [x]), x).shape
      torch.Size([1, 3])
      >>> tree = {"l1": {"w": torch.ones(2, 3)}}
      >>> q = quantize(lambda p, x: torch.tanh(x @ p["l1"]["w"]), sq.QuantConfig(), params=tree, example_args=(x,))
      >>> list(q.plan)
      ['x.post_act_fake_quantizer', 'l1.w_fake_quant']
    """
    if not isinstance(config, QuantConfig):
        fix = "sq.QuantConfig(), sq.presets.w8a8(), or sq.from_dicts(...) of the three dictionaries"
        sentence, got = "a model is quantized by a config", type(config).__name__
        raise ConfigError(explain("quantize", sentence, got=got, allowed="sq.QuantConfig", fix=fix))
    calls = [(example_args, example_kwargs)] if examples is None else list(examples)
    if not all(_is_pair(call) for call in calls):
        sentence, fix = "these examples cannot be traced", "examples=[((x,), {}), ((y,), {})]"
        raise PlanError(explain("quantize", sentence, allowed="pairs of a tuple and a dict", fix=fix))
    _refuse_quantized(model, "quantize")
    module = as_module(model, params, "quantize")
    graphs = [trace(module, args, kwargs, leaf_module=config.leaves) for args, kwargs in calls]
    return build(module, make_plan(graphs, config), kernels=kernels)


def _refuse_quantized(model: object, where: str) -> None:
    """Raise a :class:`PlanError` for a model that is quantized, or holds a bound one whose values have quantizers."""
    allowed, fix = "a torch.nn.Module, or a function with params=", "give the float model that it was made of"
    if isinstance(model, Quantized | Bound):
        sentence, got = "the model is quantized already", type(model).__name__
        raise PlanError(explain(where, sentence, got=got, allowed=allowed, fix=fix))
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, Bound) and not module.is_plain:
            sentence, because = f"{path} is quantized already", "its own quantizers act at the calls that would be planned"
            raise PlanError(explain(where, sentence, because=because, fix=fix))


def _of_shapes(shapes: Shapes, module: nn.Module) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional and keyword arguments of these shapes."""
    where, allowed, fix = "prepare_by_platform", "a list of shapes, or a dict of them by name", "[[1, 3, 224, 224]]"
    listed = list(shapes.values() if isinstance(shapes, Mapping) else shapes) if isinstance(shapes, Collection) else []
    if not listed or not all(map(_is_shape, listed)):
        sentence = "input_shape_dict holds no shapes"
        raise ConfigError(explain(where, sentence, got=shapes, allowed=allowed, fix=f"input_shape_dict={fix}"))
    # A generator of its own: the caller's random numbers stay where they are.
    generator = torch.Generator().manual_seed(0)
    tensors = tuple(torch.rand(*shape, generator=generator) for shape in listed)
    if not isinstance(shapes, Mapping):
        return tensors, {}
    arguments = signature(module).parameters
    takes_any_name = any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values())
    if not takes_any_name and not set(shapes) <= set(arguments):
        # sophgo-mq's scripts name inputs as the ONNX file shall name them, which says nothing of the model's arguments.
        sentence, fix = "input_shape_dict names inputs that the model does not have", f"input_shape_dict={listed}"
        raise ConfigError(explain(where, sentence, got=list(shapes), allowed=list(arguments), fix=fix))
    # In the order of the model's signature, as positional arguments are, whatever order the dict has.
    order = [*(name for name in arguments if name in shapes), *(name for name in shapes if name not in arguments)]
    named = dict(zip(shapes, tensors, strict=True))
    return (), {name: named[name] for name in order}


def _is_shape(shape: object) -> bool:
    return isinstance(shape, list | tuple) and all(isinstance(size, int) and size > 0 for size in shape)


def _is_pair(call: object) -> bool:
    return isinstance(call, tuple | list) and len(call) == 2


@public
def prepare_by_platform(
    model: Model,
    prepare_custom_config_dict: Mapping[str, object],
    *,
    params: Tree = None,
    example_args: ExampleArgs = (),
    example_kwargs: Kwargs | None = None,
    examples: Sequence[Example] | None = None,
    input_shape_dict: Shapes | None = None,
    kernels: Kernels = "auto",
) -> Quantized:
    """:func:`quantize` with the three dictionaries of sophgo-mq's fine-grained control.

    Args:
      model: any ``nn.Module``, or a function; it is not changed.
      prepare_custom_config_dict: ``quant_dict``, ``extra_qconfig_dict``, ``extra_quantizer_dict``, see
        :func:`sophq_func.from_dicts`.
      params, example_args, example_kwargs, examples: see :func:`quantize`.
      input_shape_dict: instead of an example, the shapes of a model's floating inputs, in order or by name. It runs on
        uniform numbers between 0 and 1; a plan holds none of them.

    Raises:
      ConfigError: see :func:`sophq_func.from_dicts`; shapes that are none, or an example besides.

    Differs from sophgo-mq: ``input_shape_dict`` may be a dict, which there fails in silence; positional, the second
    argument is the dictionaries, as sophgo-mq's document writes it.

    Example:
      >>> import torch
      >>> quant_dict = {"chip": "BM1690", "quantmode": "weight_activation", "strategy": "CNN"}
      >>> q = prepare_by_platform(nn.Linear(2, 3), {"quant_dict": quant_dict}, example_args=(torch.ones(1, 2),))
      >>> list(q.plan)
      ['input.post_act_fake_quantizer', 'weight_fake_quant', 'linear.post_act_fake_quantizer']
    """
    config = from_dicts(prepare_custom_config_dict)
    if input_shape_dict is not None:
        has_args = isinstance(example_args, Tensor) or bool(example_args)
        if has_args or example_kwargs is not None or examples is not None:
            sentence, fix = "shapes and an example are given, which may differ", "leave input_shape_dict out"
            raise ConfigError(explain("prepare_by_platform", sentence, fix=fix))
        example_args, example_kwargs = _of_shapes(input_shape_dict, as_module(model, params, "prepare_by_platform"))
    return quantize(
        model,
        config,
        params=params,
        example_args=example_args,
        example_kwargs=example_kwargs,
        examples=examples,
        kernels=kernels,
    )
