"""Options of sophgo-mq's and MQBench's advanced PTQ, as options of :func:`sophq_func.algorithms.reconstruct`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sophq_func.core.arguments import MOST_REPEATS
from sophq_func.core.errors import ConfigError, explain, raise_all, unknown
from sophq_func.core.public import public

UNITS: Mapping[str, str] = {"layer": "layer", "block": "block"}
"""``pattern`` as ``units``."""

KEYS = (
    "pattern",
    "max_count",
    "weight",
    "warm_up",
    "b_range",
    "scale_lr",
    "prob",
    "round_mode",
    "keep_gpu",
    "exclude_node",
    "exclude_node_prefix",
)
"""What a configuration may hold. ``round_mode`` and ``keep_gpu`` are checked, and change nothing: there is one rounding, and
what a unit reads stays where the data is."""


@public
def from_ptq_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config of sophgo-mq's ``ptq_reconstruction`` means, as options of :func:`sophq_func.algorithms.reconstruct`.

    ``pattern`` becomes ``units``, ``max_count`` ``steps``, ``prob`` (the probability to quantize) ``drop = 1 - prob``,
    ``b_range`` ``beta``; without ``scale_lr`` the rounding alone is learned. ``warm_up`` keeps its meaning.

    Args:
      config: the dictionary, or one that holds it under ``"reconstruction"``.

    Returns:
      Keyword arguments.

    Raises:
      ConfigError: keys that are not known, with near matches; values out of their range; all in one message.

    Differs from sophgo-mq: a plain dict; no key is required. Losses and regularizers are means, so that a ``weight`` of
    theirs, whose regularizer is a sum, is left out: the default fits layers of every size. So is the number in
    ``scale_lr``, a step of the scale itself: here a step is a share of the scale. ``exclude_node`` must be given as
    ``where=``.

    Example:
      >>> from_ptq_config({"pattern": "block", "max_count": 500, "prob": 0.5, "scale_lr": 4.0e-5})
      {'units': 'block', 'steps': 500, 'drop': 0.5, 'learn': 'both'}
    """
    given = dict(config.get("reconstruction", config))
    problems = [unknown("from_ptq_config", "key", key, KEYS) for key in given if key not in KEYS]
    problems += [
        explain("from_ptq_config", f"{key} is out of its range", got=given[key], allowed=allowed)
        for key, (fits, allowed) in CHECKS.items()
        if key in given and not fits(given[key])
    ]
    for key in ("exclude_node", "exclude_node_prefix"):
        if given.get(key):
            fix = "reconstruct(..., where=lambda site: not site.path.startswith(...))"
            problems.append(explain("from_ptq_config", f"{key} names nodes of a traced graph", got=given[key], fix=fix))
    raise_all(problems, ConfigError)
    options: dict[str, Any] = {}
    if "pattern" in given:
        options["units"] = UNITS[given["pattern"]]
    if "max_count" in given:
        options["steps"] = int(given["max_count"])
    if "warm_up" in given:
        options["warm_up"] = float(given["warm_up"])
    if "b_range" in given:
        first, last = given["b_range"]
        options["beta"] = (float(first), float(last))
    if "prob" in given:
        options["drop"] = 1 - float(given["prob"])
    options["learn"] = "both" if given.get("scale_lr") else "rounding"
    return options


def _is_between(low: float, high: float) -> Callable[[object], bool]:
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _is_pair(value: object) -> bool:
    """Whether these are two positive numbers."""
    is_number = _is_between(0, float("inf"))
    return isinstance(value, tuple | list) and len(value) == 2 and all(is_number(item) and item != 0 for item in value)


CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "pattern": (lambda value: isinstance(value, str) and value in UNITS, "'layer' or 'block'"),
    "max_count": (_is_between(1, MOST_REPEATS), f"an int from 1 to {MOST_REPEATS}"),
    "weight": (_is_between(0, float("inf")), "a number >= 0"),
    "warm_up": (_is_between(0, 1), "a number from 0 to 1"),
    "b_range": (_is_pair, "two positive numbers"),
    "scale_lr": (_is_between(0, float("inf")), "a number >= 0"),
    "prob": (lambda value: _is_between(0, 1)(value) and value > 0, "a number above 0, up to 1"),
    "round_mode": (lambda value: value == "learned_hard_sigmoid", "'learned_hard_sigmoid'"),
    "keep_gpu": (lambda value: isinstance(value, bool), "True or False"),
}
"""By key, what its value must be."""
