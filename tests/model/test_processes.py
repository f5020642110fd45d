"""Quantized models in threads, tasks and processes, and in what signals interrupt."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import sophq_func as sq
from tests.helpers import Ready, ready, same

FORKS = hasattr(os, "fork")
COUNT = 6


class Net(nn.Module):
    """Layers and functions; between them it calls what a test wants."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        for call in BETWEEN:
            call()
        return self.last(x) + 1


BETWEEN: list[Callable[[], object]] = []
"""What :class:`Net` calls; empty between tests."""


@contextmanager
def between(call: Callable[[], object]) -> Iterator[None]:
    BETWEEN.append(call)
    try:
        yield
    finally:
        BETWEEN.clear()


def batch(index: int) -> Tensor:
    return torch.linspace(-1, 1, 12).reshape(3, 4) + index / 8


@pytest.fixture(scope="module")
def made() -> Ready:
    torch.manual_seed(0)
    return ready(Net().eval(), batch(0))


@pytest.fixture(scope="module")
def expected(made: Ready) -> list[Tensor]:
    return [made(batch(index)) for index in range(COUNT)]


class Outputs(Dataset[Tensor]):
    """The outputs of a quantized model, computed where they are read."""

    def __init__(self, made: Ready) -> None:
        self.made = made

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Tensor:
        output: Tensor = self.made(batch(index))
        return output.detach()


def _output(packed: bytes, index: int) -> list[float]:
    q, params, qparams = pickle.loads(packed)
    output: list[float] = q.apply(params, qparams, batch(index)).flatten().tolist()
    return output


def test_threads_share_a_quantized_model(made: Ready, expected: list[Tensor]) -> None:
    with ThreadPoolExecutor(4) as pool:
        same(list(pool.map(made, map(batch, range(COUNT)))), expected)
        steps = list(pool.map(lambda i: torch.func.grad(lambda x: made(x).sum())(batch(i)), range(COUNT)))
    same(steps, [torch.func.grad(lambda x: made(x).sum())(batch(i)) for i in range(COUNT)])


def test_threads_plan_and_calibrate_at_once(made: Ready) -> None:
    model = Net().eval()
    params = sq.params_of(model)

    def calibrated(_: int) -> dict[str, sq.QParams]:
        q = sq.quantize(model, sq.QuantConfig(), example_args=(batch(0),))
        return q.calibrate(params, [batch(0), batch(1)], progress=False)

    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(calibrated, range(3))
    for other in others:
        same(other, first)


def test_tasks_share_a_quantized_model(made: Ready, expected: list[Tensor]) -> None:
    async def here(index: int) -> Tensor:
        await asyncio.sleep(0)
        output: Tensor = made(batch(index))
        return output

    async def everywhere() -> list[Tensor]:
        in_threads = (asyncio.to_thread(made, batch(index)) for index in range(COUNT))
        return await asyncio.gather(*map(here, range(COUNT)), *in_threads)

    same(asyncio.run(everywhere()), [*expected, *expected])


@pytest.mark.slow
@pytest.mark.skipif(not FORKS, reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_pool_of_forked_processes(made: Ready, expected: list[Tensor]) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        found = list(pool.map(_output, [pickle.dumps(tuple(made))] * COUNT, range(COUNT)))
    assert found == [output.flatten().tolist() for output in expected]


@pytest.mark.slow
@pytest.mark.parametrize("way", [pytest.param("fork", marks=pytest.mark.skipif(not FORKS, reason="no fork")), "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_of_a_data_loader(way: str, made: Ready, expected: list[Tensor]) -> None:
    loader = DataLoader(Outputs(made), batch_size=None, num_workers=1, multiprocessing_context=way)
    same([output.clone() for output in loader], [output.detach() for output in expected])


def _stop(*_: object) -> None:
    raise TimeoutError


@contextmanager
def on_signal(handler: Callable[..., object]) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_a_handler_that_raises_ends_a_run_and_leaves_nothing(made: Ready, expected: list[Tensor]) -> None:
    with on_signal(_stop), between(interrupt):
        with pytest.raises(TimeoutError):
            made(batch(0))
        with pytest.raises(TimeoutError):
            made.q.observe(made.params, made.q.init(made.params), batch(0))
    same([made(batch(index)) for index in range(COUNT)], expected)


def test_a_handler_may_run_the_model_that_it_interrupts(made: Ready, expected: list[Tensor]) -> None:
    found: list[Tensor] = []

    def handler(*_: object) -> None:
        BETWEEN.clear()
        found.append(made(batch(1)))

    with on_signal(handler), between(interrupt):
        same(made(batch(0)), expected[0])
    same(found, [expected[1]])
