"""Checkpoints: every rank writes its own shards (torch DCP), then rank 0 the manifest. No manifest, no checkpoint.

<run>/checkpoints/step-000001000-0/     the 0: the run's attempt that wrote it; a rank left over from another one cannot touch it
    __0_0.distcp …   shards        .metadata   DCP's own index
    manifest.json    written last and in one move: what, where, and the size and CRC-32 of every file
"""

from distmtl.checkpoint.finding import Checkpoint, name_of, newest, of_step, read
from distmtl.checkpoint.loading import dense, index, load, load_weights, verify
from distmtl.checkpoint.matching import Changes, load_matching
from distmtl.checkpoint.state import dense_state, like, table_of, table_state
from distmtl.checkpoint.writing import commit, discard, prepare, retain, write

__all__ = [
    "Changes",
    "Checkpoint",
    "commit",
    "dense",
    "dense_state",
    "discard",
    "index",
    "like",
    "load",
    "load_matching",
    "load_weights",
    "name_of",
    "newest",
    "of_step",
    "prepare",
    "read",
    "retain",
    "table_of",
    "table_state",
    "verify",
    "write",
]
