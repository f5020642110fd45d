"""The functions of sophgo-mq and MQBench that switch a prepared model, and what is written here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

CALIBRATE = "qparams = q.calibrate(params, batches), with params = sq.params_of(model)"
APPLY = "q.apply(params, qparams, x)"

FORMER: Mapping[str, str] = MappingProxyType(
    {
        "enable_calibration": CALIBRATE,
        "enable_calibration_woquantization": "out, ostate = q.observe(params, ostate, x), with ostate = q.init(params)",
        "enable_calibration_quantization": "out, ostate = q.observe_quantized(params, ostate, qparams, x)",
        "enable_quantization": APPLY,
        "enable_quantization_except_some_block": 'sq.Rule(name="layer1", observe_only=True) in the rules of the config',
        "disable_all": "model(x), which was never changed",
        "convert_deploy": 'sq.export.tables(q, params, qparams, ".", example_args=x), or sq.export.onnx for QDQ',
        "BackendType": '"chip" in quant_dict, or sq.QuantConfig(chip=...); prepare_by_platform takes none',
    }
)
"""By name there: what is written here."""
