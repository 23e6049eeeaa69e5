"""Batch scoring: a data set of any size → a folder of predictions in its order, part by part; the same command continues.

    _predict.json                    written first: which export scores which data, which columns are kept, where parts begin
    part-000000.parquet …            row (its number in the data set), kept columns, one column per task
    _rejected/part-000000.parquet …  row, file, reason: of the rows of a part that cannot be scored, where it has some

What begins with _ readers of Parquet folders (Arrow, pandas, Spark, we) pass over, so that the folder reads as one table.

A part is a run of row groups of one file and is there whole or not at all. Of a part a block of rows is in memory at a time.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distmtl.config import MulticlassTask
from distmtl.data.check import check_to_score
from distmtl.data.collate import ROW, alike
from distmtl.data.dataset import Dataset, open_dataset
from distmtl.distributed.matmul import fastest_fp32
from distmtl.errors import DistmtlError
from distmtl.exporting import manifest
from distmtl.progress import duration
from distmtl.serving.predictor import Predictor
from distmtl.storage import absolute, is_remote, new_file, place, sizes, write_whole

Say = Callable[[str], None]
FORMAT = 1
PLAN = "_predict.json"
REJECTED = "_rejected"
NUMBER = "row"
PART_ROWS = 262_144  # of a part at most, unless a single row group has more
BLOCK_ROWS = 16_384  # scored at once
REASONS = 3  # that an error names
REPLACED = "replaced_ids"  # how many, in the metadata of a part's file
SAY_EVERY_S = 1.0


@dataclass(frozen=True)
class Part:
    """Row groups first … last-1 of a file, rows from `row` on of the data set and from `within` on of the file."""

    number: int
    file: int
    first: int
    last: int
    row: int
    within: int
    rows: int

    @property
    def name(self) -> str:
        return f"part-{self.number:06d}.parquet"


@dataclass(frozen=True)
class Outcome:
    """Of a part: how many rows could not be scored, and why the first of them; ids outside their tables, which the policy replaced."""

    rejected: int
    reasons: tuple[str, ...]
    replaced_ids: int


@dataclass(frozen=True)
class Job:
    """What is scored, by what, and where to. Equal on every worker."""

    export: str
    digest: str  # of the export
    dataset: Dataset
    out: str
    keep: tuple[str, ...]
    max_rejected: float

    @cached_property
    def parts(self) -> list[Part]:
        return parts_of(self.dataset)

    def plan(self) -> dict[str, Any]:
        starts = [part.row for part in self.parts]
        return {"format": FORMAT, "export": self.digest, "data": self.dataset.digest, "keep": list(self.keep), "parts": starts}

    def refuse_beyond_limit(self, rejected: int, reasons: Sequence[str]) -> None:
        """
        Raises:
            DistmtlError: more rows are rejected than may be.
        """
        if rejected > self.max_rejected * self.dataset.rows:
            raise DistmtlError(
                f"data {self.dataset.path}: {rejected:,} or more of {self.dataset.rows:,} rows cannot be scored, but --max-rejected is "
                f"{self.max_rejected:g}: {' | '.join(reasons)}; mend the data, or raise --max-rejected, which goes on from here"
            )


Score = Callable[[Job, Sequence[Part]], Generator[tuple[Part, Outcome], None, None]]


def parts_of(dataset: Dataset) -> list[Part]:
    """In the order of the rows."""
    out: list[Part] = []
    row = 0
    for file, of in enumerate(dataset.parts):
        first = within = rows = 0
        for group, more in enumerate([*of.group_rows, None]):
            if rows and (more is None or rows + more > PART_ROWS):
                out.append(Part(len(out), file, first, group, row, within, rows))
                row, within, rows, first = row + rows, within + rows, 0, group
            rows += more or 0
    return out


def open_job(export: str, data: str, out: str, keep: Sequence[str] = (), max_rejected: float = 0.01) -> Job:
    """Check everything that can be known before a row is scored; nothing is written.

    Args:
        keep: columns of the data that go to the predictions as they are.
        max_rejected: share of the data set's rows.

    Raises:
        DistmtlError: no export, data without a column that it needs, or `out` holds something else than this job's predictions.
    """
    folder = Path(export).absolute()
    found = manifest.read(folder)
    if found.is_delta:
        raise DistmtlError(f"export {folder} is a delta, of the export {found.base}; give the folder of a full one")
    manifest.verify(folder, found)
    config = found.parsed_config()
    taken = [NUMBER, *(t.name for t in config.tasks)]
    if NUMBER in taken[1:]:
        raise DistmtlError(f"export {folder}: its task {NUMBER!r} is called as the column of the rows' numbers; train it by another name")
    if clash := [name for name in keep if name in taken]:
        raise DistmtlError(f"--keep {','.join(clash)}: the predictions have a column of that name already ({', '.join(taken)}); rename it")
    dataset = open_dataset(data if "://" in data else os.path.abspath(data))
    check_to_score(dataset, config, found.columns, keep)
    job = Job(str(folder), found.digest, dataset, absolute(out), tuple(dict.fromkeys(keep)), max_rejected)
    _refuse_another(job)
    return job


def _refuse_another(job: Job) -> None:
    folder = place(job.out)
    if folder.exists() and not folder.is_dir():
        raise DistmtlError(f"--out {folder} is a file; give a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / PLAN).exists():
        raise DistmtlError(f"--out {folder} is not empty, and no predictions are in it; choose another folder")
    then, now = json.loads((folder / PLAN).read_text(encoding="utf-8")), job.plan()
    differing = [f"{key} ({then.get(key)}, now {now[key]})" if key != "parts" else key for key in now if then.get(key) != now[key]]
    if differing:
        raise DistmtlError(
            f"--out {folder} is of another job, which differs in {' and '.join(differing)}; choose another folder, or delete it"
        )


def predict(job: Job, score: Score, say: Say = print) -> dict[str, Any]:
    """Score the parts that are not there yet.

    Args:
        score: yields parts as they are written, in any order, such as `in_this_process`.

    Returns:
        rows, scored, rejected, replaced_ids (of the whole data set), files, seconds, rows_per_second (of this call), export (its digest).

    Raises:
        DistmtlError: more than `max_rejected` of the rows cannot be scored, or a file cannot be read. What is written stays.
    """
    began, folder, total = time.monotonic(), place(job.out), job.dataset.rows
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / PLAN).exists():
        write_whole(folder / PLAN, json.dumps(job.plan(), indent=1) + "\n")
    (folder / REJECTED).mkdir(parents=True, exist_ok=True)
    there = sizes(folder)
    waiting = [part for part in job.parts if part.name not in there]
    rejected, reasons, replaced = _so_far(job, [part for part in job.parts if part.name in there])
    job.refuse_beyond_limit(rejected, reasons)
    before = total - sum(part.rows for part in waiting)
    say(f"{total:,} rows in {len(job.parts)} parts, {len(job.parts) - len(waiting)} of them done, to {folder}")
    done, said = before, began
    with closing(score(job, waiting)) as outcomes:
        for part, outcome in outcomes:
            done, rejected, reasons = done + part.rows, rejected + outcome.rejected, [*reasons, *outcome.reasons][:REASONS]
            replaced += outcome.replaced_ids
            job.refuse_beyond_limit(rejected, reasons)
            now = time.monotonic()
            if now - said > SAY_EVERY_S or done == total:
                said, speed = now, (done - before) / (now - began)
                ids = f", {replaced:,} ids replaced" if replaced else ""
                say(f"[{done:,}/{total:,}] {rejected:,} rejected{ids}  {speed:,.0f} rows/s  ETA {duration((total - done) / speed)}")
    there = sizes(folder)
    if missing := [part.name for part in job.parts if part.name not in there]:
        raise DistmtlError(f"{len(missing)} parts are not in {folder}, though workers wrote them; give an --out that every node sees")
    if not is_remote(folder):
        for left in (*folder.glob("*.partial"), *folder.glob(f"{REJECTED}/*.partial")):  # of processes that were killed
            left.unlink(missing_ok=True)
    seconds = time.monotonic() - began
    return {
        "rows": total,
        "scored": total - rejected,
        "rejected": rejected,
        "replaced_ids": replaced,
        "files": len(job.parts),
        "seconds": round(seconds, 3),
        "rows_per_second": round((total - before) / seconds, 1),
        "export": job.digest,
    }


def _so_far(job: Job, finished: Sequence[Part]) -> tuple[int, list[str], int]:
    """How many rows of finished parts were rejected, and why the first of them; how many ids were replaced."""
    folder, replaced = place(job.out) / REJECTED, 0
    there, count, reasons = sizes(folder) if folder.exists() else {}, 0, list[str]()  # an object store has no empty folders
    for part in finished:
        with (place(job.out) / part.name).open("rb") as file:
            replaced += int((pq.read_metadata(file).metadata or {}).get(REPLACED.encode(), 0))
        if part.name in there:
            with (folder / part.name).open("rb") as file:
                found = pq.read_table(file, columns=["reason"])["reason"]
            count += len(found)
            reasons += found.slice(0, REASONS - len(reasons)).to_pylist()
    return count, reasons, replaced


def in_this_process(job: Job, parts: Sequence[Part]) -> Generator[tuple[Part, Outcome], None, None]:
    """On one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        score = PartScorer(job)
        for part in parts:
            yield part, score(part)
    finally:
        torch.set_num_threads(threads)


