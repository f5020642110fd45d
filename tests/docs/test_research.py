"""What the pages on research show, as numbers: against loops, against ``torch.optim``, against ``Tensor.backward``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

import sophq_func as sq
from tests.docs.pages import ROOT, run

pytestmark = pytest.mark.slow

PAGES = ROOT / "docs" / "research"
Tree = dict[str, Tensor]


def leaves(tree: Tree) -> Tree:
    """Copies that require gradients."""
    return {name: leaf.detach().clone().requires_grad_() for name, leaf in tree.items()}


def test_every_page_names_an_example_and_the_readme_leads_to_it() -> None:
    readme = (ROOT / "README.md").read_text()
    for page in PAGES.glob("*.md"):
        text = page.read_text()
        shown = [part.partition("`")[0] for part in text.split("`python examples/")[1:]]
        assert shown, page
        assert all((ROOT / "examples" / script).exists() for script in shown), page
        assert f"docs/research/{page.name})" in readme
        assert "**Costs.**" in text, page
        assert "**Limits.**" in text, page


@pytest.mark.usefixtures("in_float64")
def test_functional_sgd_takes_the_steps_of_torch_optim() -> None:
    page = run(PAGES / "stateless-training.md")
    q, step, sgd, rest, x, labels = (page[name] for name in ("q", "step", "sgd", "rest", "x", "labels"))
    model, params = page["model"], page["params"]
    start = {name: params[name] for name, _ in model.named_parameters()}
    scales, _ = q.split(q.eval().calibrate(params, [x]))
    buffers = {name: p for name, p in params.items() if name not in start}

    functional, state, after = {**start, **scales}, {n: torch.zeros_like(p) for n, p in {**start, **scales}.items()}, buffers
    tensors, changed = leaves(functional), buffers
    optimizer = torch.optim.SGD(tensors.values(), lr=0.01, momentum=0.9)
    for _ in range(4):
        weights, own = ({n: functional[n] for n in half} for half in (start, scales))
        (for_weights, for_scales), (value, after) = step(weights, own, after, x, labels)
        functional, state = sgd(functional, {**for_weights, **for_scales}, state)
        weights, own = ({n: tensors[n] for n in half} for half in (start, scales))
        logits, new = q.apply_and_update({**weights, **changed}, sq.merge(own, rest), x)
        changed = {name: new[name].detach() for name in changed}
        optimizer.zero_grad()
        expected = F.cross_entropy(logits, labels)
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(functional, {n: t.detach() for n, t in tensors.items()})
    torch.testing.assert_close(after, changed)
    assert not torch.equal(functional["0.weight"], start["0.weight"])


@pytest.mark.usefixtures("in_float64")
def test_a_step_maps_over_learning_rates_and_seeds() -> None:
    page = run(PAGES / "stateless-training.md")
    step, sgd, x, labels = (page[name] for name in ("step", "sgd", "x", "labels"))
    trainable, scales, buffers = (
        {n: t.detach() for n, t in page[half].items()} for half in ("weights", "scales", "buffers")
    )
    several = {n: torch.stack([t, t * 1.01]) for n, t in trainable.items()}
    rates = torch.tensor([0.01, 0.1])

    def trained(rate: Tensor, weights: Tree, buffers: Tree) -> Tensor:
        (gradients, _), (_, after) = step(weights, scales, buffers, x, labels)
        weights, _ = sgd(weights, gradients, {n: torch.zeros_like(t) for n, t in weights.items()}, rate)
        value: Tensor = step(weights, scales, after, x, labels)[1][0]
        return value

    found = vmap(trained)(rates, several, {n: torch.stack([t, t]) for n, t in buffers.items()})
    expected = [trained(rate, {n: t[i] for n, t in several.items()}, buffers) for i, rate in enumerate(rates)]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.usefixtures("in_float64")
def test_members_with_their_own_params_and_scales_map_like_a_loop() -> None:
    page = run(PAGES / "ensembles.md")
    q, x, members = page["q"], page["x"], page["members"]
    each = [q.apply(member, setting, x) for member, setting in zip(members, sq.unstack(page["settings"]), strict=True)]
    torch.testing.assert_close(page["logits"], torch.stack(each))
    assert not torch.equal(each[0], each[1])
    by_width = [q.apply(page["params"], sq.with_bits(page["qparams"], q.plan, bits), x) for bits in (3, 4, 8)]
    torch.testing.assert_close(page["by_setting"], torch.stack(by_width))


@pytest.mark.usefixtures("in_float64")
def test_the_masked_losses_of_the_page_are_its_sensitivities() -> None:
    page = run(PAGES / "sensitivity.md")
    for name, alone in zip(page["names"], page["each_alone"], strict=True):
        torch.testing.assert_close(alone, page["found"][name].alone)
    q, labels, x = page["q"], page["labels"], page["x"].double()
    params = {name: p.double() if p.is_floating_point() else p for name, p in page["params"].items()}
    steps = 1e-3 * torch.eye(len(page["names"]), dtype=torch.float64)

    def masked(mask: Tensor) -> Tensor:
        return F.cross_entropy(q.apply(params, sq.enabled(page["qparams"], mask), x), labels)

    differences = torch.stack([(masked(step) - masked(-step)) / 2e-3 for step in steps])
    torch.testing.assert_close(grad(masked)(0 * steps[0]), differences, rtol=1e-5, atol=0)


@pytest.mark.parametrize("half", [0, 1], ids=["scales", "bits"])
def test_gradients_of_scales_and_widths_are_those_of_backward(half: int) -> None:
    page = run(PAGES / "bit-widths.md")
    bits = dict.fromkeys(page["sizes"], torch.tensor(4.0))
    both: list[Any] = [leaves(page["scales"]), leaves(bits)]
    page["loss"](*both, page["x"], page["labels"]).backward()
    found = grad(page["loss"], (0, 1))(page["scales"], bits, page["x"], page["labels"])[half]
    assert any(bool(g.abs().sum() > 0) for g in found.values())
    for name, g in found.items():
        torch.testing.assert_close(g, both[half][name].grad)
