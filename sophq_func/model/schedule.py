"""At which calls of a run the quantizers of a plan act, and which calls a run must make."""

from __future__ import annotations

from typing import NamedTuple

from sophq_func.config.site import Site
from sophq_func.core.operations import hidden_from_compile
from sophq_func.planning.plan import Plan

Pair = tuple[str, str]


OPTIONAL = "Rule(name=..., optional=True) where a run may leave the value out"


class Actions(NamedTuple):
    """What happens at one call: quantizer names by operand, by result, and for weights computed inside a leaf module."""

    operands: dict[int, str]
    outputs: dict[int, str]
    inner: str


class Schedule:
    """All actions of a plan, by call, and what calls a run must make.

    Attributes:
      inputs: quantizer name by the model's argument.
      same: for arguments that must be the same tensor as another one, that one.
      actions: by (module path, function), then by call count.
      shared: quantizers that act before several calls, where they may meet one tensor again.
      counts: for each example, calls of each pair.
      optional: pairs, and arguments, that a run may leave out.
    """

    def __init__(self, plan: Plan) -> None:
        sites = [plan.site(name) for name in plan if not plan.site(name).parameter]
        self.inputs = {site.argument: site.quantizer for site in sites if site.argument}
        self.same = {name: site.argument for site in sites for name in site.also}
        self.shared = {site.quantizer for site in sites if site.more}
        self.actions: dict[Pair, dict[int, Actions]] = {}
        for site in sites:
            if not site.argument:
                self._add(site)
        self.counts = [dict(counts) for counts in plan.counts]
        required = {pair for site in sites if not plan[site.quantizer].optional for pair in places(site)}
        self.optional = {pair for site in sites for pair in places(site)} - required
        hidden = hidden_from_compile()
        self.hidden = {pair for pair in self.actions if pair[1] in hidden}

    def _add(self, site: Site) -> None:
        for path, function, call, operand in site.places():
            at = self.actions.setdefault((path, function), {}).setdefault(call, Actions({}, {}, ""))
            if site.output >= 0:
                at.outputs[site.output] = site.quantizer
            elif operand >= 0:
                at.operands[operand] = site.quantizer
            else:
                self.actions[path, function][call] = at._replace(inner=site.quantizer)

    def __bool__(self) -> bool:
        return bool(self.inputs or self.actions)


def places(site: Site) -> list[Pair | str]:
    """The argument that a site follows, or the (module path, function) of each call at which it acts."""
    return [site.argument] if site.argument else [place[:2] for place in site.places()]
