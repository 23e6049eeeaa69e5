"""Record: what a benchmark found, beside when, for how long, under which load and by which code it was measured."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distmtl.versions import git_commit, versions


class Record:
    """Begins with the measurement; ends as NAME.json and NAME.md in a folder, and on the screen."""

    def __init__(self) -> None:
        self.began, self.load = time.time(), round(os.getloadavg()[0], 1)

    def write(self, folder: Path, name: str, report: dict[str, Any], markdown: Callable[[dict[str, Any]], str], **more: Any) -> None:
        """
        Args:
            markdown: makes the text of a report.
            more: conditions that are this benchmark's own.
        """
        when = time.strftime("%Y-%m-%d", time.gmtime(self.began))
        minutes = round((time.time() - self.began) / 60, 1)
        own = {k.replace("_", " "): v for k, v in more.items()}
        conditions = {"when": when, "minutes": minutes, "load at the start": self.load, **own, "git": git_commit(), **versions()}
        text = "\n".join([markdown(report).rstrip(), "", ", ".join(f"{k} {v}" for k, v in conditions.items()), ""])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps({"conditions": conditions} | report, indent=1) + "\n")
        (folder / f"{name}.md").write_text(text)
        print(text)
