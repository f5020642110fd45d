"""Which quantizer hurts? The loss with each one alone on, and with each one alone off; then bits where it hurts."""

import torch
import torch.nn.functional as F
from digits import batches, load, trained
from torch import Tensor

import sophq_func as sq

model = trained(epochs=6)
x, y, test_x, test_y = load()

config = sq.QuantConfig(strategy="CNN", weight=sq.override(bits=3), activation=sq.override(bits=3, symmetric=False))
q = sq.quantize(model, config, example_args=(x[:2],))
params = sq.params_of(model)
qparams = q.calibrate(params, [images for images, _ in batches(x, y, seed=0)][:4])
images, labels = x[:256], y[:256]


def loss(logits: Tensor) -> Tensor:
    """Cross entropy on the images that choose."""
    return F.cross_entropy(logits, labels)


found = sq.sensitivity(q, params, qparams, images, loss, progress=False)
ranked = sorted(found, key=lambda name: float(found[name].added), reverse=True)

print(f"{'quantizer':<40} {'alone':>7} {'added':>7} {'without':>8} {'saved':>7}")
for name in ranked:
    alone, without, added, saved = map(float, found[name])
    print(f"{name:<40} {alone:7.3f} {added:+7.3f} {without:8.3f} {saved:+7.3f}")

settings = {
    "3 bits everywhere": qparams,
    f"8 bits for {ranked[0]}": sq.with_bits(qparams, q.plan, {ranked[0]: 8}),
    "8 bits for the first four": sq.with_bits(qparams, q.plan, dict.fromkeys(ranked[:4], 8)),
    "8 bits for the last four": sq.with_bits(qparams, q.plan, dict.fromkeys(ranked[-4:], 8)),
}
print()
for what, setting in settings.items():
    with torch.no_grad():
        right = q.apply(params, setting, test_x).argmax(1) == test_y
    print(f"{what:<48} {100 * float(right.float().mean()):.2f} %")
