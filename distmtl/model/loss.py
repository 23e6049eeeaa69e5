"""The joint loss L = Σ λᵢ·Lᵢ over the tasks and what their heads add, exact over all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import and_

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from distmtl.batch import Batch
from distmtl.config import AITMConfig, Config, ESCM2Config
from distmtl.model.escm2 import counterfactual
from distmtl.model.funnel import joint_labels, joint_logit, lineage
from distmtl.model.guard import Guard
from distmtl.model.kinds import places, row_loss
from distmtl.model.weighting import Cut, make_weighting
from distmtl.model.weighting.cut import Gradients


@dataclass
class StepNumbers:
    """What a step tells the loop, on the device, detached. K terms: the tasks' losses, then what the head adds."""

    step: int
    losses: Tensor  # (K,) mean of every term over all ranks, 0 where nothing is known
    weights: Tensor  # (K,) summed weights of every term over all ranks
    non_finite: Tensor  # (K,) rows over all ranks whose loss counts and is not finite
    failed: Tensor  # () ranks whose reader failed
    bad_rows: Tensor  # (B,) this rank's row numbers where `non_finite` counted one, else -1
    trained: Tensor  # () bool, equal on all ranks: the step's update is made
    error: str | None  # why this rank's reader failed
    weighting: Tensor  # (T,) λ of every task, float64
    gram: Tensor | None  # (T, T) ⟨gᵢ, gⱼ⟩ of the tasks' gradients at the cut over all ranks, float64; None in steps that do not look
    outputs: Tensor  # (B, O) of this rank's rows
    batch: Batch  # this rank's


