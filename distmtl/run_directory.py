"""A run's folder: whose it is, what it holds, what it may be continued from."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml

from distmtl import checkpoint
from distmtl.checkpoint import Checkpoint
from distmtl.config import Config
from distmtl.config_file import dump_config, flat, parse_config
from distmtl.data.dataset import Dataset
from distmtl.data.hashing import HASH_VERSION
from distmtl.errors import DistmtlError
from distmtl.storage import place, write_whole

CALIBRATION = "calibration.json"  # beside the checkpoints
PARTITIONS = "partitions"  # of a followed run: in it, the run of every partition
IN_CHAIN = re.compile(r"\d{6,}-(.+)")  # the name of one of these

# What may change between the start of a run and its continuation: how it is run, not what it computes.
FREE = (
    "name", "run.dir", "cluster.*", "tracking*", "evaluation.*", "data.train", "data.validation", "data.test", "data.prefetch",
    "data.threads", "data.max_contradictions", "tasks.*.true_probability*", "tasks.*.calibration*",
    "train.log_every", "train.eval_every", "train.save_*", "train.keep", "train.monitor",
    "train.early_stopping*", "train.profile*", "train.non_finite*", "sharding.types", "sharding.row_wise_above_mb", "tables.*.sharding",
    "tables", "tables.*.memory", "tables.*.cache",  # `tables` itself: there are none on one side
)  # fmt: skip
FREE_ON_NEW_DATA = (*FREE, "run.seed", "optimizer.schedule.warmup_steps")  # where the state of the training goes on
FREE_WITHOUT_DECAY = ("train.epochs", "train.steps")  # a longer run continues a shorter one, unless the learning rate depends on it


# What a new run may change that only starts from another one's weights: everything but what gives them their shape and meaning.
FREE_FROM_WEIGHTS = (
    *(f"{section}.*" for section in ("cluster", "data", "evaluation", "optimizer", "run", "sharding", "tables", "train", "weighting")),
    "tracking*", "name",
    "model.dropout", "model.network.dropout", "model.calibrator", "model.weight", "model.max_weight", "model.self_normalised",
    "features.*.column", "features.*.out_of_range", "features.*.id_dropout", "features.*.max_length",
    "features.*.too_long",
    "tasks.*.label", "tasks.*.weight", "tasks.*.bias", "tasks.*.true_probability*", "tasks.*.space", "tasks.*.pos_weight", "tasks.*.focal",
    "tasks.*.kept_negatives", "tasks.*.calibration*",
)  # fmt: skip


# What `--resume-policy matching` may change besides: what a model is made of.
FREE_IF_MATCHING = (
    "features.*", "tables.*", "tasks.*", "interaction*", "model.*", "weighting.*", "optimizer.tables.*", "optimizer.clip_norm",
    "sharding.*",
)  # fmt: skip
ResumePolicy = Literal["strict", "matching"]


def open_run(
    config: Config, resume: str, train_set: Dataset, policy: ResumePolicy = "strict", continue_from: str | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """Make the run directory, or continue it. Returns the checkpoint to load, and what is worth saying about it.

    Args:
        resume: `auto` continues a run of the same config; `never` wants an empty directory; a path of a checkpoint or run
            gives the weights that a new run starts from (`is_own` is false for it), once: a run with a checkpoint continues.
        policy: `matching` lets features, tables, tasks, the head and the weighting differ: what still fits is loaded.
        continue_from: the checkpoint of another run that a new run continues on other data; goes before `resume`.

    Raises:
        DistmtlError: the directory is another run's (the differing fields), the data set changed, or nothing to load.
    """
    folder = place(config.run_dir)
    found, notes = continuation(config, resume, train_set, policy, continue_from)
    make_run(folder, config)
    return found, notes


def continuation(
    config: Config, resume: str, train_set: Dataset, policy: ResumePolicy = "strict", continue_from: str | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """What `open_run` finds, and its errors; writes nothing."""
    folder = place(config.run_dir)
    extra = FREE_IF_MATCHING if policy == "matching" else ()
    if folder.exists() and not folder.is_dir():
        raise DistmtlError(f"run.dir {folder} is a file; choose another run.dir")
    entries = entries_of(folder)
    if PARTITIONS in entries:
        raise DistmtlError(f"run.dir {folder} holds a followed run; continue it with --follow, or choose another run.dir")
    log = folder / "metrics.jsonl"  # without a word in it or a checkpoint, the run failed before its first step
    begun = (folder / "checkpoints").exists() or (log.exists() and log.stat().st_size > 0)
    if begun and resume == "never":
        raise DistmtlError(f"run.dir {folder} already holds a run; choose another run.dir, delete it, or continue it with --resume auto")
    found: Checkpoint | None = None
    notes: list[str] = []
    if begun:
        _same(config, config_of(folder), f"run.dir {folder}", FREE, extra)
        found, notes = checkpoint.newest(folder / "checkpoints")
        found = found and _readable(found)
        if found:  # a run that was changed may have been stopped before its first checkpoint of the new kind
            notes += _same(config, checkpoint_config(found), f"checkpoint {found.path}", FREE, extra)
        if found and resume not in ("auto", "never") and place(resume).resolve() not in (folder.resolve(), found.path.resolve()):
            notes = [f"run.dir {folder} holds a checkpoint of its own, which goes before --resume {resume}", *notes]
    if found is None and continue_from:
        found = find_checkpoint(continue_from)
        notes += _same(config, checkpoint_config(found), f"checkpoint {found.path}", FREE_ON_NEW_DATA, extra)
    elif found is None and resume not in ("auto", "never"):
        found = find_checkpoint(resume)
        notes += _same(config, checkpoint_config(found), f"checkpoint {found.path}", FREE_FROM_WEIGHTS, extra)
    elif found is not None:
        _same_data(train_set, found)
    return found, notes


def entries_of(folder: Path) -> list[str]:
    """Names of what a run's folder holds; none where there is no folder.

    Raises:
        DistmtlError: it holds something, but no run.
    """
    entries = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    if entries and "config.yaml" not in entries:
        raise DistmtlError(f"run.dir {folder} is not empty and not a run (no config.yaml); choose another run.dir or empty it")
    return entries


def make_run(folder: Path, config: Config, *inside: str) -> None:
    """Make a run's folder, and one inside it, and write its config.yaml.

    Raises:
        DistmtlError: it cannot be written.
    """
    try:
        folder.joinpath(*inside).mkdir(parents=True, exist_ok=True)
        write_whole(folder / "config.yaml", dump_config(config))
    except OSError as e:
        raise DistmtlError(f"run.dir {folder} cannot be written: {e.strerror or e}; choose another run.dir") from None


def partition_folder(index: int, name: str) -> str:
    """Where, in a followed run, the run of a partition is; a / of the partition's name becomes a comma.

    Args:
        index: its place in the chain.
    """
    return f"{PARTITIONS}/{index:06d}-{name.replace('/', ',')}"


def partition_runs(folder: Path) -> list[Path]:
    """The runs of a followed run's partitions, in their order; none where nothing is followed."""
    entries = (folder / PARTITIONS).iterdir() if (folder / PARTITIONS).is_dir() else ()
    return sorted((run for run in entries if IN_CHAIN.fullmatch(run.name)), key=lambda run: run.name)


