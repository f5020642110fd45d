"""At which calls of a run the quantizers of a plan act, and which calls a run must make."""

from __future__ import annotations

from typing import NamedTuple

from sophq_func.config.site import Site, WeightSite
from sophq_func.core.operations import hidden_from_compile, operations
from sophq_func.planning.plan import Plan

Pair = tuple[str, str]
"""What calls are counted by: a module path, and the function called in that module, empty for the module's own call."""

OPTIONAL = "Rule(name=..., optional=True) where a run may leave the value out"
"""The fix in errors about runs that do not reach a quantizer."""


KNOWN = operations() - {"cond"} | {"", "get"}
"""Names of torch's own functions; a call of a module has none, and the getter of a tensor's attribute has ``"get"``.

Not ``torch.cond``, which a run sees only where hidden calls are reported.
"""


class Actions(NamedTuple):
    """The quantizers that act at one call.

    Attributes:
      operands: quantizer name by the operand's index among the tensors of the call's arguments.
      outputs: quantizer name by the index among the tensors of the call's result.
      inner: quantizer of a weight that is computed inside a leaf module; empty without.
    """

    operands: dict[int, str]
    outputs: dict[int, str]
    inner: str


class Schedule:
    """All actions of a plan, by call, and the calls that a run must make.

    Attributes:
      inputs: quantizer name, by the model's argument on which it acts.
      same: for each argument that must be the same tensor as another argument, that other one.
      actions: by pair, then by the number of the call among those of its pair.
      shared: quantizers that act before several calls, which may read the same tensor.
      counts: for each example, how many calls each pair makes.
      optional: pairs, and arguments, that a run may leave out.
      functions: whether an example calls a function that is none of torch's, such as an ``autograd.Function``.
      hidden: pairs of ``actions`` whose function has a spelling that ``torch.compile`` hides from a frame.
    """

    def __init__(self, plan: Plan) -> None:
        sites = [site for site in map(plan.site, plan) if not isinstance(site, WeightSite)]
        self.inputs = {site.argument: site.quantizer for site in sites if site.argument}
        self.same = {repeated: site.argument for site in sites for repeated in site.also}
        self.shared = {site.quantizer for site in sites if site.more}
        self.actions: dict[Pair, dict[int, Actions]] = {}
        for site in sites:
            if not site.argument:
                self._add(site)
        self.counts = [dict(counts) for counts in plan.counts]
        # a place is optional only if every quantizer there is
        required = {place for site in sites if not plan[site.quantizer].optional for place in places(site)}
        self.optional = {place for site in sites for place in places(site)} - required
        # a plan of an older version does not know
        self.functions = not plan.runs or not {made.function for run in plan.runs for made in run.calls} <= KNOWN
        hidden = hidden_from_compile()
        self.hidden = {pair for pair in self.actions if pair[1] in hidden}

    def _add(self, site: Site) -> None:
        """Add a site to the actions of each call at which it acts."""
        for path, function, call, operand in site.places():
            calls = self.actions.setdefault((path, function), {})
            actions = calls.setdefault(call, Actions({}, {}, ""))
            if site.output >= 0:
                actions.outputs[site.output] = site.quantizer
            elif operand >= 0:
                actions.operands[operand] = site.quantizer
            else:
                calls[call] = actions._replace(inner=site.quantizer)

    def __bool__(self) -> bool:
        return bool(self.inputs or self.actions)


def places(site: Site) -> list[Pair | str]:
    """The argument on which a site acts, or the pair of each call at which it acts."""
    if site.argument:
        return [site.argument]
    return [(place.path, place.function) for place in site.places()]
