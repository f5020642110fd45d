# %% [markdown]
# # Questions of research
#
# A quantized model is a pure function of params, qparams and the input, so `torch.func` goes
# through it. Three questions, each a few lines: which image pulls on which scale, how sure is an
# ensemble of quantized models, and how many bits does each weight need.

# %%
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.func import grad, vmap

import sophq_func as sq

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
labels = torch.tensor(digits.target)
order = torch.randperm(len(images))
train, test = order[597:], order[:597]


def trained(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(384, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(4):
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


model = trained(0)
calibration = images[train[:256]].split(64)

# %% [markdown]
# ## Which image pulls on which scale?
#
# `vmap(grad(loss))` is the gradient of each example alone, here to all scales of a network with
# four bits.

# %%
learnable = sq.fake_quantize.learnable(use_grad_scaling=False)
half = sq.override(bits=4, fake_quantize=learnable)
q = sq.quantize(model, sq.QuantConfig(weight=half, activation=half), example_args=(images[:2],))
params = sq.params_of(model)
scales, rest = q.split(q.calibrate(params, calibration, progress=False))


def loss(scales, image, label):
    logits = q.apply(params, sq.merge(scales, rest), image[None])
    return F.cross_entropy(logits, label[None])


some = test[:128]
each = vmap(grad(loss), (None, 0, 0))(scales, images[some], labels[some])
{name: tuple(gradient.shape) for name, gradient in each.items()}

# %% [markdown]
# The images that pull hardest on the scale of the input, and how hard:

# %%
pull = each["input.post_act_fake_quantizer.scale"].abs()
hardest = pull.argsort(descending=True)[:4]
for index in hardest:
    print(f"image {int(some[index])}, a {int(labels[some[index]])}: {float(pull[index]):.3f}")

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(1, 4, figsize=(6, 1.6))
for axis, index in zip(axes, hardest, strict=True):
    axis.imshow(images[some[index], 0].numpy(), cmap="gray_r")
    axis.axis("off")

# %% [markdown]
# Their mean is the gradient of the batch:

# %%
whole = grad(lambda scales: vmap(loss, (None, 0, 0))(scales, images[some], labels[some]).mean())(scales)
for name, gradient in each.items():
    torch.testing.assert_close(gradient.mean(0), whole[name], rtol=1e-3, atol=1e-5)

# %% [markdown]
# ## How sure is a quantized model?
#
# Three networks from three seeds, one plan, each with its own scales: stacked tensors, and one
# `vmap` for the ensemble.

# %%
members = [sq.params_of(network) for network in (model, trained(1), trained(2))]
low = sq.QuantConfig(weight=sq.override(bits=3), activation=sq.override(bits=4))
q = sq.quantize(model, low, example_args=(images[:2],))
settings = sq.stack([q.calibrate(member, calibration, progress=False) for member in members])
stacked = {name: torch.stack([member[name] for member in members]) for name in params}
with torch.no_grad():
    p = vmap(q.apply, (0, 0, None))(stacked, settings, images[test]).softmax(-1)
alone = [100 * float((one.argmax(1) == labels[test]).float().mean()) for one in p]
together = 100 * float((p.mean(0).argmax(1) == labels[test]).float().mean())
print(f"members {', '.join(f'{a:.1f} %' for a in alone)}; ensemble {together:.1f} %")

# %% [markdown]
# Where the members disagree, the answer is unsure. Their disagreement is the mutual information
# between the answer and the choice of a member; the images of the upper half should hold most of
# the errors.

# %%
entropy = torch.special.entr(p.mean(0)).sum(-1)
spread = entropy - torch.special.entr(p).sum(-1).mean(0)
wrong = p.mean(0).argmax(1) != labels[test]
unsure, sure = spread.argsort(descending=True).tensor_split(2)
errors = int(wrong[unsure].sum()), int(wrong[sure].sum())
print(f"errors among the unsure half: {errors[0]}, among the sure half: {errors[1]}")

# %% [markdown]
# ## How many bits does each weight need?
#
# `sq.with_bits` is differentiable in the bit widths. A loss with a budget of bytes then learns
# them, together with the scales: whole numbers in the forward, straight through in the backward.

# %%
q = sq.quantize(model, sq.QuantConfig(weight=sq.override(fake_quantize=learnable)), example_args=(images[:2],))
qparams = q.calibrate(params, calibration, progress=False)
weights = [name for name in q.plan if q.plan.site(name).role == "weight"]
sizes = {name: params[q.plan.site(name).parameter].numel() for name in weights}
budget = 2.5 * sum(sizes.values())  # bits: two and a half for each weight


def whole_bits(bits):
    return {name: b + (b.round() - b).detach() for name, b in bits.items()}


def setting(scales, bits):
    own = {name: qparams[name]._replace(scale=scale) for name, scale in scales.items()}
    return sq.with_bits({**qparams, **own}, q.plan, whole_bits(bits))


def size(bits):
    return torch.stack([sizes[name] * b for name, b in whole_bits(bits).items()]).sum()


def budgeted(scales, bits, images, labels):
    logits = q.apply(params, setting(scales, bits), images)
    return F.cross_entropy(logits, labels) + 10 * F.relu(size(bits) / budget - 1)


# %%
scales = {name: qparams[name].scale for name in weights}
bits = {name: torch.tensor(4.0) for name in weights}
for _ in range(4):
    for batch in train[torch.randperm(len(train))].split(64):
        for_scales, for_bits = grad(budgeted, (0, 1))(scales, bits, images[batch], labels[batch])
        scales = {name: s - 0.01 * s * for_scales[name].sign() for name, s in scales.items()}
        bits = {name: (b - 0.1 * for_bits[name]).clamp(2, 8) for name, b in bits.items()}

learned = {name: int(b) for name, b in whole_bits(bits).items()}
used = float(size(bits)) / sum(sizes.values())
print(learned, f"\n{used:.2f} bits for each weight")


# %%
def accuracy(qparams):
    with torch.no_grad():
        return 100 * float((q.apply(params, qparams, images[test]).argmax(1) == labels[test]).float().mean())


uniform = accuracy(sq.with_bits(qparams, q.plan, dict.fromkeys(weights, 2)))
mixed = accuracy(setting(scales, bits))
print(f"2 bits everywhere {uniform:.2f} %, learned widths and scales {mixed:.2f} %")

# %% [markdown]
# Next: the pages of research go further: [per-example
# gradients](../research/per-example-gradients.md), [ensembles](../research/ensembles.md), [bit
# widths](../research/bit-widths.md), [curvature](../research/hessian.md), and [all
# transforms](../composition.md), with the limits of each.
