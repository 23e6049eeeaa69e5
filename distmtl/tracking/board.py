"""TensorBoard: the figures of records in the run's events.* files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distmtl.tracking.records import Record, scalars


class Board:
    """What a failure undid and a later attempt did again is shown once, as the later one has it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.writer: Any = None

    def take(self, record: Record) -> None:
        if record["kind"] == "start":
            from torch.utils.tensorboard import SummaryWriter  # a second of imports, on rank 0 only

            step = record["step"]
            self.writer = SummaryWriter(str(self.folder), purge_step=step and step + 1)
        if self.writer is None:
            return
        try:
            for name, value in scalars(record):
                self.writer.add_scalar(name, value, record["step"])
        except Exception:  # its writer is a thread that ended with its first error
            self.writer = None
            raise

    def close(self) -> None:
        if self.writer:
            self.writer.close()
