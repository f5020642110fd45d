"""What every way out has in common: the numbers of ``q.apply``, or one refusal with one reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import sophq_func as sq
from tests.helpers import Ready, ready
from tests.runtime import LEVELS, computed, onnx, session

pytestmark = pytest.mark.slow

TPU = sq.QuantConfig(chip="BM1690", strategy="CNN")
LAYERS = sq.QuantConfig(strategy="Layers")
SIXTEEN = sq.QuantConfig(weight=sq.override(bits=16), activation=sq.override(bits=16))


def in_onnx_runtime(
    made: Ready, x: Tensor, folder: Path, level: Any = LEVELS.ORT_ENABLE_ALL, **options: Any
) -> list[Tensor]:
    """What ONNX Runtime computes with the file."""
    path = folder / "net.onnx"
    sq.export.onnx(made.q, made.params, made.qparams, x, path, **options)
    return computed(path, {session(path).get_inputs()[0].name: x}, level)


def is_near(actual: Tensor, expected: Tensor, steps: float = 1.001, levels: int = 255) -> None:
    """At most a step of the grid before the last layer apart, where codes on a tie may fall to either side."""
    largest = expected.double().abs().max()
    assert (actual.double() - expected.double()).abs().max() <= steps * largest / levels * 2


class Pair(nn.Module):
    """Two layers with a ReLU in between, so that there is a grid behind the first one's bias."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


# biases beyond int32


def convolutions() -> tuple[nn.Module, Tensor]:
    return Pair(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)), 1e-4 * torch.randn(2, 4, 5, 5)


def linears() -> tuple[nn.Module, Tensor]:
    return Pair(nn.Linear(4, 4), nn.Linear(4, 2)), 1e-4 * torch.randn(6, 4)


def linears_of_three_axes() -> tuple[nn.Module, Tensor]:
    return Pair(nn.Linear(4, 4), nn.Linear(4, 2)), 1e-4 * torch.randn(2, 3, 4)


def grouped() -> tuple[nn.Module, Tensor]:
    return Pair(nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 2, 1)), 1e-4 * torch.randn(2, 4, 5, 5)


def with_large_bias(make: Callable[[], tuple[nn.Module, Tensor]], config: sq.QuantConfig) -> tuple[Ready, Tensor]:
    """A model whose first bias, 5, takes far more than 2 ** 31 steps of weight scale times input scale."""
    model, x = make()
    model.first.weight.data.mul_(1e-2)
    model.first.bias.data.fill_(5.0)
    model.second.bias.data.fill_(1.0)
    return ready(model.eval(), x, config=config), x


MODELS = (convolutions, linears, linears_of_three_axes, grouped)


@pytest.mark.parametrize("config", [TPU, sq.QuantConfig(), SIXTEEN], ids=["TPU", "default", "16 x 16"])
@pytest.mark.parametrize("make", MODELS)
def test_a_rounded_bias_beyond_int32_is_refused_by_all(make: Any, config: sq.QuantConfig, tmp_path: Path) -> None:
    made, x = with_large_bias(make, config)
    assert made.q.plan.site("first.weight_fake_quant").source
    why = "its bias takes .* steps of weight scale times input scale, int32 holds 2147483520"
    with pytest.raises(sq.StateError, match=f"first.bias: the bias does not fit in int32 .*{why}"):
        sq.convert(*made)
    with pytest.raises(sq.ConfigError, match=f"first.weight_fake_quant: export.onnx cannot express .*{why}"):
        sq.export.onnx(*made, x, tmp_path / "net.onnx")
    with pytest.raises(sq.ConfigError, match=f"first.weight_fake_quant: the tables cannot hold .*{why}"):
        sq.export.tables(*made, tmp_path, compiler="sophgo-mq")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", MODELS)
def test_it_is_right_where_it_stays_real(make: Any, tmp_path: Path) -> None:
    made, x = with_large_bias(make, LAYERS)
    expected = made(x)
    is_near(sq.convert(*made).run(x), expected)
    is_near(in_onnx_runtime(made, x, tmp_path, LEVELS.ORT_DISABLE_ALL)[0], expected)
    path = tmp_path / "net.onnx"
    is_near(computed(path, {session(path).get_inputs()[0].name: x})[0], expected)


