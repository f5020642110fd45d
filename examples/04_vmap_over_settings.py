"""An ensemble of scales, evaluated in one vmap: how far can every activation range be clipped?"""

import torch
from digits import batches, load, trained

import sophq_func as sq

model = trained(epochs=6)
x, y, test_x, test_y = load()

config = sq.QuantConfig(strategy="CNN", activation=sq.override(bits=4, symmetric=False))
q = sq.quantize(model, config, example_args=(x[:2],))
params = sq.params_of(model)
qparams = q.calibrate(params, [images for images, _ in batches(x, y, seed=0)][:4])
learnable, rest = q.split(qparams)

factors = torch.linspace(0.4, 1.3, 10)


def correct(factor: torch.Tensor) -> torch.Tensor:
    """Right answers when every activation scale is multiplied by ``factor``."""
    names = [n for n in learnable if n.endswith("post_act_fake_quantizer.scale")]
    scaled = {**learnable, **{name: learnable[name] * factor for name in names}}
    logits = q.apply(params, sq.merge(scaled, rest), test_x[:256])
    return (logits.argmax(1) == test_y[:256]).sum()


with torch.no_grad():
    together = torch.func.vmap(correct)(factors)
    one_by_one = torch.stack([correct(factor) for factor in factors])

for factor, count in zip(factors, together, strict=True):
    print(f"scales x {float(factor):.1f}: {int(count)} of 256 right")
print("one vmap and a loop agree:", bool((together == one_by_one).all()))
