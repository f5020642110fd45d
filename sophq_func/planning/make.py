"""From graphs and a config to a :class:`~sophq_func.planning.plan.Plan`."""

from __future__ import annotations

from collections.abc import Sequence

from sophq_func.capture.graph import Graph
from sophq_func.config.rules import QuantConfig
from sophq_func.core.errors import ConfigError, explain, warn
from sophq_func.core.public import public
from sophq_func.planning.checks import FUNCTION, is_weight_only, multiplies_only_inputs
from sophq_func.planning.plan import Origin, Plan


@public
def plan(graph: Graph | Sequence[Graph], config: QuantConfig) -> Plan:
    """Decide which quantizers a traced model gets, and how each is configured.

    Args:
      graph: from :func:`sophq_func.trace`; or several, for examples that take different ways through the model.
      config: what is asked for.

    Returns:
      The :class:`~sophq_func.planning.plan.Plan`; of several graphs the union.

    Warns:
      PlanWarning: much of the model stays float, although no rule says so; or a glob of a rule fits no name of the model.
      UserWarning: a config for weights alone, and a model that multiplies only what it is given as arguments.

    Raises:
      ConfigError: a rule names what the model does not have, or a config is beyond the chip's limits; all problems in one
        message.
      PlanError: a value to be quantized is written in place and used under its old name later; weights cannot be cut into
        groups of the size that is asked for, all of them in one message; or examples disagree on the calls of one name.

    Example:
      >>> import torch, sophq_func as sq
      >>> list(sq.plan(sq.trace(torch.nn.Linear(2, 3), (torch.ones(1, 2),)), sq.QuantConfig()))
      ['input.post_act_fake_quantizer', 'weight_fake_quant']
    """
    if not isinstance(config, QuantConfig):
        got, allowed, fix = type(config).__name__, "a sq.QuantConfig", 'sq.QuantConfig(chip="BM1690")'
        raise ConfigError(explain("plan", "config has the wrong type", got=got, allowed=allowed, fix=fix))
    graphs = [graph] if isinstance(graph, Graph) else graph
    if not isinstance(graphs, list | tuple) or not graphs or not all(isinstance(g, Graph) for g in graphs):
        got, allowed, fix = type(graph).__name__, "a Graph, or a list of at least one", "sq.trace(model, args)"
        raise ConfigError(explain("plan", "graph is no traced model", got=got, allowed=allowed, fix=fix))
    made = Plan.of(Origin(tuple(graphs), config))
    if not made and is_weight_only(config) and any(map(multiplies_only_inputs, graphs)):
        sentence = "nothing is quantized: the config is for weights, and the model multiplies inputs alone"
        because = "tensors that a model is given as arguments are values"
        fix = f"make its weights nn.Parameters, or give a function's by params=: {FUNCTION}"
        warn(explain("plan", sentence, because=because, fix=fix))
    return made
