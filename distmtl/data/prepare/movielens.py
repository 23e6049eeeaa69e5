"""MovieLens-1M: a rating to regress, and whether it is liked (4 or 5 stars) or loved (5), with real user and item ids."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distmtl.data.output import write_configs, write_split
from distmtl.data.prepare.raw import edges, find, numbers, read
from distmtl.errors import DistmtlError

ROWS, FOLDS, USERS, ITEMS = 1_000_209, 5, 6040, 3952  # ids count from 1; row 0 of their tables stays unused
AGES = [1, 18, 25, 35, 45, 50, 56]
VALIDATION_SHARE = 0.05  # of the training folds
HISTORY = 50  # likes of a user that a row sees at most


def write(source: Path, folder: Path, fold: int = 5) -> None:
    """Needs the ratings, users.dat and movies.dat of MovieLens-1M.

    Ratings are test_1m1.dat … test_1m5.dat (user,item,rating: the published five folds, with ml1m_users.dat and
    ml1m_items.dat), or the original ratings.dat, cut into five folds by `np.random.default_rng(0).permutation`. A twentieth
    of the other four folds, by the same generator, is validation. No feature depends on time.

    `liked` are up to HISTORY items that the row's user likes in the train split, drawn anew for every row, never the row's own
    item. Every row of a user with n likes there sees min(HISTORY, n - 1): the number must not tell whether its own is one of them.

    Args:
        fold: 1 … 5, the test split.
    """
    if str(fold) not in {str(f) for f in range(1, FOLDS + 1)}:
        raise DistmtlError(f"fold {fold} is not in 1 … {FOLDS}")
    fold = int(fold)
    ratings, folds = _ratings(source)
    users = read(find(source, ["users.dat", "ml1m_users.dat"], "MovieLens-1M"), ["id", "gender", "age", "occupation", "zip"], "\t", USERS)
    items = read(find(source, ["movies.dat", "ml1m_items.dat"], "MovieLens-1M"), ["id", "title", "genres"], "\t")
    genres = sorted({g for s in pc.unique(items["genres"]).to_pylist() for g in s.split("|")})
    table = _joined(ratings, _users(users), _items(items, genres))

    test, others = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
    others = np.random.default_rng(0).permutation(others)  # the files are sorted by user
    held_out = round(len(others) * VALIDATION_SHARE)
    table = table.append_column("liked", _liked(ratings, others[held_out:]))
    train = table.take(others[held_out:])
    write_split(folder, "train", train)
    write_split(folder, "validation", table.take(others[:held_out]))
    write_split(folder, "test", table.take(test))
    write_configs(folder, "movielens", f"MovieLens-1M, fold {fold} as test.", _config(train, genres), HEADS)


def _ratings(source: Path) -> tuple[np.ndarray, np.ndarray]:
    """(R, 3) user, item, rating, and every rating's fold."""
    columns = ["user", "item", "rating"]
    if (source / "ratings.dat").is_file():
        table = read(source / "ratings.dat", [*columns, "timestamp"], "\t", ROWS)
        folds = np.random.default_rng(0).permutation(ROWS) % FOLDS + 1
    else:
        names = [f"test_1m{k}.dat" for k in range(1, FOLDS + 1)]
        parts = [read(find(source, [name], "MovieLens-1M"), columns, ",") for name in names]
        folds = np.repeat(np.arange(1, FOLDS + 1), [len(p) for p in parts])
        table = pa.concat_tables(parts)
        if len(table) != ROWS:
            raise DistmtlError(
                f"{', '.join(names)} in {source} have {len(table):,} ratings together, the published set has {ROWS:,}; download it again"
            )
    return np.stack([numbers(table[c], f"ratings, column {c}") for c in columns], axis=1).astype(np.int64), folds


def _users(raw: pa.Table) -> pa.Table:
    age = np.searchsorted(AGES, numbers(raw["age"], "users, column age"))
    return pa.table({
        "user_id": numbers(raw["id"], "users, column id").astype(np.int64),
        "gender": pc.equal(raw["gender"], "M").cast(pa.int16()),
        "age": age.astype(np.int16),
        "occupation": numbers(raw["occupation"], "users, column occupation").astype(np.int16),
        "zip_prefix": numbers(pc.utf8_slice_codeunits(raw["zip"], 0, 3), "users, column zip").astype(np.int16),
    })  # fmt: skip


def _items(raw: pa.Table, genres: list[str]) -> pa.Table:
    year = pc.struct_field(pc.extract_regex(raw["title"], r"\((?P<year>\d{4})\)$"), "year")
    ids = [[genres.index(g) for g in s.split("|")] for s in raw["genres"].to_pylist()]
    return pa.table({
        "item_id": numbers(raw["id"], "items, column id").astype(np.int64),
        "year": year.cast(pa.float32()),
        "genres": pa.array(ids, pa.list_(pa.int64())),
    })  # fmt: skip


