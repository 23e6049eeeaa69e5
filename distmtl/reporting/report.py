"""distmtl report: what runs' directories say and what their checkpoints do, as one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from distmtl.errors import DistmtlError
from distmtl.reporting import model_sections, run_sections
from distmtl.reporting.examination import ROWS, Examination, examine, subject
from distmtl.reporting.gathering import Run, read_runs
from distmtl.reporting.model_sections import Examined
from distmtl.reporting.page import Section, page
from distmtl.storage import place, write_whole


def report(
    paths: Sequence[str],
    out: str | None = None,
    rows: int = ROWS,
    slices: Sequence[str] = (),
    model: bool = True,
    say: Callable[[str], None] = print,
) -> str:
    """Write it; returns where.

    Args:
        out: default: report.html in the run's folder, of several runs in the working directory.
        rows: of the evaluation split that the checkpoints are examined on.
        slices: as `distmtl evaluate` takes them.
        model: whether to ask the checkpoints at all.

    Raises:
        DistmtlError: a path that is no run, slices that do not fit, rows that cannot be read.
    """
    runs = read_runs(paths)
    file = place(out) if out else place(runs[0].path) / "report.html" if len(runs) == 1 else place("report.html")
    if not file.parent.is_dir():
        raise DistmtlError(f"--out {out}: its folder does not exist")
    examined = {run.name: _examined(run, rows, slices, say) if model else NOT_ASKED for run in runs}
    write_whole(file, page(title_of(runs), intro(runs, examined), sections(runs, examined)))
    return str(file)


def page_in_progress(run: Run, standing: Sequence[str], refresh_s: float | None) -> str:
    """The report of a run without what asks the checkpoint.

    Args:
        standing: lines that say how it stands.
        refresh_s: after which the reader's browser asks again.
    """
    examined: Examined = {run.name: NOT_ASKED}
    return page(title_of([run]), [*standing, *intro([run], examined)], sections([run], examined), refresh_s)


NOT_ASKED = "left out: the checkpoint was not asked"


def _examined(run: Run, rows: int, slices: Sequence[str], say: Callable[[str], None]) -> Examination | str:
    try:
        what = subject(run)
    except DistmtlError as e:
        return f"no checkpoint was examined: {e}"
    return examine(what, rows, slices, say)


def title_of(runs: Sequence[Run]) -> str:
    return f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs: {', '.join(r.name for r in runs)}"


def intro(runs: Sequence[Run], examined: Examined) -> list[str]:
    out = []
    for run in runs:
        e, tasks = examined[run.name], ", ".join(t.name for t in run.config.tasks)
        text = f"{run.path}: {run.config.model.kind}, {run.config.weighting.kind} weighting, tasks {tasks}"
        if isinstance(e, Examination):
            text += f". Examined: {e.checkpoint} (step {e.step:,}) on {e.rows:,} of the {e.of:,} rows of {e.data}"
            text += "" if e.rows == e.of else ", evenly spaced"
        out.append(text + ".")
    return out


def sections(runs: Sequence[Run], examined: Examined) -> list[Section]:
    return [
        run_sections.results(runs),
        run_sections.learning(runs),
        model_sections.calibration(examined),
        model_sections.ranking(examined),
        run_sections.weights(runs),
        run_sections.conflict(runs),
        run_sections.gates(runs),
        model_sections.ablation(examined),
        model_sections.importance(examined),
        model_sections.slices(examined),
        run_sections.speed(runs),
        run_sections.failures(runs),
        run_sections.plan(runs),
        run_sections.config(runs),
    ]