def config_of(folder: Path) -> Config:
    """The config of the run in a folder."""
    try:
        raw = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise DistmtlError(f"{folder / 'config.yaml'} cannot be read: {' '.join(str(e).split())}; choose another run.dir") from None
    return parse_config(raw, str(folder / "config.yaml"))


def find_checkpoint(path: str) -> Checkpoint:
    """The checkpoint at a path: a checkpoint's folder, or a run's (its best one, else its newest; a followed run's newest).

    Raises:
        DistmtlError: there is none, or it is incomplete.
    """
    folder = place(path)
    if not folder.exists():
        raise DistmtlError(f"checkpoint {path}: no such folder")
    if (folder / PARTITIONS).is_dir():
        newest = next((c for run in reversed(partition_runs(folder)) if (c := checkpoint.newest(run / "checkpoints")[0])), None)
        if newest is None:
            raise DistmtlError(f"run {path} has no complete checkpoint")
        return _readable(newest)
    if (folder / "checkpoints").is_dir():
        found, notes = checkpoint.newest(folder / "checkpoints")
        if found is None:
            raise DistmtlError(f"run {path} has no complete checkpoint" + "".join(f"\n  {n}" for n in notes))
        best = found.manifest["loop"]["best_step"]
        return _readable(found if best is None else checkpoint.of_step(folder / "checkpoints", best))
    return _readable(checkpoint.read(folder))


def saved_calibrations(found: Checkpoint) -> dict[str, Any]:
    """Task → its calibration (Calibration.to_dict), where the checkpoint's run fitted them to this very checkpoint."""
    file = found.path.parent.parent / CALIBRATION
    saved = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return saved["tasks"] if saved.get("checkpoint") == found.path.name else {}


