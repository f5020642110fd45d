# %% [markdown]
# # First steps
#
# You have a trained network and want to know what it does with 8-bit or 4-bit numbers. This
# tutorial trains a small network for handwritten digits, quantizes it, finds out which layer
# suffers, and gives that layer more bits. It needs scikit-learn for the data and matplotlib for one
# picture, and runs in seconds on a CPU.

# %%
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import sophq_func as sq

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # 1797 images of 8 x 8, in [-1, 1]
labels = torch.tensor(digits.target)
order = torch.randperm(len(images))
train, test = order[597:], order[:597]

# %% [markdown]
# The network is an ordinary `nn.Module`. Nothing in it knows of quantization.

# %%
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1, bias=False),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
    nn.BatchNorm2d(32),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(512, 10),
)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(5):
    for batch in train[torch.randperm(len(train))].split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
model.eval()


def accuracy(predict):
    with torch.no_grad():
        return 100 * float((predict(images[test]).argmax(1) == labels[test]).float().mean())


float_accuracy = accuracy(model)
print(f"float {float_accuracy:.2f} %")

# %% [markdown]
# ## Quantize
#
# A config says what is quantized how; `sq.QuantConfig()` is 8 bits for weights and for what the
# layers read. `sq.quantize` runs the model once on an example, sees every call, and returns `q`: a
# frozen object whose methods are pure functions. `q.plan` names each quantizer.

# %%
q = sq.quantize(model, sq.QuantConfig(), example_args=(images[:2],))
list(q.plan)

# %% [markdown]
# Scales come from data. `params` are the model's tensors by name, `qparams` a scale and a zero
# point for each quantizer.

# %%
params = sq.params_of(model)
calibration = images[train[:256]].split(64)
qparams = q.calibrate(params, calibration, progress=False)
qparams["3.weight_fake_quant"].scale.shape, qparams["input.post_act_fake_quantizer"].scale

# %% [markdown]
# The quantized model is `q.apply`, a function of params, qparams and the input:

# %%
w8a8 = accuracy(lambda x: q.apply(params, qparams, x))
print(f"W8A8 {w8a8:.2f} %")

# %% [markdown]
# Your model did not change: it has no hooks, no new modules, and the same numbers.

# %%
assert accuracy(model) == float_accuracy
assert type(model[0]) is nn.Conv2d

# %% [markdown]
# ## Fewer bits
#
# Bit widths are a field of the config, and so is what shares a scale. Two bits with one scale for a
# whole weight are too little here:

# %%
two = sq.override(bits=2, granularity=sq.PerTensor())
low = sq.QuantConfig(weight=two, activation=sq.override(bits=4))
q = sq.quantize(model, low, example_args=(images[:2],))
qparams = q.calibrate(params, calibration, progress=False)
w2a4 = accuracy(lambda x: q.apply(params, qparams, x))
print(f"W2A4 {w2a4:.2f} %")

# %% [markdown]
# ## Which layer is it?
#
# `sq.report` runs the model with one quantizer at a time, and sorts: `share` is the part of the
# output's error that comes from each.

# %%
report = sq.report(q, params, qparams, calibration, progress=False)
shares = {row.quantizer: row.share for row in report.rows}
worst = report.rows[0].quantizer
for name, share in shares.items():
    print(f"{name:<32} {100 * share:5.1f} %")

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(6, 2))
axes.barh(list(shares)[::-1], list(shares.values())[::-1])
_ = axes.set_xlabel("share of the output's error")

# %% [markdown]
# ## Give it more bits
#
# Rules change single quantizers, layers or types. A later rule overrides an earlier one, field by
# field, and `q.plan.explain` says which rule decided what. The worst gets eight bits; the other
# weights keep two.

# %%
mixed = sq.QuantConfig(
    weight=two,
    activation=sq.override(bits=4),
    rules=(sq.Rule(name=worst, weight=sq.override(bits=8)),),
)
q = sq.quantize(model, mixed, example_args=(images[:2],))
qparams = q.calibrate(params, calibration, progress=False)
better = accuracy(lambda x: q.apply(params, qparams, x))
print(f"mixed {better:.2f} %\n\n{q.plan.explain(worst)}")

# %% [markdown]
# ## Keep it
#
# One checked file holds the plan, the scales and the weights. To load it, the model's code is
# needed, and no config.

# %%
import tempfile
from pathlib import Path

file = Path(tempfile.mkdtemp()) / "digits.safetensors"
sq.save(file, plan=q.plan, qparams=qparams, params=params)

stored = sq.load(file)
again = sq.build(model, stored.plan)
assert torch.equal(again.apply(stored.params, stored.qparams, images[:8]), q.apply(params, qparams, images[:8]))

# %% [markdown]
# Next: [train weights and scales together](training.py), which repairs what few bits break, or read
# the guides: [which observer, which fake quantizer, which granularity](../how-to/which.md), and
# [how to treat one layer apart](../how-to/layers.md).
