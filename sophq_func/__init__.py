"""Fine-grained control over quantization, as pure functions that compose with ``torch.func``."""

import typing as _typing

from sophq_func import algorithms as algorithms
from sophq_func import export as export
from sophq_func import fake_quantize as fake_quantize
from sophq_func import numerics as numerics
from sophq_func import observers as observers
from sophq_func import testing as testing
from sophq_func.algorithms.curvature import HessianTrace as HessianTrace
from sophq_func.algorithms.curvature import TopEigenvalue as TopEigenvalue
from sophq_func.algorithms.curvature import hessian_trace as hessian_trace
from sophq_func.algorithms.curvature import rademacher as rademacher
from sophq_func.algorithms.curvature import top_eigenvalue as top_eigenvalue
from sophq_func.algorithms.sensitivity import Fidelity as Fidelity
from sophq_func.algorithms.sensitivity import Sensitivities as Sensitivities
from sophq_func.algorithms.sensitivity import Sensitivity as Sensitivity
from sophq_func.algorithms.sensitivity import fidelity as fidelity
from sophq_func.algorithms.sensitivity import sensitivity as sensitivity
from sophq_func.capture.contents import params_of as params_of
from sophq_func.capture.graph import Graph as Graph
from sophq_func.capture.staging import Staged as Staged
from sophq_func.capture.staging import stage as stage
from sophq_func.capture.trace import trace as trace
from sophq_func.checkpoint.io import Checkpoint as Checkpoint
from sophq_func.checkpoint.io import load as load
from sophq_func.checkpoint.io import save as save
from sophq_func.codes import pack as pack
from sophq_func.codes import unpack as unpack
from sophq_func.config import patterns as patterns
from sophq_func.config import presets as presets
from sophq_func.config import register as register
from sophq_func.config import rules as rules
from sophq_func.config import strategies as strategies
from sophq_func.config.chips import CHIPS as CHIPS
from sophq_func.config.chips import ChipSpec as ChipSpec
from sophq_func.config.dicts import from_dicts as from_dicts
from sophq_func.config.dicts.former import FORMER as _FORMER
from sophq_func.config.rules import QuantConfig as QuantConfig
from sophq_func.config.rules import Rule as Rule
from sophq_func.config.site import Site as Site
from sophq_func.core.absent import refuse_name as _refuse_name
from sophq_func.core.errors import CheckpointError as CheckpointError
from sophq_func.core.errors import ConfigError as ConfigError
from sophq_func.core.errors import PlanError as PlanError
from sophq_func.core.errors import PlanWarning as PlanWarning
from sophq_func.core.errors import StateError as StateError
from sophq_func.core.registry import Spec as Spec
from sophq_func.core.version import __version__ as __version__
from sophq_func.fake_quantize import fake_quantizer as fake_quantizer
from sophq_func.integers import Artifact as Artifact
from sophq_func.integers import convert as convert
from sophq_func.model.build import build as build
from sophq_func.model.build import prepare_by_platform as prepare_by_platform
from sophq_func.model.build import quantize as quantize
from sophq_func.model.flat import merge as merge
from sophq_func.model.guards import skip_guards_on_quantized as skip_guards_on_quantized
from sophq_func.model.params import load_into as load_into
from sophq_func.model.params import split_params as split_params
from sophq_func.model.quantized import Quantized as Quantized
from sophq_func.model.settings import enabled as enabled
from sophq_func.model.settings import stack as stack
from sophq_func.model.settings import unstack as unstack
from sophq_func.model.settings import with_bits as with_bits
from sophq_func.model.statistics import statistics as statistics
from sophq_func.model.trees import cast as cast
from sophq_func.model.trees import lerp as lerp
from sophq_func.numerics import formats as formats
from sophq_func.numerics.contracts import FakeQuantize as FakeQuantize
from sophq_func.numerics.contracts import Observer as Observer
from sophq_func.numerics.contracts import QParams as QParams
from sophq_func.numerics.granularity import PerBlock as PerBlock
from sophq_func.numerics.granularity import PerChannel as PerChannel
from sophq_func.numerics.granularity import PerGroup as PerGroup
from sophq_func.numerics.granularity import PerTensor as PerTensor
from sophq_func.numerics.granularity import PerToken as PerToken
from sophq_func.numerics.moments import Moments as Moments
from sophq_func.numerics.scheme import QScheme as QScheme
from sophq_func.numerics.scheme import QuantizerConfig as QuantizerConfig
from sophq_func.numerics.scheme import override as override
from sophq_func.observers import observer as observer
from sophq_func.planning.coverage import Coverage as Coverage
from sophq_func.planning.coverage import Left as Left
from sophq_func.planning.make import plan as plan
from sophq_func.planning.plan import Plan as Plan
from sophq_func.planning.plot import draw as draw
from sophq_func.reports import ChipComparison as ChipComparison
from sophq_func.reports import ChipRow as ChipRow
from sophq_func.reports import Report as Report
from sophq_func.reports import ReportRow as ReportRow
from sophq_func.reports import compare_chip as compare_chip
from sophq_func.reports import report as report

__all__ = [
    "CHIPS",
    "Artifact",
    "Checkpoint",
    "CheckpointError",
    "ChipComparison",
    "ChipRow",
    "ChipSpec",
    "ConfigError",
    "Coverage",
    "FakeQuantize",
    "Fidelity",
    "Graph",
    "HessianTrace",
    "Left",
    "Moments",
    "Observer",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Plan",
    "PlanError",
    "PlanWarning",
    "QParams",
    "QScheme",
    "QuantConfig",
    "Quantized",
    "QuantizerConfig",
    "Report",
    "ReportRow",
    "Rule",
    "Sensitivities",
    "Sensitivity",
    "Site",
    "Spec",
    "Staged",
    "StateError",
    "TopEigenvalue",
    "algorithms",
    "build",
    "cast",
    "compare_chip",
    "convert",
    "draw",
    "enabled",
    "export",
    "fake_quantize",
    "fake_quantizer",
    "fidelity",
    "formats",
    "from_dicts",
    "hessian_trace",
    "lerp",
    "load",
    "load_into",
    "merge",
    "numerics",
    "observer",
    "observers",
    "override",
    "pack",
    "params_of",
    "patterns",
    "plan",
    "prepare_by_platform",
    "presets",
    "quantize",
    "rademacher",
    "register",
    "report",
    "rules",
    "save",
    "sensitivity",
    "skip_guards_on_quantized",
    "split_params",
    "stack",
    "stage",
    "statistics",
    "strategies",
    "testing",
    "top_eigenvalue",
    "trace",
    "unpack",
    "unstack",
    "with_bits",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


if not _typing.TYPE_CHECKING:  # a type checker would take every name for one of this module

    def __getattr__(name: str) -> _typing.NoReturn:
        _refuse_name("sophq_func", name, __all__, _FORMER)
