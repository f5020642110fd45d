"""Whole models against recorded placements, scales, outputs, gradients and BatchNorm statistics."""

from __future__ import annotations

import fnmatch
import operator
import re
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import sophq_func as sq
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, OBSERVERS
from tests import ties
from tests.golden import models
from tests.golden.cases import Case, cases, params
from tests.helpers import Ready, same

GROUPS = (
    "matrix",
    "variant_global",
    "variant_mixed",
    "variant_module_name",
    "variant_object_type",
    "variant_op_list",
    "variant_quantizer",
)
TYPES = "defect 6: in the reference a type entry reaches the other half, or misses its own"
HALVES = "decision: an entry leaves the other half alone, and a 4-bit input quantizer needs 4 bits in both"
DECONV = "defect 36: the reference does not fuse a transposed convolution with the BatchNorm and ReLU behind it"
PLACEMENT: dict[str, str] = {
    "DeconvNet_*": DECONV,
    "v_deconv_*": DECONV,
    "PoolClassifier_badmode": "defect 10: the reference accepts an unknown quantmode",
    "PoolClassifier_badstrategy": "defect 10: the reference accepts an unknown strategy",
    "v_objtype_fused_act8_*": TYPES,
    "v_objtype_docs_int8": TYPES,
    "v_objtype_qat_w4_CV183X": TYPES,
    "v_objtype_both_w4_*": HALVES,
    "v_objtype_conv_act4": HALVES,
    "v_objtype_dw_act4": HALVES,
    "v_aq_4bit_Academic": "defect 44: first and last layers have 8 bits",
    "v_onlyobs_unknown": "decision: an unknown name is refused",
}
E5M2 = "defect 24: on a CPU the reference rounds E4M3 per channel, and in long tensors, as E5M2 without a scale"
SUBNORMAL = "defect 23: the reference has E4M3 values below the smallest normal beside the grid"
BIAS = "defect 26: the reference rounds biases with the reciprocal of an FP8 scale"
FP4 = "defect 21: FP4FakeQuantize is an FP6 in the reference"
HESSIAN = "decision: a bias is not rounded behind a table format, and gptq wants its Hessian"
CLIP = "defect 13: ClipStd widens the range in the reference"
NUMBERS: dict[str, str] = {
    **PLACEMENT,
    "*_Academic_*": E5M2,
    "v_modname_academic_act*": E5M2,
    "v_addnode_academic": E5M2,
    "v_int4_op_academic": E5M2,
    "v_afq_E4M3FakeQuantize": BIAS,
    "v_afq_E5M2FakeQuantize": BIAS,
    "v_int8_op_e4m3": BIAS,
    "v_docs_*": BIAS,
    "v_wfq_E4M3FakeQuantize_pt_wo": SUBNORMAL,
    "v_wq_4bit_pt_Academic": SUBNORMAL,
    "v_add*_academic": SUBNORMAL,
    "v_*fq_FP4FakeQuantize*": FP4,
    "v_?obs_ClipStdObserver": CLIP,
    "v_extra_clip_w": CLIP,
    "v_wfq_DSQFakeQuantize_pt_wo": "defect 30: DSQ observes in training mode only, its scale stays 1",
    "v_onlyobs_a": "decision: a bias is not rounded behind an input that is only observed",
    "v_afq_GPTQFP4FakeQuantize": HESSIAN,
    "v_wfq_GPTQFP4FakeQuantize_pt_wo": HESSIAN,
    "v_wfq_AdaRoundFakeQuantize_pt_wo": "decision: AdaRound is shown the weight and starts from it",
}
SYMBOLS: dict[str, Callable[[str], Any]] = {
    "qat": "{}_sophgo".format,
    "fused": lambda name: getattr(sq.patterns, name),
    "float": lambda name: getattr(nn, name),
    "fn": {
        "operator.add": operator.add,
        "torch.matmul": torch.matmul,
        "torch.cat": torch.cat,
        "softmax": F.softmax,
        "interpolate": F.interpolate,
    }.__getitem__,
}


def decoded(value: Any) -> Any:
    """Recorded settings with their symbols made types and functions."""
    if isinstance(value, dict):
        if "__tuple__" in value:
            return tuple(decoded(item) for item in value["__tuple__"])
        return {decoded(key): decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decoded(item) for item in value]
    kind, _, name = value.partition(":") if isinstance(value, str) else ("", "", "")
    return SYMBOLS[kind](name) if name and kind in SYMBOLS else value


def model_of(case: Case) -> nn.Module:
    model: nn.Module = getattr(models, case.config["model"])()
    model.load_state_dict(case.named("state_dict"))
    return model.train(case.config["prepared_in"] == "train")


