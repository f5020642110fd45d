"""Which layer to fix? One weight is given 2 bits, all else 8, and the report says which: as text, CSV and a page."""

from pathlib import Path

from digits import batches, load, trained

import sophq_func as sq

OUT = Path("demo_out")

model = trained(epochs=6)
x, y, test_x, _ = load()
calibration = [images for images, _ in batches(x, y, seed=0)][:4]

config = sq.QuantConfig(
    strategy="CNN",
    activation=sq.override(symmetric=False),
    rules=(sq.Rule(name="layer2.conv1.weight_fake_quant", weight=sq.override(bits=2)),),
)
q = sq.quantize(model, config, example_args=(x[:2],))
params = sq.params_of(model)
qparams = q.calibrate(params, calibration)

report = sq.report(q, params, qparams, [test_x[:64], test_x[64:128]])
print(report)

OUT.mkdir(exist_ok=True)
print(report.to_html(OUT / "report.html"), report.to_csv(OUT / "report.csv"))

worst = report.rows[0].quantizer
better = sq.report(q, params, sq.with_bits(qparams, q.plan, {worst: 8}), [test_x[:64], test_x[64:128]])
print(f"\n8 bits for {worst}: output SQNR {report.sqnr_db:.1f} dB -> {better.sqnr_db:.1f} dB")