@pytest.mark.parametrize("make", [convolutions, linears_of_three_axes])
def test_a_simulated_bias_is_right_of_any_size(make: Any, tmp_path: Path) -> None:
    simulated, x = with_large_bias(make, TPU)
    is_near(in_onnx_runtime(simulated, x, tmp_path, simulate=True)[0], simulated(x))
    is_near(sq.export.torch(*simulated, x).module()(x), simulated(x))


def transposed() -> tuple[nn.Module, Tensor]:
    return Pair(nn.ConvTranspose2d(4, 4, 2), nn.Conv2d(4, 2, 1)), torch.randn(2, 4, 5, 5)


def behind_a_move() -> tuple[nn.Module, Tensor]:
    return Pair(nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 4, 1)), nn.Conv2d(4, 2, 1)), torch.randn(2, 4, 6, 6)


LEFT_OUT = sq.QuantConfig(rules=(sq.Rule(name="first*", weight=None),))


@pytest.mark.parametrize("make", [linears, grouped, transposed, behind_a_move])
def test_weights_that_a_rule_leaves_out_stay_real_behind_a_grid(make: Any, tmp_path: Path) -> None:
    made, x = with_a_large_weight(make, LEFT_OUT)
    is_near(in_onnx_runtime(made, x, tmp_path)[0], made(x))


@pytest.mark.parametrize("make", [convolutions, linears_of_three_axes])
def test_simulated_weights_stay_real_behind_a_grid(make: Any, tmp_path: Path) -> None:
    made, x = with_a_large_weight(make, sq.QuantConfig(weight=sq.override(bits=16)))
    is_near(in_onnx_runtime(made, x, tmp_path, simulate=True)[0], made(x))


def with_a_large_weight(make: Callable[[], tuple[nn.Module, Tensor]], config: sq.QuantConfig) -> tuple[Ready, Tensor]:
    """A model whose first layer has one weight, which multiplies zeros, beside which all others would be 0 in 8 bits."""
    model, x = make()
    x = x / x.abs().max()
    weight = next(model.first.parameters()).data
    inputs = weight[0] if make is transposed else weight[:, 0]
    channels = x.movedim(-1 if x.ndim < 4 else 1, 0)
    inputs.fill_(1e3)
    channels[:: 2 if make is grouped else len(channels)].zero_()  # each group reads the first of its own
    return ready(model.eval(), x, config=config), x


def test_channels_of_zero_weights_get_the_scale_that_their_bias_needs(tmp_path: Path) -> None:
    model, x = convolutions()
    model.first.weight.data[0] = 0
    model.first.bias.data.copy_(torch.tensor([3e-2, 1e-5, 1e-5, 1e-5]))
    model.second.bias.data.fill_(1.0)
    made = ready(model.eval(), x, config=TPU)
    artifact = sq.convert(*made)
    sq.export.onnx(*made, x, tmp_path / "net.onnx")
    found = {
        t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy())
        for t in onnx.load(tmp_path / "net.onnx").graph.initializer
    }
    assert torch.equal(found["first.weight_scale"], artifact.tensors["first.weight.scale"])
    assert torch.equal(found["first.bias_quantized"], artifact.tensors["first.bias.codes"])
    bias = artifact.tensors["first.bias.codes"][0] * artifact.tensors["first.bias.scale"][0]
    torch.testing.assert_close(bias, torch.tensor(3e-2))
    tables = sq.export.tables(*made, tmp_path, compiler="sophgo-mq")
    steps = [float(s) for s in tables.calibration.read_text().split("#weight_scale")[1].split()[2:6]]
    assert steps[0] == pytest.approx(float(artifact.tensors["first.weight.scale"][0]), abs=1e-7)
    is_near(computed(tmp_path / "net.onnx", {"x": x})[0], made(x))


# dtypes


def normalized() -> tuple[nn.Module, Tensor]:
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
    return nn.Sequential(*layers), torch.randn(2, 3, 6, 6)


def perceptron() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4)), torch.randn(5, 8)


def transposed() -> tuple[nn.Module, Tensor]:
    layers = nn.ConvTranspose1d(4, 4, 2, stride=2), nn.ReLU(), nn.Conv1d(4, 2, 3)
    return nn.Sequential(*layers), torch.randn(2, 4, 6)