def prepared(case: Case) -> tuple[sq.Quantized, dict[str, Tensor]]:
    model = model_of(case)
    names = ("quant_dict", "extra_qconfig_dict", "extra_quantizer_dict")
    dictionaries = {name: decoded(case.config[name]) for name in names if case.config.get(name)}
    example = case.get("test_input")
    return sq.prepare_by_platform(model, dictionaries, example_args=(example,)).eval(), sq.params_of(model)


def recorded_quantizers(case: Case, plan: sq.Plan) -> dict[str, dict[str, Any]]:
    """Recorded facts, with the index of the entry, by the name that the plan gives the quantizer.

    What the bf16 pass registered but took out of the graph again is left out.
    """
    found = {}
    for index, entry in enumerate(case.facts["quantizers"]):
        names = [entry["name"], *entry["aliases"]]
        own = [n for n in names if n.endswith("_act_fake_quantizer") and "." not in n]
        own += [n for n in names if n.endswith("weight_fake_quant")]
        kept = case.facts.get("graph_modules", own)
        if own[0] in kept[:-1] or own[0].endswith("weight_fake_quant") or kept is own:
            name = re.sub(r"_\w{15}__input_act_fake_quantizer", "_input_act_fake_quantizer_1", own[0])
            found[plan.find(name)] = {"index": index, **entry}
    return found


def allowed(case: Case) -> float:
    """2e-5, or 2 % of the quantization noise, as the norm of an error."""
    expected = case.get("output")
    return max(2e-5 * float(expected.norm()), 0.02 * float((expected - case.get("float_output")).norm()))


def is_integer(config: sq.QuantizerConfig) -> bool:
    return FAKE_QUANTIZERS.build(config.fake_quantize).integer


def steps(case: Case) -> bool:
    return bool(case.config["training_step"])


@pytest.mark.parametrize("case", params("end_to_end", *GROUPS, defects=PLACEMENT))
def test_placement(case: Case) -> None:
    q, _ = prepared(case)
    facts = recorded_quantizers(case, q.plan)
    assert facts.keys() == q.plan.keys()
    for name, entry in facts.items():
        config = q.plan[name]
        assert config.fake_quantize.name == FAKE_QUANTIZERS.canonical(entry["cls"])
        assert config.observe_only == entry["only_enable_observer"], name
        if entry["cls"] != "BF16FakeQuantize":
            assert config.observer.name == OBSERVERS.canonical(decoded(entry["observer"]))
            assert getattr(config.scheme.granularity, "axis", -1) == entry["ch_axis"]
        if is_integer(config):
            assert (config.scheme.qmin, config.scheme.qmax) == (entry["quant_min"], entry["quant_max"])


@pytest.mark.isa
@pytest.mark.parametrize("case", params("end_to_end", *GROUPS, defects=NUMBERS, where=lambda case: not steps(case)))
def test_scales_and_outputs(case: Case) -> None:
    q, weights = prepared(case)
    qparams = with_recorded_scales(case, q, q.calibrate(weights, case.all("calib_input")))
    x = case.get("test_input")
    if float((q.apply(weights, qparams, x) - case.get("output")).norm()) > allowed(case):
        # a sum near a tie rounds here to the other side than where it was recorded; with the same choices all is the same
        made, exactly = Ready(q, weights, qparams), 2e-5 * float(case.get("output").norm())
        assert all(map(is_integer, q.plan.values()))
        assert ties.follows(made, x, case.get("output"), exactly)
        ties.simulated(made, ties.reference(made, x), x)


SUM = 16 * 2.0**-24
"""Of the largest value: what float32 left in recorded sums.

Twice, forward and backward, a third of the root of 576: sums over a batch of 4 images have 4 * 12 * 12 terms.
"""
OF_SCALE = 2.0**-16
"""The same in gradients of scales, sums of ``g * (round(x / s) - x / s)``.

``x / s`` up to 128 is rounded to 2 ** -18, in a difference of at most a half. Twice that, as gradients of the scales of
weights are computed in float32 here, too.
"""

Step = tuple[tuple[dict[str, Tensor], dict[str, Tensor], Tensor], Tensor, Tensor, dict[str, Tensor]]


def step(q: sq.Quantized, weights: dict[str, Tensor], qparams: dict[str, sq.QParams], x: Tensor, target: Tensor) -> Step:
    """Gradients to parameters, learned scales and input; the loss, the output, and the parameters behind the step."""
    learnable, rest = q.split(qparams)
    floats = {n: p for n, p in weights.items() if p.is_floating_point()}
    counters = {n: p for n, p in weights.items() if not p.is_floating_point()}

    def loss(floats: Any, learnable: Any, x: Tensor) -> Any:
        out, after = q.apply_and_update(floats | counters, sq.merge(learnable, rest), x)
        return (out - target).square().mean(), (out, after)

    gradients, (value, (out, after)) = torch.func.grad_and_value(loss, argnums=(0, 1, 2), has_aux=True)(floats, learnable, x)
    return gradients, value, out, after


