"""Run the notebooks of docs/ in place, and keep what they show: `python -m documentation.notebooks`."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbformat import NotebookNode

from documentation.blocks import ROOT, notebooks

CELL_S = 300


def execute(path: Path, folder: Path, environment: dict[str, str] | None = None) -> NotebookNode:
    """A notebook with its outputs, run in a folder.

    Raises:
        CellExecutionError: a cell raised; the text says which, and what.
        CellTimeoutError: a cell took too long.
    """
    notebook = nbformat.read(path, as_version=4)
    at = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=CELL_S, kernel_name="python3", resources=at, coalesce_streams=True)
    client.execute(env=environment or {**os.environ})
    return notebook


def mistake(path: Path, folder: Path, environment: dict[str, str]) -> str | None:
    """What is wrong with a notebook, if it does not run to its end."""
    try:
        execute(path, folder, environment)
    except (CellExecutionError, CellTimeoutError) as e:
        return str(e)
    return None


def main() -> None:
    for path in notebooks():
        notebook = execute(path, path.parent)
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times
        nbformat.write(notebook, path)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
