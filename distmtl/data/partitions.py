"""Partitions of a folder that grows: DIR/day=003/, DIR/day=003/hour=07/ … Each is complete once it holds a file _SUCCESS."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from pyarrow import fs

from distmtl.data.dataset import filesystem_of, open_dataset
from distmtl.errors import DistmtlError

SEAL = "_SUCCESS"  # in a partition that is complete, as Spark and Hadoop write it
FORM = re.compile(r"[^/=,]+=[^/,]+(/[^/=,]+=[^/,]+)*")  # of a partition's name


@dataclass(frozen=True)
class Partitions:
    """Those below a folder, local or an object store's."""

    folder: str

    def sealed(self) -> tuple[dict[str, float], list[str]]:
        """Name of every complete partition → Unix time of its newest file; and folders that have a seal, but no partition's name.

        Raises:
            DistmtlError: the folder cannot be listed, or its partitions lie in each other.
        """
        filesystem, inner = filesystem_of(self.folder)
        try:
            files = [i for i in filesystem.get_file_info(fs.FileSelector(inner, recursive=True)) if i.type == fs.FileType.File]
        except OSError as e:
            raise DistmtlError(f"the partitions in {self.folder} cannot be listed: {str(e).splitlines()[0]}") from None
        places = [(PurePosixPath(i.path).relative_to(PurePosixPath(inner)), i.mtime.timestamp() if i.mtime else 0.0) for i in files]
        with_seal = {str(path.parent) for path, _ in places if path.name == SEAL} - {"."}  # that one is of the job that wrote them all
        newest = dict.fromkeys((name for name in with_seal if FORM.fullmatch(name)), 0.0)
        for path, time_of in places:
            within = [name for name in map(str, path.parents) if name in newest]
            if len(within) > 1:
                raise DistmtlError(
                    f"partition {within[1]} of {self.folder} holds another one, {within[0]}: its rows would be trained twice; "
                    f"take the {SEAL} of one of them away"
                )
            for name in within:
                newest[name] = max(newest[name], time_of)
        return newest, sorted(f"{self.folder}/{name}" for name in with_seal - newest.keys())

    def digest(self, name: str) -> str:
        """Of a partition's files; a text that is no digest where they cannot be read."""
        try:
            return open_dataset(f"{self.folder}/{name}").digest
        except DistmtlError as e:
            return str(e)


def in_order(name: str) -> tuple[list[int | str], str]:
    """What names sort by: their text, numbers in it by their value (hour=9 before hour=10)."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))], name
