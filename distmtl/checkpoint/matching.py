"""Loading the part of a checkpoint that fits a model that has changed since."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distmtl.checkpoint.finding import Checkpoint
from distmtl.checkpoint.loading import forget_cached_rows, index, read_state, verify
from distmtl.checkpoint.state import WEIGHTING, dense_tensors, first_rows, table_of, table_state, weights


@dataclass(frozen=True)
class Changes:
    """What a changed config makes of a checkpoint's parts, besides their shapes.

    weighting: why the saved state of what balances the tasks means nothing now, "" if it does.
    former: name and shape of a dense parameter → its name in the checkpoint, and why it starts anew all the same ("" if it does not).
    """

    tables: dict[str, str]  # table → why its saved rows mean nothing now
    optimizers: dict[str, str]  # table → why its saved optimizer state does
    weighting: str = ""
    former: Callable[[str, torch.Size], tuple[str, str]] = lambda name, shape: (name, "")


def load_matching(checkpoint: Checkpoint, model: nn.Module, optimizers: Any | None, changes: Changes) -> list[str]:
    """Fill what the checkpoint has: tables of the same name and width, of no fewer rows now; dense parameters of the same role
    and shape. The rest keeps its initial values. Without `optimizers`, weights alone, no state of what balances the tasks.

    Returns what was not loaded, and what was left behind, each with the reason.
    """
    verify(checkpoint)
    saved = {name: value.size for name, value in index(checkpoint).state_dict_metadata.items() if hasattr(value, "size")}
    state = table_state(model, optimizers)
    matching, notes = _fitting_tables(state, saved, changes)
    left = {table_of(n) for n in saved} - {table_of(n) for n in state}
    notes += [f"table {t} of the checkpoint is left behind: the config has none of that name" for t in sorted(left)]
    blob = read_state(checkpoint, matching)
    forget_cached_rows(model)
    dense = dense_tensors(model) if optimizers and not changes.weighting else weights(model)
    of_weighting = {n for n in blob["parameters"] if n.startswith(WEIGHTING)}
    if optimizers and changes.weighting and (of_weighting or dense.keys() < dense_tensors(model).keys()):
        notes.append(f"weighting: its state starts anew: it {changes.weighting}")
    former = {name: changes.former(name, p.shape) for name, p in dense.items()}
    loaded: dict[str, str] = {}  # name → its name in the checkpoint
    with torch.no_grad():
        for name, parameter in dense.items():
            then, why = former[name]
            old = blob["parameters"].get(then)
            if why := why or _unlike(getattr(old, "shape", None), parameter.shape):
                notes.append(f"{name} starts anew: it {why}")
            else:
                parameter.copy_(old)
                loaded[name] = then
    left = blob["parameters"].keys() - of_weighting - {then for then, _ in former.values()}
    notes += [f"{name} of the checkpoint is left behind" for name in sorted(left)]
    if optimizers:
        optimizers.load_dense_state({n: blob["optimizer"][then] for n, then in loaded.items() if then in blob["optimizer"]})
    return notes


def _fitting_tables(state: dict[str, Any], saved: dict[str, torch.Size], changes: Changes) -> tuple[dict[str, Any], list[str]]:
    """What of `table_state` can be filled, by its name in the checkpoint, of a table that has grown its first rows; and notes on all
    the rest."""
    fitting: dict[str, Any] = {}
    anew: dict[str, str] = {}  # table → why
    states_anew = dict(changes.optimizers)
    former = {_wherever(name): name for name in saved}
    notes = []
    for name, value in state.items():  # every weight comes before any optimizer state
        was = former.get(_wherever(name), name)
        table, then, now = table_of(name), saved.get(was), value.size()
        is_weight = name.startswith("tables/")
        why = changes.tables.get(table) if is_weight else anew.get(table) or states_anew.get(table)
        if why := why or _unlike(then, now, may_grow=True):
            (anew if is_weight else states_anew)[table] = why
        elif then:
            fitting[was] = first_rows(value, then)
            if is_weight and then[0] < now[0]:
                notes.append(f"table {table}: rows {then[0]:,} to {now[0] - 1:,} are new")
    notes += [f"table {table} starts anew: it {why}" for table, why in anew.items()]
    notes += [f"table {table}: its optimizer's state starts anew: it {why}" for table, why in states_anew.items() if table not in anew]
    return fitting, notes


def _unlike(then: torch.Size | None, now: torch.Size, may_grow: bool = False) -> str:
    """Why a tensor of the checkpoint does not fit a shape; "" if it does."""
    if then is None:
        return "is not in the checkpoint"
    fits = len(then) == len(now) and then[1:] == now[1:] and then[0] <= now[0] if may_grow else then == now
    return "" if fits else f"was {_by(then)}, is {_by(now)}"


def _wherever(name: str) -> str:
    """An entry of `table_state` without the module that its table is in: a table of bags may become one of sequences."""
    return re.sub(r"/[^/]*\.([^./]+\.weight)", r"/\1", name)


def _by(size: Any) -> str:
    return " x ".join(f"{n:,}" for n in size)
