"""The cut of every head: its Gram matrix against gradients taken where the sharing ends, and what a replaced gradient trains."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from by_hand import batch_of
from torch import Tensor

from distmtl.config import Config
from distmtl.config_file import parse_config
from distmtl.model.experts import Gate
from distmtl.model.head import Head
from distmtl.model.layout import Features, Layout
from distmtl.model.loss import JointLoss, Terms
from distmtl.model.multitask import initialise_dense
from distmtl.model.weighting.cut import Gradients

B = 24
HEADS: dict[str, dict[str, Any]] = {
    "shared_bottom": {"bottom": [16, 8]},
    "omoe": {"num_experts": 3, "expert": [16, 8]},
    "mmoe": {"num_experts": 3, "expert": [16, 8]},
    "cgc": {"shared_experts": 2, "task_experts": 1, "expert": [8]},
    "ple": {"num_levels": 2, "shared_experts": 1, "task_experts": 2, "expert": [8]},
    "stem": {"shared_experts": 1, "task_experts": 2, "expert": [8]},
    "home": {"groups": [["click", "conversion"], ["rating"]], "experts": 2, "expert": [8]},
    "dbmtl": {"bottom": [16], "task": [8], "relation": [8]},
    "star": {"domain": "domain", "bottom": [16, 8], "auxiliary": [4]},
    "esmm": {"network": {"kind": "mmoe", "num_experts": 3, "expert": [8]}},
    "escm2": {"method": "dr", "network": {"kind": "ple", "num_levels": 2, "expert": [8]}},
}
FEATURES: dict[str, dict[str, Any]] = {
    "single_task": {"bottom": [8]},
    "aitm": {"bottom": [8]},
    "pepnet": {"domain_features": ["domain"], "gate_features": ["user"], "tower": [8]},
    "esmm": HEADS["esmm"],
    "stem": HEADS["stem"],
}
CASES = [*((kind, model, "network") for kind, model in HEADS.items()), *((kind, model, "features") for kind, model in FEATURES.items())]


class Built:
    """A head with open gates, a batch, and the losses of its terms."""

    def __init__(self, kind: str, model: dict[str, Any], cut: str, **train: Any):
        raw = tiny.raw(Path(), Path(), model={"kind": kind, **model}, weighting={"kind": "pcgrad", "cut": cut}, train=train)
        raw["features"].append({"kind": "id", "name": "domain", "rows": 3, "dim": 4})
        raw["tasks"][1]["parents"] = ["click"]
        self.config: Config = parse_config(raw)
        layout = Layout.of(self.config)
        self.head = Head(self.config, layout)
        initialise_dense(self.head, 0)
        torch.manual_seed(0)
        with torch.no_grad():
            for gate in (m for m in self.head.modules() if isinstance(m, Gate)):
                gate.weight.normal_(std=0.3)
        self.head.requires_grad_(True)
        dtype = torch.bfloat16 if self.config.train.precision == "bf16" else torch.float64
        if dtype == torch.float64:
            self.head.double()
        self.x = [torch.randn(B, layout.width).to(dtype).requires_grad_() for _ in range(self.config.copies)]
        self.domain = torch.arange(B) % 4
        click, rating = torch.arange(B) % 3 > 0, torch.randn(B)
        labels = torch.stack([click.float(), (click & (torch.arange(B) % 2 == 0)).float(), rating], dim=1)
        labels[::5, 2] = torch.nan
        self.batch = batch_of(labels.tolist(), torch.rand(B).add(0.5).tolist())
        self.probed: list[Tensor] = []
        if cut == "network":
            self._probe(kind)

    def _probe(self, kind: str) -> None:
        sharing = self.head.sharing
        if hasattr(sharing, "levels"):
            where = sharing.levels[-1].experts
        elif kind == "home":
            where = sharing.tasks.experts
        elif kind == "star":
            where = sharing
        else:
            where = sharing.bottom if hasattr(sharing, "bottom") else sharing.experts
        last = slice(1) if kind == "star" else slice(None)  # the same tensor for every task
        where.register_forward_hook(lambda module, inputs, outputs: self.probed.extend(outputs[last]))

    def losses(self) -> Tensor:
        self.probed.clear()
        self.outputs = self.head(Features(tuple(self.x), self.domain.clamp(max=2), torch.ones(B, dtype=torch.bool)))
        errors, weights = Terms(self.config)(self.outputs, self.batch)
        return (errors * weights).sum(0)

    def gradients(self, losses: Tensor) -> Gradients:
        return self.head.cut.gradients(losses, self.outputs, Terms(self.config).reads)

    def compared(self) -> list[Tensor]:
        """Where the tasks' gradients are compared."""
        return self.probed or self.x

    def trained(self, loss: Tensor) -> dict[str, Tensor]:
        """The gradient of everything, after one backward pass."""
        leaves = dict(self.head.named_parameters()) | {f"x{i}": x for i, x in enumerate(self.x)}
        for leaf in leaves.values():
            leaf.grad = None
        loss.backward()
        return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone() for name, leaf in leaves.items()}

    def above(self, name: str) -> bool:
        """Whether a parameter lies above the cut, where every task trains its own."""
        if self.head.at_features:
            return not name.startswith("x")
        own = ("sharing.tasks.", "sharing.relations.") if self.config.model.kind == "dbmtl" else ()
        return name.startswith(("towers.", "imputation.", *own))


