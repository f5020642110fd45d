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
    """One quantizer that acts while the model runs: on an activation, or on a weight computed in the forward."""

    site: Site
    config: QuantizerConfig
    observer: Observer
    fake_quantize: FakeQuantize

    @property
    def scheme(self) -> QScheme:
        """The scheme."""
        return self.config.scheme

    def quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """``x`` on its grid, where the quantizer is enabled."""
        return switched(x, self.fake_quantize.apply(x, qparams, self.scheme), qparams)

    def seen(self, params: Params) -> Tensor:
        """A tensor of the example's shape, on the device of the params; it takes no memory."""
        device = next((p.device for p in params.values()), torch.device("cpu"))
        return torch.zeros((), device=device).expand(self.site.shape)
