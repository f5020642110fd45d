"""A quantizer that acts while the model runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sophq_func.config.site import ComputedSite, Site
from sophq_func.core.errors import StateError, explain
from sophq_func.core.modes import is_mapped
from sophq_func.model.weight_quantizer import Params
from sophq_func.numerics.affine import switched
from sophq_func.numerics.contracts import FakeQuantize, Observer, QParams, State
from sophq_func.numerics.granularity import PerTensor, PerToken
from sophq_func.numerics.scheme import QScheme, QuantizerConfig


@dataclass(frozen=True)
class RunQuantizer:
    """A quantizer that acts while the model runs: on an activation, or on a weight computed in the forward.

    Attributes:
      site: where it sits.
      config: its scheme, observer and fake quantizer, as the plan names them.
      observer, fake_quantize: the functions that the config names.
    """

    site: Site
    config: QuantizerConfig
    observer: Observer
    fake_quantize: FakeQuantize

    @property
    def scheme(self) -> QScheme:
        """The scheme of the config."""
        return self.config.scheme

    @property
    def is_inner(self) -> bool:
        """Whether it acts on a weight inside a leaf, whose axes are those of the layer even where the model maps over it."""
        return isinstance(self.site, ComputedSite) and self.site.operand < 0

    def check_members(self, x: Tensor) -> None:
        """Raise a :class:`StateError` where a compiler shows one member of the value, and its scale is not that of each.

        In eager the whole value is quantized, as it is without the ``vmap`` in the forward.
        """
        is_member = is_mapped() and x.dim() < len(self.site.shape) and not self.is_inner
        scheme = self.scheme
        is_per_tensor = isinstance(scheme.granularity, PerTensor) and not scheme.dynamic and not self.fake_quantize.noise
        if is_member and not is_per_tensor and not isinstance(scheme.granularity, PerToken):
            sentence = f"{self.site.quantizer} lies under a vmap in the forward, which cannot be compiled"
            because = "the compiler shows one member at a time, and the scales are those of the whole tensor"
            fix = "run it without torch.compile, or give it one calibrated scale: granularity=sq.PerTensor()"
            raise StateError(explain("apply", sentence, because=because, fix=fix))

    def observed(self, state: State, x: Tensor) -> State:
        """The observer's state after one more tensor.

        Raises:
          StateError: the state has other channels than the tensor.
        """
        try:
            return self.observer.update(state, x, self.scheme)
        except RuntimeError as error:
            if isinstance(self.scheme.granularity, PerTensor) or x.shape == self.site.shape:
                raise
            sentence, because = "this value cannot be observed", f"its scales are {self.scheme.granularity}: {error}"
            allowed, fix = f"{self.site.shape}, that of the example, along its scales", "plan this model anew"
            text = explain(self.site.quantizer, sentence, got=tuple(x.shape), allowed=allowed, because=because, fix=fix)
            raise StateError(text) from error

    def quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """``x`` rounded to its grid, unless ``extras["enabled"]`` switches the quantizer off."""
        return switched(x, self.fake_quantize.apply(x, qparams, self.scheme), qparams)

    def seen(self, params: Params) -> Tensor:
        """A tensor of the example's shape, to tell functions shape and device; its numbers mean nothing.

        It is one zero, expanded, so that it takes no memory; on the device of the params.
        """
        device = next((p.device for p in params.values()), torch.device("cpu"))
        return torch.zeros((), device=device).expand(self.site.shape)
