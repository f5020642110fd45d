"""Cuts a quantized model: which part of the skeleton and of the plan belong to a module."""

from __future__ import annotations

from sophq_func.capture.skeleton import Skeleton
from sophq_func.core.errors import PlanError, explain, unknown
from sophq_func.model.engine import Engine
from sophq_func.planning import parts
from sophq_func.planning.plan import Plan


def part(engine: Engine, path: str, call: int) -> tuple[Skeleton, Plan]:
    """The skeleton and the plan of one call of a module, see :meth:`sophq_func.Quantized.part`."""
    if engine.whole is not None:
        fix = "take it from the whole model"
        raise PlanError(explain("part", "a part of a part cannot be taken", fix=fix))
    skeleton = engine.skeleton
    first = skeleton.first_path(path)
    if first is None:
        known = [spelling for spellings in skeleton.paths.values() for spelling in spellings if spelling]
        raise PlanError(unknown("part", "module", path, known))
    parameters = skeleton.part(first).names
    plan = parts.part(engine.plan, first, call, parameters)
    # which BatchNorms are folded is known from the plan only, which needs the parameters first
    return skeleton.part(first, _folded_into(engine, plan)), plan


def blocks(engine: Engine, pattern: str | None) -> list[tuple[str, int]]:
    """Path and call of each block in execution order, see :meth:`sophq_func.Quantized.blocks`."""
    if pattern is None:
        return parts.blocks(engine.plan, engine.skeleton.is_list_item)
    return parts.matching(engine.plan, pattern)


def _folded_into(engine: Engine, plan: Plan) -> list[str]:
    """Names of the tensors of each BatchNorm that a part's weights are folded with; it may lie outside of the part."""
    norms = {plan.site(name).norm for name in plan} - {""}
    return [tensor for norm in norms for tensor in engine.tensors_of(norm).values()]
