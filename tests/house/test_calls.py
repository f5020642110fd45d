"""Every public function and constructor, called wrongly in each of its arguments: one error of the library's classes.

A valid call of each is written down; the wrong ones are made from it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq

ERRORS = (sq.ConfigError, sq.PlanError, sq.StateError)
OUTCOMES = frozenset(
    "Artifact Checkpoint ChipComparison ChipRow Coverage Fidelity Graph HessianTrace Left Moments Plan QParams Quantized "
    "Report ReportRow Sensitivities Sensitivity Site Staged TopEigenvalue".split()
)
"""Classes whose instances the library returns; ``QParams``, of which every run makes many, is a plain NamedTuple."""
EXCEPTIONS = frozenset("CheckpointError ConfigError PlanError PlanWarning StateError".split())
NAMESPACES = {"observers": sq.observers, "fake_quantize": sq.fake_quantize, "export": sq.export, "presets": sq.presets}
NAMESPACES |= {"algorithms": sq.algorithms, "register": sq.register, "testing": sq.testing}
SHORT = {"LawError", "Tables"}


class Wrong:
    """A value of a type that nothing takes."""

    def __repr__(self) -> str:
        return "a wrong value"


class Ready(NamedTuple):
    model: nn.Module
    x: Tensor
    graph: sq.Graph
    q: sq.Quantized
    params: dict[str, Tensor]
    qparams: dict[str, sq.QParams]


@functools.cache
def ready() -> Ready:
    model, x = nn.Linear(2, 3), torch.ones(4, 2)
    graph = sq.trace(model, (x,))
    q = sq.build(model, sq.plan(graph, sq.QuantConfig()))
    params = sq.params_of(model)
    return Ready(model, x, graph, q, params, q.calibrate(params, [x], progress=False))


Call = tuple[tuple[Any, ...], dict[str, Any]]


def calls(folder: Path) -> dict[str, Call]:
    """A valid call of each function and constructor that takes arguments, with as many of them as it has a value for."""
    r = ready()
    config = sq.QuantizerConfig(scheme=sq.QScheme(), observer="minmax", fake_quantize="fixed")
    loss = lambda params: params["weight"].square().sum()  # noqa: E731
    noise = {"weight": torch.ones(1, 3, 2)}
    algorithm = (r.q, r.params, r.qparams, [r.x])
    tensor_qparams = sq.QParams(torch.tensor(1.0), torch.tensor(0), {})
    return {
        "ChipSpec": ((), {"weight": config, "activation": config, "weight_bits": (8,)}),
        "FakeQuantize": (tuple(sq.fake_quantizer("fixed")[:2]), {}),
        "Observer": ((), sq.observer("minmax")._asdict()),
        "PerBlock": ((), {"rows": 2, "columns": 2}),
        "PerChannel": ((), {"axis": 0}),
        "PerGroup": ((), {"size": 4, "axis": 0}),
        "PerTensor": ((), {}),
        "PerToken": ((), {}),
        "QScheme": ((), {"bits": 8, "symmetric": True, "granularity": "per_channel", "dynamic": False}),
        "QuantConfig": ((), {"chip": "BM1690", "strategy": "CNN", "weight": None, "rules": (), "patterns": ()}),
        "QuantizerConfig": ((), {"scheme": sq.QScheme(), "observer": "minmax", "fake_quantize": "lsq", "optional": True}),
        "Rule": ((), {"name": "a", "weight": None, "activation": None, "requests": True}),
        "Spec": (("minmax",), {"options": ()}),
        "build": ((r.model, r.q.plan), {"kernels": "off"}),
        "cast": ((r.qparams, torch.float64), {}),
        "compare_chip": ((r.q, r.params, r.qparams, folder, r.x), {"outputs": "outputs.npz"}),
        "convert": ((r.q, r.params, r.qparams), {"example_args": (r.x,)}),
        "draw": ((r.q.plan, folder / "plan.png"), {}),
        "enabled": ((r.qparams, True), {}),
        "fake_quantizer": (("fixed",), {}),
        "fidelity": ((r.q, r.params, r.qparams, r.x), {}),
        "from_dicts": (({"quant_dict": {"chip": "BM1690", "quantmode": "weight_activation", "strategy": "CNN"}},), {}),
        "hessian_trace": ((loss, r.params, noise), {"chunk_size": 1}),
        "lerp": ((r.qparams, r.qparams, 0.5), {}),
        "load": ((folder / "none.safetensors",), {}),
        "load_into": ((nn.Linear(2, 3), r.params), {}),
        "merge": (r.q.split(r.qparams), {}),
        "observer": (("minmax",), {}),
        "override": ((), {"bits": 4, "granularity": "per_channel", "observer": "mse", "symmetric": True}),
        "pack": ((torch.ones(4, dtype=torch.uint8), 4), {}),
        "params_of": ((r.model,), {}),
        "plan": ((r.graph, sq.QuantConfig()), {}),
        "prepare_by_platform": (
            (r.model, {"quant_dict": {"chip": "BM1690", "quantmode": "weight_activation", "strategy": "CNN"}}),
            {"example_args": (r.x,), "kernels": "off"},
        ),
        "quantize": ((r.model, sq.QuantConfig()), {"example_args": (r.x,), "kernels": "off"}),
        "rademacher": ((r.params, ["weight"], 1, torch.Generator()), {}),
        "report": ((r.q, r.params, r.qparams, [r.x]), {"how": "auto", "progress": False}),
        "save": ((folder / "a.safetensors",), {"plan": r.q.plan, "qparams": r.qparams, "params": r.params}),
        "sensitivity": ((r.q, r.params, r.qparams, r.x, torch.sum), {"how": "auto", "progress": False}),
        "split_params": ((r.model,), {}),
        "stack": (([r.qparams, r.qparams],), {}),
        "stage": ((torch.sin,), {"backend": "eager"}),
        "skip_guards_on_quantized": (([],), {}),
        "statistics": ((r.q, r.params, [r.x], r.qparams), {"where": "weight_fake_quant", "progress": False}),
        "top_eigenvalue": ((loss, r.params, {"weight": torch.ones(3, 2)}), {"steps": 1}),
        "trace": ((r.model, (r.x,)), {}),
        "unpack": ((torch.ones(2, dtype=torch.uint8), 4, (4,), False), {}),
        "unstack": ((sq.stack([r.qparams, r.qparams]),), {}),
        "with_bits": ((r.qparams, r.q.plan, 4), {}),
        "algorithms.adam": ((0.1,), {"decay": (0.9, 0.999), "eps": 1e-8}),
        "algorithms.adaround": (algorithm, {"steps": 1, "progress": False}),
        "algorithms.at_widths": (({8: r.qparams}, {"weight_fake_quant": 8}, r.qparams), {}),
        "algorithms.bit_operations": ((r.q, r.params, r.x), {"names": ()}),
        "algorithms.bit_sensitivity": ((r.q, r.params, {8: r.qparams}, [r.x]), {"how": "loop", "progress": False}),
        "algorithms.brecq": (algorithm, {"steps": 1, "progress": False}),
        "algorithms.choose_bits": (({"a": {8: 0.1}}, {"a": 1.0}, 8.0), {"tie": ()}),
        "algorithms.correct_biases": (algorithm, {"order": "local", "progress": False}),
        "algorithms.equalizable": ((r.q, r.params, r.x), {}),
        "algorithms.equalize": (algorithm, {"where": "weight_fake_quant", "progress": False}),
        "algorithms.from_ptq_config": (({"pattern": "layer"},), {}),
        "algorithms.pareto": (({"a": {8: 0.1}}, {"a": 1.0}), {"budgets": 2, "tie": ()}),
        "algorithms.qdrop": (algorithm, {"steps": 1, "progress": False}),
        "algorithms.reconstruct": (algorithm, {"units": "layer", "steps": 1, "learn": "both", "progress": False}),
        "algorithms.reestimate_norms": (algorithm, {"where": "weight_fake_quant", "progress": False}),
        "algorithms.sizes": ((r.q,), {}),
        "algorithms.trace_sensitivity": (
            (r.q, r.params, {8: r.qparams}, loss, torch.Generator()),
            {"samples": 1, "chunk_size": 1},
        ),
        "algorithms.untie": ((torch.nn.Linear(2, 2), dict(torch.nn.Linear(2, 2).named_parameters())), {}),
        "algorithms.awq": (algorithm, {"alpha": 0.5, "where": "weight_fake_quant", "progress": False}),
        "algorithms.clip": (algorithm, {"where": "weight_fake_quant", "progress": False}),
        "algorithms.clip_solve": ((torch.ones(3, 2), torch.eye(2), sq.QScheme(), tensor_qparams), {}),
        "algorithms.gptq": (algorithm, {"order": "storage", "damping": 0.1, "sweeps": 1, "inputs": "float"}),
        "algorithms.gptq_solve": (
            (torch.ones(3, 2), torch.eye(2), sq.QScheme(), tensor_qparams),
            {"order": "storage", "damping": 0.1, "sweeps": 1},
        ),
        "algorithms.rotate": (algorithm, {"generator": torch.Generator(), "progress": False}),
        "algorithms.smooth": (algorithm, {"alpha": 0.5, "where": "weight_fake_quant", "progress": False}),
        "fake_quantize.fake_quantizer": (("fixed",), {}),
        "observers.observer": (("minmax",), {}),
        "fake_quantize.hessian_update": ((torch.zeros(2, 2), torch.tensor(0), torch.ones(3, 2)), {}),
        "fake_quantize.rectified_sigmoid": ((torch.zeros(2),), {}),
        "export.torch": ((r.q, r.params, r.qparams, (r.x,)), {}),
        "export.onnx": ((r.q, r.params, r.qparams, (r.x,), folder / "a.onnx"), {}),
        "export.tables": ((r.q, r.params, r.qparams, folder), {"work_mode": "QAT_all_int8", "compiler": "sophgo-mq"}),
        "presets.w4a16": ((), {"group": 8, "symmetric": True}),
        "presets.w4a8": ((), {"group": 8}),
        "presets.fp8": ((), {"dynamic": True}),
        "presets.mxfp4": ((), {"weight_only": True}),
        "presets.nvfp4": ((), {"weight_only": True}),
        "presets.w8a8": ((), {"rules": ()}),
        "presets.w4a4_lsq": ((), {"rules": ()}),
        "presets.w8a8_per_token": ((), {"rules": ()}),
        "register.algorithm": (("mine",), {"rounds": True, "keeps_float": False, "resumes": False, "options": {}}),
        "register.chip": (("mine", sq.CHIPS.get("BM1690")), {}),
        "register.fake_quantizer": (("mine",), {}),
        "register.format": (("mine", sq.formats.float_(3, 4)), {}),
        "register.observer": (("mine",), {}),
        "register.pattern": (("Mine", nn.Linear, nn.Softsign), {}),
        "register.strategy": (("mine", sq.strategies.PLACEMENTS.get("CNN")), {}),
        "testing.check_algorithm": (("equalize",), {"without": ()}),
        "testing.check_chip": (("BM1690",), {}),
        "testing.check_fake_quantizer": (("fixed",), {"slow": False}),
        "testing.check_format": (("e4m3",), {}),
        "testing.check_observer": (("minmax",), {"slow": False}),
        "testing.check_strategy": (("CNN",), {}),
    }


def public() -> dict[str, Callable[..., Any]]:
    """Everything that users call, by dotted name."""
    found = {name: getattr(sq, name) for name in sq.__all__ if name not in OUTCOMES | EXCEPTIONS}
    for room, module in NAMESPACES.items():
        found |= {f"{room}.{name}": getattr(module, name) for name in module.__all__ if name not in SHORT}
    return {name: item for name, item in found.items() if callable(item)}


PUBLIC = public()
SPECS = [name for name in PUBLIC if name.startswith(("observers.", "fake_quantize.")) and name.partition(".")[2] not in
         ("observer", "fake_quantizer", "hessian_update", "rectified_sigmoid")]  # fmt: skip
"""The functions of registered pieces, all of whose arguments are options."""
OTHERS = [name for name in PUBLIC if name not in SPECS]


def parameters(item: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(item).parameters


def refused(item: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The message of the one error of the library."""
    with pytest.raises(ERRORS) as caught:
        item(*args, **kwargs)
    return str(caught.value)


