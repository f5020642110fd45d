"""Calibration on what a loader yields."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sophq_func as sq
from tests.checkpoint.test_io import same_bits
from tests.helpers import ready

X = torch.arange(24.0).reshape(6, 4) - 7


def test_inputs_takes_the_arguments_out_of_what_a_loader_yields() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    r = ready(model, X)
    expected = r.q.calibrate(r.params, X.split(2), progress=False)
    pairs = DataLoader(TensorDataset(X, torch.arange(6)), batch_size=2)
    same_bits(r.q.calibrate(r.params, pairs, inputs=lambda batch: batch[0], progress=False), expected)
    named = [{"image": x, "label": 0} for x in X.split(2)]
    same_bits(r.q.calibrate(r.params, named, inputs=lambda batch: {"input": batch["image"]}, progress=False), expected)
    same_bits(r.q.calibrate(r.params, named, inputs=lambda batch: (batch["image"],), progress=False), expected)


def test_a_loader_of_pairs_is_told_of_inputs() -> None:
    r = ready(nn.Linear(4, 3), X)
    with pytest.raises(
        sq.StateError, match=r"Fix: inputs=lambda batch: batch\[0\] picks the inputs from what a loader yields"
    ):
        r.q.calibrate(r.params, DataLoader(TensorDataset(X, X), batch_size=2), progress=False)


def test_a_loader_of_dicts_is_told_of_inputs_by_key() -> None:
    r = ready(nn.Linear(4, 3), X)
    with pytest.raises(sq.StateError, match=r"Fix: inputs=lambda batch: batch\['image'\] picks the inputs"):
        r.q.calibrate(r.params, [{"image": X, "label": 0}], progress=False)


@pytest.mark.parametrize("inputs", ["image", 0])
def test_inputs_is_a_function(inputs: Any) -> None:
    r = ready(nn.Linear(4, 3), X)
    with pytest.raises(
        sq.ConfigError, match=r"calibrate: inputs cannot be called: got .* Fix: inputs=lambda batch: batch\[0\]"
    ):
        r.q.calibrate(r.params, [X], inputs=inputs, progress=False)
