"""An ensemble of quantized models in one vmap: does its spread tell where it errs?"""

import torch
from digits import batches, load, trained

import sophq_func as sq

x, y, test_x, test_y = load()
models = [trained(seed, epochs=4) for seed in range(3)]

config = sq.QuantConfig(strategy="CNN", weight=sq.override(bits=3), activation=sq.override(bits=4, symmetric=False))
q = sq.quantize(models[0], config, example_args=(x[:2],))
members = [sq.params_of(model) for model in models]
calibration = [images for images, _ in batches(x, y, seed=0)][:4]
settings = [q.calibrate(params, calibration) for params in members]

params = {name: torch.stack([member[name] for member in members]) for name in members[0]}
qparams = sq.stack(settings)

with torch.no_grad():
    logits = torch.func.vmap(q.apply, (0, 0, None))(params, qparams, test_x)
    loop = torch.stack([q.apply(*member, test_x) for member in zip(members, settings, strict=True)])

p = logits.softmax(-1)
mean = p.mean(0)
entropy = -(mean * mean.clamp_min(1e-12).log()).sum(-1)
within = -(p * p.clamp_min(1e-12).log()).sum(-1).mean(0)
spread = entropy - within  # mutual information: how much the members disagree

for number, member in enumerate(p):
    print(f"member {number}  {100 * float((member.argmax(-1) == test_y).float().mean()):.2f} %")
wrong = mean.argmax(-1) != test_y
print(f"ensemble  {100 * float((~wrong).float().mean()):.2f} %")
print(f"\n{'images, by spread':<24} {'spread':>7} {'wrong':>6}")
for part, which in enumerate(spread.argsort(descending=True).tensor_split(4), 1):
    print(f"{f'quarter {part}':<24} {float(spread[which].mean()):7.4f} {int(wrong[which].sum()):>3} of {len(which)}")
same = (logits - loop).abs().amax((0, 2)) < 1e-3
print(f"one vmap and a loop: {int((logits.argmax(-1) != loop.argmax(-1)).sum())} answers differ; logits differ for", end=" ")
print(f"{int((~same).sum())} of {len(same)} images, where a value lies between two codes and rounding errors decide")
