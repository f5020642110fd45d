"""What torch saves of the library's values, it loads in its safe mode."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sophq_func as sq
from sophq_func.config.paths import Reference
from sophq_func.numerics.contracts import OBSERVERS
from tests.checkpoint.test_io import same_bits
from tests.helpers import ready


def through(value: Any) -> Any:
    """A value, saved and loaded by torch."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_qparams_plans_and_configs_come_back() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(6, 4)
    rules = (
        sq.Rule(name="2", weight=sq.override(granularity=sq.PerGroup(size=4)), activation=None),
        sq.Rule(type="Conv2d", requests=False),
    )
    config = sq.QuantConfig(chip="BM1690", weight=sq.override(bits=8), rules=rules)
    r = ready(model, x, config=config)
    found = through({"qparams": r.qparams, "plan": r.q.plan, "config": config})
    assert found["config"] == config
    assert found["plan"] == r.q.plan
    same_bits(found["qparams"], r.qparams)
    assert torch.equal(sq.build(model, found["plan"]).apply(r.params, found["qparams"], x), r(x))


def test_a_plan_of_computed_weights_and_shared_inputs_comes_back() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.s = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.bmm(x, x) @ (self.w * self.s)

    plan = ready(Scaled(), torch.randn(2, 4, 4), config=sq.QuantConfig()).q.plan
    assert through(plan).to_json() == plan.to_json()


def test_a_config_of_the_three_dictionaries_comes_back() -> None:
    quant_dict = {"chip": "BM1690", "quantmode": "weight_activation", "strategy": "CNN"}
    entry = {"mode": "weight", "bit": 4, "wperchannel": True}
    config = sq.from_dicts({"quant_dict": quant_dict, "extra_qconfig_dict": {"object_type": {"Conv2d": entry}}})
    assert config.rules
    assert through(config) == config


@pytest.mark.parametrize("name", OBSERVERS.names())
def test_states_of_every_observer_come_back(name: str) -> None:
    observer, scheme, x = sq.observer(name), sq.QScheme(), torch.randn(8)
    state = observer.update(observer.init(x, scheme), x, scheme)
    same_bits(through(state), state)


class Block(nn.Linear):
    """A layer of a user's."""


def test_a_class_of_a_user_is_the_users_to_allow() -> None:
    config = sq.QuantConfig(rules=(sq.Rule(type=Block, weight=None),))
    with pytest.raises(Exception, match=r"add_safe_globals\(\[\S*Block\]\)"):
        through(config)
    with torch.serialization.safe_globals([Block]):
        assert through(config) == config


def test_types_of_torch_and_patterns_need_no_permission() -> None:
    pattern = sq.patterns.fused("ConvSwish", nn.Conv2d, F.silu, "add")
    types = (nn.Linear, torch.sigmoid, torch.Tensor.add, sq.patterns.ConvBnReLU2d, pattern, "Linear")
    rules = tuple(sq.Rule(type=key, weight=None) for key in types)
    config = sq.QuantConfig(
        rules=rules, patterns=(pattern,), leaf_module=(nn.MultiheadAttention,), operations=(F.softmax, "relu")
    )
    assert through(config) == config
    assert copy.deepcopy(config) == config
    config.default("weight")  # is remembered, and no part of what is stored
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_name_in_a_file_imports_nothing() -> None:
    for name in ("os:system", "antigravity:fly", "torch.nothing"):
        rule = sq.Rule(name="a")
        state = {**rule.__getstate__(), "type": Reference(name)}
        with pytest.raises(sq.ConfigError, match="leads to no class or function"):
            rule.__setstate__(state)
    assert "antigravity" not in sys.modules
