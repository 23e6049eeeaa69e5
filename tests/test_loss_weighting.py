"""Weightings by losses, and GradNorm: each against its paper's loss written for autograd and torch.optim.Adam, or a closed form."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from by_hand import batch_of
from torch import Tensor

from distmtl.config_file import parse_config
from distmtl.errors import DistmtlError
from distmtl.model.loss import JointLoss
from distmtl.model.weighting import Cut, Weighting, make_weighting

STEPS, TASKS = 12, 3


def made(seed: int = 0, tasks: list[dict[str, Any]] | None = None, **method: Any) -> Weighting:
    sections = {"weighting": method, "run": {"seed": seed}} | ({"tasks": tasks} if tasks else {})
    return make_weighting(tiny.config(Path(), Path(), **sections))


def weights_of(method: Weighting, losses: Tensor, grams: Tensor | None = None) -> Tensor:
    """λ in every step; a NaN loss is of an absent task."""
    return torch.stack(
        [method(i, of_step.nan_to_num(), ~of_step.isnan(), None if grams is None else grams[i]) for i, of_step in enumerate(losses)]
    )


def losses_of(seed: int = 0, absent: bool = True) -> Tensor:
    """Of STEPS steps: of different sizes, falling at different speeds; task 1 is absent now and then, once task 0 is too."""
    noise, step = torch.Generator().manual_seed(seed), torch.arange(STEPS)[:, None]
    falling = torch.tensor([0.1, 0.7, 5.0]) * torch.exp(-step * torch.tensor([0.01, 0.1, 0.03]))
    out = (falling * torch.exp(0.2 * torch.randn(STEPS, TASKS, generator=noise))).double()
    if absent:
        out[[0, 4, 5, 9], 1] = math.nan
        out[7, 0] = math.nan
    return out


class OfEveryTask:
    """A parameter per task under Adam, which leaves those without a gradient alone, moments and all."""

    def __init__(self, start: float | list[float], lr: float):
        starts = start if isinstance(start, list) else [start] * TASKS
        self.values = [torch.tensor(s, dtype=torch.float64, requires_grad=True) for s in starts]
        self.adam = torch.optim.Adam(self.values, lr=lr)

    def minimise(self, loss: Tensor) -> None:
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()


def kendall(s, loss, squared):
    return loss / (2 * s.exp()) + s / 2 if squared else loss / s.exp() + s / 2


LEARNT = {  # the term of a task, where its number starts, and where it is squared
    "uncertainty": (kendall, [0.0, 0.0, math.log(0.5)], {"kind": "uncertainty", "lr": 0.03}),
    "liebel_koerner": (
        lambda s, loss, squared: loss / (2 * s.exp()) + torch.log(1 + s.exp()),
        math.log(0.5),
        {"kind": "uncertainty", "form": "liebel_koerner", "lr": 0.03},
    ),
    "imtl_l": (lambda s, loss, squared: s.exp() * loss - s, 0.0, {"kind": "imtl_l", "lr": 0.03}),
}
BINARY = {"kind": "binary", "tower": [8]}
SQUARED = [{**BINARY, "name": "a"}, {"kind": "regression", "name": "b"}, {"kind": "regression", "name": "c", "loss": "squared"}]


@pytest.mark.parametrize("name", LEARNT)
def test_a_number_per_task_by_autograd(name):
    term, start, config = LEARNT[name]
    method, learnt, expected = made(tasks=SQUARED, **config), OfEveryTask(start, config["lr"]), []
    for of_step in losses_of():
        losses = of_step.clone().requires_grad_()
        here = [t for t in range(TASKS) if not of_step[t].isnan()]
        joint = sum(term(learnt.values[t], losses[t], t == 2) for t in here)
        (of_losses,) = torch.autograd.grad(joint, losses, retain_graph=True)
        expected.append(torch.where(of_step.isnan(), 1.0, of_losses))
        learnt.minimise(joint)
    found = weights_of(method, losses_of())
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=0)
    assert torch.equal(found[0], torch.ones(TASKS).double()) and (found[-1] - 1).abs().min() > 0.01


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_gradnorm_by_autograd(alpha):
    rng = torch.Generator().manual_seed(1)
    gradients = torch.randn(STEPS, TASKS, 5, generator=rng).double() * torch.tensor([0.2, 1.0, 4.0])[:, None]
    learnt, first, expected = OfEveryTask(1.0, 0.025), {}, []
    for g, losses in zip(gradients, losses_of(), strict=True):
        here = [t for t in range(TASKS) if not losses[t].isnan()]
        weights = [learnt.values[t] for t in here]
        expected.append(torch.ones(TASKS).double().index_put((torch.tensor(here),), torch.stack(weights).detach()))
        first = {t: losses[t] for t in here} | first
        norms = torch.stack([(w * g[t]).norm() for w, t in zip(weights, here, strict=True)])
        relative = torch.stack([losses[t] / first[t] for t in here])
        target = (norms.mean() * (relative / relative.mean()) ** alpha).detach()
        total = sum(w.item() for w in weights)
        learnt.minimise((norms - target).abs().sum())
        with torch.no_grad():
            factor = total / sum(w.item() for w in weights)
            for w in weights:
                w.mul_(factor)
    found = weights_of(made(kind="gradnorm", alpha=alpha), losses_of(), gradients @ gradients.mT)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=0)
    assert (found[-1] - 1).abs().min() > 0.01
    everyone = weights_of(made(kind="gradnorm", alpha=alpha), losses_of(absent=False), gradients @ gradients.mT)
    torch.testing.assert_close(everyone.sum(1), torch.full((STEPS,), 3.0).double())


def test_famo_by_autograd():
    """The paper's weighted loss and Jacobian, with a running mean in place of the same batch's loss."""
    w = torch.zeros(TASKS, dtype=torch.float64, requires_grad=True)
    adam, level, expected = torch.optim.Adam([w], lr=0.025, weight_decay=0.01), None, []
    for losses in losses_of(absent=False):
        if level is not None:
            (w.grad,) = torch.autograd.grad(w.softmax(0), w, grad_outputs=level - losses.log())
            adam.step()
        level = losses.log() if level is None else 0.8 * level + 0.2 * losses.log()
        z, of_task = w.softmax(0).detach(), losses.clone().requires_grad_()
        c = (z / losses).sum()
        (gradient,) = torch.autograd.grad((of_task.log() * z / c).sum(), of_task)
        expected.append(TASKS * gradient)
    found = weights_of(made(kind="famo", weight_decay=0.01, smoothing=0.8), losses_of(absent=False))
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=0)


def test_famo_with_absent_tasks():
    """They keep their logit, and come back with it; those that are there are weighed among themselves."""
    method, losses = made(kind="famo", weight_decay=0.0), losses_of()
    before = None
    for i, of_step in enumerate(losses):
        found = method(i, of_step.nan_to_num(), ~of_step.isnan(), None)
        here = ~of_step.isnan()
        assert torch.isfinite(found).all() and (found[~here] == 1).all()
        assert float(found[here].sum()) == pytest.approx(int(here.sum()))
        if before is not None:
            assert torch.equal(method.logits[~here], before[~here])
        before = method.logits.clone()


def test_dwa_by_windows():
    window, losses = 3, losses_of(absent=False)
    means = losses.view(STEPS // window, window, TASKS).mean(1)
    expected = [torch.ones(TASKS).double()] * 2
    for k in range(2, len(means)):
        exp = ((means[k - 1] / means[k - 2]) / 2.0).exp()
        expected.append(TASKS * exp / exp.sum())
    found = weights_of(made(kind="dwa", window=window), losses)
    torch.testing.assert_close(found, torch.stack(expected).repeat_interleave(window, 0), rtol=1e-12, atol=0)
    assert (found[-1] - 1).abs().max() > 0.01


def test_dwa_goes_on_with_a_smaller_window():
    first, second = made(kind="dwa", window=100), made(kind="dwa", window=3)
    losses = torch.linspace(1, 2, 60 * TASKS).view(60, TASKS).double()
    for i, x in enumerate(losses[:50]):
        first(i, x, torch.ones(TASKS, dtype=torch.bool), None)
    second.load_state_dict(first.state_dict())
    for i, x in enumerate(losses[50:], 50):
        found = second(i, x * torch.arange(1, TASKS + 1), torch.ones(TASKS, dtype=torch.bool), None)
    assert (found != 1).any() and (second.steps < 3).all()


def test_a_window_of_dwa_is_of_steps_with_rows():
    """A task that is in every second step compares means of as many losses as the others."""
    method, losses = made(kind="dwa", window=2), torch.full((8, TASKS), 1.0).double()
    losses[:, 1] = torch.tensor([8.0, math.nan, 8.0, math.nan, 2.0, math.nan, 2.0, math.nan])
    assert torch.equal(weights_of(method, losses), torch.ones(8, TASKS).double())
    assert (method.before[1], method.last[1]) == (8.0, 2.0)
    exp = torch.tensor([1.0, 0.25, 1.0]).double().div(2).exp()
    torch.testing.assert_close(method(8, losses[0], torch.ones(TASKS, dtype=torch.bool), None), 3 * exp / exp.sum())


def test_rlw_is_drawn_by_seed_and_step():
    """Equal on all ranks, which know both; λ of the tasks that are there adds up to their number, and is a normal's softmax."""
    method, losses = made(seed=3, kind="rlw"), losses_of(absent=False)
    found = weights_of(method, losses)
    assert torch.equal(found, weights_of(made(seed=3, kind="rlw"), 2 * losses)), "neither rank nor losses matter"
    assert len({tuple(row.tolist()) for row in found}) == STEPS
    assert not torch.equal(found, weights_of(made(seed=4, kind="rlw"), losses))
    torch.testing.assert_close(found.sum(1), torch.full((STEPS,), float(TASKS)).double())
    partly = method(5, losses[5], torch.tensor([True, False, True]), None)
    torch.testing.assert_close(
        partly, torch.stack([found[5, 0], torch.tensor(0.0).double(), found[5, 2]]) * 2 / found[5, [0, 2]].sum() + torch.tensor([0, 1, 0])
    )
    z = np.random.default_rng((3, 5)).standard_normal(TASKS)
    torch.testing.assert_close(found[5].log() - found[5, 0].log(), torch.tensor(z - z[0]))


