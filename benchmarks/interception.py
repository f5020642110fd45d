"""What interception costs when nothing is quantized: the frame, the hooks and the mode, against calling the module.

Interleaved medians on one thread: ResNet-18 at 4x3x224x224 (no pretrained weights). ``--json FILE`` writes the figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from measure import medians, write
from subjects import resnet18

import sophq_func as sq
from sophq_func.capture.frame import Frame
from sophq_func.capture.skeleton import Skeleton


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    subject = resnet18()
    model, (x,) = subject.make(), subject.args
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
