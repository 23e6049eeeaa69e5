"""A record: what a run says at one moment, a mapping that JSON can hold. Its `kind` is one of start, train, evaluation, checkpoint,
note, failed, stopped (given up by a search) and end. A sink takes records: metrics.jsonl, TensorBoard, a tracker."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

Record = dict[str, Any]
MEASURED = ("train", "evaluation", "checkpoint")  # kinds that have figures over steps; a later attempt says those anew that a failure undid


class Sink(Protocol):
    def take(self, record: Record) -> None: ...

    def close(self) -> None: ...


def series(record: Record) -> str:
    """What its figures go on: those of two splits are not one curve."""
    return f"{record['kind']}/{record['split']}" if "split" in record else record["kind"]


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """Name → value of its figures, alike in TensorBoard and every tracker: train/losses/click, evaluation/test/metrics/click/auc."""
    if record["kind"] in MEASURED:
        figures = {k: v for k, v in record.items() if k not in ("step", "time")}
        yield from _scalars(figures, f"{series(record)}/")


def _scalars(values: Record, prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield prefix + name, value


def finite(value: Any) -> Any:
    """With None for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