@pytest.mark.parametrize(
    ("make", "dtype", "simulate"),
    [
        (normalized, torch.float16, False),
        (normalized, torch.float64, True),
        (normalized, torch.bfloat16, False),
        (perceptron, torch.float64, False),
        (perceptron, torch.bfloat16, True),
        (transposed, torch.float16, True),
        (transposed, torch.float64, False),
    ],
)
def test_models_of_other_dtypes(make: Any, dtype: torch.dtype, simulate: bool, tmp_path: Path) -> None:
    model, x = make()
    model, x = model.eval().to(dtype), x.to(dtype)
    made = ready(model, x)
    expected = made(x)
    # a rounding of the model's dtype may move a code, and a code is a step
    steps = 1 + 255 * 4 * torch.finfo(dtype).eps
    program = sq.export.torch(*made, x, simulate=simulate).module()
    assert program(x).dtype == dtype
    is_near(program(x), expected, steps)
    sq.export.onnx(*made, x, tmp_path / "net.onnx", simulate=simulate)
    if dtype != torch.bfloat16:  # which numpy does not have
        (output,) = computed(tmp_path / "net.onnx", {"input": x})
        assert output.dtype == dtype
        is_near(output, expected, steps)
    is_near(sq.convert(*made).run(x), expected, steps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_scales_of_other_dtypes_are_written_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = normalized()
    q, params, qparams = ready(model.eval(), x)
    exact = {name: entry._replace(scale=entry.scale.to(dtype)) for name, entry in qparams.items()}
    same = {name: entry._replace(scale=entry.scale.float()) for name, entry in exact.items()}
    for path, scales in ("other.onnx", exact), ("float.onnx", same):
        sq.export.onnx(q, params, scales, x, tmp_path / path)
    assert (tmp_path / "other.onnx").read_bytes() == (tmp_path / "float.onnx").read_bytes()


class Cast(nn.Module):
    """A model that insists on its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.half())


def test_a_model_that_casts_itself_is_refused_with_the_reason(tmp_path: Path) -> None:
    x = torch.randn(2, 4).half()
    made = ready(Cast().eval().half(), x)
    with pytest.raises(sq.ConfigError, match=r"a model in torch\.float16 is exported in float32, and this one cannot be"):
        sq.export.onnx(*made, x, tmp_path / "net.onnx")
    with pytest.raises(sq.ConfigError, match=r"a model in torch\.float16 is exported in float32, and this one cannot be"):
        sq.export.torch(*made, x)


# outputs


@dataclass
class Detections:
    boxes: Tensor
    scores: Tensor | dict[str, Any]


class Heads(nn.Module):
    """Two outputs in a container of the given kind."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.pack = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1), pack

    def forward(self, x: Tensor) -> Any:
        return self.pack(self.a(x), self.b(x))


OUTPUTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], list[str], dict[str, str]]] = {
    "dict": (lambda a, b: {"boxes": a, "scores": b}, ["boxes", "scores"], {}),
    "None": (lambda a, b: {"boxes": a, "aux": None, "scores": b}, ["boxes", "scores"], {}),
    "number": (lambda a, b: {"boxes": a, "stride": 8, "scores": b}, ["boxes", "scores"], {"output.stride": "8"}),
    "string": (lambda a, b: {"boxes": a, "format": "xywh", "scores": b}, ["boxes", "scores"], {"output.format": "xywh"}),
    "dataclass": (Detections, ["boxes", "scores"], {}),
    "nested": (
        lambda a, b: [Detections(a, {"x": b, "n": 0.5})],
        ["0.boxes", "0.scores.x"],
        {"output.0.scores.n": "0.5"},
    ),
    "size": (lambda a, b: (a, b, a.shape[0]), ["0", "1", "2"], {}),
    "tuple": (lambda a, b: (a, (True, b)), ["0", "1.1"], {"output.1.0": "True"}),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_have_their_names_and_what_is_no_tensor_is_metadata(kind: str, tmp_path: Path) -> None:
    pack, names, metadata = OUTPUTS[kind]
    model, x = Heads(pack).eval(), torch.randn(2, 3, 4, 4)
    made = ready(model, x)
    plain = ready(Heads(lambda a, b: (a, b)).eval(), x)
    expected = plain.q.apply(made.params, made.qparams, x)
    found = in_onnx_runtime(made, x, tmp_path)
    proto = onnx.load(tmp_path / "net.onnx")
    assert [output.name for output in proto.graph.output] == names
    assert {prop.key: prop.value for prop in proto.metadata_props} == metadata
    for actual, wanted in zip(found, expected, strict=False):
        is_near(actual, wanted)
    if kind == "size":
        assert found[2] == 2
    program = sq.export.torch(*made, x).module()(x)
    if kind == "dataclass":
        is_near(program["boxes"], expected[0])
        is_near(program["scores"], expected[1])


def test_an_object_in_the_output_is_refused(tmp_path: Path) -> None:
    made = ready(Heads(lambda a, b: (a, object())).eval(), torch.randn(2, 3, 4, 4))
    for export in (lambda x: sq.export.onnx(*made, x, tmp_path / "net.onnx"), lambda x: sq.export.torch(*made, x)):
        with pytest.raises(sq.ConfigError, match=r"the output '1' cannot be exported: got 'object'.*use_cache=False"):
            export(torch.randn(2, 3, 4, 4))


# derived weights


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.s = nn.Parameter(torch.randn(32, 16, 9)), nn.Parameter(torch.rand(32, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.w * self.s)


class Standardized(nn.Conv1d):
    """Weight standardization (arXiv:1903.10520)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2), keepdim=True)
        return F.conv1d(x, weight / (weight.std((1, 2), keepdim=True) + 1e-5), self.bias)


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(288, 288))
        self.a, self.b = nn.Parameter(torch.randn(288, 2)), nn.Parameter(torch.randn(2, 288))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.weight + self.a @ self.b)


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def own_parametrization() -> nn.Module:
    layer = nn.Conv1d(16, 32, 9)
    parametrize.register_parametrization(layer, "weight", Exponential())
    return layer


DERIVED: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Conv1d(16, 32, 9)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Conv1d(16, 32, 9)),
    "orthogonal": lambda: nn.Sequential(nn.Flatten(), parametrizations.orthogonal(nn.Linear(288, 288))),
    "w * s": Scaled,
    "standardized": lambda: Standardized(16, 32, 9),
    "low rank": LowRank,
    "own": own_parametrization,
    "transposed": lambda: parametrizations.weight_norm(nn.ConvTranspose1d(16, 32, 9)),
}


@pytest.mark.parametrize("name", DERIVED)
def test_weights_that_depend_on_parameters_alone_are_stored_as_integers(name: str, tmp_path: Path) -> None:
    model, x = DERIVED[name]().eval(), torch.randn(2, 16, 18)
    made = ready(model, x)
    expected = made(x)
    sites = [made.q.plan.site(n) for n in made.q.plan if made.q.plan.site(n).role == "weight"]
    count = max(torch.Size(site.shape).numel() for site in sites)
    artifact = sq.convert(*made)
    assert artifact.size_bytes < 1.3 * count + 2048
    assert artifact.metadata["weights"]
    is_near(artifact.run(x), expected)
    found = in_onnx_runtime(made, x, tmp_path)
    assert (tmp_path / "net.onnx").stat().st_size < 1.3 * count + 8192
    is_near(found[0], expected)
    program = sq.export.torch(*made, x)
    held = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    assert held < 1.3 * count + 4096
    is_near(program.module()(x), expected)


def test_a_plan_without_examples_needs_one_to_find_them() -> None:
    model, x = Scaled().eval(), torch.randn(2, 16, 18)
    made = ready(model, x)
    read = made._replace(q=sq.build(model, sq.Plan.from_json(made.q.plan.to_json())))
    with pytest.warns(UserWarning, match="weight_fake_quant: weights that are computed in the forward stay parameters"):
        whole = sq.convert(*read)
    assert "w" in whole.tensors and not whole.metadata["weights"]
    is_near(whole.run(x), made(x))
    assert sq.convert(*read, example_args=x) == sq.convert(*made)


class Twice(nn.Module):
    """A scale that the derived weight and something else read."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.s = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w * self.s) * self.s


def test_parameters_that_something_else_reads_stay() -> None:
    made, x = ready(Twice().eval(), torch.randn(4, 8)), torch.randn(4, 8)
    artifact = sq.convert(*made)
    assert artifact.metadata["derived"] == ["w"] and "s" in artifact.tensors and "w" not in artifact.tensors
    is_near(artifact.run(x), made(x))


def test_tables_and_reports_know_derived_weights(tmp_path: Path) -> None:
    layer, x = parametrizations.weight_norm(nn.Conv1d(16, 32, 9)), torch.randn(2, 16, 18)
    made = ready(nn.Sequential(layer, nn.ReLU()).eval(), x)
    row = next(row for row in sq.report(*made, [x], progress=False).rows if row.role == "weight")
    assert row.bytes_before == 4 * 16 * 32 * 9 and row.bytes_after < 1.1 * 16 * 32 * 9
    narrow = {
        name: entry._replace(scale=entry.scale / 4) if "weight" in name else entry for name, entry in made.qparams.items()
    }
    sq.export.tables(made.q, made.params, narrow, tmp_path, name="net", example_args=x, compiler="sophgo-mq")
    weights = [t for t in onnx.load(tmp_path / "net.onnx").graph.initializer if list(t.dims) == [32, 16, 9]]
    (weight,) = (torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in weights)
    scale = narrow["0.weight_fake_quant"].scale[:, None, None]
    original = parametrizations.weight_norm(nn.Conv1d(16, 32, 9))
    original.load_state_dict(layer.state_dict())
    torch.testing.assert_close(weight, original.weight.detach().clamp(-128 * scale, 127 * scale))


# numbers and options that cannot be meant


def broken(made: Ready, what: str) -> Ready:
    nan = torch.nan
    if what in made.params:
        return made._replace(params={**made.params, what: torch.full_like(made.params[what], nan)})
    entry = made.qparams[what]
    return made._replace(qparams={**made.qparams, what: entry._replace(scale=torch.full_like(entry.scale, nan))})


NUMBERS = ("0.weight", "0.bias", "1.running_var", "3.bias", "0.weight_fake_quant", "input.post_act_fake_quantizer")


@pytest.mark.parametrize("what", NUMBERS)
def test_nan_is_refused_by_every_way_out(what: str, tmp_path: Path) -> None:
    model, x = normalized()
    made = broken(ready(model.eval(), x, config=TPU), what)
    ways: dict[str, Callable[[], Any]] = {
        "convert": lambda: sq.convert(*made),
        "export.onnx": lambda: sq.export.onnx(*made, x, tmp_path / "net.onnx"),
        "export.torch": lambda: sq.export.torch(*made, x),
        "tables": lambda: sq.export.tables(*made, tmp_path, compiler="sophgo-mq"),
        "report": lambda: sq.report(*made, [x], progress=False),
    }
    for where, way in ways.items():
        with pytest.raises(sq.StateError, match=f"({where}:|qparams of) {what}: the (numbers hold NaN|scale is not finite)"):
            way()
    assert not list(tmp_path.iterdir())


def test_quantizers_that_are_off_may_hold_nan(tmp_path: Path) -> None:
    model, x = normalized()
    made = broken(ready(model.eval(), x), "input.post_act_fake_quantizer")
    off = made._replace(qparams=sq.enabled(made.qparams, {"input.post_act_fake_quantizer": False}))
    is_near(in_onnx_runtime(off, x, tmp_path)[0], off(x))


@pytest.mark.parametrize("options", [{"signed": "no"}, {"pack": []}, {"simulate": 0.0}, {"dynamic_batch": None}])
def test_options_of_wrong_types_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    model, x = perceptron()
    made = ready(model.eval(), x)
    (name,) = options
    with pytest.raises(sq.ConfigError, match=f"export.onnx: {name} has the wrong type: .* allowed True or False"):
        sq.export.onnx(*made, x, tmp_path / "net.onnx", **options)
    if name in ("simulate", "dynamic_batch"):
        with pytest.raises(sq.ConfigError, match=f"export.torch: {name} has the wrong type"):
            sq.export.torch(*made, x, **options)
