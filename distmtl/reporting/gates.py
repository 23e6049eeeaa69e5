"""An expert taken away from a trained head: its gates are 0, and those of the other experts as much larger."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from distmtl.model.head import Head
from distmtl.model.home import HoME
from distmtl.model.mmoe import MMoE
from distmtl.model.omoe import OMoE
from distmtl.model.ple import PLE
from distmtl.model.stem import STEM


@dataclass(frozen=True)
class Gated:
    """The experts that a task mixes last, and the layers whose softmax weighs the first of them, one per output."""

    experts: Sequence[int]
    gates: Sequence[nn.Linear]


def gated(head: Head) -> list[Gated]:
    """Of every task; nothing where the head has no gates."""
    sharing = head.sharing
    tasks = len(head.towers)
    match sharing:
        case MMoE() | STEM():
            return [Gated(range(gate.out_features), [gate]) for gate in sharing.gates]
        case OMoE():
            return [Gated(range(sharing.gate.out_features), [sharing.gate])] * tasks
        case PLE():
            last = sharing.levels[-1]
            return [Gated(places, [gate]) for places, gate in zip(last.places, last.gates, strict=True)]
        case HoME():
            last = sharing.tasks
            gates = zip(last.gates, last.self_gates, strict=True)
            return [Gated(places, both) for places, both in zip(last.places, gates, strict=True)]
    return []


@contextmanager
def without_expert(of_tasks: Sequence[Gated], expert: int) -> Iterator[list[bool]]:
    """Until its end no task mixes the expert: a logit of -∞ is a gate of 0 in a softmax over the others. Yields which tasks lose it;
    one that has no other expert keeps it."""
    lose = [expert in of.experts and len(of.experts) > 1 for of in of_tasks]
    biases = [
        (gate.bias, place)
        for of, loses in zip(of_tasks, lose, strict=True)
        if loses
        for gate in of.gates
        if (place := list(of.experts).index(expert)) < gate.out_features
    ]
    before = [bias[place].item() for bias, place in biases]
    _put(biases, [-math.inf] * len(biases))
    try:
        yield lose
    finally:
        _put(biases[::-1], before[::-1])  # omoe's is there once per task


def _put(places: Sequence[tuple[torch.Tensor, int]], values: Sequence[float]) -> None:
    with torch.no_grad():
        for (bias, place), value in zip(places, values, strict=True):
            bias[place] = value
