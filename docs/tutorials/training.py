# %% [markdown]
# # Training through quantization
#
# Four bits and fewer need training: the gradient passes the rounding straight through, and reaches
# the scales, too (LSQ, [arXiv:1902.08153](https://arxiv.org/abs/1902.08153)). This tutorial trains
# one quantized network twice: as a pure function, with weights, scales and optimizer going in and
# new ones coming out; and with `torch.optim`.

# %%
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.func import grad_and_value

import sophq_func as sq

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
labels = torch.tensor(digits.target)
order = torch.randperm(len(images))
train, test = order[597:], order[:597]

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


# %% [markdown]
# ## Where training starts
#
# Two bits for weights, three for activations. `learnable` is the fake quantizer that has a gradient
# to its scale.

# %%
low = sq.QuantConfig(
    strategy="CNN",
    weight=sq.override(bits=2, observer=sq.observers.mse(), fake_quantize=sq.fake_quantize.learnable()),
    activation=sq.override(bits=3, symmetric=False, fake_quantize=sq.fake_quantize.learnable()),
)
q = sq.quantize(model, low, example_args=(images[:2],))
params = sq.params_of(model)
qparams = q.calibrate(params, images[train[:256]].split(64), progress=False)
float_accuracy = accuracy(model)
before = accuracy(lambda x: q.apply(params, qparams, x))
print(f"float {float_accuracy:.2f} %, calibrated {before:.2f} %")

# %% [markdown]
# ## As a pure function
#
# There are three kinds of leaves: `weights`, which are trained; `scales`, which `q.split` picks
# from the qparams; and `buffers`, the statistics of BatchNorm, which come back new from every step.
# `q.train()` is the same plan with the model in training mode.

# %%
weights = {name: params[name] for name, _ in model.named_parameters()}
buffers = {name: tensor for name, tensor in params.items() if name not in weights}
scales, rest = q.split(qparams)
training = q.train()
list(scales)


# %%
def loss(leaves, buffers, images, labels):
    weights, scales = leaves
    logits, after = training.apply_and_update({**weights, **buffers}, sq.merge(scales, rest), images)
    return F.cross_entropy(logits, labels), {name: after[name] for name in buffers}


def sgd(leaves, gradients, momenta, rate):
    momenta = {name: 0.9 * momenta[name] + g for name, g in gradients.items()}
    return {name: leaf - rate * momenta[name] for name, leaf in leaves.items()}, momenta


# %% [markdown]
# `grad_and_value` of that loss is one step's gradient to everything at once. Each kind of leaf has
# a learning rate of its own, which falls to zero.

# %%
step = grad_and_value(loss, has_aux=True)
leaves = (weights, scales)
momenta = [{name: torch.zeros_like(leaf) for name, leaf in kind.items()} for kind in leaves]
epochs = 4
for epoch in range(epochs):
    rate = 0.05 * (1 - epoch / epochs)
    for batch in train[torch.randperm(len(train))].split(64):
        gradients, (value, buffers) = step(leaves, buffers, images[batch], labels[batch])
        new_weights, momenta[0] = sgd(leaves[0], gradients[0], momenta[0], rate)
        new_scales, momenta[1] = sgd(leaves[1], gradients[1], momenta[1], 0.01 * rate)
        leaves = (new_weights, new_scales)

trained_params = {**leaves[0], **buffers}
trained_qparams = sq.merge(leaves[1], rest)
after = accuracy(lambda x: q.apply(trained_params, trained_qparams, x))
print(f"calibrated {before:.2f} %, trained {after:.2f} %")

# %% [markdown]
# Nothing was changed in place: the model and the first qparams are what they were, so settings can
# be compared side by side.

# %%
assert accuracy(model) == float_accuracy
assert accuracy(lambda x: q.apply(params, qparams, x)) == before

# %% [markdown]
# ## With `torch.optim`
#
# An optimizer of `torch.optim` changes leaf tensors in place, so it gets copies that require
# gradients. The rest is the loop that you know.

# %%
weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
buffers = {name: tensor for name, tensor in params.items() if name not in weights}
scales = {name: scale.clone().requires_grad_() for name, scale in scales.items()}
groups = [{"params": list(weights.values())}, {"params": list(scales.values()), "lr": 2e-4}]
optimizer = torch.optim.Adam(groups, lr=2e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
for _ in range(epochs):
    for batch in train[torch.randperm(len(train))].split(64):
        optimizer.zero_grad()
        logits, updated = training.apply_and_update({**weights, **buffers}, sq.merge(scales, rest), images[batch])
        F.cross_entropy(logits, labels[batch]).backward()
        optimizer.step()
        buffers = {name: updated[name].detach() for name in buffers}
    schedule.step()

with_optim = accuracy(lambda x: q.apply({**weights, **buffers}, sq.merge(scales, rest), x))
print(f"calibrated {before:.2f} %, trained with torch.optim {with_optim:.2f} %")

# %% [markdown]
# ## Look at what was learned
#
# Scales are data: compare them before and after.

# %%
for name, scale in scales.items():
    if name.endswith("post_act_fake_quantizer.scale"):
        print(f"{name:<38} {float(qparams[name.rpartition('.')[0]].scale):.4f} -> {float(scale.detach()):.4f}")

# %% [markdown]
# Next: [questions of research](research.py) that pure functions answer in a few lines.