def _joined(ratings: np.ndarray, users: pa.Table, items: pa.Table) -> pa.Table:
    user, item, rating = ratings.T
    out = users.take(_rows_of(user, users["user_id"].to_numpy(), "user"))
    for name, column in zip(items.column_names, items.take(_rows_of(item, items["item_id"].to_numpy(), "item")).columns):
        out = out.append_column(name, column)
    labels = {"rating": rating.astype(np.float32), "like": (rating >= 4).astype(np.int8), "love": (rating == 5).astype(np.int8)}
    for name, label in labels.items():
        out = out.append_column(name, pa.array(label))
    return out


def _liked(ratings: np.ndarray, train: np.ndarray) -> pa.Array:
    """For every rating, items that its user likes in the training rows."""
    user, item, rating = ratings.T
    likes = np.zeros(len(ratings), dtype=bool)
    likes[train] = rating[train] >= 4
    rng, order = np.random.default_rng(0), np.argsort(user, kind="stable")
    bounds = np.r_[0, np.flatnonzero(np.diff(user[order])) + 1, len(order)]
    out, lengths = [], np.zeros(len(ratings), dtype=np.int64)
    for rows in (order[a:b] for a, b in pairwise(bounds)):
        of_user = item[rows[likes[rows]]]
        seen = max(min(HISTORY, len(of_user) - 1), 0)
        draw = rng.random((len(rows), len(of_user)))
        draw[item[rows][:, None] == of_user] = 2.0  # its own comes last, and there is one more than is seen
        out.append(of_user[np.argsort(draw, axis=1)[:, :seen]].reshape(-1))
        lengths[rows] = seen
    by_user = pa.ListArray.from_arrays(np.r_[0, np.cumsum(lengths[order])].astype(np.int32), np.concatenate(out).astype(np.int16))
    return by_user.take(np.argsort(order))


def _rows_of(ids: np.ndarray, known: np.ndarray, what: str) -> np.ndarray:
    order = np.argsort(known)
    place = order[np.minimum(np.searchsorted(known, ids, sorter=order), len(known) - 1)]
    if (known[place] != ids).any():
        raise DistmtlError(f"the ratings name {what} {ids[known[place] != ids][0]}, which the {what}s' file lacks; download it again")
    return place


def _config(train: pa.Table, genres: list[str]) -> dict[str, Any]:
    mean = {task: round(float(train[task].to_numpy().mean()), 4) for task in ("rating",)}
    return {
        "data": {"train": "train", "validation": "validation", "test": "test", "group": "user_id"},
        "features": [
            {"kind": "id", "name": "user_id", "rows": USERS + 1, "dim": 32},
            {"kind": "id", "name": "item_id", "rows": ITEMS + 1, "dim": 32},
            {"kind": "id", "name": "gender", "rows": 2, "dim": 4},
            {"kind": "id", "name": "age", "rows": len(AGES), "dim": 8},
            {"kind": "id", "name": "occupation", "rows": 21, "dim": 8},
            {"kind": "id", "name": "zip_prefix", "rows": 1000, "dim": 8},
            {"kind": "id", "name": "genres", "rows": len(genres), "dim": 16, "pooling": "mean"},
            {"kind": "sequence", "name": "liked", "table": "item_id", "rows": ITEMS + 1, "dim": 32, "max_length": HISTORY},
            {"kind": "bucket", "name": "year", "boundaries": edges(train["year"].drop_null().to_numpy(), 24), "dim": 8},
        ],
        "tasks": [
            {"kind": "regression", "name": "rating", "bias": mean["rating"]},
            {"kind": "binary", "name": "like"},
            {"kind": "binary", "name": "love"},
        ],
        "optimizer": {
            "tables": {"kind": "rowwise_adagrad", "lr": 0.02},
            "dense": {"kind": "adamw", "lr": 0.002},
            "schedule": {"warmup_steps": 100, "decay": "cosine"},
        },
        "interaction": {"kind": "cross", "layers": 2},
        "train": {"global_batch_size": 1024, "epochs": 6, "monitor": "loss", "early_stopping": {"patience": 3}},
    }


HEADS: dict[str, dict[str, Any]] = {
    "mmoe": {"model": {"kind": "mmoe", "num_experts": 4, "expert": [128, 64], "dropout": 0.3}},
    "ple": {"model": {"kind": "ple", "num_levels": 2, "shared_experts": 2, "task_experts": 1, "expert": [128], "dropout": 0.3}},
    "shared_bottom": {"model": {"kind": "shared_bottom", "bottom": [256, 128], "dropout": 0.3}},
}
