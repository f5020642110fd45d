"""Post-training quantization in four calls: plan, calibrate, apply, compare."""

import torch
from digits import accuracy, batches, load, trained

import sophq_func as sq

model = trained(epochs=6)
x, y, test_x, test_y = load()

q = sq.quantize(model, sq.QuantConfig(chip="BM1690"), example_args=(x[:2],))
params = sq.params_of(model)
qparams = q.calibrate(params, [images for images, _ in batches(x, y, seed=0)][:4])

print(q.plan.table())
print(f"float {accuracy(model, test_x, test_y):.2f} %")
print(f"W8A8  {accuracy(lambda images: q.apply(params, qparams, images), test_x, test_y):.2f} %")

with torch.no_grad():
    noise = q.apply(params, qparams, test_x) - model(test_x)
print(f"largest change of a logit: {float(noise.abs().max()):.3f}")
