"""The same training with ``torch.optim``: weights and scales are leaf tensors, and still nothing is hidden in a module."""

import torch
import torch.nn.functional as F
from digits import accuracy, batches, load, trained

import sophq_func as sq

model = trained(epochs=6)
x, y, test_x, test_y = load()

config = sq.QuantConfig(strategy="CNN", weight=sq.override(bits=2), activation=sq.override(bits=4, symmetric=False))
q = sq.quantize(model, config, example_args=(x[:2],))
params = sq.params_of(model)
qparams = q.calibrate(params, [images for images, _ in batches(x, y, seed=0)][:4])

trainable = {name for name, _ in model.named_parameters()}
scales, rest = q.split(qparams)
weights = {name: params[name].clone().requires_grad_() for name in sorted(trainable)}
scales = {name: scale.clone().requires_grad_() for name, scale in scales.items()}
buffers = {name: tensor for name, tensor in params.items() if name not in trainable}

optimizer = torch.optim.Adam([*weights.values(), *scales.values()], lr=2e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
training = q.train()
for epoch in range(3):
    for images, labels in batches(x, y, epoch):
        optimizer.zero_grad()
        logits, after = training.apply_and_update({**weights, **buffers}, sq.merge(scales, rest), images)
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        buffers = {name: after[name].detach() for name in buffers}
    schedule.step()

before = accuracy(lambda images: q.apply(params, qparams, images), test_x, test_y)
new = {**weights, **buffers}, sq.merge(scales, rest)
print(f"float           {accuracy(model, test_x, test_y):.2f} %, before and after")
print(f"W2A4, untrained {before:.2f} %")
print(f"W2A4, trained   {accuracy(lambda images: q.apply(*new, images), test_x, test_y):.2f} %")
