"""Which weight needs bits? Trace and top eigenvalue of each weight's Hessian, as HAWQ ranks layers."""

import torch
import torch.nn.functional as F
from digits import batches, load, trained
from torch import Tensor

import sophq_func as sq

model = trained(epochs=6)
x, y, _, _ = load()

config = sq.QuantConfig(strategy="CNN", weight=sq.override(bits=4), activation=None)
q = sq.quantize(model, config, example_args=(x[:2],))
params = sq.params_of(model)
qparams = q.calibrate(params, [images for images, _ in batches(x, y, seed=0)][:4])
images, labels = x[:128], y[:128]


def float_loss(params: dict[str, Tensor]) -> Tensor:
    """Cross entropy of the model itself."""
    return F.cross_entropy(torch.func.functional_call(model, params, (images,)), labels)


def quantized_loss(params: dict[str, Tensor]) -> Tensor:
    """Cross entropy with weights of four bits."""
    return F.cross_entropy(q.apply(params, qparams, images), labels)


weights = sorted(q.plan.site(name).parameter for name in q.plan)
noise = sq.rademacher(params, weights, 32, torch.Generator().manual_seed(0))
start = {name: signs[0] for name, signs in noise.items()}
trace = sq.hessian_trace(float_loss, params, noise, chunk_size=8)
quantized_trace = sq.hessian_trace(quantized_loss, params, noise, chunk_size=8)
top = sq.top_eigenvalue(float_loss, params, start, steps=10)

with torch.no_grad():
    rounded = q.capture(params, qparams, images[:1])

print(f"{'weight':<24} {'trace':>8}   {'error':>6} {'4 bits':>8} {'top':>8} {'residual':>8}  mean trace x |Q(w) - w|^2")
order = {}
for name in weights:
    before, after = rounded[f"{name}_fake_quant"]
    order[name] = float(trace[name].trace / params[name].numel() * (after - before).square().sum())
for name in sorted(order, key=lambda name: order[name], reverse=True):
    own, best = trace[name], top[name]
    print(f"{name:<24} {float(own.trace):8.3f} ± {float(own.error):6.3f} {float(quantized_trace[name].trace):8.3f}", end=" ")
    print(f"{float(best.value):8.3f} {float(best.residual):8.3f}  {order[name]:.2e}")