class PartScorer:
    """A job's export in memory.

    Raises:
        DistmtlError: it is not the one that the job was begun with.
    """

    def __init__(self, job: Job):
        fastest_fp32()  # as in training and serving, and on every worker alike
        self.job, self.predictor = job, Predictor(job.export, check=False)
        if self.predictor.manifest.digest != job.digest:
            raise DistmtlError(f"export {job.export} has become another one while it scored; begin again in another folder")
        self.check, self.score = self.predictor.checked, self.predictor.score
        self.config, self.needed = self.predictor.config, self.predictor.schema.names
        self.fields = [
            (t.name, pa.list_(pa.float32(), t.classes) if isinstance(t, MulticlassTask) else pa.float32()) for t in self.config.tasks
        ]

    def __call__(self, part: Part) -> Outcome:
        """Write a part.

        Raises:
            DistmtlError: its file cannot be read, or more of its rows cannot be scored than may be of the whole data set.
        """
        job, folder = self.job, place(self.job.out)
        path = job.dataset.parts[part.file].path
        rejected: list[tuple[int, str]] = []
        with job.dataset.open_part(part.file) as file, new_file(folder / part.name) as sink:
            kept = [(name, file.schema_arrow.field(name).type) for name in job.keep]
            schema = pa.schema([(NUMBER, pa.int64()), *kept, *self.fields])
            with pq.ParquetWriter(sink, schema, use_dictionary=list(job.keep)) as writer:
                offset = replaced = 0
                for table in self._blocks(file, part, path):
                    bad, predictions, more = self._score(table, part.within + offset, len(rejected))
                    replaced += more
                    rows = part.row + offset + np.arange(table.num_rows)
                    rejected += ((int(rows[i]), reason) for i, reason in sorted(bad.items()))
                    good = _others(table.num_rows, bad)
                    columns = [pa.array(rows[good]), *_taken(table.select(job.keep), good).columns]
                    columns += [_column(predictions[name], kind) for name, kind in self.fields]
                    writer.write_table(pa.Table.from_arrays(columns, schema=schema))
                    offset += table.num_rows
                writer.add_key_value_metadata({REPLACED: str(replaced)})
            if offset != part.rows:
                raise DistmtlError(f"{path} has changed while it was scored; begin again in another folder")
            if rejected:  # first: the part's own file says that the part is whole
                with new_file(folder / REJECTED / part.name) as sink_of_rejected:
                    numbers, why = zip(*rejected, strict=True)
                    pq.write_table(
                        pa.table({NUMBER: pa.array(numbers, pa.int64()), "file": [path] * len(why), "reason": why}), sink_of_rejected
                    )
        return Outcome(len(rejected), tuple(reason for _, reason in rejected[:REASONS]), replaced)

    def _blocks(self, file: pq.ParquetFile, part: Part, path: str) -> Iterator[pa.Table]:
        columns = list(dict.fromkeys([*self.needed, *self.job.keep]))
        try:
            batches = file.iter_batches(BLOCK_ROWS, row_groups=list(range(part.first, part.last)), columns=columns, use_threads=False)
            for batch in batches:
                yield pa.Table.from_batches([batch])
        except (pa.ArrowException, OSError) as e:
            raise DistmtlError(f"{path} cannot be read: {str(e).splitlines()[0]}") from None

    def _score(self, table: pa.Table, within: int, rejected: int) -> tuple[dict[int, str], dict[str, np.ndarray], int]:
        """Rows that cannot be scored and why; the predictions of the others, and how many ids were replaced.

        Args:
            within: number in its file of the table's first row.
            rejected: rows of the part that were rejected before.
        """
        inputs, bad = alike(table.select(self.needed)), dict[int, str]()
        try:
            scored = self.score(inputs)
        except DistmtlError:
            for i, reason in bad_rows(self.check, inputs.append_column(ROW, pa.array(within + np.arange(len(inputs))))):
                bad[i] = reason
                self.job.refuse_beyond_limit(rejected + len(bad), list(bad.values())[:REASONS])
            if not bad:
                raise
            scored = self.score(_taken(inputs, _others(len(inputs), bad)))
        predictions, replaced = scored.predictions, int(scored.replaced.sum())
        good = _others(len(inputs), bad)
        finite = np.ones(len(good), dtype=bool)
        for task, values in predictions.items():
            fine = np.isfinite(values).reshape(len(good), -1).all(1)
            for i in np.flatnonzero(finite & ~fine).tolist():
                bad[int(good[i])] = f"task {task!r}: the model predicts {values[i]} at row {within + good[i]}"
            finite &= fine
        return bad, predictions if finite.all() else {task: values[finite] for task, values in predictions.items()}, replaced


def bad_rows(check: Callable[[pa.Table], object], table: pa.Table, first: int = 0) -> Iterator[tuple[int, str]]:
    """Position and reason of every row that is refused, found by halving: k of n rows cost O(k·log n) calls.

    Args:
        first: position of the table's first row.
    """
    try:
        check(table)
    except DistmtlError as e:
        n = len(table)
        if n == 1:
            yield first, str(e)
        else:
            yield from bad_rows(check, table.slice(0, n // 2), first)
            yield from bad_rows(check, table.slice(n // 2), first + n // 2)


def _others(n: int, bad: dict[int, str]) -> np.ndarray:
    """Positions below n that are not bad."""
    return np.delete(np.arange(n), list(bad))


def _taken(table: pa.Table, rows: np.ndarray) -> pa.Table:
    return table if len(rows) == len(table) else table.take(pa.array(rows))


def _column(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    flat = pa.array(values.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=kind) if pa.types.is_fixed_size_list(kind) else flat
