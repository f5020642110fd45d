"""Quantization-aware training without state: weights, scales and optimizer go in, new ones come out."""

from digits import accuracy, batches, load, trained
from qat import finetune

import sophq_func as sq

model = trained(epochs=6)
x, y, test_x, test_y = load()

config = sq.QuantConfig(strategy="CNN", weight=sq.override(bits=2), activation=sq.override(bits=4, symmetric=False))
q = sq.quantize(model, config, example_args=(x[:2],))
params = sq.params_of(model)
qparams = q.calibrate(params, [images for images, _ in batches(x, y, seed=0)][:4])

before = accuracy(lambda images: q.apply(params, qparams, images), test_x, test_y)
new_params, new_qparams = finetune(q, params, qparams, x, y, epochs=3)
after = accuracy(lambda images: q.apply(new_params, new_qparams, images), test_x, test_y)

print(f"float           {accuracy(model, test_x, test_y):.2f} %")
print(f"W2A4, untrained {before:.2f} %")
print(f"W2A4, trained   {after:.2f} %")
unchanged = accuracy(lambda images: q.apply(params, qparams, images), test_x, test_y)
print(f"the first qparams still give {unchanged:.2f} %: nothing was changed in place")
