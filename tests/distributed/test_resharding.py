"""A checkpoint of any layout and world size loads at any other: weights and optimizer state bit-equal at the moment of loading."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import NamedTuple

import pytest
import tiny
import torch
from states import state_of
from worlds import run_world

from distmtl import checkpoint
from distmtl.config import Config
from distmtl.data.splits import open_splits
from distmtl.distributed.process import process_group
from distmtl.distributed.sharding import local_shards
from distmtl.errors import DistmtlError
from distmtl.loop import Training
from distmtl.progress import Progress
from distmtl.saving import Saver
from distmtl.storage import place
from distmtl.verification.runs import State

OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad")
LAYOUTS = ("table_wise", "row_wise", "column_wise")
WORLDS = (1, 2, 3, 4)


class Case(NamedTuple):
    optimizer: str
    layout: str
    world: int

    @property
    def refused(self) -> bool:
        return (self.optimizer, self.layout) == ("rowwise_adagrad", "column_wise")


CASES = [Case(*c) for c in product(OPTIMIZERS, LAYOUTS, WORLDS)]
SOUND = [c for c in CASES if not c.refused]


def config_for(data, run, case: Case) -> Config:
    """Tables of 4 and of 2 column shards at most; one of 7 rows, which nothing divides."""
    raw = tiny.raw(data, f"{run}/{case.optimizer}-{case.layout}-{case.world}")
    raw["optimizer"] = {"tables": {"kind": case.optimizer, "lr": 0.1}}
    dims = {"user": 128, "item": 64, "x_bucket": 64}
    raw["features"] = [{**f, "dim": dims[f["name"]]} for f in raw["features"] if f["name"] in dims] + raw["features"][-2:]
    raw["features"][2]["boundaries"] = [-2, -1, 0, 1, 2]
    raw["tables"] = {t: {"sharding": [case.layout]} for t in dims}
    return tiny.parse_config(raw)


@contextmanager
def started(config: Config) -> Iterator[Training]:
    """A run after its first step, which makes the dense optimizer's state."""
    with process_group(config) as process:
        training = Training(config, process, open_splits(config, checked=True), Progress(None, False, print))
        training.pipeline.progress(training.reader.batches(0, 1))
        yield training


def save(configs: dict[Case, Config]) -> dict[Case, State]:
    """One checkpoint per case, of values that no other case has."""
    out = {}
    for number, (case, config) in enumerate(configs.items()):
        with started(config) as training:
            tables = checkpoint.table_state(training.model, training.optimizers)
            if case.layout != "table_wise" and case.world > 1:
                assert all(len(v.metadata().shards_metadata) > 1 for n, v in tables.items() if ".user." in n), f"{case}: not split"
            for name, tensor, offsets in local_shards(tables):
                tensor.uniform_(generator=torch.Generator().manual_seed(hash((number, len(name), *offsets)) % 2**31))
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for p in training.optimizers.parameters.values():
                    p.uniform_(generator=generator)
            for values in training.optimizers.dense_state().values():
                values["exp_avg"].uniform_(generator=generator)
            folder = place(config.run_dir) / "checkpoints"
            saver = Saver(folder, training.model, training.optimizers, training.process, attempt=0, background=True, keep=9)
            saver.save({"step": 1}, best_step=None)
            out[case] = state_of(training)
            saver.wait()
    return out


def load(pairs: list[tuple[Case, Case]], configs: dict[Case, Config], saved: dict[Case, State]) -> list[str]:
    """What differs, pair by pair (checkpoint's case, own case), on a world of the second's size."""
    out = []
    for case in dict.fromkeys(own for _, own in pairs):
        with started(configs[case]) as training:
            for source in (s for s, own in pairs if own == case):
                found = checkpoint.of_step(place(configs[source].run_dir) / "checkpoints", 1)
                checkpoint.load(found, training.model, training.optimizers)
                state = state_of(training)
                wrong = sorted(k for k in saved[source].keys() | state.keys() if not torch.equal(saved[source][k], state[k]))
                out.append(", ".join(wrong) or "equal")
    return out


def matrix(data, folder, pairs: list[tuple[Case, Case]]) -> dict[tuple[Case, Case], str]:
    """What loading every pair gave. A world is forked once per size to save, once to load."""
    sources = {s for s, _ in pairs}
    configs = {c: config_for(data, folder, c) for c in SOUND}
    saved: dict[Case, State] = {}
    results: dict[tuple[Case, Case], str] = {}
    for world in WORLDS:
        saved |= run_world(save, world, {c: configs[c] for c in SOUND if c.world == world and c in sources})[0]
    for world in WORLDS:
        own = sorted((p for p in pairs if p[1].world == world), key=lambda p: p[1])
        for pair, said in zip(own, zip(*run_world(load, world, own, configs, saved), strict=True), strict=True):
            results[pair] = next((s for s in said if s != "equal"), "equal")
    return results


def table(results: dict[tuple[Case, Case], str]) -> str:
    """Markdown: a row per optimizer and saved layout, a column per loading layout; how many pairs of world sizes were equal."""
    lines = [
        "| optimizer | saved as \\ loaded as | " + " | ".join(LAYOUTS) + " |",
        "|---|---|" + "---|" * len(LAYOUTS),
    ]
    for optimizer, source in product(OPTIMIZERS, LAYOUTS):
        cells = []
        for target in LAYOUTS:
            if Case(optimizer, source, 1).refused or Case(optimizer, target, 1).refused:
                cells.append("refused")
                continue
            of = [v for (s, o), v in results.items() if (s.optimizer, s.layout, o.layout) == (optimizer, source, target)]
            good = of.count("equal")
            cells.append(f"equal ({good})" if good == len(of) else f"**{len(of) - good} of {len(of)} differ**")
        lines.append(f"| {optimizer} | {source} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_every_layout_and_world_size_loads_at_every_other(tiny_data, tmp_path, capsys):
    began = time.monotonic()
    results = matrix(tiny_data, tmp_path, [(s, o) for s, o in product(SOUND, SOUND) if s.optimizer == o.optimizer])
    with capsys.disabled():
        print(f"\n{len(results)} pairs, {time.monotonic() - began:.0f} s\n{table(results)}")
    assert {p: r for p, r in results.items() if r != "equal"} == {}
    assert len(results) == 2 * 12**2 + 8**2


def test_column_shards_of_rowwise_adagrad_are_refused(tiny_data, tmp_path):
    for case in (c for c in CASES if c.refused):
        with pytest.raises(DistmtlError, match="column_wise cannot train with rowwise_adagrad, whose one momentum per row"):
            config_for(tiny_data, tmp_path, case)
