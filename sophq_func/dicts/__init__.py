"""The three dictionaries of sophgo-mq's fine-grained control, translated into a :class:`~sophq_func.rules.QuantConfig`."""

from sophq_func.dicts._keys import KEYS
from sophq_func.dicts._read import from_dicts

__all__ = ["KEYS", "from_dicts"]