CONSTANT = torch.tensor([0.1, 0.7, 5.0]).double()


@pytest.mark.parametrize(
    ("method", "optimum"),
    [
        ({"kind": "uncertainty"}, 1 / (2 * CONSTANT)),
        ({"kind": "uncertainty", "form": "liebel_koerner"}, 2 / (CONSTANT + (CONSTANT**2 + 8 * CONSTANT).sqrt())),
        ({"kind": "imtl_l"}, 1 / CONSTANT),
        ({"kind": "famo"}, 3 / CONSTANT / (1 / CONSTANT).sum()),
        ({"kind": "dwa", "window": 5}, torch.ones(3)),
    ],
)
def test_where_constant_losses_lead(method, optimum):
    """e^s = 2L and so λ = 1/(2L), whatever the task's kind; Liebel and Körner's e^(2s) = L·(1 + e^s)/2; FAMO's 1/L."""
    found = weights_of(made(tasks=SQUARED, **method), CONSTANT.repeat(1500, 1))
    torch.testing.assert_close(found[-1], optimum.double(), rtol=1e-3, atol=0)


def test_where_constant_norms_lead_gradnorm():
    norms = torch.tensor([0.5, 1.0, 2.0]).double()
    found = weights_of(made(kind="gradnorm", alpha=0, lr=0.002), CONSTANT.repeat(2000, 1), torch.outer(norms, norms).repeat(2000, 1, 1))
    torch.testing.assert_close(found[-1] * norms, torch.full((3,), 3 / (1 / norms).sum().item()).double(), rtol=1e-2, atol=0)


