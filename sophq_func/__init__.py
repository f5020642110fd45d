"""Fine-grained control over quantization, as pure functions that compose with ``torch.func``."""

from sophq_func import fake_quantize as fake_quantize
from sophq_func import observers as observers
from sophq_func.base import QParams as QParams
from sophq_func.fake_quantize import fake_quantizer as fake_quantizer
from sophq_func.observers import observer as observer
from sophq_func.scheme import QScheme as QScheme
from sophq_func.base import FakeQuantize as FakeQuantize
from sophq_func.scheme import PerChannel as PerChannel
