"""The three dictionaries of sophgo-mq's fine-grained control, and the plan that they make, with reasons."""

import torch
from digits import Digits

import sophq_func as sq

quant_dict = {"chip": "BM1688", "quantmode": "weight_activation", "strategy": "CNN"}
extra_qconfig_dict = {
    "w_observer": "MinMaxObserver",
    "a_observer": "EMAMinMaxObserver",
    "w_qscheme": {"bit": 4, "symmetry": True, "per_channel": True, "pot_scale": False},
    "a_qscheme": {"bit": 8, "symmetry": True, "per_channel": False, "pot_scale": False},
    "object_type": {
        sq.patterns.ConvBn2d: {
            "mode": "activation",
            "bit": "8",
            "afakequantize": "FixedFakeQuantize",
            "aobserver": "MinMaxObserver",
        },
    },
    "module_name": {
        "head": {"mode": "weight", "bit": "8", "wfakequantize": "FixedFakeQuantize", "wobserver": "MinMaxObserver"},
    },
}
extra_quantizer_dict = {
    "module_only_enable_observer": ["stem.0.weight_fake_quant"],
    "exclude_module_name": ["layer2.shortcut"],
    "exclude_function_type": [torch.nn.functional.relu],
}
prepare_custom_config_dict = {
    "quant_dict": quant_dict,
    "extra_qconfig_dict": extra_qconfig_dict,
    "extra_quantizer_dict": extra_quantizer_dict,
}

model = Digits().eval()
q = sq.prepare_by_platform(model, prepare_custom_config_dict, example_args=(torch.zeros(2, 1, 8, 8),))

for name, config in q.plan.items():
    print(f"{name:<45} {config.scheme.bits} bit  {config.fake_quantize.name:<10}", end="")
    print("  observes only" if config.observe_only else "")
print("\nThe same, as native rules:")
for rule in sq.from_dicts(prepare_custom_config_dict).rules:
    print(" ", rule)
print("\nWhy layer1.conv2 has what it has:")
for field, reason in q.plan.reasons("layer1.conv2.post_act_fake_quantizer").items():
    print(f"  {field:<16} {reason}")
print("\nRules that matched nothing:", q.plan.unused)