LOWER_ROOTS: dict[str, tuple[int, tuple[int, ...]]] = {
    "DepthwiseNet_BM1690_CNN_wa_step": (4, (4, 7)),
    "DepthwiseNet_BM1690_Transformer_wo_step": (1, (4, 7)),
}
"""By case: at which call, and in which channels, the recording has roots that are a unit in the last place too low.

Found by moving one root at a time, by the unit that brings output and input gradient nearest to what is recorded.
"""


class Roots(TorchFunctionMode):
    """Roots as a recording has them; all others correctly rounded.

    MKL's may be off by a unit in the last place, on each CPU other ones.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.call, self.channels = LOWER_ROOTS.get(case.name, (0, ()))
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.sqrt:
            return func(*args, **(kwargs or {}))
        (x,) = args
        factor = torch.ones(len(x), dtype=torch.float64)
        if self.calls == self.call:
            factor[list(self.channels)] -= 2.0**-23
        self.calls += 1
        return (func(x.double()) * factor).to(x.dtype)


def computing_in(dtype: torch.dtype, q: sq.Quantized, roots: Roots | None = None) -> sq.Quantized:
    """``q``, whose model gets the codes that its weights have in float32, and computes with them in ``dtype``.

    Weights are put on grids element by element, which is the same on every CPU but for roots; largest weights lie at ties by
    construction (``w / s`` is 127.5), and would have other codes in float64. What the model adds up rounds otherwise on
    other CPUs.
    """
    engine = q.engine

    def run_quantized(params: Any, qparams: Any, effect: Any, args: Any, kwargs: Any) -> Any:
        with roots or nullcontext():
            on_grids = engine.quantized_params(params, qparams)
        cast = {n: value.to(dtype) if value.is_floating_point() else value for n, value in on_grids.items()}
        return engine.loop.run(cast, effect, args, kwargs)

    engine.run_quantized = run_quantized  # type: ignore[method-assign]
    return q


@pytest.mark.isa
@pytest.mark.parametrize("case", params("end_to_end", "training_step", *GROUPS, defects=NUMBERS, where=steps))
def test_training_step(case: Case) -> None:
    """In float64 and with the recorded scales, so that every CPU makes the same codes of the same activations."""
    q, weights = prepared(case)
    qparams = q.calibrate(weights, case.all("calib_input"))
    qparams = with_recorded_scales(case, q, qparams)
    x, target = case.get("test_input"), case.get("target")
    as_it_is = step(q.train(), weights, qparams, x, target)
    same(step(computing_in(torch.float32, q.train()), weights, qparams, x, target), as_it_is)

    exact = computing_in(torch.float64, q.train(), Roots(case))
    (of_params, of_scales, of_input), value, out, after = step(exact, weights, qparams, x.double(), target.double())
    as_recorded(value, case.get("loss"), what="loss")
    as_recorded(out, case.get("output"), what="output")
    as_recorded(of_input, case.get("grad_input"), what="gradient to the input")
    compare_gradients(case, q.plan, of_params, of_scales)
    for name, offset, shape in case.facts.get("running_layout", ()):
        expected = case.get("running_stats")[offset : offset + torch.Size(shape).numel()]
        as_recorded(after[own_name(name)], expected, what=name)


def as_recorded(found: Tensor, recorded: Tensor, rounding: float = SUM, of: Tensor | None = None, what: str = "") -> None:
    """Equal but for ``rounding`` of the largest value ``of`` a tensor: of the recorded one, where none is given."""
    largest = float((recorded if of is None else of).abs().max())
    error = float((found.reshape(-1).double() - recorded.reshape(-1).double()).abs().max())
    assert error <= rounding * largest, f"{what}: off by {error / largest} of the largest value"


def with_recorded_scales(case: Case, q: sq.Quantized, qparams: dict[str, sq.QParams]) -> dict[str, sq.QParams]:
    """``qparams`` with scales of integer grids as recorded, once they have been compared.

    A scale is an extreme of sums in float32, or a mean of some, divided by a number of codes.
    """
    found = dict(qparams)
    for name, entry in recorded_quantizers(case, q.plan).items():
        if is_integer(q.plan[name]):
            own = qparams[name].scale
            offset, shape = case.facts["calibrated_layout"][entry["index"]]["scale"]
            recorded = case.get("calibrated_scale")[offset : offset + torch.Size(shape).numel()].reshape(own.shape)
            torch.testing.assert_close(own, recorded, rtol=1e-5, atol=0)
            found[name] = qparams[name]._replace(scale=recorded)
    return found


def own_name(recorded: str) -> str:
    """``conv1.bn.weight`` of the fused module as the parameter of the model, ``bn1.weight``."""
    layer, _, field = recorded.partition(".bn.")
    norms = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3", "stem": "stem_bn", "dw": "dw_bn", "pw": "pw_bn", "up1": "bn2"}
    return f"{norms[layer]}.{field}" if field else recorded


def compare_gradients(case: Case, plan: sq.Plan, of_params: dict[str, Tensor], of_scales: dict[str, Tensor]) -> None:
    """Each recorded gradient; rounding is that of the largest gradient, since some sums cancel."""
    recorded = case.get("grads")
    seen = set()
    for name, offset, shape in case.facts["grad_layout"]:
        quantizer, _, field = name.rpartition(".")
        if offset is None or field == "zero_point":
            continue
        expected = recorded[offset : offset + torch.Size(shape).numel()]
        if quantizer.endswith("input_fake_quantizer"):
            (quantizer,) = (n for n, e in recorded_quantizers(case, plan).items() if quantizer in (e["name"], *e["aliases"]))
        if quantizer.endswith(("_fake_quant", "_fake_quantizer")):
            key = f"{plan.find(quantizer)}.{field}"
            actual = of_scales[key]
        else:
            key = own_name(name)
            actual = of_params[key]
        seen.add(key)
        as_recorded(actual, expected, OF_SCALE if field == "scale" else SUM, recorded, name)
    assert of_scales.keys() <= seen


ALL = [Case("end_to_end", data) for data in cases("end_to_end")]


def why(case: Case) -> str:
    """What becomes of a case."""
    failed = f"error: {case.error['message']}" if case.error else "compared"
    return next((text for pattern, text in NUMBERS.items() if fnmatch.fnmatchcase(case.name, pattern)), failed)


def is_skipped_by_name(case: Case) -> bool:
    return not case.error and why(case) != "compared"


@pytest.mark.parametrize("case", list(filter(is_skipped_by_name, ALL)), ids=lambda case: case.name)
def test_no_case_is_skipped_that_would_pass(case: Case) -> None:
    with pytest.raises((AssertionError, KeyError, sq.ConfigError, sq.StateError)):
        test_placement(case)
        (test_training_step if steps(case) else test_scales_and_outputs)(case)


COUNTS: dict[str, int] = {
    "compared": 117,
    HALVES: 4,
    "decision: AdaRound is shown the weight and starts from it": 1,
    HESSIAN: 2,
    "decision: a bias is not rounded behind an input that is only observed": 1,
    "decision: an unknown name is refused": 1,
    TYPES: 4,
    "defect 10: the reference accepts an unknown quantmode": 1,
    "defect 10: the reference accepts an unknown strategy": 1,
    CLIP: 3,
    FP4: 3,
    SUBNORMAL: 4,
    E5M2: 29,
    BIAS: 14,
    "defect 30: DSQ observes in training mode only, its scale stays 1": 1,
    DECONV: 17,
    "defect 44: first and last layers have 8 bits": 1,
    "error: ": 1,
    "error: 'BF16FakeQuantize' object has no attribute 'scale'": 1,
    "error: 'Identity' object has no attribute 'scale'": 4,
    "error: 'NoneType' object has no attribute 'p'": 1,
    "error: 'NoneType' object is not callable": 2,
    "error: 'quantmode'": 1,
    "error: 'strategy'": 1,
    "error: Do not support fakequantize name: NNIEFakeQuantize": 3,
    "error: Do not support fakequantize name: NoSuchQuantizer": 1,
    "error: Do not support observer name: LSQPlusObserver": 1,
    "error: Do not support observer name: NoSuchObserver": 1,
    "error: HistogramObserver's qscheme only support torch.per_tensor_symmetric and torch.per_tensor_affine.": 1,
    "error: Invalid method None encoding!": 2,
    "error: None": 1,
    "error: Quantile observer only support in per-tensor scheme.": 1,
    "error: You should set the observer type before forward!": 3,
    "error: Zero-point must be Int32, Float or Half, found Long": 2,
    "error: a Tensor with 6 elements cannot be converted to Scalar": 2,
    'error: can only concatenate tuple (not "list") to tuple': 1,
    "error: shape '[6, 1, 1, 1]' is invalid for input of size 1": 2,
    "error: unsupport this combination": 5,
    "error: unsupported data type": 1,
    "error: unsupported operand type(s) for -: 'str' and 'int'": 2,
}
"""How many cases each reason keeps from being compared in full; ``test_reasons.py`` has the right behaviour for each."""


def test_the_reasons_and_their_numbers_are_these() -> None:
    assert dict(Counter(map(why, ALL))) == COUNTS
