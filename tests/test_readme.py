"""The README's code runs, block by block, as a reader would type it."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.documented import DocumentedNet

README = Path(__file__).parent.parent / "README.md"


def test_every_python_block_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 5
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    names: dict[str, object] = {
        "torch": torch,
        "model": model,
        "x": x,
        "batches": [x, x],
        "network": DocumentedNet().eval(),
        "image": torch.randn(2, 3, 8, 8),
    }
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert isinstance(names["rounded"], Tensor)
    assert names["gradients"]
