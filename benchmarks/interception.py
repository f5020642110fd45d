"""What interception costs when nothing is quantized: the frame, the hooks and the mode, against calling the module.

Interleaved medians on one thread: ResNet-18 at 4x3x224x224 (no pretrained weights). ``--json FILE`` writes the figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from measure import medians, write
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.intercept import Frame, Skeleton


class Basic(nn.Module):
    """The basic block of ResNet (arXiv:1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        projection = (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.downsample = None if same else nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


def resnet18() -> nn.Module:
    """ResNet-18 for 224x224 images."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    blocks = [Basic(*width) for width in [*widths, (512, 512, 1)]]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)).eval()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = resnet18(), torch.randn(4, 3, 224, 224)
    skeleton, params = Skeleton(model), sq.params_of(model)
    empty = sq.quantize(model, sq.QuantConfig(weight=None, activation=None), example_args=(x,))
    w8a8 = sq.quantize(model, sq.QuantConfig(chip="BM1690"), example_args=(x,))
    qparams = w8a8.calibrate(params, [x], progress=False)
    with torch.no_grad():
        found = medians(
            {
                "module": lambda: model(x),
                "intercepted, nothing quantized": lambda: skeleton.run(Frame(), params, (x,), {}),
                "empty plan": lambda: empty.apply(params, {}, x),
                "W8A8": lambda: w8a8.apply(params, qparams, x),
            },
            options.rounds,
        )
    base = found["module"]
    for name, seconds in found.items():
        print(f"{name:<32} {1000 * seconds:8.1f} ms  {seconds / base:6.3f} of the module")
    if options.json:
        write(options.json, {name: {"seconds": seconds, "ratio": seconds / base} for name, seconds in found.items()})


if __name__ == "__main__":
    main()
