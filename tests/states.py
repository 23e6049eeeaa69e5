"""What a checkpoint must hold, taken from a run in memory."""

from __future__ import annotations

from distmtl import checkpoint
from distmtl.loop import Training
from distmtl.verification.runs import State, gathered


def state_of(training: Training) -> State:
    """Weights and optimizer state, whole, cloned, by the names of worlds.saved_state. All ranks call it."""
    optimizers = training.optimizers
    state = gathered(checkpoint.table_state(training.model, optimizers))
    state |= {f"dense/{name}": p.detach().clone() for name, p in optimizers.parameters.items()}
    return state | {f"optimizer/{n}/{k}": v.clone() for n, values in optimizers.dense_state().items() for k, v in values.items()}