def _readable(found: Checkpoint) -> Checkpoint:
    version = found.manifest.get("hash_version")
    if version != HASH_VERSION:
        raise DistmtlError(
            f"checkpoint {found.path} hashes strings by scheme {version}, this version by {HASH_VERSION}: rows would be mixed up"
        )
    return found


def is_own(found: Checkpoint, config: Config) -> bool:
    """Whether a checkpoint is the run's: it is continued then, not only started from."""
    return found.path.parent.resolve() == (place(config.run_dir) / "checkpoints").resolve()


def checkpoint_config(found: Checkpoint) -> Config:
    return parse_config(found.manifest["config"], f"checkpoint {found.path}")


def finished(config: Config, digests: dict[str, str]) -> dict[str, Any] | None:
    """The result of the run in run.dir, if it came to its end.

    Args:
        digests: split → digest of the data as they are now.

    Raises:
        DistmtlError: the run is of another config, though it may be one that `distmtl train` would continue, or of other data.
    """
    folder = place(config.run_dir)
    if not (folder / "config.yaml").exists():
        return None
    then, now = _what_counts(config_of(folder)), _what_counts(config)
    if differing := sorted(section for section in then if then[section] != now[section]):
        raise DistmtlError(f"run.dir {folder} was made with another config ({', '.join(differing)}); delete it, or choose another out")
    result = read_json(folder / "result.json")
    if result is None or result["stopped"]:
        return None
    if changed := sorted(split for split in digests if digests[split] != result["data"].get(split)):
        which = " and ".join(f"data.{split}" for split in changed)
        raise DistmtlError(f"{which} changed since the run in {folder} was made; delete it, or choose another out")
    return result


def _what_counts(config: Config) -> dict[str, Any]:
    """A config without where and how it is run, and who is told."""
    raw = _as_meant(config)
    free = {"run": ("dir",), "data": ("prefetch", "threads"), "train": ("log_every", "keep", "save_in_background")}
    raw |= {section: {k: v for k, v in raw[section].items() if k not in keys} for section, keys in free.items()}
    return {section: values for section, values in raw.items() if section not in ("name", "cluster", "tracking")}


def _as_meant(config: Config) -> dict[str, Any]:
    """The config, with what a default follows from put in its place: configs that mean the same are the same."""
    raw = config.model_dump(mode="json")
    raw["sharding"]["exchange"] = config.exchange
    return raw


def read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_whole(path, json.dumps(value, indent=1) + "\n")


def _same(new: Config, old: Config, where: str, free: tuple[str, ...], matching: tuple[str, ...]) -> list[str]:
    """Compare what is not `free`; returns, as a note, what differs and is free by --resume-policy `matching` alone.

    Raises:
        DistmtlError: something else differs.
    """
    if new.optimizer.schedule.decay == "none":
        free += FREE_WITHOUT_DECAY
    a, b = flat(_as_meant(new)), flat(_as_meant(old))
    differing = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    differing = [
        k for k in differing if not _is_one_of(k, free) or {"oov", "quotient"} & {str(a.get(k)), str(b.get(k))}
    ]  # of whom rows mean else
    differing.sort(key=lambda k: _is_one_of(k, FREE_IF_MATCHING))  # first what no policy allows
    lines = [f"  - {k}: {b.get(k)!r} there, {a.get(k)!r} now" for k in differing]
    if any(not _is_one_of(k, matching) for k in differing):
        hint = "; --resume-policy matching loads what still fits" if all(_is_one_of(k, FREE_IF_MATCHING) for k in differing) else ""
        more = [f"  … and {len(lines) - 20} more"] if len(lines) > 20 else []
        text = "\n".join(lines[:20] + more)
        raise DistmtlError(f"{where} was made with another config; use its values or another run.dir{hint}\n{text}")
    return ["\n".join([f"{where} was made with another config; what still fits is loaded", *lines])] if differing else []


def _is_one_of(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, p) for p in patterns)


def _same_data(train_set: Dataset, found: Checkpoint) -> None:
    data = found.manifest["data"]
    if data["digest"] == train_set.digest:
        return
    old, new = data["files"], train_set.manifest()
    changed = [f"{n} added" for n in new if n not in old] + [f"{n} gone" for n in old if n not in new]
    changed += [
        f"{n}: {old[n][0]} bytes and {old[n][1]} rows then, {new[n][0]} and {new[n][1]} now"
        for n in new
        if n in old and list(new[n]) != old[n]
    ]
    raise DistmtlError(
        f"data.train {train_set.path} changed since checkpoint {found.path}: its position in the data would be wrong; "
        "bring the files back, or start another run.dir\n" + "\n".join(f"  - {c}" for c in (changed or ["row groups cut otherwise"])[:20])
    )
