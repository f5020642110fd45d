"""What other libraries do with a bound model: generate, train, differentiate, run in several processes."""

from __future__ import annotations

import copy
import gc
import inspect
import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.func import grad, jacrev, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import sophq_func as sq

LSQ = sq.override(fake_quantize=sq.fake_quantize.learnable())
FIXED = sq.fake_quantize.fixed()
INT8 = sq.override(bits=8, granularity=sq.PerChannel(), fake_quantize=FIXED)
TOKEN = sq.override(bits=8, symmetric=False, granularity=sq.PerToken(), dynamic=True, fake_quantize=FIXED)
STATIC = sq.override(bits=8, symmetric=False, granularity=sq.PerTensor(), fake_quantize=FIXED)

CONFIGS = {
    "weights": sq.QuantConfig(strategy="Layers", weight=INT8, activation=None),
    "per token": sq.QuantConfig(strategy="Layers", weight=INT8, activation=TOKEN),
    "static": sq.QuantConfig(strategy="Layers", weight=INT8, activation=STATIC),
    "operands of attention, too": sq.QuantConfig(),
}

SIZES = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, **HEADS}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
MODELS = {"Llama": ("LlamaForCausalLM", LLAMA), "Qwen2": ("Qwen2ForCausalLM", LLAMA), "GPT2": ("GPT2LMHeadModel", GPT2)}


def language_model(name: str) -> Any:
    """A tiny one with random weights."""
    transformers = pytest.importorskip("transformers")
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)
    return model(model.config_class(**SIZES, **sizes)).eval()