def explicit(built: Built) -> Tensor:
    losses = built.losses()
    columns = sum(f.dim for f in built.config.embedded) if built.head.at_features else None
    found = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, built.compared(), retain_graph=True, allow_unused=True)
        parts = zip(gradients, built.compared(), strict=True)
        found.append(torch.cat([(torch.zeros_like(at) if g is None else g)[:, :columns].flatten().double() for g, at in parts]))
    stacked = torch.stack(found)
    return stacked @ stacked.T


@pytest.mark.parametrize(("kind", "model", "cut"), CASES, ids=lambda v: v if isinstance(v, str) else "")
class TestCut:
    def test_gram_is_that_of_the_gradients_where_sharing_ends(self, kind, model, cut):
        built = Built(kind, model, cut)
        expected = explicit(built)
        gram = built.head.cut.gram(built.gradients(built.losses()))
        norms = expected.diagonal().sqrt()
        assert (norms > 0).all()
        torch.testing.assert_close(gram / norms / norms[:, None], expected / norms / norms[:, None], rtol=0, atol=1e-6)

    def test_a_replaced_gradient_trains_what_is_shared_by_the_weighted_losses_and_the_rest_by_their_own(self, kind, model, cut):
        built = Built(kind, model, cut)
        losses = built.losses()
        factors = torch.linspace(2.0, -0.5, len(losses), dtype=torch.float64)
        own, weighted = built.trained(losses.sum()), built.trained((built.losses() * factors).sum())
        losses = built.losses()
        built.head.cut.replace(built.gradients(losses), factors)
        for name, gradient in built.trained(losses.sum()).items():
            expected = own[name] if built.above(name) else weighted[name]
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert not built.head.cut.points, "the graph is kept alive"
        again = built.trained(built.losses().sum())
        assert all(torch.equal(again[name], own[name]) for name in own), "a replacement outlives its step"


@pytest.mark.parametrize("cut", ["network", "features"])
def test_a_head_that_is_not_used_any_more_is_freed(cut):
    """After a step that did not look at gradients, too: what a graph holds must not hold the graph."""
    built = Built("mmoe", HEADS["mmoe"], cut)
    alive = weakref.ref(built.head.sharing.experts.weights[0])
    built.trained(built.losses().sum())
    del built
    gc.collect()
    assert alive() is None


def test_bfloat16():
    """Gradients at the cut are those of the precision trained in; their products are summed in full."""
    rough, fine = (Built("mmoe", HEADS["mmoe"], "network", precision=precision) for precision in ("bf16", "fp32"))
    gram, expected = (b.head.cut.gram(b.gradients(b.losses())) for b in (rough, fine))
    torch.testing.assert_close(gram, explicit(rough), rtol=0.02, atol=0)
    norms = expected.diagonal().sqrt()
    torch.testing.assert_close(gram / norms / norms[:, None], expected / norms / norms[:, None], rtol=0, atol=0.05)
    losses = rough.losses()
    rough.head.cut.replace(rough.gradients(losses), torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64))
    one = rough.trained(losses.sum())
    other = rough.trained((rough.losses() * torch.tensor([2.0, 0.5, 1.0])).sum())
    for name in one:
        if not rough.above(name):
            torch.testing.assert_close(one[name], other[name], rtol=0.05, atol=0.05 * float(other[name].abs().max()))


def test_nothing_is_compared_where_nothing_is_trained():
    """Numbers alone: what a head without a network of all tasks shares is data."""
    raw = tiny.raw(Path(), Path(), model={"kind": "single_task"}, train={"log_every": 1})
    raw["features"] = [{"kind": "numeric", "name": "x"}]
    config = parse_config(raw)
    head = Head(config, Layout.of(config))
    loss, numbers = JointLoss(config, head.cut)(head(Features((torch.randn(2, 1),))), batch_of([[0, 1, 0.2], [1, 0, 0.5]], [1.0, 1.0]))
    loss.backward()
    assert numbers.gram is not None and not numbers.gram.any()
