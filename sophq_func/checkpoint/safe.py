"""What ``torch.load(..., weights_only=True)`` may make of a file: values of the library that hold tensors, numbers, texts.

``torch.save({"qparams": qparams, "plan": q.plan, "config": config})`` is then a file that loads in the mode that is torch's
default, in which a file cannot call what it likes. The list holds no class that refers to a model, and none whose
constructor does more than check its fields. Classes and functions of torch in the rules of a config are stored by name;
others are the user's to allow, with ``torch.serialization.add_safe_globals``.
"""

from __future__ import annotations

from torch.serialization import add_safe_globals

from sophq_func.config.paths import Reference
from sophq_func.config.rules import UNSET, QuantConfig, Rule, not_grouped
from sophq_func.config.site import CallSite, ComputedSite, LayerInput, OperandSite, ValueSite, WeightSite
from sophq_func.core.registry import Spec
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.granularity import GRANULARITIES
from sophq_func.numerics.scheme import Override, QScheme, QuantizerConfig
from sophq_func.observers import STATES
from sophq_func.planning.coverage import Coverage, Left
from sophq_func.planning.picture import Call, Edge, Wiring
from sophq_func.planning.plan import Plan
from sophq_func.planning.runs import Made, Run, Span

OF_STATES = (QParams, *STATES)
"""Named tuples of tensors."""

OF_CONFIGS = (
    *(QuantConfig, Rule, Reference, Override, QuantizerConfig, QScheme, Spec),
    *GRANULARITIES.values(),
    not_grouped,
)
"""What a config is made of; ``not_grouped`` is the condition of rules from the dictionaries of sophgo-mq."""

OF_PLANS = (
    *(Plan, CallSite, OperandSite, LayerInput, WeightSite, ComputedSite, ValueSite),
    *(Coverage, Left, Wiring, Call, Edge, Run, Made, Span),
)
"""What a plan is made of beside configs."""

OF_CACHES = (frozenset,)
"""What a site remembers after it was compared with a rule."""

# a pickle refers to the one instance by its name, which torch reads although it asks for something callable
NAMED = (UNSET, f"{Rule.__module__}.UNSET")

add_safe_globals([*OF_STATES, *OF_CONFIGS, *OF_PLANS, *OF_CACHES, NAMED])  # type: ignore[list-item]