METHODS: list[dict[str, Any]] = [
    {"kind": "uncertainty"},
    {"kind": "uncertainty", "form": "liebel_koerner"},
    {"kind": "dwa", "window": 2},
    {"kind": "rlw"},
    {"kind": "imtl_l"},
    {"kind": "famo"},
    {"kind": "bandit"},
    {"kind": "gradnorm"},
]


@pytest.mark.parametrize("config", METHODS, ids=lambda c: "-".join(map(str, c.values())))
def test_steps_without_an_update_leave_the_state_alone(config):
    """A step that is skipped for a loss that is not finite, through the whole joint loss; and one with a single task."""
    cut, towers = Cut(), torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    loss = JointLoss(tiny.config(Path(), Path(), weighting=config), cut)
    labels, nan = [[1, 0, 0.3], [0, 1, 2.0], [1, 1, -1.0], [0, 0, 0.0]], math.nan

    def step(x, rows):
        (shared,) = cut([x.requires_grad_()])
        return loss(cut.beside([shared @ tower[:, None] for tower in towers]), batch_of(rows, [1] * 4))[1]

    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        last = step(x, labels).weighting
    before = {name: buffer.clone() for name, buffer in loss.weighting.named_buffers()}
    broken = x.detach().clone()
    broken[2, 1] = nan
    for inputs, rows, trained in ((broken, labels, False), (x, [[1, nan, nan]] * 4, True)):
        numbers = step(inputs, rows)
        assert bool(numbers.trained) == trained
        if trained and loss.weighting.least == 1:  # λ is the task's own, and goes on
            assert torch.equal(numbers.weighting[1:], torch.ones(2).double()) and numbers.weighting[0] != 1
            torch.testing.assert_close(numbers.weighting[0], last[0], rtol=0.3, atol=0)
            continue
        assert torch.equal(numbers.weighting, torch.ones(3).double())
        assert all(torch.equal(before[name], buffer) for name, buffer in loss.weighting.named_buffers())
    assert torch.isfinite(step(x, labels).weighting).all()


