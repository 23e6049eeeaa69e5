"""What torch and storage say of a checkpoint that could not be written or read, in a line."""

from __future__ import annotations

from torch.distributed.checkpoint.api import CheckpointException


def causes(e: CheckpointException) -> str:
    return "; ".join(sorted({str(failure[0]).strip() or type(failure[0]).__name__ for failure in e.failures.values()}))


def reason(e: Exception) -> str:
    return (isinstance(e, OSError) and e.strerror) or str(e).strip() or type(e).__name__
