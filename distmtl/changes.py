"""What of a checkpoint still fits a config that has changed since; `--resume-policy matching` loads it."""

from __future__ import annotations

import re
from typing import Any

import pyarrow as pa
from torch import Size

from distmtl.checkpoint import Changes, Checkpoint
from distmtl.config import BucketFeature, Config, DotConfig, Ids
from distmtl.data.collate import alike_type, is_list, is_string
from distmtl.data.dataset import Dataset
from distmtl.run_directory import checkpoint_config


def same_model(config: Config, found: Checkpoint) -> bool:
    """Whether a checkpoint's tables, their optimizers' state, its dense parameters and its weighting's state are the config's, each and
    all."""
    old, parts = checkpoint_config(found), {"features", "tasks", "interaction", "model", "weighting"}
    return old.model_dump(include=parts) == config.model_dump(include=parts) and not _other_optimizers(config, old)


def changes(config: Config, found: Checkpoint, train_set: Dataset) -> Changes:
    """What of a checkpoint has another meaning in a changed config, although its name and shape may be the same."""
    old, tables = checkpoint_config(found), {}
    owners = [[t.name for t in c.tasks] if c.copies > 1 else [] for c in (config, old)]  # of a table's columns
    for feature in config.embedded:
        before = [f for f in old.embedded if f.table_name == feature.table_name]
        if before and owners[0] != owners[1]:
            tables[feature.table_name] = "has its columns dealt to the tasks in another way now"
        elif isinstance(feature, BucketFeature):
            if before and feature.boundaries not in [getattr(f, "boundaries", None) for f in before]:
                tables[feature.table_name] = f"is read by {feature.name!r}, whose boundaries are others now"
        elif before and _extra_rows_moved(feature, before[0]):
            tables[feature.table_name] = f"is read by {feature.name!r}, whose rows of oov or missing ids lie elsewhere now"
        elif before and getattr(before[0], "hashing", (1, False)) != feature.hashing:
            what = "other rows" if getattr(before[0], "hashes", 1) == feature.hashes else f"{feature.hashes} rows each"
            tables[feature.table_name] = f"is read by {feature.name!r}, whose ids read {what} now"
        elif before and feature.rows not in [f.rows for f in before]:
            hashed = any(feature.out_of_range == way == getattr(f, "out_of_range", "") for f in before for way in ("hash", "quotient"))
            if hashed or _is_string(feature.source, train_set):
                tables[feature.table_name] = f"is read by {feature.name!r}, whose ids are hashed to other rows now"
        elif any(isinstance(f, BucketFeature) for f in before):
            tables[feature.table_name] = f"was read by {before[0].name!r}, a bucket"
    return Changes(tables, _other_optimizers(config, old), _other_weighting(config, old), _former_name(config, old))


def _extra_rows_moved(now: Ids, then: Ids | BucketFeature) -> bool:
    """Whether a row that the table had and has is, or was, an extra one and the other not."""
    common = min(now.table_rows, then.table_rows)
    before, after = ({f.rows + i: name for i, name in enumerate(f.extra_rows) if f.rows + i < common} for f in (then, now))
    return before != after


def _is_string(column: str, dataset: Dataset) -> bool:
    """Whether its ids are hashed whatever out_of_range says."""
    kind: pa.DataType = alike_type(dataset.open_part(0).schema_arrow.field(column).type)
    return is_string(alike_type(kind.value_type) if is_list(kind) else kind)


def _other_optimizers(config: Config, old: Config) -> dict[str, str]:
    """Table → why the optimizer's state that was saved for it is of no use."""
    tables = {f.table_name for f in config.embedded} & {f.table_name for f in old.embedded}
    kinds = {t: (old.table_optimizer(t).kind, config.table_optimizer(t).kind) for t in sorted(tables)}
    return {t: f"was {then}'s, is {now}'s" for t, (then, now) in kinds.items() if then != now}


def _other_weighting(config: Config, old: Config) -> str:
    """Why the state that was saved of it is of no use, "" if it is."""
    for now, then in zip(*((c.weighting.kind, getattr(c.weighting, "form", "")) for c in (config, old)), strict=True):
        if now != then:
            return f"was {then}, is {now}"
    now, then = ([(t.name, t.kind, t.weight, getattr(t, "loss", "")) for t in c.tasks] for c in (config, old))
    return "" if now == then else "balances tasks that are others, in another order or of other weights, now"


READ_IN_PARTS = ("home", "star", "pepnet")  # heads with weights as wide as some of the features' columns
SHARED_BY_ALL = ("shared_bottom", "omoe", "mmoe", "plugin")  # heads whose networks, gates apart, belong to no task


def _former_name(config: Config, old: Config) -> Any:
    """For `Changes`: towers and gates go with their task, not with its place in the list; what reads the feature vector, and
    networks that belong to tasks, fit only where those are laid out alike."""
    now, then = ([(t.name, t.kind) for t in c.tasks] for c in (config, old))
    parts = [[getattr(c.model, key, None) for key in ("domain", "domain_features", "gate_features")] for c in (config, old)]
    vectors = [
        ([(f.name, f.dim) for f in c.embedded] + [(f.name, f.columns) for f in c.dense], c.interaction, of)
        for c, of in zip((config, old), parts, strict=True)
    ]
    spaces = [[(t.name, c.space(t)) for t in c.tasks] for c in (config, old)]
    width = sum(columns for _, columns in vectors[0][0])
    widths = {width, width + DotConfig.pairs(len(config.embedded))} if isinstance(config.interaction, DotConfig) else {width}
    of_head = ("kind", "network", "shared_experts", "task_experts", "groups")
    dealt = [[*(getattr(c.model, key, None) for key in of_head), [t.parents for t in c.tasks]] for c in (config, old)]
    experts_fit = all(kind in SHARED_BY_ALL for kind, *_ in dealt) or (now == then and dealt[0] == dealt[1])

    ours = "" if config.model.kind == "plugin" else r"|sharing\.gates|sharing\.levels\.\d+\.gates"

    def former(name: str, shape: Size) -> tuple[str, str]:
        why = ""
        if of_task := re.fullmatch(rf"(.*\.head\.(?:towers{ours})\.)(\d+)(\..*)", name):
            before, t, after = of_task.groups()
            task = now[int(t)]
            if task not in then:
                return "", f"is of the {task[1]} task {task[0]!r}, which the checkpoint does not have"
            name = f"{before}{then.index(task)}{after}"
        if ".sharing." in name and not experts_fit:
            why = "has its experts dealt to the tasks in another way now"
        elif ".imputation." in name and spaces[0] != spaces[1]:
            why = "imputes the errors of tasks that are others, or in another order, now"
        elif (
            vectors[0] != vectors[1]
            and ".head." in name
            and (".interaction." in name or (".sharing." in name and config.model.kind in READ_IN_PARTS) or (shape and shape[-1] in widths))
        ):
            why = "reads the features, which are others or in another order now"
        return name, why

    return former