def two_layers(wide: bool = True) -> tuple[sq.Quantized, dict[str, Tensor], dict[str, sq.QParams], Tensor, Tensor]:
    """A quantized classifier with data; wide grids clip nothing, so that rounding is straight-through everywhere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    q = sq.quantize(model, sq.QuantConfig(weight=LSQ, activation=LSQ), example_args=(x,))
    params = sq.params_of(model)
    qparams = q.calibrate(params, [x], progress=False)
    if wide:
        qparams = {name: entry._replace(scale=entry.scale * 1.1) for name, entry in qparams.items()}
    return q, params, qparams, x, y


def learned(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def after_steps(bound: nn.Module, x: Tensor, y: Tensor, steps: int) -> dict[str, nn.Parameter]:
    """Parameters after steps of a plain loop over whole batches."""
    optimizer = torch.optim.SGD(learned(bound).values(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(bound(x), y).backward()
        optimizer.step()
    return learned(bound)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "quantized", "learn"),
    [
        ("Llama", "weights", None),
        ("Llama", "weights", "params"),
        ("Llama", "per token", None),
        ("Llama", "static", None),
        ("Llama", "operands of attention, too", None),
        ("Qwen2", "static", None),
        ("GPT2", "per token", None),
    ],
)
def test_generate_with_a_cache_finds_the_tokens_of_apply_without(name: str, quantized: str, learn: Any) -> None:
    model = language_model(name)
    prompt = torch.randint(3, 64, (2, 5))
    q = sq.quantize(model, CONFIGS[quantized], example_kwargs={"input_ids": prompt})
    params = sq.params_of(model)
    qparams = q.calibrate(params, [{"input_ids": prompt}], progress=False)
    # where keys and values have quantizers, the example made the calls of a cache, as the model does by default
    options = {} if quantized == "operands of attention, too" else {"use_cache": False}
    expected = prompt
    with torch.no_grad():
        for _ in range(10):
            logits = q.apply(params, qparams, input_ids=expected, **options).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    bound = q.bind(params, qparams, learn)
    found = bound.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False)
    assert torch.equal(found, expected)


def test_a_cache_that_is_given_grows_in_place() -> None:
    transformers = pytest.importorskip("transformers")
    model = language_model("Llama")
    prompt = torch.randint(3, 64, (1, 5))
    q = sq.quantize(model, CONFIGS["static"], example_kwargs={"input_ids": prompt})
    params = sq.params_of(model)
    bound = q.bind(params, q.calibrate(params, [{"input_ids": prompt}], progress=False))
    cache = transformers.DynamicCache(config=model.config)
    # the name of the argument is another one in older versions
    keyword = "cache" if "cache" in inspect.signature(bound.forward).parameters else "past_key_values"
    with torch.no_grad():
        bound(prompt[:, :4], **{keyword: cache})
        last = bound(prompt[:, 4:], **{keyword: cache}).logits
        whole = bound(prompt, use_cache=False).logits
    assert cache.get_seq_length() == 5
    torch.testing.assert_close(last[:, -1], whole[:, -1])


@pytest.mark.slow
def test_an_encoder_runs_alone_where_weights_are_frozen() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, eos_token_id=None)
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids = torch.randint(3, 64, (2, 5))
    example = {"input_ids": ids, "decoder_input_ids": ids}
    q = sq.quantize(model, CONFIGS["weights"], example_kwargs=example)
    params = sq.params_of(model)
    qparams = q.calibrate(params, [example], progress=False)
    tokens = q.bind(params, qparams).generate(ids, max_new_tokens=4, do_sample=False)
    expected = torch.zeros(2, 1, dtype=torch.long)
    for _ in range(4):
        logits = q.apply(params, qparams, input_ids=ids, decoder_input_ids=expected).logits
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, expected)
    with pytest.raises(sq.StateError, match="outside the forward of the bound model"):
        q.bind(params, qparams, "params").generate(ids, max_new_tokens=4, do_sample=False)


@pytest.mark.slow
def test_trainer_takes_the_steps_of_a_plain_loop(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    model = language_model("Llama")
    ids = torch.randint(3, 64, (4, 6))
    config = sq.QuantConfig(strategy="Layers", weight=LSQ, activation=LSQ)
    q = sq.quantize(model, config, example_kwargs={"input_ids": ids})
    params = sq.params_of(model)
    bound = q.bind(params, q.calibrate(params, [{"input_ids": ids}], progress=False), "all")
    expected = copy.deepcopy(bound)
    steps = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 2}
    others = {"report_to": [], "save_steps": 2, "use_cpu": True, "disable_tqdm": True}
    arguments = transformers.TrainingArguments(tmp_path, per_device_train_batch_size=4, **steps, **others)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    transformers.Trainer(model=bound, args=arguments, train_dataset=rows).train()

    optimizer = torch.optim.SGD(learned(expected).values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        expected(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    torch.testing.assert_close(learned(bound), learned(expected))
    saved = pytest.importorskip("safetensors.torch").load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    expected.load_state_dict(saved)
    assert torch.equal(expected(input_ids=ids).logits, bound.eval()(input_ids=ids).logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # Lightning asks torch in a way that torch has given up
def test_lightning_takes_the_steps_of_a_plain_loop() -> None:
    lightning = pytest.importorskip("pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    q, params, qparams, x, y = two_layers()
    bound = q.bind(params, qparams, "all")
    expected = after_steps(copy.deepcopy(bound), x, y, 3)

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = bound

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(learned(self).values(), lr=0.1)

    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_steps=3, accelerator="cpu", **silent)
    trainer.fit(Classifier(), DataLoader(TensorDataset(x, y), batch_size=len(x)))
    torch.testing.assert_close(learned(bound), expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # Opacus puts one on the first layer, too
def test_opacus_finds_the_gradients_of_single_examples() -> None:
    opacus = pytest.importorskip("opacus")
    q, params, qparams, x, y = two_layers()

    def loss(some: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(q.apply(some, qparams, x[None]), y[None])

    expected = vmap(grad(loss), (None, 0, 0))(params, x, y)
    bound = q.bind(params, qparams, "params")
    sampled = opacus.GradSampleModule(bound, loss_reduction="sum")
    F.cross_entropy(sampled(x), y, reduction="sum").backward()
    assert learned(bound).keys() == expected.keys()
    for name, parameter in learned(bound).items():
        torch.testing.assert_close(parameter.grad_sample, expected[name])


@pytest.mark.slow
def test_kfac_of_one_example_is_the_gauss_newton_matrix_of_each_layer() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    q, params, qparams, x, _ = two_layers()
    x, target = x[:1], torch.randn(1, 3)
    bound = q.bind(params, qparams, "params")
    options = {"fisher_type": "type-2", "separate_weight_and_bias": True, "check_deterministic": False}
    kfac = curvlinops.KFACLinearOperator(bound, nn.MSELoss(), list(bound.parameters())[:4], [(x, target)], **options)
    found = kfac @ torch.eye(kfac.shape[1])

    jacobians = jacrev(lambda some: q.apply(some, qparams, x)[0])(params)
    start = 0
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        jacobian = jacobians[name].flatten(start_dim=1)
        curvature = 2 / 3  # of the mean of three squares, in each of the three outputs
        stop = start + jacobian.shape[1]
        torch.testing.assert_close(found[start:stop, start:stop], curvature * jacobian.T @ jacobian)
        start = stop


def train_in_a_process(rank: int, store: str, folder: str) -> None:
    """One of two processes: it takes a step on its half of the data."""
    patience = timedelta(seconds=60)  # of the other process, should this one fail
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=patience)
    q, params, qparams, x, y = two_layers()
    parallel = DistributedDataParallel(q.bind(params, qparams, "all"))
    half = slice(4 * rank, 4 * rank + 4)
    after_steps(parallel, x[half], y[half], 2)
    torch.save(parallel.module.state_dict(), Path(folder) / f"{rank}.pt")
    # neither ends while the other still needs it, nor does the group before what holds on to it, which would wait for ever
    distributed.barrier()
    del parallel
    gc.collect()
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_learn_from_the_mean_of_their_gradients(tmp_path: Path) -> None:
    arguments = (str(tmp_path / "store"), str(tmp_path))
    context = torch.multiprocessing.spawn(train_in_a_process, arguments, nprocs=2, join=False)
    try:
        # returns when one of them is done, and is true when all are; a process that waits for the other must end, too
        assert context.join(timeout=120) or context.join(timeout=120)
    finally:
        for process in context.processes:
            process.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)

    q, params, qparams, x, y = two_layers()
    scales, rest = q.split(qparams)

    def loss(params: dict[str, Tensor], scales: dict[str, Tensor], half: slice) -> Tensor:
        return F.cross_entropy(q.apply(params, sq.merge(scales, rest), x[half]), y[half])

    for _ in range(2):
        of_halves = [grad(loss, argnums=(0, 1))(params, scales, half) for half in (slice(4), slice(4, 8))]
        for values, (one, other) in zip((params, scales), zip(*of_halves, strict=True), strict=True):
            values.update({name: value - 0.1 * (one[name] + other[name]) / 2 for name, value in values.items()})
    for name, expected in params.items():
        torch.testing.assert_close(first[name], expected)
    for name, expected in scales.items():
        quantizer = name.removesuffix(".scale").replace(".", "_")
        torch.testing.assert_close(first[f"fake_quantizers.{quantizer}.scale"], expected)
