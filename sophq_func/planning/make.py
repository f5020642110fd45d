"""From graphs and a config to a :class:`~sophq_func.planning.plan.Plan`."""

from __future__ import annotations

from collections.abc import Sequence

from sophq_func.capture.graph import Graph
from sophq_func.config.rules import QuantConfig
from sophq_func.core.errors import ConfigError, explain
from sophq_func.planning.plan import Origin, Plan


def plan(graph: Graph | Sequence[Graph], config: QuantConfig) -> Plan:
    """Decide for a traced model which quantizers there are, and how each is configured.

    Args:
      graph: from :func:`sophq_func.trace`; of several traces the plan is the union.
      config: what is asked for.

    Returns:
      The :class:`~sophq_func.planning.plan.Plan`.

    Raises:
      ConfigError: a rule names what the model has not, or a config is beyond the chip's limits; all problems at once.
      PlanError: a value to be quantized was made in place, and is used under its old name later.

    Example:
      >>> import torch, sophq_func as sq
      >>> list(sq.plan(sq.trace(torch.nn.Linear(2, 3), (torch.ones(1, 2),)), sq.QuantConfig()))
      ['input.post_act_fake_quantizer', 'weight_fake_quant']
    """
    if not isinstance(config, QuantConfig):
        raise ConfigError(
            explain("plan", "this config is not possible", got=type(config).__name__, allowed="sq.QuantConfig")
        )
    graphs = [graph] if isinstance(graph, Graph) else graph
    if not isinstance(graphs, list | tuple) or not graphs or not all(isinstance(g, Graph) for g in graphs):
        got, allowed = type(graph).__name__, "a Graph, or a list of at least one"
        raise ConfigError(
            explain("plan", "this graph is not possible", got=got, allowed=allowed, fix="sq.trace(model, args)")
        )
    return Plan.of(Origin(tuple(graphs), config))
