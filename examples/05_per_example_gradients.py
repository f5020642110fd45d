"""Per-example gradients of a quantization-aware loss: which images pull hardest on which scale?"""

import torch
import torch.nn.functional as F
from digits import batches, load, trained
from torch import Tensor

import sophq_func as sq

model = trained(epochs=6)
x, y, test_x, test_y = load()

config = sq.QuantConfig(strategy="CNN", weight=sq.override(bits=4), activation=sq.override(bits=4, symmetric=False))
q = sq.quantize(model, config, example_args=(x[:2],))
params = sq.params_of(model)
qparams = q.calibrate(params, [images for images, _ in batches(x, y, seed=0)][:4])
learnable, rest = q.split(qparams)


def loss(learnable: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
    """Cross entropy of one image."""
    logits = q.apply(params, sq.merge(learnable, rest), image[None])
    return F.cross_entropy(logits, label[None])


images, labels = test_x[:64], test_y[:64]
per_example = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(learnable, images, labels)

name = "stem.0.post_act_fake_quantizer.scale"
pull = per_example[name].abs()
print(f"{len(per_example)} learnable tensors, a gradient of each for {len(images)} images")
print(f"the images that pull hardest on {name}:")
for index in pull.argsort(descending=True)[:5]:
    print(f"  image {int(index):>2}, digit {int(labels[index])}: {float(pull[index]):.2e}")


def batch_loss(learnable: dict[str, Tensor]) -> Tensor:
    """Mean loss of all images."""
    return torch.stack([loss(learnable, image, label) for image, label in zip(images, labels, strict=True)]).mean()


expected = torch.func.grad(batch_loss)(learnable)[name]
difference = float((per_example[name].mean() - expected).abs() / per_example[name].abs().mean())
print(f"their mean is the gradient of the batch, to {100 * difference:.2f} % (codes near a tie)")
