"""MinMax, EMAMinMax and MSE against recorded ranges, scales and zero points after each of three batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sophq_func as sq
from tests.golden.cases import Case, params

DEFECTS = {"*_aff_*_pot_*": "defect 15: the reference keeps the zero point of the scale before its rounding"}


@pytest.mark.parametrize("case", params("observers", "MinMaxObserver", "EMAMinMaxObserver", "MSEObserver", defects=DEFECTS))
def test_follows_the_recording(case: Case) -> None:
    observer, scheme = sq.observer(case.cls, **case.config["observer_args"]), case.scheme
    inputs = case.all("input")
    state = observer.init(inputs[0], scheme)
    for step, x in enumerate(inputs):
        state = observer.update(state, x, scheme)
        qparams = observer.qparams(state, scheme)

        def recorded(role: str, like: Tensor, step: int = step) -> Tensor:
            return case.get(role)[step].reshape(like.shape)

        close = {"rtol": 1e-5, "atol": 1e-12}
        torch.testing.assert_close(state.lo, recorded("min_val", state.lo), **close)
        torch.testing.assert_close(state.hi, recorded("max_val", state.hi), **close)
        torch.testing.assert_close(qparams.scale, recorded("scale", qparams.scale), **close)
        assert torch.equal(qparams.zero_point.long(), recorded("zero_point", qparams.zero_point).long())


def test_defect_15_zero_point_belongs_to_the_rounded_scale() -> None:
    observer, scheme = sq.observer("minmax"), sq.QScheme(bits=8, symmetric=False, pot_scale=True)
    x = torch.tensor([-1.0, 2.3])
    scale, zero_point, _ = observer.qparams(observer.update(observer.init(x, scheme), x, scheme), scheme)
    assert torch.equal(torch.log2(scale), torch.log2(scale).round())
    assert zero_point == scheme.qmin - torch.round(-1.0 / scale)