class Terms:
    """The errors that are averaged, row by row: one per task, then the head's own.

    names, coefficients, owners: of the K terms; a task's coefficient is its own weight, a further term's includes that of the task that
    owns it.
    reads: the towers whose outputs a term is made of; None may be any.
    """

    def __init__(self, config: Config):
        self.config, self.places = config, places(config)
        self.spaces = [config.space(t) for t in config.tasks]
        self.lineages = [lineage(config, t) for t in range(len(config.tasks))]
        self.funnel = any(s in ("entire", "joint") for s in self.spaces)
        terms = [(t.name, t.weight, i) for i, t in enumerate(config.tasks)]
        model = config.model
        if isinstance(model, ESCM2Config):
            for i, task in ((i, t) for i, t in enumerate(config.tasks) if self.spaces[i] == "entire"):
                terms.append((f"{task.name} {model.method}", task.weight * model.weight, i))
                if model.method == "dr":
                    terms.append((f"{task.name} imputation", task.weight * model.weight, i))
        if isinstance(model, AITMConfig) and model.calibrator:
            joint = [i for i, s in enumerate(self.spaces) if s == "joint"]
            terms += [(f"{config.tasks[i].name} calibrator", config.tasks[i].weight * model.calibrator, i) for i in joint]
        self.names = [name for name, _, _ in terms]
        self.coefficients = [float(c) for _, c, _ in terms]
        self.owners = [owner for _, _, owner in terms]
        self.reads: list[list[int] | None] = [
            line if s in ("entire", "joint") else [t] for t, (line, s) in enumerate(zip(self.lineages, self.spaces, strict=True))
        ]
        self.reads += [None] * (len(terms) - len(config.tasks))

    def __call__(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Outputs (B, O) → errors (B, K) and their weights (B, K): 0 where a row does not count, and its error is then 0."""
        outputs, known = outputs.float(), batch.weights > 0
        labels = torch.where(known, batch.labels, 0.0)  # 0 · NaN is NaN: what is masked must not even be computed with
        joint, joint_weights = joint_labels(self.config, labels, batch.weights) if self.funnel else (labels, batch.weights)
        logits = [outputs[:, p.start] for p in self.places]
        errors, weights = [], []
        for t, (task, space) in enumerate(zip(self.config.tasks, self.spaces, strict=True)):
            if space in ("entire", "joint"):
                logit = joint_logit([logits[i] for i in self.lineages[t]])
                errors.append(F.binary_cross_entropy_with_logits(logit, joint[:, t], reduction="none"))
                weights.append(joint_weights[:, t])
            else:
                extra = None if batch.extras is None else torch.where(known[:, t], batch.extras[:, t], 0.0)
                errors.append(row_loss(task, outputs[:, self.places[t]], labels[:, t], extra))
                weights.append(batch.weights[:, t])
        more: list[tuple[Tensor, Tensor]] = []
        if isinstance(self.config.model, ESCM2Config):
            more = counterfactual(self.config, self.config.model, outputs, labels, batch.weights, joint_weights, self.lineages)
        if isinstance(self.config.model, AITMConfig) and self.config.model.calibrator:
            more = self._order(logits, joint_weights)
        for error, weight in more:
            errors.append(error)
            weights.append(weight)
        weight = torch.stack(weights, dim=1)
        return torch.where(weight > 0, torch.stack(errors, dim=1), 0.0), weight

    def _order(self, logits: list[Tensor], weights: Tensor) -> list[tuple[Tensor, Tensor]]:
        """AITM's calibrator (Xi et al. 2021): how much a task is likelier than its parents, where both are known."""
        out = []
        for t, task in enumerate(self.config.tasks):
            if self.spaces[t] != "joint":
                continue
            parents = [self.config.place_of(p) for p in task.parents]
            excess = sum(F.relu(logits[t].sigmoid() - joint_logit([logits[i] for i in self.lineages[p]]).sigmoid()) for p in parents)
            known = torch.stack([weights[:, i] for i in (t, *parents)]).amin(0)
            out.append((torch.as_tensor(excess), known))
        return out


class JointLoss(nn.Module):
    """L = Σ λᵢ·Lᵢ of the tasks i, Lᵢ = Σₖ cₖ·(Σ w·e / Σ w) over its terms k, both sums over all ranks; masked and padding rows have
    w = 0 and exactly zero gradient. λ is that of config.weighting; under gradient surgery it holds below the cut, and 1 above it.

    Gradients are summed over ranks later, by TorchRec for tables, by Optimizers for the rest. A non-finite loss or a failed
    reader, on any rank, gives every rank zero gradient.

    Args:
        cut: where the head that computes the outputs compares the tasks' gradients; every `train.log_every` steps it is looked at in
            any case, to be logged.
        guard: before the tables; told whether the step's update is made.

    forward: outputs (B, O), batch → scalar loss of this rank, StepNumbers
    """

    def __init__(self, config: Config, cut: Cut | None = None, guard: Guard | None = None):
        super().__init__()
        self.guard = guard or Guard()
        self.terms, self.weighting, self.cut, self.log_every = Terms(config), make_weighting(config), cut, config.train.log_every
        self.reads_gradients = config.weighting.reads_gradients
        self.register_buffer("coefficients", torch.tensor(self.terms.coefficients, dtype=torch.float64), persistent=False)
        self.register_buffer("owners", torch.tensor(self.terms.owners), persistent=False)
        self.coefficients: Tensor
        self.owners: Tensor

    def forward(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, StepNumbers]:
        finite = torch.isfinite(outputs)
        errors, weights = self.terms(torch.where(finite, outputs, 0.0), batch)
        bad = self._bad(finite, errors, weights)
        sums = (torch.where(bad, 0.0, errors) * weights).sum(0)
        looks = self.cut is not None and (self.reads_gradients or (batch.step + 1) % self.log_every == 0)
        gradients: Gradients = []
        gram = sums.new_empty(0)
        if looks and self.cut is not None:
            gradients = self.cut.gradients(sums, outputs, self.terms.reads)
            gram = self.cut.gram(gradients).to(sums.device)
        elif self.cut is not None:
            self.cut.forget()

        failed = sums.new_full((1,), float(batch.error is not None))
        shared = torch.cat([sums.detach(), weights.detach().sum(0), bad.sum(0), failed, gram.flatten()]).double()
        if dist.is_initialized():
            dist.all_reduce(shared)
        k = len(sums)
        total, weight, non_finite = shared[: 3 * k].view(3, -1)
        n_failed, gram = shared[3 * k], shared[3 * k + 1 :].view(-1, k)
        if self.reads_gradients:
            non_finite = non_finite + ~torch.isfinite(gram.diagonal())  # a finite loss whose gradient is not
        trained = self.guard.trained = (non_finite.sum() == 0) & (n_failed == 0)

        share = torch.where(weight > 0, 1.0 / weight.clamp(min=1e-30), 0.0)
        scale = share * self.coefficients
        of_tasks = gram * scale[:, None] * scale if looks else None
        weighting, of_tasks = self._balance(batch.step, total * scale, weight, of_tasks)
        factors = torch.where(trained, weighting[self.owners] * scale, 0.0)
        if self.weighting.surgery and self.cut is not None:
            self.cut.replace(gradients, factors)
            factors = scale
        loss = (sums * factors.float()).sum()
        bad_rows = torch.where(bad.any(1), batch.rows, -1)
        numbers = StepNumbers(
            batch.step, total * share, weight, non_finite, n_failed, bad_rows, trained, batch.error, weighting, of_tasks,
            outputs.detach(), batch,
        )  # fmt: skip
        return torch.where(trained, loss, 0.0), numbers

    @property
    def trained(self) -> Tensor:
        """Of the last forward: the optimizer looks here before it steps."""
        return self.guard.trained

    def _bad(self, finite: Tensor, errors: Tensor, weights: Tensor) -> Tensor:
        """(B, K): which errors count and are not finite, or come of an output that is not."""
        of_tasks = [finite[:, place].all(1) for place in self.terms.places]
        of_terms = [finite.all(1) if read is None else reduce(and_, [of_tasks[t] for t in read]) for read in self.terms.reads]
        return (weights > 0) & ~(torch.isfinite(errors.detach()) & torch.stack(of_terms, dim=1))

    def _balance(self, step: int, losses: Tensor, weight: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """λ (T,) and the tasks' Gram matrix (T, T), from the terms' losses, weights and Gram matrix."""
        tasks = len(self.terms.places)
        of_tasks = losses.new_zeros(tasks).index_add(0, self.owners, losses)
        if gram is not None:
            gram = gram.new_zeros(tasks, len(losses)).index_add(0, self.owners, gram)
            gram = gram.new_zeros(tasks, tasks).index_add(1, self.owners, gram)
        present = (weight[:tasks] > 0) & (self.coefficients[:tasks] > 0) & self.trained  # without an update the state stays as it is
        return self.weighting(step, of_tasks, present, gram if self.reads_gradients else None), gram