def test_a_valid_call_of_each_is_written_down(tmp_path: Path) -> None:
    assert set(calls(tmp_path)) == set(OTHERS)


@pytest.mark.parametrize("name", OTHERS)
def test_a_misspelt_keyword_is_named_with_the_right_one(name: str, tmp_path: Path) -> None:
    args, kwargs = calls(tmp_path)[name]
    known = parameters(PUBLIC[name])
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        pytest.skip("further keywords belong to a piece or to the model")
    named = [
        key
        for key, parameter in known.items()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    text = refused(PUBLIC[name], *args, **{**kwargs, f"{named[-1]}x" if named else "x": 1})
    assert f"'{named[-1]}x' is not known, did you mean '{named[-1]}'" in text if named else "'x' is not known" in text


@pytest.mark.parametrize("name", SPECS)
def test_a_misspelt_option_is_named_with_the_right_one(name: str) -> None:
    for option in parameters(PUBLIC[name]):
        text = refused(PUBLIC[name], **{f"{option}x": 1})
        assert f"option '{option}x' is not known" in text and repr(option) in text
    assert "too many positional arguments" in refused(PUBLIC[name], *[None] * 9)


VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
BY_KEYWORD = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def replaced(name: str, call: Call, other: Callable[[object], Iterator[object]]) -> Iterator[tuple[str, Call]]:
    """The call with each argument in turn replaced by another value; the arguments of a model are its own."""
    args, kwargs = call
    own = [key for key, parameter in parameters(PUBLIC[name]).items() if parameter.kind not in VARIADIC]
    for i, key in enumerate(own[: len(args)]):
        for value in other(args[i]):
            yield f"{key}={value!r}", ((*args[:i], value, *args[i + 1 :]), kwargs)
    for key in kwargs:
        for value in other(kwargs[key]):
            yield f"{key}={value!r}", (args, {**kwargs, key: value})


def unrefused(name: str, calls: Iterator[tuple[str, Call]]) -> list[str]:
    """Which of the calls raise no error of the library."""
    found = []
    for which, (args, kwargs) in calls:
        try:
            PUBLIC[name](*args, **kwargs)
        except ERRORS:
            continue
        except Exception as error:
            found.append(f"{which}: {type(error).__name__}: {error}")
        else:
            found.append(f"{which}: accepted")
    return found


def of_another_type(value: object) -> Iterator[object]:
    yield Wrong()


def of_another_value(value: object) -> Iterator[object]:
    """A text that names nothing, a number that nothing has, a mapping without what is needed."""
    if isinstance(value, str):
        yield "no such thing"
    if isinstance(value, int) and not isinstance(value, bool):
        yield -999_999
    if isinstance(value, dict) and value:
        yield {"no such thing": next(iter(value.values()))}


FREE = {
    "PerChannel": "axis: a tensor says later which axes it has",
    "PerGroup": "axis: a tensor says later which axes it has",
    "Rule": "name: a model says later which names it has",
    "Spec": "name: a piece may be registered later",
    "cast": "qparams: no plan says which names there are",
    "enabled": "qparams: no plan says which names there are",
    "register.algorithm": "name: any text is one",
    "register.chip": "name: any text is one",
    "register.fake_quantizer": "name: any text is one",
    "register.format": "name: any text is one",
    "register.observer": "name: any text is one",
    "register.strategy": "name: any text is one",
    "save": "params: the plan does not know all names of the model",
    "unstack": "settings: no plan says which names there are",
    "with_bits": "qparams: those of a part of the model will do",
}
"""The one argument of a call whose other value is not wrong, and why."""


@pytest.mark.parametrize("name", OTHERS)
def test_a_value_of_a_wrong_type_is_one_error_in_every_argument(name: str, tmp_path: Path) -> None:
    assert unrefused(name, replaced(name, calls(tmp_path)[name], of_another_type)) == []


@pytest.mark.parametrize("name", OTHERS)
def test_a_wrong_value_is_one_error_in_every_argument(name: str, tmp_path: Path, scratch_registries: None) -> None:
    found = unrefused(name, replaced(name, calls(tmp_path)[name], of_another_value))
    free = FREE.get(name, "").partition(":")[0]
    assert [
        problem for problem in found if not (free and problem.startswith(f"{free}=") and problem.endswith(": accepted"))
    ] == []
