"""Bit widths as something to learn: gradient steps on scales and widths together, under a budget of bytes."""

import torch
import torch.nn.functional as F
from digits import adam_init, adam_step, batches, load, trained
from torch import Tensor

import sophq_func as sq

Tree = dict[str, Tensor]

model = trained(epochs=6)
x, y, test_x, test_y = load()

weight = sq.override(fake_quantize=sq.fake_quantize.learnable(use_grad_scaling=False))
q = sq.quantize(model, sq.QuantConfig(strategy="CNN", weight=weight), example_args=(x[:2],))
params = sq.params_of(model)
qparams = q.calibrate(params, [images for images, _ in batches(x, y, seed=0)][:4])

sizes = {name: params[q.plan.site(name).parameter].numel() for name in q.plan if q.plan.site(name).parameter}
start, fixed = {name: qparams[name].scale for name in sizes}, qparams  # the scales of eight bits
budget = 2.5 * sum(sizes.values()) / 8  # bytes: two and a half bits for each weight


def whole(bits: Tree) -> Tree:
    """Whole widths, straight through."""
    return {name: b + (b.round() - b).detach() for name, b in bits.items()}


def setting(scales: Tree, bits: Tree) -> dict[str, sq.QParams]:
    """The qparams of some scales, which are those of eight bits, at some widths."""
    own = {name: fixed[name]._replace(scale=scale) for name, scale in scales.items()}
    return sq.with_bits({**fixed, **own}, q.plan, whole(bits))


def size(bits: Tree) -> Tensor:
    """Bytes of all weights."""
    return torch.stack([sizes[name] * b for name, b in whole(bits).items()]).sum() / 8


def loss(scales: Tree, bits: Tree, images: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, and what lies above the budget."""
    excess = F.relu(size(bits) / budget - 1)
    return F.cross_entropy(q.apply(params, setting(scales, bits), images), labels) + 10 * excess


scales, bits = start, dict.fromkeys(sizes, torch.tensor(4.0))
state, other = adam_init(scales), adam_init(bits)
rates = {name: 0.01 * scale for name, scale in scales.items()}
for epoch in range(4):
    for images, labels in batches(x, y, seed=epoch):
        for_scales, for_bits = torch.func.grad(loss, (0, 1))(scales, bits, images, labels)
        scales, state = adam_step(scales, for_scales, state, rates)
        bits, other = adam_step(bits, for_bits, other, dict.fromkeys(bits, 0.1))
        bits = {name: b.clamp(2, 8) for name, b in bits.items()}

for name, width in whole(bits).items():
    print(f"{name:<36} {sizes[name]:>5} weights of {int(width)} bits")
two, three = (dict.fromkeys(sizes, torch.tensor(width)) for width in (2.0, 3.0))
print(f"\n{'setting':<26} {'bytes':>6} {'accuracy':>9}")
for what, those, widths in [
    ("2 bits", start, two),
    ("3 bits", start, three),
    ("learned widths and scales", scales, bits),
    ("2 bits, learned scales", scales, two),
    ("3 bits, learned scales", scales, three),
]:
    with torch.no_grad():
        right = q.apply(params, setting(those, widths), test_x).argmax(1) == test_y
    print(f"{what:<26} {int(size(widths)):>6} {100 * float(right.float().mean()):7.2f} %")
