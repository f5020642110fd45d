"""What a compiled backward keeps of a quantizer: nothing but what its input is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

import sophq_func as sq


def kept(f: Any, *args: Any) -> list[Tensor]:
    """What the forward pass of a compiled function hands to its backward pass, beside its arguments."""
    found: list[Tensor] = []

    def forward(graph: fx.GraphModule, inputs: Any) -> fx.GraphModule:
        (outputs,) = next(node for node in graph.graph.nodes if node.op == "output").args
        made = [node for node in outputs[1:] if isinstance(node, fx.Node) and node.op != "placeholder"]
        found.extend(node.meta["val"] for node in made if isinstance(node.meta["val"], Tensor))
        return graph

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, _: graph,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    torch._dynamo.reset()
    torch.compile(f, fullgraph=True, backend=backend)(*args)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
def test_neither_masks_nor_slopes_are_kept(affine: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3)).train()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    learned = {"observer": sq.observers.minmax(), "fake_quantize": sq.fake_quantize.learnable()}
    config = sq.QuantConfig(
        strategy="Layers",
        weight=sq.override(granularity=sq.PerChannel(), **learned),
        activation=sq.override(symmetric=not affine, **learned),
    )
    q, params = sq.quantize(model, config, example_args=(x,)), sq.params_of(model)
    scales, rest = q.split(q.calibrate(params, [x], progress=False))
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    scales = {name: scale.clone().requires_grad_() for name, scale in scales.items()}

    def loss(weights: dict[str, Tensor], scales: dict[str, Tensor], x: Tensor) -> Tensor:
        return q.apply({**params, **weights}, sq.merge(scales, rest), x).square().mean()

    found = kept(loss, weights, scales, x)
    hidden = [tuple(tensor.shape) for tensor in found if tensor.ndim == 4 and tensor.shape[0] == 2]
    assert not [tensor.shape for tensor in found if tensor.dtype == torch.bool and tensor.numel() > 5]
    assert sorted(hidden) == [(2, 4, 6, 6), (2, 5, 4, 4)], "the results of the convolutions, and nothing else"
