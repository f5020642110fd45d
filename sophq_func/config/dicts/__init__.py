"""The three dictionaries of sophgo-mq's fine-grained control as a :class:`~sophq_func.config.rules.QuantConfig`."""

from sophq_func.config.dicts._keys import KEYS
from sophq_func.config.dicts._read import from_dicts

__all__ = ["KEYS", "from_dicts"]
