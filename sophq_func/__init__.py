"""Fine-grained control over quantization, as pure functions that compose with ``torch.func``."""

from sophq_func import fake_quantize as fake_quantize
from sophq_func import observers as observers
from sophq_func import patterns as patterns
from sophq_func import rules as rules
from sophq_func.base import FakeQuantize as FakeQuantize
from sophq_func.base import Observer as Observer
from sophq_func.base import QParams as QParams
from sophq_func.chips import CHIPS as CHIPS
from sophq_func.chips import ChipSpec as ChipSpec
from sophq_func.dicts import from_dicts as from_dicts
from sophq_func.errors import ConfigError as ConfigError
from sophq_func.errors import PlanError as PlanError
from sophq_func.errors import StateError as StateError
from sophq_func.fake_quantize import fake_quantizer as fake_quantizer
from sophq_func.flat import merge as merge
from sophq_func.graph import Graph as Graph
from sophq_func.intercept import params_of as params_of
from sophq_func.observers import observer as observer
from sophq_func.plan import Plan as Plan
from sophq_func.planning import plan as plan
from sophq_func.plot import draw as draw
from sophq_func.prepare import build as build
from sophq_func.prepare import prepare_by_platform as prepare_by_platform
from sophq_func.prepare import quantize as quantize
from sophq_func.quantized import Quantized as Quantized
from sophq_func.registry import Spec as Spec
from sophq_func.report import Fidelity as Fidelity
from sophq_func.report import fidelity as fidelity
from sophq_func.rules import QuantConfig as QuantConfig
from sophq_func.rules import Rule as Rule
from sophq_func.scheme import PerBlock as PerBlock
from sophq_func.scheme import PerChannel as PerChannel
from sophq_func.scheme import PerGroup as PerGroup
from sophq_func.scheme import PerTensor as PerTensor
from sophq_func.scheme import PerToken as PerToken
from sophq_func.scheme import QScheme as QScheme
from sophq_func.scheme import QuantizerConfig as QuantizerConfig
from sophq_func.scheme import override as override
from sophq_func.settings import enabled as enabled
from sophq_func.settings import stack as stack
from sophq_func.settings import unstack as unstack
from sophq_func.settings import with_bits as with_bits
from sophq_func.site import Site as Site
from sophq_func.trace import trace as trace

__version__ = "0.1.0"