@pytest.mark.parametrize("config", METHODS, ids=lambda c: "-".join(map(str, c.values())))
def test_a_state_that_is_saved_goes_on_bit_for_bit(config):
    gram = torch.eye(3).double().repeat(STEPS, 1, 1) if config["kind"] == "gradnorm" else None
    whole, first, second = (made(**config) for _ in range(3))
    expected = weights_of(whole, losses_of(), gram)
    found = [first(i, x.nan_to_num(), ~x.isnan(), None if gram is None else gram[i]) for i, x in enumerate(losses_of()[:6])]
    second.load_state_dict(first.state_dict())
    found += [second(i, x.nan_to_num(), ~x.isnan(), None if gram is None else gram[i]) for i, x in enumerate(losses_of()) if i >= 6]
    assert torch.equal(torch.stack(found), expected)
    assert all(b.dtype == torch.float64 for b in whole.buffers())


LTV, DFM = {"kind": "zero_inflated_lognormal", "name": "spent"}, {**BINARY, "name": "late", "delay": {"kind": "dfm", "elapsed": "x"}}


@pytest.mark.parametrize("kind", ["uncertainty", "dwa", "imtl_l", "famo", "gradnorm", "rlw", "bandit"])
def test_losses_below_zero(kind):
    """A density's logarithm has any sign: where λ comes from ln L, 1/L or a ratio of losses, there is none."""
    for task in (LTV, DFM):
        if kind in ("rlw", "bandit"):
            made(kind=kind, tasks=[SQUARED[0], task])
            continue
        with pytest.raises(DistmtlError, match=f"task '{task['name']}': its loss, a density's, may fall below 0, where weighting {kind}"):
            made(kind=kind, tasks=[SQUARED[0], SQUARED[1], task])
        made(kind=kind, tasks=[SQUARED[0], SQUARED[1], {**task, "weight": 0}])


def test_the_bandit_needs_a_validation_split():
    raw = tiny.raw(Path(), Path(), weighting={"kind": "bandit"})
    del raw["data"]["validation"]
    with pytest.raises(DistmtlError, match="weighting bandit is rewarded by the loss on the validation split; set data.validation"):
        parse_config(raw)


def arms_of(bandit: Weighting, losses: list[float]) -> list[int]:
    """Which arm it holds after every evaluation, by the λ it gives: 0 where all are equal."""
    out = []
    for loss in losses:
        bandit.evaluated(loss)
        weights = bandit(0, torch.ones(TASKS).double(), torch.ones(TASKS, dtype=torch.bool), None)
        assert float(weights.sum()) == pytest.approx(TASKS)
        out.append(0 if weights.max() == weights.min() else int(weights.argmax()) + 1)
    return out


def test_the_bandit_is_discounted_ucb():
    """Against the sums over the whole history, written out."""
    rng, discount, exploration = np.random.default_rng(0), 0.8, 0.7
    losses = list(np.cumsum(-rng.random(30)) + 50)
    found = arms_of(made(kind="bandit", discount=discount, exploration=exploration), losses)
    held, peaks, fallen = [0, 0], [0.0], -np.diff(losses)
    rewards: list[float] = []
    for t, now in enumerate(fallen):
        peaks.append(max(abs(now), discount * peaks[-1]))
        rewards.append(now / peaks[-1])
        ages = discount ** np.arange(t, -1, -1)
        values = []
        for arm in range(1 + TASKS):
            mine = np.array(held[1:]) == arm
            n = (ages * mine).sum()
            values.append((ages * mine * rewards).sum() / n + exploration * math.sqrt(math.log(ages.sum()) / n) if n else math.inf)
        held.append(int(np.argmax(values)))
    assert found == held[1:] and set(found) == {0, 1, 2, 3}


def test_the_bandit_follows_what_pays():
    """The arm whose loss falls fastest, also after another one has become that."""
    bandit, arm, loss, held = made(kind="bandit"), 0, 100.0, []
    for t in range(120):
        loss -= {True: 1.0, False: 0.3}[arm == (2 if t < 60 else 3)] * 0.97**t
        (arm,) = arms_of(bandit, [loss])
        held.append(arm)
    assert held[:4] == [0, 1, 2, 3] and held[20:60].count(2) > 20 and held[80:].count(3) > 20


def test_what_the_bandit_raises():
    bandit = made(kind="bandit", boost=3.0)
    arms_of(bandit, [2.0, 1.9])
    everyone = torch.tensor([True] * 3)
    torch.testing.assert_close(bandit(0, CONSTANT, everyone, None), torch.tensor([9 / 5, 3 / 5, 3 / 5]).double())
    torch.testing.assert_close(bandit(0, CONSTANT, torch.tensor([True, True, False]), None), torch.tensor([3 / 2, 1 / 2, 1]).double())
