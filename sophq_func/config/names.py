"""Names of quantizers. No other file composes or splits one.

=====================  ===========================================  ===============================
quantizer              name                                         example
=====================  ===========================================  ===============================
of a weight            ``<module path>.<parameter>_fake_quant``     ``conv1.weight_fake_quant``
behind a value         ``<value>.post_act_fake_quantizer``          ``conv1.post_act_fake_quantizer``
before certain calls   ``<first call>.input_act_fake_quantizer``    ``fc.input_act_fake_quantizer``
=====================  ===========================================  ===============================

The endings are those of sophgo-mq, so that names in its configs mean the same quantizers here.
"""

from __future__ import annotations

# The three endings.
WEIGHT = "_fake_quant"
VALUE = ".post_act_fake_quantizer"
INPUT = ".input_act_fake_quantizer"


def weight_quantizer(parameter: str) -> str:
    """Name of the quantizer of a weight.

    Example:
      >>> weight_quantizer("layer1.0.conv1.weight")
      'layer1.0.conv1.weight_fake_quant'
    """
    return f"{parameter}{WEIGHT}"


def value_quantizer(value: str) -> str:
    """Name of the quantizer behind a value.

    Example:
      >>> value_quantizer("layer1.0.add")
      'layer1.0.add.post_act_fake_quantizer'
    """
    return f"{value}{VALUE}"


def input_quantizer(call: str, number: int = 0) -> str:
    """Name of a quantizer that sits before ``call`` and perhaps further calls.

    Args:
      call: name of the first of the calls.
      number: how many earlier quantizers are named after the same call.

    Example:
      >>> input_quantizer("fc"), input_quantizer("fc", 1)
      ('fc.input_act_fake_quantizer', 'fc.input_act_fake_quantizer_1')
    """
    return f"{call}{INPUT}_{number}" if number else f"{call}{INPUT}"


def is_weight_quantizer(name: str) -> bool:
    """Whether a quantizer of this name is that of a weight.

    Example:
      >>> is_weight_quantizer("fc.weight_fake_quant"), is_weight_quantizer("fc.post_act_fake_quantizer")
      (True, False)
    """
    return name.endswith(WEIGHT)


def is_value_quantizer(name: str) -> bool:
    """Whether a quantizer of this name sits behind a value.

    Dots may be written as underscores, as sophgo-mq writes them.

    Example:
      >>> is_value_quantizer("layer1_0_conv1_post_act_fake_quantizer")
      True
    """
    return underscored(name).endswith(underscored(VALUE))


def before_ending(name: str) -> str:
    """The value or call that an activation quantizer is named after; ``name`` itself if it is no such quantizer's.

    Example:
      >>> before_ending("x.post_act_fake_quantizer"), before_ending("fc.input_act_fake_quantizer")
      ('x', 'fc')
    """
    return name.removesuffix(VALUE).removesuffix(INPUT)


def underscored(name: str) -> str:
    """A dotted name as sophgo-mq writes names of graph nodes.

    Example:
      >>> underscored("layer1.0.conv1")
      'layer1_0_conv1'
    """
    return name.replace(".", "_")
