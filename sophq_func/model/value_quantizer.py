"""A quantizer that acts while the model runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sophq_func.config.site import Site
from sophq_func.model.weight_quantizer import Params
from sophq_func.numerics.affine import switched
from sophq_func.numerics.contracts import FakeQuantize, Observer, QParams
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

    def quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """``x`` rounded to its grid, unless ``extras["enabled"]`` switches the quantizer off."""
        return switched(x, self.fake_quantize.apply(x, qparams, self.scheme), qparams)

    def seen(self, params: Params) -> Tensor:
        """A tensor of the example's shape, to tell functions shape and device; its numbers mean nothing.

        It is one zero, expanded, so that it takes no memory; on the device of the params.
        """
        device = next((p.device for p in params.values()), torch.device("cpu"))
        return torch.zeros((), device=device).expand(self.site.shape)
